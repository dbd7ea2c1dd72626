"""What a run prints: a live table on a terminal, one plain line per step everywhere else.

Plain lines also serve `NO_COLOR`, `TERM=dumb`, log files and `nohup`. Table and lines have the same
columns, each the name of a metric; a value that a row does not have prints as `-`. Labels and
formats are those of `sdpo_jax.evaluation.metric_table`.
"""

import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TextIO

from sdpo_jax.config import Config
from sdpo_jax.evaluation.metric_table import AT_K, duration, metric_of, text_of

LIVE_STEPS = 12
"""Rows of the live table."""

Row = Mapping[str, Any]


_SUMMARY_ONLY = (
    *(*AT_K, "best_at_", "entropy", "repetition", "most_common_output", "same_output"),
    "student_teacher_kl",
)
"""Metrics that an evaluation's line has no room for; log and summary have them."""


def batch_arithmetic(config: Config) -> str:
    """What one step consists of: prompts, rollouts, generations, updates."""
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


class Console(AbstractContextManager["Console"]):
    """The console of one run.

    with Console(objective.columns, steps=60) as console:
        console.note("run       runs/x")
        console.step({"step": 1, "reward": 0.2})
    """

    def __init__(
        self,
        columns: Sequence[str],
        *,
        steps: int,
        stream: TextIO | None = None,
        live: bool | None = None,
    ):
        """Decides between table and lines.

        Args:
            columns: names of metrics, in the order in which steps show them.
            steps: steps of the whole run.
            stream: where to print; standard output by default.
            live: the table (True) or plain lines (False); by default a table on a terminal.
        """
        self._columns = tuple(columns)
        self._steps = steps
        self._stream = stream if stream is not None else sys.stdout
        table = _is_capable_terminal(self._stream) if live is None else live
        self._table = _LiveTable(self._columns, self._stream, live is True) if table else None

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, row: Row) -> None:
        """One finished step: `step` and the metrics of the columns."""
        if self._table is not None:
            self._table.add(row)
            return
        values = [
            f"{metric_of(name).title} {text_of(name, row.get(name))}"
            for name in self._columns
            if name in row or not metric_of(name).evaluated
        ]
        self.note("  ".join([self._place(row), *values]))

    def evaluation(self, row: Row) -> None:
        """One evaluation after `step` steps; in the table it joins the row of its step."""
        if self._table is not None and self._table.join(row):
            return
        # There is no room for the parts of a metric (`accuracy/FAMILY`) either.
        left_out = ("step", *_SUMMARY_ONLY)
        keys = [key for key in row if "/" not in key and not key.startswith(left_out)]
        values = [f"{_label(key)} {text_of(key, row[key])}" for key in keys]
        self.note("  ".join([self._place(row), "evaluation", *values]))

    def compilation(self, step: int, compiled: int, loaded: int, seconds: float) -> None:
        """Prints how many programs `step` compiled or loaded, and how long that took."""
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
        """Prints the evaluations before and after training, and commands to try next."""
        self.close()
        keys = [key for key in dict.fromkeys([*before, *after]) if key != "step"]
        # Parts stand below their metric, whatever order they came in.
        first = {key.partition("/")[0]: i for i, key in reversed(list(enumerate(keys)))}
        keys.sort(key=lambda key: first[key.partition("/")[0]])
        lines = [("", "before", "after")]
        for key in keys:
            left, right = (text_of(key, row.get(key)) for row in (before, after))
            lines.append((_label(key), left, right))
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        self.note("")
        for name, left, right in lines:
            self.note(f"{name:<{widths[0]}}  {left:>{widths[1]}}  {right:>{widths[2]}}")
        self.note("")
        self.note(f"run       {run_dir}")
        for text in next_steps:
            self.note(f"next      {text}")

    def close(self) -> None:
        """Stops redrawing; the table stays on the terminal."""
        if self._table is not None:
            self._table.stop()

    def _place(self, row: Row) -> str:
        width = len(str(self._steps))
        return f"step {row['step']:>{width}}/{self._steps}"


class _LiveTable:
    """The last steps as a table that rich redraws in place; rich is imported only here."""

    def __init__(self, columns: Sequence[str], stream: TextIO, force: bool):
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
        for metric in map(metric_of, self._columns):
            heading = metric.heading or metric.title.replace(" ", "\n")
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self._rows:
            cells = [text_of(name, row.get(name)) for name in self._columns]
            table.add_row(*map(Text, [str(row["step"]), *cells]))
        if self._live is None:
            self._live = Live(table, console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(table, refresh=True)


def _is_capable_terminal(stream: TextIO) -> bool:
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def _label(key: str) -> str:
    """`accuracy/alarm` reads `  alarm`, below the metric that it is a part of."""
    _, _, part = key.partition("/")
    return f"  {part.replace('_', ' ')}" if part else metric_of(key).label
