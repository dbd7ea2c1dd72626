"""The loop as a library: resuming, teachers, mini-batches, and updates that are not finite.

A tiny model on a toy question: half of all answers pass, the others hear why not. One device, and
one cache for the compiled programs: each call of `train` makes its programs anew.
"""

import io
import os
import signal
import zlib
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import quick
import tiny

from sdpo_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RolloutConfig,
    TeacherConfig,
    TrainConfig,
)
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.errors import UserError
from sdpo_jax.objectives import GrpoConfig, SdftConfig, SdpoConfig, SftConfig, make_objective
from sdpo_jax.rollouts.phase_timer import is_time
from sdpo_jax.run import loop
from sdpo_jax.run.components import RunComponents, make_trainer
from sdpo_jax.run.console import Console
from sdpo_jax.run.loop import Run
from sdpo_jax.run.metrics import METRICS_FILE, read_metrics
from sdpo_jax.run.recipes import default_config
from sdpo_jax.run.stop_signals import stop_signals
from sdpo_jax.training import trainer as trainer_module
from sdpo_jax.training.state import from_saved, to_saved
from sdpo_jax.training.step import make_update_programs

TOKENIZER = tiny.ByteTokenizer()
ARCHITECTURE = replace(tiny.ARCHITECTURE, vocabulary=TOKENIZER.vocabulary)
MODEL = tiny.make_model(ARCHITECTURE)
STEPS = 3
OBJECTIVES = {
    "sdpo": SdpoConfig(),
    "grpo": GrpoConfig(),
    "sft": SftConfig(),
    "sdft": SdftConfig(skip_first_tokens=1),
}
BASE = default_config(
    rollout=RolloutConfig(
        prompts_per_step=2, rollouts_per_prompt=4, max_prompt_tokens=32, max_response_tokens=6
    ),
    teacher=TeacherConfig(max_prompt_tokens=160, max_feedback_tokens=32),
    data=DataConfig(rows_per_step=4, max_tokens=32),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    train=TrainConfig(steps=STEPS, micro_batch_tokens=1024, head_chunk_tokens=48),
    evaluation=EvaluationConfig(every_steps=1, prompts=2, samples_per_prompt=2, batch_prompts=2),
    checkpoint=CheckpointConfig(every_steps=1, keep=9),
)
DEMONSTRATIONS = [
    Demonstration(str(i), ({"role": "user", "content": f"q{i}"},), "abc"[: 1 + i % 3] * 2)
    for i in range(6)
]


class Toy:
    """Questions of two letters; an answer passes by its checksum."""

    train = tuple(Prompt(f"t{i}", ({"role": "user", "content": f"a{i}"},), {}) for i in range(6))
    held_out = tuple(Prompt(f"h{i}", ({"role": "user", "content": f"b{i}"},), {}) for i in range(2))

    def grade(self, prompt, response):
        del prompt
        passed = zlib.crc32(response.encode()) % 2 == 0
        return Outcome(float(passed), passed, "" if passed else "odd, wanted even", {})


@cache
def start_params():
    return jax.device_get(tiny.make_params(ARCHITECTURE, scale=0.5))


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
    """One device, cheap compilation, one sampler."""
    with quick.programs(sampler_of=(MODEL, TOKENIZER.stop_ids)):
        yield


def columns_of(config):
    return make_objective(config.objective).columns


class Crash(Exception):
    """Ends a run where it stands."""


class QuietConsole(Console):
    """Keeps what it prints; once the row of a step is written, crashes or calls `then`."""

    def __init__(self, config, crash_after=None, then=None):
        self.text = io.StringIO()
        super().__init__(columns_of(config), steps=config.train.steps, stream=self.text)
        self._crash_after, self._then = crash_after, then

    def step(self, row):
        super().step(row)
        if row["step"] == self._crash_after:
            if self._then is None:
                raise Crash
            self._then()


def make_config(run_dir, name="sdpo", **sections):
    config = replace(BASE, run_dir=str(run_dir), objective=OBJECTIVES[name])
    if name == "sdft":  # as many generations as the others
        config = replace(config, data=replace(config.data, rows_per_step=2))
    for section, settings in sections.items():
        config = replace(config, **{section: replace(getattr(config, section), **settings)})
    return config


def run(config, *, params=None, crash_after=None, then=None):
    """Trains; the summary, and what was printed."""
    console = QuietConsole(config, crash_after, then)
    params = start_params() if params is None else params
    with stop_signals() as stop:
        summary = Run(config, components_of(params), console=console).train(stop)
    return summary, console.text.getvalue()


def components_of(params, environment=None):
    """The components of a run of the tiny model."""
    load = params if callable(params) else lambda: params
    return RunComponents(MODEL, load, TOKENIZER, environment or Toy(), DEMONSTRATIONS)


def rows_of(config, kind=None):
    """Rows without times."""
    return [
        {name: value for name, value in row.items() if not is_time(name)}
        for row in read_metrics(Path(config.run_dir) / METRICS_FILE)
        if kind in (None, row["kind"])
    ]


def saved_steps(config):
    """Complete checkpoints, ascending."""
    return loop.Checkpoints(Path(config.run_dir) / "checkpoints").steps()


def restore(config, step=None):
    """The newest saved step with its state; it must be `step`, if given."""
    trainer = make_trainer(config, components_of(start_params()))
    template = trainer.initial_state(start_params())
    with loop.Checkpoints(Path(config.run_dir) / "checkpoints") as checkpoints:
        restored = checkpoints.restore(to_saved(template))
    assert restored is not None and step in (None, restored.step)
    return restored._replace(state=from_saved(restored.state))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b):
    return any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """name -> configuration and summary of a run that nothing interrupted, run on first use."""

    @cache
    def of(name):
        config = make_config(tmp_path_factory.mktemp(name) / "run", name)
        summary, _ = run(config)
        return config, summary

    return of


def assert_same_result(config, summary, expected):
    other, other_summary = expected
    assert rows_of(config) == rows_of(other)
    assert_equal(restore(config, STEPS).state, restore(other, STEPS).state)
    same = ("complete", "steps", "generations", "before", "after")
    assert [getattr(summary, key) for key in same] == [getattr(other_summary, key) for key in same]


# Resuming


@pytest.mark.slow
def test_a_run_with_adapters_resumes_exactly_and_its_checkpoints_hold_adapters_alone(tmp_path):
    config = make_config(tmp_path / "whole", lora={"rank": 2}, teacher={"weights": "frozen"})
    run(config)
    broken = replace(config, run_dir=str(tmp_path / "broken"))
    with pytest.raises(Crash):
        run(broken, crash_after=2)
    run(broken)
    assert rows_of(broken) == rows_of(config)
    trainer = make_trainer(config, components_of(start_params()))
    template = trainer.initial_state(start_params())
    with loop.Checkpoints(Path(config.run_dir) / "checkpoints") as checkpoints:
        restored = checkpoints.restore(to_saved(template))
    assert restored is not None and restored.state["teacher"] is None
    assert differ(restored.state["params"], template.params)
    assert_equal(jax.device_get(template.base), start_params())


@pytest.mark.slow
def test_adapters_do_not_go_on_beside_other_weights(tmp_path):
    config = make_config(tmp_path / "run", lora={"rank": 2})
    with pytest.raises(Crash):
        run(config, crash_after=2)
    other = jax.tree.map(lambda x: x * 1.001, start_params())
    with pytest.raises(UserError, match="other weights than those that this run's adapters"):
        run(config, params=other)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_stopped_after_every_step_in_turn_a_run_repeats_the_whole_one(name, whole, tmp_path):
    config = make_config(tmp_path / "run", name)
    for step in range(1, STEPS):
        # The row of `step` is written and its checkpoint is not: the step is done a second time.
        with pytest.raises(Crash):
            run(config, crash_after=step + 1)
        assert saved_steps(config)[-1] == step
    summary, text = run(config)
    assert f"resumed   from step {STEPS - 1}" in text
    assert_same_result(config, summary, whole(name))


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 1])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_checkpoint_older_than_the_crash_repeats_the_steps_between(name, every, whole, tmp_path):
    config = make_config(tmp_path / "run", name, checkpoint={"every_steps": every})
    with pytest.raises(Crash):
        run(config, crash_after=STEPS)
    assert rows_of(config, "train")[-1]["step"] == STEPS
    assert saved_steps(config)[-1] == (STEPS - 1) // every * every
    summary, _ = run(config)
    assert_same_result(config, summary, whole(name))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_asked_to_stop_a_run_saves_its_step_and_goes_on_exactly(number, whole, tmp_path):
    config = make_config(tmp_path / "run", checkpoint={"every_steps": 99})
    before = signal.getsignal(number)
    summary, text = run(config, crash_after=2, then=partial(os.kill, os.getpid(), number))
    assert signal.getsignal(number) == before
    assert not summary.complete and summary.steps == 2 == saved_steps(config)[-1]
    assert "stopped   after step 2; saved. The same command goes on." in text
    assert not (Path(config.run_dir) / "summary.json").exists()
    summary, _ = run(config)
    assert_same_result(config, summary, whole("sdpo"))


def test_a_run_with_more_steps_goes_on_from_the_shorter_one(whole, tmp_path):
    config = make_config(tmp_path / "run", train={"steps": 2})
    summary, _ = run(config)
    assert summary.complete and summary.steps == 2
    config = make_config(tmp_path / "run")
    summary, text = run(config)
    assert "resumed   from step 2" in text
    assert_same_result(config, summary, whole("sdpo"))


def test_a_run_killed_between_its_last_checkpoint_and_its_summary_only_reports(whole):
    config, expected = whole("sdpo")
    (Path(config.run_dir) / "summary.json").unlink()
    before = rows_of(config)
    summary, text = run(config)
    assert f"step 1/{STEPS}" not in text
    assert rows_of(config) == before
    assert summary.after == expected.after and (Path(config.run_dir) / "summary.json").exists()


def test_a_failure_before_the_first_new_step_keeps_the_result_of_a_finished_run(
    tmp_path, monkeypatch
):
    config = make_config(tmp_path / "run", train={"steps": 2}, checkpoint={"every_steps": 2})
    run(config)
    kept = (tmp_path / "run" / "summary.json").read_text()
    more = make_config(tmp_path / "run", train={"steps": 5}, checkpoint={"every_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_trainer", lambda *_: fail())
        with pytest.raises(Crash):
            run(more)
    assert (tmp_path / "run" / "summary.json").read_text() == kept
    with pytest.raises(Crash):  # one step further, of which nothing is saved
        run(more, crash_after=3)
    assert (tmp_path / "run" / "summary.json").read_text() == kept
    with pytest.raises(Crash):  # step 4 is saved: the run has gone beyond its result
        run(more, crash_after=5)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert run(more)[0].complete


def fail():
    raise Crash


# What a run reports


COMMON = "loss grad_norm tokens updates skipped seconds_train tokens_per_second_train"
SAMPLED = "response_tokens truncated generations seconds_rollout tokens_per_second_rollout"
ROLLOUT = f"{SAMPLED} reward success seconds_grade"
TEACHER = "divergence teacher_signal seconds_teacher tokens_per_second_teacher"
KEYS = {
    "sdpo": f"{COMMON} {ROLLOUT} {TEACHER} shown/demonstration shown/feedback",
    "grpo": f"{COMMON} {ROLLOUT} advantage_signal",
    "sdft": f"{COMMON} {SAMPLED} {TEACHER} importance",
    "sft": f"{COMMON} token_accuracy seconds_data",
}


@pytest.mark.parametrize(
    "name", [n if n == "sdpo" else pytest.param(n, marks=pytest.mark.slow) for n in OBJECTIVES]
)
def test_every_step_has_one_row_with_what_its_objective_reports(name, whole):
    config, summary = whole(name)
    rows = read_metrics(Path(config.run_dir) / METRICS_FILE)
    steps = range(1, STEPS + 1)
    order = [("eval", 0), *((kind, step) for step in steps for kind in ("train", "eval"))]
    assert [(row["kind"], row["step"]) for row in rows] == order
    train = [row for row in rows if row["kind"] == "train"]
    for row in train:
        missing = set(KEYS[name].split()) - set(row)
        assert not missing
        assert row["updates"] == 1 and row["skipped"] == 0 and np.isfinite(row["loss"])
        assert row["grad_norm"] > 0
    if name != "sft":
        assert [row["generations"] for row in train] == [8 * step for step in steps]
    if name in ("sdpo", "grpo"):
        assert 0 < np.mean([row["reward"] for row in train]) < 1
    assert summary.steps == STEPS and summary.complete and summary.seconds > 0
    assert summary.generations == (0 if name == "sft" else 8 * STEPS)
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert summary.before.items() <= evaluations[0].items()
    assert summary.after.items() <= evaluations[-1].items()
    # Under sft the model itself, shown a context, stands in for a teacher; grpo has none, and under
    # sdft it would be shown a reference, which this environment does not have.
    assert ("teacher_accuracy" in summary.before) == (name in ("sdpo", "sft"))


@pytest.mark.parametrize(
    "name", ["sdpo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("grpo", "sft"))]
)
def test_training_does_not_depend_on_evaluation(name, whole, tmp_path):
    config = make_config(tmp_path / "run", name, evaluation={"prompts": 0})
    summary, _ = run(config)
    assert summary.before == summary.after == {}
    assert rows_of(config, "train") == rows_of(whole(name)[0], "train")


# Teachers


@pytest.mark.slow
def test_an_average_that_never_moves_is_the_initial_model(tmp_path):
    config = make_config(tmp_path / "run", teacher={"ema_rate": 0.0}, train={"steps": 2})
    run(config)
    state = restore(config).state
    assert_equal(jax.device_get(state.teacher), start_params())
    assert differ(state.params, start_params())
    frozen = make_config(tmp_path / "frozen", teacher={"weights": "frozen"}, train={"steps": 2})
    run(frozen)
    assert_equal(restore(frozen).state, state)
    assert rows_of(frozen) == rows_of(config)


@pytest.mark.slow
def test_a_live_teacher_is_an_average_that_arrives_at_once_and_costs_no_copy(tmp_path):
    short = partial(make_config, train={"steps": 2}, evaluation={"prompts": 0})
    live = short(tmp_path / "live", teacher={"weights": "live"})
    run(live)
    state = restore(live).state
    assert state.teacher is None
    at_once = short(tmp_path / "ema", teacher={"ema_rate": 1.0})
    run(at_once)
    copied = restore(at_once).state
    assert_equal((copied.params, copied.teacher), (state.params, state.params))
    assert rows_of(live) == rows_of(at_once)


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_objectives_without_a_teacher_keep_no_copy(name, whole):
    assert restore(whole(name)[0]).state.teacher is None


def test_mini_batches_make_that_many_updates_and_the_teacher_follows_once(tmp_path):
    settings = {"steps": 1, "mini_batches": 2}
    config = make_config(tmp_path / "run", train=settings, evaluation={"prompts": 0})
    run(config)
    (row,) = rows_of(config, "train")
    assert row["updates"] == 2
    state = restore(config).state
    rate = np.float32(config.teacher.ema_rate)
    expected = jax.tree.map(
        lambda old, new: (1 - rate) * old + rate * np.asarray(new), start_params(), state.params
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), state.teacher, expected)


# Updates that are not finite


def poisoned_after(good_updates):
    """`make_update_programs`, whose gradient is not a number from then on."""

    def make(*parts, **settings):
        programs = make_update_programs(*parts, **settings)

        def finish(state, sums, denominator):
            count = optax.tree_utils.tree_get_all_with_path(state.optimizer, "count")[0][1]
            bad = jax.numpy.where(count >= good_updates, np.float32(np.nan), np.float32(1.0))
            gradient = jax.tree.map(lambda g: g * bad, sums.gradient)
            return programs.finish(state, sums._replace(gradient=gradient), denominator)

        return programs._replace(finish=finish)

    return make


def test_updates_that_stay_non_finite_stop_the_run_and_leave_a_good_checkpoint(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer_module, "make_update_programs", poisoned_after(2))
    limits = {"max_skipped_updates": 2}
    config = make_config(
        tmp_path / "run", optimizer=limits, train={"steps": 20}, evaluation={"prompts": 0}
    )
    with pytest.raises(UserError, match=r"optimizer\.max_skipped_updates = 2") as error:
        run(config)
    assert "step 4" in str(error.value) and "optimizer.learning_rate = 0.01" in str(error.value)
    assert [row["skipped"] for row in rows_of(config, "train")] == [0, 0, 1, 2]
    good = make_config(tmp_path / "good", train={"steps": 2}, evaluation={"prompts": 0})
    monkeypatch.undo()
    run(good)
    kept, expected = restore(config), restore(good)
    assert kept.step == 3 == saved_steps(config)[-1] and int(kept.state.skipped) == 1
    assert_equal(kept.state.params, expected.state.params)
    assert_equal(kept.state.teacher, expected.state.teacher)


def test_weights_that_are_not_numbers_are_refused_before_the_first_step(tmp_path):
    poisoned = start_params() | {"final_norm": np.full_like(start_params()["final_norm"], np.nan)}
    config = make_config(tmp_path / "run", "sft", evaluation={"prompts": 0})
    with pytest.raises(
        UserError, match=r"weights hold values that are not finite, in .*final_norm"
    ):
        run(config, params=poisoned)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
