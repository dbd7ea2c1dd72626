"""What the training loop reports: rows of metrics, compiled programs, the result."""

import io
from pathlib import Path

import jax

from sdpo_jax.compilation import CompileCounter
from sdpo_jax.config import Config
from sdpo_jax.run.callbacks import Callbacks, Metrics
from sdpo_jax.run.console import Console, batch_arithmetic
from sdpo_jax.run.metrics import MetricsLog
from sdpo_jax.run.summary import Summary
from sdpo_jax.training.trainer import Trainer


class Reporter:
    """Sends rows to the log, the console and the callbacks; compiled programs to the console only.

    A resumed run compiles what the uninterrupted one had in memory, and their rows are the same.
    """

    def __init__(
        self,
        log: MetricsLog | None,
        console: Console,
        counter: CompileCounter,
        callbacks: Callbacks,
    ):
        """`log` is None on every process but the first."""
        self._log, self._console, self._counter = log, console, counter
        self._callbacks, self._has_reported = callbacks, False

    def step(self, step: int, row: Metrics) -> None:
        """Reports a training step."""
        if self._log is not None:
            self._log.write("train", step, row)
        self._console.step({"step": step, **row})
        if self._callbacks.on_step is not None:
            self._callbacks.on_step(step, row)

    def evaluation(self, step: int, row: Metrics) -> None:
        """Reports an evaluation after `step` steps."""
        if self._log is not None:
            self._log.write("eval", step, row)
        self._console.evaluation({"step": step, **row})
        if self._callbacks.on_evaluation is not None:
            self._callbacks.on_evaluation(step, row)

    def compilation(self, step: int) -> None:
        """Reports the first step, with all that went before it; then steps that compiled."""
        new = self._counter.since_mark()
        if new.programs_compiled or not self._has_reported:
            self._console.compilation(step, *new)
        self._has_reported = True


def introduce(config: Config, trainer: Trainer, console: Console) -> None:
    """Prints what is trained, on what, to where."""
    is_taught = config.objective.learns_from == "demonstrations"
    task = config.data.source if is_taught else config.environment.kind
    size = f"{trainer.size / 1e6:.2f} M parameters"
    console.note(
        f"training  {config.objective.name} on {task}, model {config.model.path} with {size}"
    )
    console.note(f"devices   {jax.device_count()} x {jax.devices()[0].device_kind}")
    console.note(f"run       {config.run_dir}")
    console.note(f"batch     {batch_arithmetic(config)}, {config.train.steps} steps")


def show_summary(config: Config, result: Summary, console: Console) -> None:
    """Prints before and after, where the run lies, and what to try next."""
    run_dir, best = Path(config.run_dir), result.best
    commands = next_commands(config, run_dir)
    if best is not None and best.step < result.steps:
        reason = f"{100 * best.accuracy:.1f} % after step {best.step}"
        commands.insert(0, f"sdpo eval {run_dir}@best   # {reason}, the highest; it is kept")
    console.summary(result.before, result.after, str(run_dir), commands)


def next_commands(config: Config, run_dir: Path) -> list[str]:
    """Commands that make sense after this run."""
    commands = [f"sdpo eval {run_dir}", f"sdpo report {run_dir}   # curves and times as one page"]
    commands.append(f"sdpo heatmap {run_dir}   # the teacher's advantage of each token")
    commands.append(f"tensorboard --logdir {run_dir}/tensorboard")
    is_nano = config.model.path == "nano" and config.environment.kind == "tool_calls"
    if config.objective.name == "sdpo" and is_nano:
        commands.insert(0, "sdpo train configs/nano_grpo.toml   # the baseline on the same budget")
    if config.objective.name == "sdft" and is_nano:
        commands.insert(
            0, "sdpo train configs/nano_sft.toml   # the baseline on the same demonstrations"
        )
    if config.objective.learns_from == "demonstrations":
        commands.append(f"sdpo train RECIPE --model.path {run_dir}   # a second stage from here")
    return [*commands, f"sdpo convert {run_dir} OUT   # weights in Hugging Face layout"]


class Nowhere(io.StringIO):
    """A stream that keeps nothing."""

    def write(self, text: str, /) -> int:
        """Counts the letters, as any stream does."""
        return len(text)
