"""The training loop: steps, evaluations, metrics, checkpoints, resuming."""

import copy
import logging
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.compilation import CompileCounter
from sdpo_jax.config import Config
from sdpo_jax.distributed import any_process, is_leader, of_leader
from sdpo_jax.errors import UserError
from sdpo_jax.evaluation.evaluator import Evaluator
from sdpo_jax.model import Params
from sdpo_jax.run import run_directory, summary
from sdpo_jax.run.callbacks import Callbacks, Metrics
from sdpo_jax.run.checkpoint import Checkpoints
from sdpo_jax.run.components import RunComponents, make_trainer
from sdpo_jax.run.console import Console, generations_per_step
from sdpo_jax.run.evaluate import evaluate, make_evaluator
from sdpo_jax.run.metrics import MetricsLog
from sdpo_jax.run.reporter import Nowhere, Reporter, introduce, show_summary
from sdpo_jax.run.restore import restore
from sdpo_jax.run.saver import Progress, Saver
from sdpo_jax.run.summary import Summary
from sdpo_jax.training.trainer import Trainer


class StepResult(NamedTuple):
    """One training step."""

    step: int
    """Steps done so far, this one included."""
    metrics: Metrics
    """As in `metrics.jsonl`."""
    evaluation: Metrics | None
    """Metrics on held-out prompts, where the schedule has an evaluation after this step."""


class EvaluationResult(NamedTuple):
    """Held-out accuracy and what else an evaluation measures."""

    step: int
    metrics: Metrics


def never() -> bool:
    """Nobody asks the run to stop."""
    return False


class Run:
    """A run in its folder: trains, resumes, evaluates. `sdpo_jax.api.load` makes it.

    It goes on from what is in memory, or from the folder's last checkpoint.

    Attributes:
      config: every setting of the run.
      run_dir: the folder of metrics, checkpoints and summary.
    """

    def __init__(
        self,
        config: Config,
        components: RunComponents,
        *,
        callbacks: Callbacks | None = None,
        console: Console | None = None,
    ):
        """Loads no weights and writes nothing.

        Args:
          config: the recipe; `run_dir` must be set.
          components: model, environment, ...
          callbacks: functions to call on the way.
          console: prints the progress; None prints nothing.
        """
        self.config, self.run_dir = config, Path(config.run_dir)
        self._components, self._callbacks = components, callbacks or Callbacks()
        self._console = console or Console((), steps=config.train.steps, stream=Nowhere())
        self._warn = console.note if console else logging.getLogger("sdpo_jax").warning
        self._trainer: Trainer | None = None
        self._first_host_state: dict[str, Any] | None = None
        self._evaluator: Evaluator | None = None
        self._progress: Progress | None = None
        self._summary: Summary | None = None
        self._is_running = False

    def train(self, stop: Callable[[], bool] = never) -> Summary:
        """Trains up to `train.steps`; goes on from memory, or from the folder's last checkpoint.

        A run that is complete is not trained again: the result is read from its `summary.json`.

        Args:
          stop: called after each step, on every process; True saves the step and ends the training.

        Raises:
          UserError: bad input, a folder with another recipe, or updates that stay non-finite.
        """
        for _ in self._steps(stop):
            pass
        assert self._summary is not None
        return self._summary

    def steps(self) -> Generator[StepResult, None, None]:
        """Trains as `train` does, and yields the result of each step.

        The recipe's evaluations and the final summary are complete before their step is yielded; a
        checkpoint is still being written, and `on_save` reports it when it is on the disk. A loop
        that is left early waits for that checkpoint, and goes on with the next step when `steps` or
        `train` is called again. Another process goes on from the last checkpoint.

        Raises:
          UserError: as `train`.
        """
        return self._steps(never)

    def evaluate(self) -> EvaluationResult:
        """Measures the current student on the held-out prompts, as evaluations in training do.

        Raises:
          UserError: `evaluation.prompts` is 0.
        """
        if self.config.evaluation.prompts == 0:
            raise UserError("evaluation.prompts = 0: expected at least 1, to evaluate on")
        trainer, progress = self._current()
        return EvaluationResult(progress.step, self._evaluate(trainer, progress))

    @property
    def params(self) -> Params:
        """The student's current weights, adapters merged; from memory, else the last checkpoint.

        The next training step reuses the memory of these arrays: copy what is needed beyond it.
        """
        trainer, progress = self._current()
        return trainer.student(progress.state)

    def _steps(self, stop: Callable[[], bool]) -> Generator[StepResult, None, None]:
        if self._is_running:
            raise UserError(f"{self.run_dir}: `steps` is running already; close that iterator")
        finished = summary.read(self.run_dir)
        if finished is not None and finished.steps >= self.config.train.steps:
            if is_leader():
                run_directory.claim(self.run_dir, self.config)
            self._summary = finished
            return
        self._is_running = True
        try:
            yield from self._locked_steps(stop)
        except GeneratorExit:
            raise
        except BaseException:  # its arrays may be donated, and the data are one step further
            self._trainer = self._evaluator = self._progress = None
            raise
        finally:
            self._is_running = False

    def _evaluate(self, trainer: Trainer, progress: Progress) -> Metrics:
        if self._evaluator is None:
            self._evaluator = make_evaluator(trainer, self._components.environment)
        return evaluate(trainer, self._evaluator, progress.state, progress.step)

    def _current(self) -> tuple[Trainer, Progress]:
        """What is in memory, else what the last checkpoint holds, else the start."""
        if self._trainer is None or self._progress is None:
            run_directory.check(self.run_dir, self.config)
            with self._checkpoints() as checkpoints:
                return self._begin(checkpoints)
        return self._trainer, self._progress

    def _checkpoints(self) -> Checkpoints:
        keep = self.config.checkpoint.keep
        return Checkpoints(self.run_dir / "checkpoints", keep=keep, warn=self._warn)

    def _begin(self, checkpoints: Checkpoints) -> tuple[Trainer, Progress]:
        """Makes the trainer where there is none, and restores the last checkpoint, if any."""
        trainer, load_params = self._make_trainer(), self._components.params
        restored = restore(trainer, checkpoints, load_params)
        if restored is None:
            state = trainer.initial_state(load_params())
            # A context from the caller outlives a trainer, and may remember steps that are undone.
            trainer.set_host_state(copy.deepcopy(self._first_host_state or {}))
            _refuse_weights_that_are_not_finite(trainer.student(state), self.config.model.path)
            self._progress = Progress(0, state, None, None, 0.0)
        else:
            extra = restored.extra
            trainer.source.set_state(extra["data"])
            trainer.set_host_state(extra.get("host", {}))
            before, after = extra["before"], extra.get("after")
            self._progress = Progress(
                restored.step, restored.state, before, after, extra["seconds"], resumed=True
            )
        return trainer, self._progress

    def _locked_steps(self, stop: Callable[[], bool]) -> Generator[StepResult, None, None]:
        config, run_dir, console = self.config, self.run_dir, self._console
        with ExitStack() as stack:
            stack.enter_context(console)
            counter = stack.enter_context(CompileCounter())
            if is_leader():
                run_directory.check(run_dir, config)  # before a lock is left in a foreign folder
                stack.enter_context(run_directory.locked(run_dir))
                run_directory.claim(run_dir, config)
            checkpoints = stack.enter_context(self._checkpoints())
            began = time.perf_counter()
            trainer, progress = self._start(checkpoints)
            log = None
            if is_leader():
                log = stack.enter_context(MetricsLog(run_dir, progress.step))
            report = Reporter(log, console, counter, self._callbacks)
            if progress.before is None:
                progress.before = self._evaluate(trainer, progress)
                report.evaluation(0, progress.before)
            began -= progress.seconds
            saver = Saver(trainer, checkpoints, progress, self._callbacks, began=began)
            stack.callback(saver.finish)
            first, stopping = progress.step, False
            for step in range(first + 1, config.train.steps + 1):
                result = self._step(trainer, progress, step, report, saver)
                last = step == config.train.steps
                stopping = any_process(stop())
                saver(now=last or stopping)
                report.compilation(step)
                if last or stopping:
                    self._finish(progress, saver, counter)
                yield result
                if stopping:
                    return
            if first == config.train.steps:  # killed between its last checkpoint and its summary
                progress.after = self._evaluate(trainer, progress)
                self._finish(progress, saver, counter)

    def _start(self, checkpoints: Checkpoints) -> tuple[Trainer, Progress]:
        """The trainer and the progress that the run goes on from."""
        saved = of_leader(max(checkpoints.steps(), default=0))
        if self._progress is not None and self._progress.step < saved:
            self._progress = None  # another process went on in the meantime
        introduce(self.config, self._make_trainer(), self._console)
        if self._progress is None:
            self._begin(checkpoints)
        assert self._progress is not None and self._trainer is not None
        if self._progress.resumed:
            self._console.note(f"resumed   from step {self._progress.step}")
            self._progress.resumed = False
        return self._trainer, self._progress

    def _make_trainer(self) -> Trainer:
        if self._trainer is None:
            self._trainer = make_trainer(self.config, self._components)
            if self._first_host_state is None:
                self._first_host_state = copy.deepcopy(self._trainer.host_state())
        return self._trainer

    def _step(
        self, trainer: Trainer, progress: Progress, step: int, report: Reporter, saver: Saver
    ) -> StepResult:
        config, evaluation = self.config, None
        on_rollouts = self._callbacks.on_rollouts
        progress.state, row = trainer.step(progress.state, step, on_rollouts)
        progress.step = step
        report.step(step, row)
        _stop_if_not_finite(config, row, step)
        every = config.evaluation.every_steps
        if step == config.train.steps or (every and step % every == 0):
            progress.after = evaluation = self._evaluate(trainer, progress)
            report.evaluation(step, evaluation)
            saver.evaluated(step, evaluation)
        return StepResult(step, row, evaluation)

    def _finish(self, progress: Progress, saver: Saver, counter: CompileCounter) -> None:
        """Waits for the last checkpoint, then reports the result."""
        saver.finish()
        config, step, before = self.config, progress.step, progress.before or {}
        self._summary = Summary(
            objective=config.objective.name,
            complete=step == config.train.steps,
            steps=step,
            generations=step * generations_per_step(config),
            seconds=saver.seconds(),
            before=before,
            after=before if progress.after is None else progress.after,
            best=saver.kept(),
            compilation=counter.total(),
        )
        if not self._summary.complete:
            self._console.note(f"stopped   after step {step}; saved. The same command goes on.")
        else:
            if is_leader():
                summary.write(self.run_dir, self._summary, config)
            show_summary(config, self._summary, self._console)
        if self._callbacks.on_end is not None:
            self._callbacks.on_end(self._summary)


def _refuse_weights_that_are_not_finite(params: Params, path: str) -> None:
    """A model of NaN may stop at its first token for ever: no signal, no update, no skip."""
    finite = jax.jit(partial(jax.tree.map, lambda x: jnp.all(jnp.isfinite(x))))(params)
    bad = [jax.tree_util.keystr(key) for key, ok in jax.tree.leaves_with_path(finite) if not ok]
    if bad:
        raise UserError(
            f"model.path = {path!r}: weights hold values that are not finite, in "
            f"{', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}. "
            "Expected numbers: convert or copy them again."
        )


def _stop_if_not_finite(config: Config, row: Mapping[str, Any], step: int) -> None:
    if row["skipped"] >= config.optimizer.max_skipped_updates:
        raise UserError(
            f"step {step}: {row['skipped']} updates in a row were not finite and were skipped "
            f"(optimizer.max_skipped_updates = {config.optimizer.max_skipped_updates}). Lower "
            f"optimizer.learning_rate = {config.optimizer.learning_rate}; checkpoints are kept."
        )
