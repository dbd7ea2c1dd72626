"""`sdpo eval` and `sdpo convert` start here: the student of a run, and its accuracy."""

import json
from pathlib import Path
from typing import Any

import jax

from sdpo_jax.config import Config
from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.accuracy import accuracy_metrics
from sdpo_jax.model import Params
from sdpo_jax.training.checkpoint import Checkpoints, Restored
from sdpo_jax.training.loop import Trainer


def restore_run(run_dir: Path, trainer: Trainer, params: Params) -> Restored:
    """The last intact checkpoint of a run.

    Raises:
      UserError: the run has none yet.
    """
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        start = trainer.initial_state(params)
        restored = checkpoints.restore(start.replace(base=None))
    if restored is None:
        raise UserError(
            f"{run_dir} has no checkpoint yet; expected at least one (checkpoint.every_steps)"
        )
    return restored._replace(state=restored.state.replace(base=start.base))


def restore_params(run_dir: Path, config: Config, parts: dict[str, Any]) -> tuple[int, Params]:
    """Step and weights of a run's student."""
    trainer = _trainer(config, parts)
    restored = restore_run(run_dir, trainer, parts["params"])
    return restored.step, trainer.student(restored.state)


def evaluate_run(run_dir: Path, config: Config, parts: dict[str, Any], *, samples: int) -> None:
    """Prints held-out accuracy as a table and writes `eval.json` into the run's folder."""
    trainer = _trainer(config, parts)
    start = trainer.initial_state(parts["params"])
    restored = restore_run(run_dir, trainer, parts["params"])
    rows = {
        "start": _evaluate(trainer, start, samples),
        f"step {restored.step}": _evaluate(trainer, restored.state, samples),
    }
    if jax.process_index() == 0:
        (run_dir / "eval.json").write_text(json.dumps(rows, indent=2) + "\n")
        _print(rows)


def _trainer(config: Config, parts: dict[str, Any]) -> Trainer:
    return Trainer(
        config, parts["model"], parts["tokenizer"], parts["environment"], parts["demonstrations"]
    )


def _evaluate(trainer: Trainer, state: Any, samples: int) -> dict[str, float]:
    """Sampled (avg@k) and greedy accuracy of the student, and the teacher's in context."""
    evaluator, prompts = trainer.evaluator, trainer.evaluator.prompts
    student = trainer.student(state)
    sampled = evaluator.attempts(student, 0, samples=samples)
    greedy = evaluator.attempts(student, 0, samples=1, temperature=0.0)
    metrics = accuracy_metrics(sampled, prompts)
    metrics["accuracy_greedy"] = accuracy_metrics(greedy, prompts)["accuracy"]
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
