"""`sdpo eval` and `sdpo convert` start here: the student of a run, and its accuracy."""

import json
from pathlib import Path
from typing import Any

import jax

from sdpo_jax.config import Config
from sdpo_jax.devices import Devices, make_mesh
from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.accuracy import accuracy_metrics
from sdpo_jax.model import Model, Params
from sdpo_jax.training.checkpoint import Checkpoints, Restored
from sdpo_jax.training.parameters import refuse_another_base
from sdpo_jax.training.state import make_parameters
from sdpo_jax.training.trainer import LoadParams, Trainer


def restore_student(
    run_dir: Path, config: Config, model: Model, load_params: LoadParams
) -> tuple[int, Params]:
    """Step and weights of a run's student: no optimiser, no teacher, no environment is needed.

    Args:
      run_dir: of the run.
      config: of the run; `mesh` may be another.
      model: of the run.
      load_params: loads the initial weights; called only where adapters need their base.

    Raises:
      UserError: the run has no checkpoint yet, or adapters and base do not belong together.
    """
    parameters, devices = make_parameters(config), Devices(make_mesh(config.mesh))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    trained = jax.eval_shape(parameters.trainable, shapes, jax.random.key(0))
    template = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        trained,
        devices.parameter_shardings(parameters.logical_axes(model.logical_axes), trained),
    )
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        restored = _found(run_dir, checkpoints.restore_part("params", template))
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


def evaluate_run(run_dir: Path, config: Config, parts: dict[str, Any], *, samples: int) -> None:
    """Prints held-out accuracy as a table and writes `eval.json` into the run's folder.

    Raises:
      UserError: the run has no checkpoint yet, or evaluates no prompts.
    """
    if config.evaluation.prompts == 0:
        raise UserError(
            f"{run_dir}: evaluation.prompts = 0, there is nothing to evaluate; expected a run "
            "whose recipe sets it above 0"
        )
    trainer = Trainer(
        config, parts["model"], parts["tokenizer"], parts["environment"], parts["demonstrations"]
    )
    load_params: LoadParams = parts["params"]
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        restored = _found(run_dir, trainer.restore(checkpoints, load_params))
    trained = _evaluate(trainer, restored.state, samples)
    start = _evaluate(trainer, trainer.initial_state(load_params()), samples)
    rows = {"start": start, f"step {restored.step}": trained}
    if jax.process_index() == 0:
        (run_dir / "eval.json").write_text(json.dumps(rows, indent=2) + "\n")
        _print(rows)


def _evaluate(trainer: Trainer, state: Any, samples: int) -> dict[str, float]:
    """Sampled (avg@k) and greedy accuracy of the student, and the teacher's in context."""
    evaluator, prompts = trainer.evaluator, trainer.evaluator.prompts
    student = trainer.student(state)
    sampled = evaluator.attempts(student, 0, samples=samples)
    greedy = evaluator.attempts(student, 0, samples=1, temperature=0.0)
    metrics = accuracy_metrics(sampled, prompts)
    metrics["accuracy_greedy"] = accuracy_metrics(greedy, prompts)["accuracy"]
    if not evaluator.asks_teacher:
        return metrics
    teacher = trainer.teacher_params(state, student)
    teacher = student if teacher is None else teacher
    return metrics | evaluator.teacher_metrics(teacher, sampled, 0)


def _print(rows: dict[str, dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max(map(len, names))
    print(f"{'':<{width}}  " + "  ".join(f"{title:>10}" for title in rows))
    for name in names:
        cells = [f"{row[name]:>10.3f}" if name in row else f"{'-':>10}" for row in rows.values()]
        print(f"{name:<{width}}  " + "  ".join(cells))
