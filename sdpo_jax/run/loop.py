"""The training loop: steps, evaluation, metrics, checkpoints.

`train(config, model, params, tokenizer, environment)` is the whole program; the command line is a
thin shell over it.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.compilation import CompileCounter
from sdpo_jax.config import Config
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.distributed import any_process, is_leader, of_leader
from sdpo_jax.environments.base import Environment
from sdpo_jax.errors import UserError
from sdpo_jax.model import Model, Params
from sdpo_jax.run import run_directory
from sdpo_jax.run.checkpoint import Checkpoints
from sdpo_jax.run.console import Console, batch_arithmetic, generations_per_step
from sdpo_jax.run.metrics import MetricsLog
from sdpo_jax.run.run_ref import Best, best_of
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.lora import checksum
from sdpo_jax.training.state import TrainState, to_saved
from sdpo_jax.training.trainer import LoadParams, Trainer


def train(
    config: Config,
    model: Model,
    params: Params | LoadParams,
    tokenizer: Tokenizer,
    environment: Environment,
    *,
    demonstrations: Sequence[Demonstration] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs a recipe in `config.run_dir`, from the folder's last checkpoint if there is one.

    Args:
      config: the recipe; `run_dir` must be set.
      model: pure functions, see `sdpo_jax.model`.
      params: initial weights, or a function that loads them: it is called only where they are
        needed, and the run holds no second copy of what it returns.
      tokenizer: see `sdpo_jax.tokens`.
      environment: prompts and grader.
      demonstrations: for `sft` and `sdft`.
      console: where to report; plain lines on standard output by default.

    Returns:
      The summary: evaluation `before` and `after`, `steps`, `generations`, `seconds`, `complete`;
      `best`, step and accuracy, unless no step that is saved was better than the start;
      under `compilation` what this process compiled, not what it resumed from.

    Raises:
      UserError: bad input, a folder with another recipe, or updates that stay non-finite.
    """
    run_dir = Path(config.run_dir)
    console = console or Console(config.objective.name, steps=config.train.steps, live=False)
    with ExitStack() as stack:
        stack.enter_context(console)
        counter = stack.enter_context(CompileCounter())
        if jax.process_index() == 0:
            run_directory.check(run_dir, config)  # before a lock is left in a stranger's folder
            stack.enter_context(run_directory.locked(run_dir))
            run_directory.claim(run_dir, config)
            run_directory.reopen(run_dir)
        trainer = Trainer(config, model, tokenizer, environment, demonstrations)
        checkpoints = stack.enter_context(
            Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep, warn=console.note)
        )
        load_params = params if callable(params) else lambda: params
        return _run(config, trainer, load_params, checkpoints, console, counter, run_dir)


def _run(
    config: Config,
    trainer: Trainer,
    load_params: LoadParams,
    checkpoints: Checkpoints,
    console: Console,
    counter: CompileCounter,
    run_dir: Path,
) -> dict[str, Any]:
    began = time.perf_counter()
    _introduce(config, trainer, console, run_dir)
    first, state, before, spent = _start(config, trainer, load_params, checkpoints, console)
    base = None if state.base is None else checksum(state.base)
    with _open_log(run_dir, first) as log, _stop_signals() as stop_asked:
        report = _Reporter(log, console, counter)
        if before is None:
            before = trainer.evaluate(state, 0)
            report.evaluation(0, before)
        saver = _Saver(trainer, checkpoints, before, base=base, began=began - spent)
        after, step, stopping = before, first, False
        while step < config.train.steps and not stopping:
            step += 1
            state, row = trainer.step(state, step)
            report.step(step, row)
            _stop_if_not_finite(config, row, step)
            last = step == config.train.steps
            every = config.evaluation.every_steps
            if last or (every and step % every == 0):
                after = trainer.evaluate(state, step)
                report.evaluation(step, after)
                saver.evaluated(step, after)
            stopping = any_process(stop_asked())
            saver(step, state, now=last or stopping)
            checkpoints.poll()
            report.compilation(step)
    checkpoints.finish()
    if first == config.train.steps:
        after = trainer.evaluate(state, first)
    summary = _summary(config, step, before, after, saver.seconds())
    summary |= {"compilation": counter.total()._asdict(), "best": saver.kept()}
    _finish(config, summary, console, run_dir)
    return summary


def _introduce(config: Config, trainer: Trainer, console: Console, run_dir: Path) -> None:
    taught = config.objective.learns_from == "demonstrations"
    task = config.data.source if taught else config.environment.kind
    console.header(
        training=f"{config.objective.name} on {task}, model {config.model.path} "
        f"with {trainer.size / 1e6:.2f} M parameters",
        devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        run_dir=str(run_dir),
        batch=batch_arithmetic(config),
    )


class _Saver:
    """Knows when a checkpoint is due, which one is to stay, and what lies beside the arrays.

    Whether an evaluation is the best so far is for the first process to say: where grades differ
    between processes, each would wait for the others in another place.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
        before: dict[str, float],
        *,
        base: int | None,
        began: float,
    ):
        self._settings, self._folder = trainer.config.checkpoint, Path(trainer.config.run_dir)
        self._trainer, self._checkpoints = trainer, checkpoints
        self._before, self._base, self._began = before, base, began
        best = best_of(self._folder, {0, *checkpoints.steps()}) if is_leader() else None
        self._best = best or Best(0, -1.0)

    def seconds(self) -> float:
        """Spent so far, by earlier processes too."""
        return time.perf_counter() - self._began

    def evaluated(self, step: int, evaluation: dict[str, float]) -> None:
        """Notes an evaluation; one of no prompts has no accuracy."""
        accuracy = evaluation.get("accuracy", -1.0)
        if of_leader(accuracy > self._best.accuracy):
            self._best = Best(step, accuracy)

    def __call__(self, step: int, state: TrainState, *, now: bool) -> None:
        """Saves a step if it is due, is the best so far, or `now`."""
        best = self._best.step if self._settings.keep_best else None
        if not (now or step == best or step % self._settings.every_steps == 0):
            return
        extra = {
            "data": self._trainer.source.get_state(),
            "host": self._trainer.host_state(),
            "base": self._base,
            "before": self._before,
            "seconds": self.seconds(),
        }
        self._checkpoints.save(step, to_saved(state), extra, also=best)

    def kept(self) -> dict[str, Any] | None:
        """The best evaluation of all, the start's included, if its step is saved."""
        return self._best._asdict() if self._best.step in self._checkpoints.steps() else None


class _Start(NamedTuple):
    """Where a run begins or goes on."""

    step: int
    state: TrainState
    before: dict[str, float] | None  # the evaluation of step 0, where there has been one
    seconds: float  # spent by earlier processes


def _start(
    config: Config,
    trainer: Trainer,
    load_params: LoadParams,
    checkpoints: Checkpoints,
    console: Console,
) -> _Start:
    restored = trainer.restore(checkpoints, load_params)
    if restored is None:
        state = trainer.initial_state(load_params())
        _refuse_weights_that_are_not_finite(trainer.student(state), config.model.path)
        return _Start(0, state, None, 0.0)
    trainer.source.set_state(restored.extra["data"])
    trainer.set_host_state(restored.extra.get("host", {}))
    console.note(f"resumed   from step {restored.step}")
    extra = restored.extra
    return _Start(restored.step, restored.state, extra["before"], extra["seconds"])


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


def _summary(
    config: Config, step: int, before: dict[str, float], after: dict[str, float], seconds: float
) -> dict[str, Any]:
    return {
        "objective": config.objective.name,
        "complete": step == config.train.steps,
        "steps": step,
        "generations": step * generations_per_step(config),
        "seconds": seconds,
        "before": before,
        "after": after,
        "config": dataclasses.asdict(config),
    }


def _finish(config: Config, summary: dict[str, Any], console: Console, run_dir: Path) -> None:
    if not summary["complete"]:
        console.note(f"stopped   after step {summary['steps']}; saved. The same command goes on.")
        return
    if jax.process_index() == 0:
        run_directory.write_summary(run_dir, summary)
    show_summary(config, summary, console, run_dir)


def show_summary(config: Config, summary: dict[str, Any], console: Console, run_dir: Path) -> None:
    """Prints before and after, where the run lies, and what to try next."""
    next_ones, best = next_steps(config, run_dir), summary.get("best")
    if best is not None and best["step"] < summary["steps"]:
        told = f"{100 * best['accuracy']:.1f} % after step {best['step']}"
        next_ones.insert(0, f"sdpo eval {run_dir}@best   # {told}, the highest; it is kept")
    console.summary(summary["before"], summary["after"], str(run_dir), next_ones)


def next_steps(config: Config, run_dir: Path) -> list[str]:
    """Commands that make sense after this run."""
    steps = [f"sdpo eval {run_dir}", f"sdpo report {run_dir}   # curves and times as one page"]
    steps.append(f"sdpo heatmap {run_dir}   # what the teacher says of each token")
    steps.append(f"tensorboard --logdir {run_dir}/tensorboard")
    requests = config.model.path == "nano" and config.environment.kind == "tool_calls"
    if config.objective.name == "sdpo" and requests:
        steps.insert(0, "sdpo train configs/nano_grpo.toml   # the baseline on the same budget")
    if config.objective.name == "sdft" and requests:
        steps.insert(
            0, "sdpo train configs/nano_sft.toml   # the baseline on the same demonstrations"
        )
    if config.objective.learns_from == "demonstrations":
        steps.append(f"sdpo train RECIPE --model.path {run_dir}   # a second stage from here")
    return [*steps, f"sdpo convert {run_dir} OUT   # weights in Hugging Face layout"]


def _open_log(run_dir: Path, first: int) -> Any:
    if jax.process_index() == 0:
        return MetricsLog(run_dir, first)
    return _NoLog()


class _NoLog:
    """The log of every process but the first."""

    def __enter__(self) -> "_NoLog":
        return self

    def __exit__(self, *error: object) -> None:
        del error

    def write(self, kind: str, step: int, values: Any) -> None:
        """Writes nothing."""
        del kind, step, values


class _Reporter:
    """Rows to the log and to the console; compiled programs to the console alone.

    A resumed run compiles what the uninterrupted one had in memory, and their rows are the same.
    """

    def __init__(self, log: Any, console: Console, counter: CompileCounter):
        self._log, self._console, self._counter = log, console, counter
        self._told = False

    def step(self, step: int, row: dict[str, Any]) -> None:
        self._log.write("train", step, row)
        self._console.step({"step": step, **row})

    def evaluation(self, step: int, row: dict[str, Any]) -> None:
        self._log.write("eval", step, row)
        self._console.evaluation({"step": step, **row})

    def compilation(self, step: int) -> None:
        """Tells of the first step, with all that went before it; then of steps that compiled."""
        new = self._counter.since_mark()
        if new.programs_compiled or not self._told:
            self._console.compilation(step, *new)
        self._told = True


def _stop_if_not_finite(config: Config, row: dict[str, Any], step: int) -> None:
    if row["skipped"] >= config.optimizer.max_skipped_updates:
        raise UserError(
            f"step {step}: {row['skipped']} updates in a row were not finite and were skipped "
            f"(optimizer.max_skipped_updates = {config.optimizer.max_skipped_updates}). Lower "
            f"optimizer.learning_rate = {config.optimizer.learning_rate}; checkpoints are kept."
        )


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM asks for a stop after the step; the second ends at once."""
    asked: list[int] = []

    def handle(number: int, frame: object) -> None:
        del frame
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        old = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Not the main thread: signals are somebody else's.
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
