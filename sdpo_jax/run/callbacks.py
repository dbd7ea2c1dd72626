"""Functions of the user's that the training loop calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.run.summary import Summary

Metrics: TypeAlias = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Functions that a run calls; each may be left out.

    They run between the device programs of the run, on its thread and in each of its processes. An
    exception that leaves one of them ends the run, which goes on from its last checkpoint.

    Attributes:
      on_rollouts: step and graded rollouts of the step, before its update; under `sft` the
        demonstrations in their place.
      on_step: step, and its metrics.
      on_evaluation: step, and the metrics on held-out prompts; step 0 is before training.
      on_save: step and folder of a checkpoint that is complete on the disk.
      on_end: the summary of a finished run, or of one that was asked to stop.
    """

    on_rollouts: Callable[[int, RolloutBatch], None] | None = None
    on_step: Callable[[int, Metrics], None] | None = None
    on_evaluation: Callable[[int, Metrics], None] | None = None
    on_save: Callable[[int, Path], None] | None = None
    on_end: Callable[[Summary], None] | None = None


def merge(callbacks: Sequence[Callbacks]) -> Callbacks:
    """One value that calls the functions of all of them in order; unused ones stay None."""
    names = [field.name for field in fields(Callbacks)]
    return Callbacks(**{name: _each([getattr(c, name) for c in callbacks]) for name in names})


def _each(functions: Sequence[Callable[..., None] | None]) -> Callable[..., None] | None:
    used = [function for function in functions if function is not None]

    def call(*args: Any) -> None:
        for function in used:
            function(*args)

    return call if used else None
