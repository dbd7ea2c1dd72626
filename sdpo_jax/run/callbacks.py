"""Functions of the user's that the training loop calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeAlias

from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.run.summary import Summary

Metrics: TypeAlias = Mapping[str, float]
P = ParamSpec("P")


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
    return Callbacks(
        on_rollouts=_each([c.on_rollouts for c in callbacks]),
        on_step=_each([c.on_step for c in callbacks]),
        on_evaluation=_each([c.on_evaluation for c in callbacks]),
        on_save=_each([c.on_save for c in callbacks]),
        on_end=_each([c.on_end for c in callbacks]),
    )


def _each(functions: Sequence[Callable[P, None] | None]) -> Callable[P, None] | None:
    used = [function for function in functions if function is not None]
    if not used:
        return None

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        for function in used:
            function(*args, **kwargs)

    return call
