"""The result of a run: `summary.json`, typed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sdpo_jax.compilation import Compilation
from sdpo_jax.config import Config
from sdpo_jax.run import run_directory
from sdpo_jax.run.run_ref import Best


class Summary(NamedTuple):
    """The result of a run, or of the part that is done."""

    objective: str
    complete: bool
    """Whether all of `train.steps` are done."""
    steps: int
    generations: int
    """Responses that the student sampled for training."""
    seconds: float
    """Wall-clock time of all processes that worked on the run, one after the other."""
    before: Mapping[str, float]
    """The evaluation of the start model; empty without held-out prompts."""
    after: Mapping[str, float]
    """The last evaluation."""
    best: Best | None
    """The evaluation with the highest accuracy, the start's included, if its step is saved."""
    compilation: Compilation
    """What the last process compiled."""


def read(run_dir: Path) -> Summary | None:
    """The summary of a complete run; None if the folder has none."""
    stored = run_directory.read_summary(run_dir)
    if stored is None:
        return None
    fields = {name: stored[name] for name in Summary._fields}
    best, compilation = stored["best"], stored["compilation"]
    fields["best"] = None if best is None else Best(**best)
    fields["compilation"] = Compilation(**compilation)
    return Summary(**fields)


def write(run_dir: Path, summary: Summary, config: Config) -> None:
    """Writes `summary.json`, which marks the run complete."""
    best = None if summary.best is None else summary.best._asdict()
    stored = summary._asdict() | {"best": best, "compilation": summary.compilation._asdict()}
    run_directory.write_summary(run_dir, stored | {"config": dataclasses.asdict(config)})
