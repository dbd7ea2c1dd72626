"""`sdpo eval` and `sdpo convert` start here: the student of a run, and its evaluation."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sdpo_jax.config import Config
from sdpo_jax.devices import Devices, make_mesh
from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.measures import Measures
from sdpo_jax.evaluation.report import Evaluation, evaluation, report, table
from sdpo_jax.model import Model, Params
from sdpo_jax.run.checkpoint import Checkpoints, Restored
from sdpo_jax.run.run_ref import RunRef
from sdpo_jax.training.lora import refuse_another_base
from sdpo_jax.training.state import make_parameters
from sdpo_jax.training.trainer import LoadParams, Trainer

USAGE = "sdpo eval RUN_DIR|RECIPE [--samples K] [--json FILE]"


def restore_student(run: RunRef, model: Model, load_params: LoadParams) -> tuple[int, Params]:
    """Step and weights of a run's student: no optimiser, no teacher, no environment is needed.

    Args:
      run: and which of its checkpoints.
      model: of the run.
      load_params: loads the initial weights; called only where adapters need their base.

    Raises:
      UserError: the run has no such checkpoint, or adapters and base do not belong together.
    """
    config = run.config
    parameters, devices = make_parameters(config), Devices(make_mesh(config.mesh))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    trained = jax.eval_shape(parameters.trainable, shapes, jax.random.key(0))
    template = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        trained,
        devices.parameter_shardings(parameters.logical_axes(model.logical_axes), trained),
    )
    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        restored = _found(run.folder, checkpoints.restore_part("params", template, run.step))
    if config.lora.rank == 0:
        return restored.step, restored.state
    base = load_params()
    refuse_another_base(base, restored.extra["base"], config.model.path)
    return restored.step, jax.jit(parameters.merged)(base, restored.state)


def _found(run_dir: Path, restored: Restored | None) -> Restored:
    if restored is None:
        raise UserError(
            f"{run_dir} has no checkpoint yet; expected at least one (checkpoint.every_steps)"
        )
    return restored


class Options(NamedTuple):
    """What follows `sdpo eval`."""

    target: str
    samples: int
    json_file: str
    settings: list[str]
    """For the recipe, if the target is one."""

    @property
    def is_recipe(self) -> bool:
        """Whether a recipe's start model is evaluated, and not a run."""
        return self.target.endswith(".toml")


def parse_options(words: Sequence[str]) -> Options:
    """Reads the words after `sdpo eval`; all but `--samples` and `--json` is for a recipe.

    Raises:
      UserError: no target, an option without its value or with a bad one, or settings for a run.
    """
    if not words or words[0].startswith("-"):
        raise UserError(f"expected `{USAGE}`")
    given, settings = {"--samples": "4", "--json": ""}, list[str]()
    rest = list(words[1:])
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name not in given:
            settings.append(word)
            continue
        if not equals and (not rest or rest[0].startswith("-")):
            raise UserError(f"option {name!r} has no value; expected `{USAGE}`")
        given[name] = value if equals else rest.pop(0)
    samples, json_file = given["--samples"], given["--json"]
    if not samples.isdecimal() or int(samples) < 1:
        raise UserError(f"--samples {samples}: expected `{USAGE}` with a positive integer")
    if json_file and (Path(json_file).is_dir() or not Path(json_file).parent.is_dir()):
        raise UserError(f"--json {json_file}: expected a file in a folder that is there")
    options = Options(words[0], int(samples), json_file, settings)
    if settings and not options.is_recipe:
        raise UserError(
            f"{settings[0]}: a run is evaluated with the settings of its own recipe; "
            f"expected `{USAGE}`, with settings for a recipe alone"
        )
    return options


def evaluate_run(run: RunRef, parts: dict[str, Any], *, samples: int, json_file: str = "") -> None:
    """Evaluates a run before and after training; prints a table, writes `eval.json` into the run.

    Of a checkpoint that was asked for, the file is `eval@STEP.json`.

    Raises:
      UserError: the run has no such checkpoint, or evaluates no prompts.
    """
    trainer, load_params = _trainer(str(run.folder), run.config, parts)
    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        restored = _found(run.folder, trainer.restore(checkpoints, load_params, run.step))
    trained = _evaluate(trainer, restored.state, samples)
    start = _evaluate(trainer, trainer.initial_state(load_params()), samples)
    rows = {"start": start, f"step {restored.step}": trained}
    name = "eval.json" if run.step is None else f"eval@{run.step}.json"
    files = [run.folder / name, *([Path(json_file)] if json_file else [])]
    _tell(rows, run.config, trainer, samples, files)


def evaluate_start(
    recipe: str, config: Config, parts: dict[str, Any], *, samples: int, json_file: str = ""
) -> None:
    """Evaluates the model that a recipe starts from; prints a table, writes JSON if asked to.

    Raises:
      UserError: the recipe evaluates no prompts.
    """
    trainer, load_params = _trainer(recipe, config, parts)
    rows = {"start": _evaluate(trainer, trainer.initial_state(load_params()), samples)}
    _tell(rows, config, trainer, samples, [Path(json_file)] if json_file else [])


def _trainer(
    what: str, config: Config, parts: dict[str, Any]
) -> tuple[Trainer, Callable[[], Params]]:
    if config.evaluation.prompts == 0:
        raise UserError(
            f"{what}: evaluation.prompts = 0, there is nothing to evaluate; expected a recipe "
            "that sets it above 0"
        )
    trainer = Trainer(
        config, parts["model"], parts["tokenizer"], parts["environment"], parts["demonstrations"]
    )
    return trainer, parts["params"]


def _evaluate(trainer: Trainer, state: Any, samples: int) -> Evaluation:
    """The student, sampled and greedy, and the teacher in context."""
    evaluator, prompts = trainer.evaluator, trainer.evaluator.prompts
    student = trainer.student(state)
    sampled = evaluator.attempts(student, 0, samples=samples)
    greedy = evaluator.attempts(student, 0, samples=1, temperature=0.0)
    teacher_measures: Measures = {}
    if evaluator.asks_teacher:
        teacher = trainer.teacher_params(state, student)
        teacher = student if teacher is None else teacher
        teacher_measures = evaluator.teacher_measures(teacher, sampled, 0)
    return evaluation(prompts, sampled, evaluator.answers(sampled), greedy, teacher_measures)


def _tell(
    rows: dict[str, Evaluation], config: Config, trainer: Trainer, samples: int, files: list[Path]
) -> None:
    if jax.process_index() != 0:
        return
    made = report(rows, config, samples)
    for file in files:
        file.write_text(json.dumps(made, indent=1, allow_nan=False) + "\n")
    print(
        f"avg@{samples} and greedy, {len(trainer.evaluator.prompts)} held-out prompts of "
        f"{config.environment.kind}; in brackets 95 % intervals over prompts"
    )
    print(table(made))
