"""The folder of a run: one run, one recipe, one job at a time.

config.toml      the resolved recipe
metrics.jsonl    one JSON object per step and per evaluation
summary.json     before, after, totals; written when all steps are done
tensorboard/     the same metrics as curves
checkpoints/     Orbax
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdpo_jax.config import Config
from sdpo_jax.config.resolved import differences, to_toml
from sdpo_jax.errors import UserError
from sdpo_jax.run.recipes import load_recipe

CONFIG, SUMMARY, LOCK = "config.toml", "summary.json", "run.lock"


def claim(run_dir: Path, config: Config) -> None:
    """Writes the resolved recipe into a new folder, or checks that a used one holds the same run.

    Raises:
      UserError: the folder holds another recipe, or files that no run has written.
    """
    check(run_dir, config)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / CONFIG, to_toml(config))


def check(run_dir: Path, config: Config) -> None:
    """Refuses the folder of another run; changes nothing and leaves no lock in it.

    Raises:
      UserError: the folder holds another recipe, or files that no run has written.
    """
    path = run_dir / CONFIG
    if path.exists():
        stored = load_recipe(path, objectives=[type(config.objective)])
        if differing := differences(stored, config):
            listed = "\n  ".join(differing)
            raise UserError(
                f"{run_dir} holds a run of another recipe:\n  {listed}\n"
                f"Nothing was changed. Choose another folder (--run-dir DIR) or delete {run_dir}."
            )
    elif run_dir.exists() and any(p.name != LOCK for p in run_dir.iterdir()):
        raise UserError(
            f"{run_dir}: expected an empty folder or a run with {CONFIG}, found other files. "
            "Nothing was changed. Choose another folder with --run-dir DIR."
        )


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Locks the folder for this process; the operating system unlocks it when the process ends.

    Raises:
      UserError: another process trains there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{run_dir} is in use by {holder}. "
                "Wait for it, or choose another folder with --run-dir DIR."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a complete run, else None."""
    path = run_dir / SUMMARY
    return json.loads(path.read_text()) if path.exists() else None


def reopen(run_dir: Path) -> None:
    """Deletes the summary, once a run that was given more steps has saved one of them."""
    (run_dir / SUMMARY).unlink(missing_ok=True)


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Marks the run complete."""
    write_atomically(run_dir / SUMMARY, json.dumps(summary, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a file completely, on the disk, or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
