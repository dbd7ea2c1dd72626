"""How a command names a run and one of its checkpoints: `DIR`, `DIR@best`, `DIR@STEP`."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sdpo_jax.config import Config
from sdpo_jax.errors import UserError
from sdpo_jax.recipe import load_recipe
from sdpo_jax.training.manifest import complete
from sdpo_jax.training.metrics import METRICS_FILE, read_metrics
from sdpo_jax.training.run_directory import CONFIG


class FoundRun(NamedTuple):
    """A run that a command was given."""

    folder: Path
    config: Config
    """Its `mesh` may be made to fit the devices that are here."""
    step: int | None
    """Of a checkpoint; None for the last one."""


def find(text: str) -> FoundRun:
    """The run and the checkpoint that `DIR`, `DIR@best` or `DIR@STEP` names.

    The best step is that with the highest held-out accuracy of all that are saved, the first of
    equals.

    Raises:
      UserError: there is no run, or no such checkpoint of it.
    """
    folder, which = _split(text)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder}: expected the folder of a run, with {CONFIG} in it; "
            "`sdpo train RECIPE` makes one under runs/"
        )
    config = replace(load_recipe(folder / CONFIG), run_dir=str(folder))
    return FoundRun(folder, config, None if which is None else _step(folder, which))


def names_a_run(text: str) -> bool:
    """Whether there is a run at this path; `nano` is the embedded model, whatever lies there."""
    # A run in a folder `nano` would otherwise be its own model, for ever.
    return text != "nano" and (_split(text)[0] / CONFIG).is_file()


def _split(text: str) -> tuple[Path, str | None]:
    """Folder and what stands behind the last `@`; a folder's own name may hold one."""
    name, sign, which = text.rpartition("@")
    if not sign or (Path(text) / CONFIG).is_file():
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
    log = folder / METRICS_FILE
    accuracies = {
        row["step"]: row["accuracy"]
        for row in (read_metrics(log) if log.is_file() else [])
        if row["kind"] == "eval" and row["step"] in saved and row.get("accuracy") is not None
    }
    if not accuracies:
        raise UserError(
            f"{folder}@best: expected an evaluation of a step that is saved ({there}); there is "
            f"none in {log}. Name a step: {folder}@STEP"
        )
    return max(accuracies, key=lambda step: (accuracies[step], -step))
