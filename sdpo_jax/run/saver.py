"""Checkpoints of the training loop: when one is due, which one is kept, what it holds."""

import time
from dataclasses import dataclass
from pathlib import Path

from sdpo_jax.distributed import is_leader, of_leader
from sdpo_jax.run import run_directory
from sdpo_jax.run.callbacks import Callbacks, Metrics
from sdpo_jax.run.checkpoint import Checkpoints
from sdpo_jax.run.run_ref import Best, best_evaluation
from sdpo_jax.training.lora import checksum
from sdpo_jax.training.state import TrainState, to_saved
from sdpo_jax.training.trainer import Trainer


@dataclass
class Progress:
    """A run as it stands after a step, in memory."""

    step: int
    state: TrainState
    before: Metrics | None  # the evaluation of step 0, where there has been one
    after: Metrics | None
    seconds: float  # spent so far, by earlier processes too
    resumed: bool = False


class Saver:
    """Decides when a checkpoint is due and which one is kept, and adds what is not an array.

    The first process decides whether an evaluation is the best so far: where grades differ between
    processes, each would wait for the others in another place.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
        progress: Progress,
        callbacks: Callbacks,
        *,
        began: float,
    ):
        """`began` is when the run would have begun, had no time passed between its processes."""
        self._settings, self._folder = trainer.config.checkpoint, Path(trainer.config.run_dir)
        self._trainer, self._checkpoints, self._progress = trainer, checkpoints, progress
        self._on_save = callbacks.on_save
        self._began = began
        base = progress.state.base
        self._base = None if base is None else checksum(base)
        best = best_evaluation(self._folder, {0, *checkpoints.steps()}) if is_leader() else None
        self._best = best or Best(0, -1.0)
        self._pending: int | None = None

    def seconds(self) -> float:
        """Spent so far, by earlier processes too."""
        return time.perf_counter() - self._began

    def evaluated(self, step: int, evaluation: Metrics) -> None:
        """Takes note of an evaluation; one of no prompts has no accuracy."""
        accuracy = evaluation.get("accuracy", -1.0)
        if of_leader(accuracy > self._best.accuracy):
            self._best = Best(step, accuracy)

    def __call__(self, *, now: bool) -> None:
        """Saves the step if it is due, is the best so far, or `now`."""
        progress = self._progress
        step, progress.seconds = progress.step, self.seconds()
        best = self._best.step if self._settings.keep_best else None
        if now or step == best or step % self._settings.every_steps == 0:
            self.finish()
            extra = {
                "data": self._trainer.source.get_state(),
                "host": self._trainer.host_state(),
                "base": self._base,
                "before": progress.before,
                "after": progress.after,
                "seconds": progress.seconds,
            }
            self._checkpoints.save(step, to_saved(progress.state), extra, also=best)
            self._pending = step
        self._checkpoints.poll()
        self._announce()

    def finish(self) -> None:
        """Waits until the last save is complete."""
        self._checkpoints.finish()
        self._announce()

    def _announce(self) -> None:
        """Reports a pending step once it is complete: the run has gone beyond its old summary."""
        step = self._pending
        if step is None or step not in self._checkpoints.steps():
            return
        self._pending = None
        if is_leader():
            run_directory.reopen(self._folder)
        if self._on_save is not None:
            self._on_save(step, self._folder / "checkpoints" / str(step))

    def kept(self) -> Best | None:
        """The best evaluation of all, the start's included, if its step is saved."""
        return self._best if self._best.step in self._checkpoints.steps() else None
