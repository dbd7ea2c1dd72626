"""What a run prints: a live table on a terminal, one plain line per step everywhere else.

The plain face also serves `NO_COLOR`, `TERM=dumb`, log files and `nohup`. Both faces show the same
columns; a value that a row does not have prints as `-`. Columns are named by the metrics they show,
see `COLUMNS`.
"""

import math
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, TextIO

from sdpo_jax.config import Config

LIVE_STEPS = 12
"""Rows of the live table."""

Row = Mapping[str, Any]


def duration(seconds: float) -> str:
    """Seconds with the unit that reads best: `85 ms`, `1.20 s`, `3 min 05 s`, `2 h 04 min`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.995:
        return f"{seconds:.2f} s"
    if round(seconds) < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def percent(fraction: float) -> str:
    """A fraction as `41.2 %`."""
    return f"{100 * fraction:.1f} %"


def number(value: float) -> str:
    """Four significant digits, without an exponent where people do not expect one."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


class Column(NamedTuple):
    """A metric on the console."""

    key: str
    title: str
    show: Callable[[float], str]
    evaluated: bool = False
    """Comes with evaluations; plain step lines leave it out unless the row has it."""
    heading: str = ""
    """Title in the table, which has to fit 80 characters; by default one word of `title` a line."""


_ROLLOUT_COLUMNS = (
    Column("reward", "reward", "{:.3f}".format),
    Column("accuracy", "held-out accuracy", percent, evaluated=True),
    Column("teacher_accuracy", "teacher accuracy", percent, evaluated=True),
    Column("response_tokens", "tokens", "{:.1f}".format),
)
_TIMES = tuple(
    Column(f"seconds_{phase}", f"{phase} time", duration)
    for phase in ("rollout", "grade", "teacher", "train")
)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "sdpo": (
        *_ROLLOUT_COLUMNS,
        Column("divergence", "divergence", "{:.4f}".format, heading="diver-\ngence"),
        Column("teacher_signal", "signal", percent),
        *_TIMES,
    ),
    "grpo": (
        *(column for column in _ROLLOUT_COLUMNS if column.key != "teacher_accuracy"),
        Column("loss", "loss", "{:.4f}".format),
        *(column for column in _TIMES if column.key != "seconds_teacher"),
    ),
    "sdft": (
        *_ROLLOUT_COLUMNS[1:],  # no reward
        Column("divergence", "divergence", "{:.4f}".format, heading="diver-\ngence"),
        *(column for column in _TIMES if column.key != "seconds_grade"),
    ),
    "sft": (
        Column("loss", "loss", "{:.4f}".format),
        Column("token_accuracy", "token accuracy", percent),
        Column("accuracy", "held-out accuracy", percent, evaluated=True),
        Column("seconds_train", "train time", duration),
    ),
}
"""What each objective shows, in order."""

LABELS: dict[str, tuple[str, Callable[[float], str]]] = {
    "accuracy": ("held-out accuracy", percent),
    "teacher_accuracy": ("teacher accuracy", percent),
    "token_accuracy": ("token accuracy", percent),
    "response_tokens": ("response tokens", "{:.1f}".format),
    "truncated": ("cut off at the limit", percent),
    "seconds": ("time", duration),
    "entropy": ("entropy, nats a token", "{:.3f}".format),
    "repetition": ("repeated 4-grams", percent),
    "most_common_output": ("most common output", percent),
    "same_output": ("teacher repeats the attempt", percent),
    "student_teacher_kl": ("student to teacher without a context, nats a token", "{:.4f}".format),
}
"""How evaluations and the summary spell a metric; others show their key."""

_SHARES = ("pass_at_", "maj_at_")
_DIAGNOSTICS = (
    *(*_SHARES, "best_at_", "entropy", "repetition", "most_common_output", "same_output"),
    "student_teacher_kl",
)
"""For the log and the summary: what an evaluation's line has no room for."""


def batch_arithmetic(config: Config) -> str:
    """What one step consists of, worked out."""
    if not config.objective.samples:
        return f"{config.data.rows_per_step} demonstrations a step"
    generations, rollouts = generations_per_step(config), config.rollout.rollouts_per_prompt
    prompts = "demonstrations" if config.objective.learns_from == "demonstrations" else "prompts"
    count = generations // rollouts
    text = f"{count} {prompts} x {rollouts} rollouts = {generations} generations a step"
    if config.rollout.max_turns > 1:
        text += f" of up to {config.rollout.max_turns} turns"
    updates = config.train.mini_batches
    return text if updates == 1 else f"{text}, {updates} optimiser updates"


def generations_per_step(config: Config) -> int:
    """Responses that the student samples in a step."""
    if not config.objective.samples:
        return 0
    taught = config.objective.learns_from == "demonstrations"
    prompts = config.data.rows_per_step if taught else config.rollout.prompts_per_step
    return prompts * config.rollout.rollouts_per_prompt


class Console:
    """The console of one run.

    with Console("sdpo", steps=60) as console:
        console.header(training="nano on tool_calls", devices="1 cpu", run_dir="runs/x", batch=...)
        console.step({"step": 1, "reward": 0.2})
    """

    def __init__(
        self,
        objective: str,
        *,
        steps: int,
        stream: TextIO | None = None,
        live: bool | None = None,
    ):
        """Chooses the face.

        Args:
            objective: `sdpo`, `grpo`, `sft` or `sdft`; decides the columns.
            steps: steps of the whole run.
            stream: where to print; standard output by default.
            live: the table (True) or plain lines (False); by default a table on a terminal.
        """
        self._columns = COLUMNS[objective]
        self._steps = steps
        self._stream = stream if stream is not None else sys.stdout
        table = _is_capable_terminal(self._stream) if live is None else live
        self._table = _LiveTable(self._columns, self._stream, live is True) if table else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def header(self, *, training: str, devices: str, run_dir: str, batch: str) -> None:
        """What is being trained, on what, to where, and what a step consists of."""
        self.note(f"training  {training}")
        self.note(f"devices   {devices}")
        self.note(f"run       {run_dir}")
        self.note(f"batch     {batch}, {self._steps} steps")

    def step(self, row: Row) -> None:
        """One finished step: `step` and the metrics of `COLUMNS`."""
        if self._table is not None:
            self._table.add(row)
            return
        values = [
            f"{column.title} {_show(column, row)}"
            for column in self._columns
            if column.key in row or not column.evaluated
        ]
        self.note("  ".join([self._place(row), *values]))

    def evaluation(self, row: Row) -> None:
        """One evaluation after `step` steps; in the table it joins the row of its step."""
        if self._table is not None and self._table.join(row):
            return
        # Nor for parts of a metric (`accuracy/FAMILY`).
        aside = ("step", *_DIAGNOSTICS)
        keys = [key for key in row if "/" not in key and not key.startswith(aside)]
        values = [f"{_label(key)} {_spell(key, row[key])}" for key in keys]
        self.note("  ".join([self._place(row), "evaluation", *values]))

    def compilation(self, step: int, compiled: int, loaded: int, seconds: float) -> None:
        """Programs that were new to this process in `step`, and the seconds they took."""
        built = f"{compiled} program{'' if compiled == 1 else 's'} built"
        took = duration(seconds)
        self.note(f"compiled  step {step}: {built}, {loaded} read from the cache, {took}")

    def note(self, text: str) -> None:
        """A line of text, above the table if there is one."""
        if self._table is not None:
            self._table.print(text)
        else:
            print(text, file=self._stream, flush=True)

    def summary(self, before: Row, after: Row, run_dir: str, next_steps: Sequence[str]) -> None:
        """The evaluation before and after training, side by side, and what to do with the run."""
        self.close()
        keys = [key for key in dict.fromkeys([*before, *after]) if key != "step"]
        # Parts stand below their metric, whatever order they came in.
        first = {key.partition("/")[0]: i for i, key in reversed(list(enumerate(keys)))}
        keys.sort(key=lambda key: first[key.partition("/")[0]])
        lines = [("", "before", "after")]
        lines += [
            (_label(key), _spell(key, before.get(key)), _spell(key, after.get(key))) for key in keys
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        self.note("")
        for name, left, right in lines:
            self.note(f"{name:<{widths[0]}}  {left:>{widths[1]}}  {right:>{widths[2]}}")
        self.note("")
        self.note(f"run       {run_dir}")
        for text in next_steps:
            self.note(f"next      {text}")

    def close(self) -> None:
        """Leaves the table as it stands and gives the terminal back."""
        if self._table is not None:
            self._table.stop()

    def _place(self, row: Row) -> str:
        width = len(str(self._steps))
        return f"step {row['step']:>{width}}/{self._steps}"


class _LiveTable:
    """The last steps as a table that rich redraws in place; rich is imported only here."""

    def __init__(self, columns: tuple[Column, ...], stream: TextIO, force: bool):
        from rich.console import Console as RichConsole

        self._columns = columns
        self._rows: deque[dict[str, Any]] = deque(maxlen=LIVE_STEPS)
        self._console = RichConsole(file=stream, force_terminal=True if force else None)
        self._live: Any = None

    def add(self, row: Row) -> None:
        self._rows.append(dict(row))
        self._draw()

    def join(self, row: Row) -> bool:
        """Puts an evaluation into the row of its step; False if that row is not shown."""
        for shown in self._rows:
            if shown["step"] == row["step"]:
                shown.update(row)
                self._draw()
                return True
        return False

    def print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._rows.clear()

    def _draw(self) -> None:
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
        table.add_column("step", justify="right")
        for column in self._columns:
            heading = column.heading or column.title.replace(" ", "\n")
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self._rows:
            cells = [_show(column, row) for column in self._columns]
            table.add_row(*map(Text, [str(row["step"]), *cells]))
        if self._live is None:
            self._live = Live(table, console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(table, refresh=True)


def _is_capable_terminal(stream: TextIO) -> bool:
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def _show(column: Column, row: Row) -> str:
    return _format(row.get(column.key), column.show)


def _label(key: str) -> str:
    """`accuracy/alarm` reads `  alarm`, below the metric that it is a part of."""
    whole, _, part = key.partition("/")
    if part:
        return f"  {part.replace('_', ' ')}"
    if whole.startswith(_SHARES):
        return whole.replace("_at_", "@")
    return LABELS[whole][0] if whole in LABELS else whole.replace("_", " ")


def _spell(key: str, value: Any) -> str:
    whole = key.partition("/")[0]
    if whole.startswith(_SHARES):
        return _format(value, percent)
    return _format(value, LABELS[whole][1] if whole in LABELS else number)


def _format(value: Any, show: Callable[[float], str]) -> str:
    """A number as a column shows it; `-` for a missing one, words as they are."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    plain = float(value)
    return show(plain) if math.isfinite(plain) else str(plain)
