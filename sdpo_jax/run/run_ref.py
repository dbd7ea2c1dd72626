"""References to a run and one of its checkpoints: `DIR`, `DIR@best`, `DIR@STEP`."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sdpo_jax.config import Config
from sdpo_jax.errors import UserError
from sdpo_jax.run.manifest import complete
from sdpo_jax.run.metrics import METRICS_FILE, read_metrics
from sdpo_jax.run.recipes import load_recipe
from sdpo_jax.run.run_directory import CONFIG


class RunRef(NamedTuple):
    """A run, its recipe and one of its checkpoints."""

    folder: Path
    config: Config
    """The run's recipe; a caller may replace `mesh` by one that fits its own devices."""
    step: int | None
    """The checkpoint's step; None for the last one."""


class Best(NamedTuple):
    """An evaluation during training."""

    step: int
    accuracy: float


def find_run(text: str) -> RunRef:
    """Finds the run and the checkpoint that `DIR`, `DIR@best` or `DIR@STEP` refers to.

    Raises:
      UserError: there is no run, or no such checkpoint of it.
    """
    folder, which = _split(text)
    config = run_config(text)
    return RunRef(folder, config, None if which is None else _step(folder, which))


def run_config(text: str) -> Config:
    """The recipe of the run that `text` refers to; its checkpoints may be deleted already.

    Raises:
      UserError: there is no run.
    """
    folder = _split(text)[0]
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder}: expected the folder of a run, with {CONFIG} in it; "
            "`sdpo train RECIPE` makes one under runs/"
        )
    return replace(load_recipe(folder / CONFIG), run_dir=str(folder))


def is_run(text: str) -> bool:
    """Whether `text` refers to a run; `nano` is always the embedded model."""
    # Otherwise a run in a folder `nano` would be its own start model: an endless recursion.
    return text != "nano" and (_split(text)[0] / CONFIG).is_file()


def best_evaluation(folder: Path, steps: Collection[int]) -> Best | None:
    """The evaluation with the highest accuracy among those of `steps`; the first of equals."""
    log = folder / METRICS_FILE
    evaluations = [
        Best(row["step"], row["accuracy"])
        for row in (read_metrics(log) if log.is_file() else [])
        if row["kind"] == "eval" and row["step"] in steps and row.get("accuracy") is not None
    ]
    return max(evaluations, key=lambda best: (best.accuracy, -best.step), default=None)


def _split(text: str) -> tuple[Path, str | None]:
    """Splits at the last `@`, unless the whole text is the name of a folder."""
    name, sign, which = text.rpartition("@")
    if not sign or Path(text).is_dir():
        return Path(text), None
    return Path(name), which


def _step(folder: Path, which: str) -> int:
    saved = complete(folder / "checkpoints")
    if which.isdecimal() and int(which) in saved:
        return int(which)
    there = ", ".join(map(str, saved)) or "none yet"
    if which != "best":
        raise UserError(
            f"{folder}@{which}: expected @best or @STEP with a step that is saved: {there}"
        )
    best = best_evaluation(folder, saved)
    if best is None:
        raise UserError(
            f"{folder}@best: expected an evaluation of a step that is saved ({there}); there is "
            f"none in {folder / METRICS_FILE}. Name a step: {folder}@STEP"
        )
    return best.step
