"""Training from Python: what `load` accepts, what a run returns, and loops that are left early.

A tiny model on a toy question, as in test_loop.py.
"""

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_loop
import tiny
from test_loop import (
    BASE,
    MODEL,
    STEPS,
    TOKENIZER,
    Toy,
    assert_equal,
    make_config,
    rows_of,
    saved_steps,
    start_params,
)

import sdpo_jax
from sdpo_jax import api
from sdpo_jax.api import Callbacks, EvaluationResult, StepResult, Summary, load
from sdpo_jax.cli import main
from sdpo_jax.errors import UserError
from sdpo_jax.run import loop

quick_programs = test_loop.quick_programs
RECIPE = Path(__file__).parents[1] / "configs" / "nano.toml"

# Public signatures: whoever changes one changes this text, and CHANGELOG.md.
SIGNATURES = {
    "load": """(recipe: str | pathlib.Path | sdpo_jax.config.Config, *,
        environment: sdpo_jax.environments.base.Environment | None = None,
        model: sdpo_jax.model.Model | None = None, params: Any | Callable[[], Any] | None = None,
        tokenizer: sdpo_jax.tokens.Tokenizer | None = None,
        optimizer: optax.GradientTransformation | None = None,
        objective: sdpo_jax.training.objective.Objective | None = None,
        context: sdpo_jax.teacher.contexts.ContextBuilder | None = None,
        callbacks: sdpo_jax.run.callbacks.Callbacks |
        Sequence[sdpo_jax.run.callbacks.Callbacks] = (),
        verbose: bool | sdpo_jax.run.console.Console = False, **overrides: Any)
        -> sdpo_jax.run.loop.Run""",
    "train": """(recipe: str | pathlib.Path | sdpo_jax.config.Config, **arguments: Any)
        -> sdpo_jax.run.summary.Summary""",
    "Run.train": "(self, stop: Callable[[], bool] = never) -> sdpo_jax.run.summary.Summary",
    "Run.steps": "(self) -> Generator[sdpo_jax.run.loop.StepResult, None, None]",
    "Run.evaluate": "(self) -> sdpo_jax.run.loop.EvaluationResult",
}
FIELDS = {
    StepResult: ("step", "metrics", "evaluation"),
    EvaluationResult: ("step", "metrics"),
    Summary: (
        *("objective", "complete", "steps", "generations", "seconds", "before", "after", "best"),
        "compilation",
    ),
}
CALLBACKS = {
    "on_rollouts": None,
    "on_step": None,
    "on_evaluation": None,
    "on_save": None,
    "on_end": None,
}


def signature_of(name):
    function = api
    for part in name.split("."):
        function = getattr(function, part)
    text = str(inspect.signature(function))
    for module in ("collections.abc.", "typing."):
        text = text.replace(module, "")
    # A function is shown with its address, a NamedTuple of optax with its module.
    text = text.replace("optax._src.base.", "optax.")
    return inspect.cleandoc(text).replace(repr(loop.never), "never")


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_public_signatures_are_these(name):
    assert signature_of(name) == " ".join(SIGNATURES[name].split())


def test_the_typed_results_and_the_callbacks_have_these_fields():
    for kind, fields in FIELDS.items():
        assert kind._fields == fields
    assert vars(Callbacks()) == CALLBACKS


def test_the_package_resolves_load_and_train_on_first_use():
    assert sdpo_jax.load is api.load and sdpo_jax.train is api.train
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = sdpo_jax.lode
    code = "import sdpo_jax, sys; assert 'sdpo_jax.api' not in sys.modules; sdpo_jax.load"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=RECIPE.parents[1])


# What `load` accepts


def refusal(**overrides):
    with pytest.raises(UserError) as error:
        load(RECIPE, **overrides)
    return str(error.value)


def test_one_error_lists_every_override_that_is_wrong():
    message = refusal(
        **{
            "train.steps": 0,
            "train.stpes": 3,
            "rollout.temperature": "hot",
            "environment.families": ("alarms",),
        }
    )
    assert message.startswith("3 problems:")  # a family is the environment's own affair
    assert "train.steps: 0, expected at least 1" in message
    assert "train.stpes: unknown key; did you mean train.steps?" in message
    assert 'rollout.temperature: "hot" (a string), expected a number' in message


def test_an_override_is_refused_in_the_words_of_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["train", str(RECIPE), "--train.steps", "0"])
    told = capsys.readouterr().err.removeprefix("sdpo: --").strip()
    assert refusal(**{"train.steps": 0}) == told


def test_a_config_takes_overrides_too_and_another_objective_brings_its_defaults(tmp_path):
    config = make_config(tmp_path)
    given = {"model": MODEL, "params": start_params(), "tokenizer": TOKENIZER}
    run = load(config, environment=Toy(), **given, **{"train.steps": 9, "objective.name": "grpo"})
    assert run.config.train.steps == 9 and run.config.objective.name == "grpo"
    assert run.run_dir == tmp_path
    with pytest.raises(UserError, match=r"^train\.steps: -1, expected at least 1$"):
        load(config, **{"train.steps": -1})
    with pytest.raises(UserError, match='run_dir = "": expected the folder'):
        load(replace(config, run_dir=""))


def test_the_folder_of_a_recipe_has_its_name():
    assert load(RECIPE).run_dir == Path("runs/nano")
    assert load(RECIPE, run_dir="runs/other").run_dir == Path("runs/other")


def test_a_model_comes_with_params_and_tokenizer(tmp_path):
    with pytest.raises(UserError, match="expected params= and tokenizer= too"):
        load(make_config(tmp_path), environment=Toy(), model=MODEL)


def test_an_environment_that_is_none_is_refused_with_what_it_lacks(tmp_path):
    with pytest.raises(UserError, match=r"environment \(object\) has no train and no held_out"):
        load(RECIPE, environment=object())


# What a run returns


def toy(config, **arguments):
    """A run of the tiny model."""
    given = {"model": MODEL, "params": start_params, "tokenizer": TOKENIZER}
    return load(config, environment=Toy(), **{**given, **arguments})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, what it called back, and its final weights."""
    calls = []

    def log(name):
        return lambda *arguments: calls.append((name, *arguments))

    config = make_config(tmp_path_factory.mktemp("whole") / "run", evaluation={"every_steps": 2})
    callbacks = Callbacks(**{name: log(name) for name in CALLBACKS})
    run = toy(config, callbacks=callbacks)
    summary = run.train()
    return config, summary, calls, jax.device_get(run.params)


def test_callbacks_are_called_in_the_order_of_a_step(whole):
    _, summary, calls, _ = whole
    order = [(name, x) for name, x, *_ in calls if name not in ("on_save", "on_end")]
    steps = [[("on_rollouts", step), ("on_step", step)] for step in range(1, STEPS + 1)]
    evaluations = [("on_evaluation", step) for step in (0, 2, 3)]
    assert order == [
        evaluations[0],
        *steps[0],
        *steps[1],
        evaluations[1],
        *steps[2],
        evaluations[2],
    ]
    saved = [step for name, step, *_ in calls if name == "on_save"]
    assert saved == [1, 2, 3] and calls[-1] == ("on_end", summary)
    assert all(call[2].is_dir() for call in calls if call[0] == "on_save")
    (rollouts,) = [call[2] for call in calls if call[:2] == ("on_rollouts", 1)]
    assert len(rollouts.outcomes) == 8
    (row,) = [call[2] for call in calls if call[:2] == ("on_step", 1)]
    assert row["reward"] == np.mean([outcome.reward for outcome in rollouts.outcomes])


def test_a_loop_that_is_left_after_every_step_is_the_whole_run(whole, tmp_path):
    config, summary, _, params = whole
    broken = replace(config, run_dir=str(tmp_path))
    run, results = toy(broken), []
    for _ in range(STEPS):
        for row in run.steps():
            results.append(row)
            assert run.evaluate().step == row.step  # and looking at it changes nothing
            break
    assert [row.step for row in results] == [1, 2, 3]
    assert [row.evaluation is not None for row in results] == [False, True, True]
    assert rows_of(broken) == rows_of(config)
    assert_equal(jax.device_get(run.params), params)
    again = run.train()  # complete: the stored result
    assert (again.before, again.after, again.best) == (summary.before, summary.after, summary.best)
    assert not list(run.steps())


@pytest.mark.slow
def test_a_loop_that_is_left_early_goes_on_in_another_process(whole, tmp_path):
    config, summary, _, params = whole
    broken = replace(config, run_dir=str(tmp_path), checkpoint=BASE.checkpoint)
    steps = toy(broken).steps()
    row = [next(steps), next(steps)][-1]
    steps.close()
    assert saved_steps(broken) == [1, 2]  # whole, and nothing of step 3
    run = toy(broken)
    assert run.evaluate() == EvaluationResult(2, row.evaluation)
    assert run.train().after == summary.after
    assert rows_of(broken) == rows_of(config)
    assert_equal(jax.device_get(run.params), params)


def test_an_exception_in_a_callback_drops_the_step_and_the_run_goes_on_exactly(whole, tmp_path):
    config, summary, _, _ = whole
    broken, failing = replace(config, run_dir=str(tmp_path)), [2]

    def fail(step, row):
        del row
        if failing == [step]:
            raise KeyboardInterrupt

    run = toy(broken, callbacks=[Callbacks(on_step=fail), Callbacks()])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    failing.clear()
    assert run.train().after == summary.after
    assert rows_of(broken) == rows_of(config)


def test_one_iterator_at_a_time(tmp_path):
    run = toy(make_config(tmp_path))
    steps = run.steps()
    next(steps)
    with pytest.raises(UserError, match="is running already"):
        next(run.steps())
    steps.close()
    assert next(run.steps()).step == 2


def test_the_folder_of_another_recipe_is_refused(whole):
    config = replace(whole[0], seed=1)
    for use in (lambda run: run.params, lambda run: run.evaluate(), lambda run: run.train()):
        with pytest.raises(UserError, match="holds a run of another recipe"):
            use(toy(config))


def test_nothing_is_printed_unless_asked_for(tmp_path, capfd):
    toy(make_config(tmp_path / "quiet"), **{"train.steps": 1}).train()
    out, err = capfd.readouterr()
    assert not out and not err
    toy(make_config(tmp_path / "verbose"), verbose=True, **{"train.steps": 1}).train()
    out, err = capfd.readouterr()
    assert "step 1/1  reward" in out and not err


def test_an_evaluation_needs_prompts(tmp_path):
    run = toy(make_config(tmp_path), **{"evaluation.prompts": 0})
    with pytest.raises(UserError, match=r"evaluation\.prompts = 0"):
        run.evaluate()


def test_given_weights_stay_the_callers_and_the_optimizer_is_any_of_optax(tmp_path):
    params = jax.tree.map(jnp.asarray, start_params())
    devices = tiny.make_devices()
    params = jax.device_put(params, devices.replicated)
    run = toy(make_config(tmp_path), params=params, optimizer=optax.sgd(0.0))
    run.train()
    assert_equal(jax.device_get(params), start_params())
    assert_equal(jax.device_get(run.params), start_params())


def test_a_context_builder_decides_what_is_distilled(tmp_path):
    seen = []

    def nothing(prompts, group, outcomes, responses, /, *, seed):
        del outcomes, seed
        seen.append((len(prompts), group, len(responses)))
        return [None] * len(responses)

    run = toy(make_config(tmp_path, evaluation={"prompts": 0}), context=nothing)
    assert all(row.metrics["updates"] == 0 for row in run.steps())
    assert seen == [(2, 4, 8)] * STEPS


class Counting:
    """A context builder that remembers how many batches it saw."""

    def __init__(self):
        self.batches = 0

    def __call__(self, prompts, group, outcomes, responses, /, *, seed):
        del prompts, group, outcomes, seed
        return [None] * len(responses)

    def remember(self, prompts, group, outcomes, responses):
        del prompts, group, outcomes, responses
        self.batches += 1

    def get_state(self):
        return {"batches": self.batches}

    def set_state(self, state):
        self.batches = state["batches"]


@pytest.mark.parametrize("every_steps", [1, 10])
def test_a_context_builder_forgets_the_steps_that_an_exception_undid(every_steps, tmp_path):
    context, failing = Counting(), [2]

    def fail(step, row):
        del row
        if failing == [step]:
            raise KeyboardInterrupt

    sections = {"evaluation": {"prompts": 0}, "checkpoint": {"every_steps": every_steps}}
    run = toy(make_config(tmp_path, **sections), context=context, callbacks=Callbacks(on_step=fail))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert context.batches == 2
    failing.clear()
    run.train()
    assert context.batches == STEPS


def test_a_resumed_run_that_stops_before_its_next_evaluation_reports_the_last_one(tmp_path):
    train = replace(BASE.train, steps=5)
    config = replace(make_config(tmp_path, evaluation={"every_steps": 2}), train=train)
    steps = toy(config).steps()
    row = [next(steps), next(steps)][-1]
    steps.close()
    summary = toy(config).train(stop=lambda: True)
    assert summary.steps == 3 and summary.after == row.evaluation
