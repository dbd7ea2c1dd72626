"""Metrics of a run: one JSON object per line in `metrics.jsonl`, and TensorBoard curves beside it.

Each row is appended in one write, so that a killed run loses at most its last line; on resume the
file is cut back to the restored step, so that each step appears once. A row is flat:
`{"kind": "train", "step": 3, "reward": 0.41, ...}`; numbers that are not finite become null.

Only process 0 opens a log.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import json
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import numpy as np
from tensorboardX import SummaryWriter

from sdpo_jax.errors import UserError
from sdpo_jax.run.run_directory import write_atomically

METRICS_FILE = "metrics.jsonl"


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """The open log of a run directory.

    with MetricsLog("runs/x", start_step=0) as log:
        log.write("train", 1, {"reward": 0.5})
    """

    def __init__(self, run_dir: str | os.PathLike[str], start_step: int):
        """Opens the log after `start_step`, the last step whose rows are kept.

        Args:
            run_dir: folder of the run; created if it does not exist.
            start_step: the restored step; 0 starts an empty log.
        """
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if start_step > 0:
            truncate_to(path, start_step)
        else:
            path.unlink(missing_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        # Without a purge step TensorBoard draws the lost steps of a killed run a second time.
        self._curves = SummaryWriter(
            str(folder / "tensorboard"), purge_step=start_step + 1 if start_step > 0 else 0
        )

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        self._curves.close()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends a row and hands it to the operating system before it returns.

        Args:
            kind: `train`, `eval`, ...; the first part of the TensorBoard tag.
            step: steps completed, counting from 1; 0 is before training.
            values: numbers (Python, numpy or jax scalars), strings, or lists of these.
        """
        plain = {name: _plain(value) for name, value in values.items()}
        row = {"kind": kind, "step": step} | plain
        line = memoryview((json.dumps(row, allow_nan=False) + "\n").encode())
        while line:  # one write, unless the disk is nearly full
            line = line[os.write(self._file, line) :]
        for name, value in plain.items():
            if isinstance(value, int | float):
                self._curves.add_scalar(f"{kind}/{name}", float(value), step)


def truncate_to(path: Path, step: int) -> None:
    """Drops the rows of steps after `step` and a torn last line, atomically."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step]
        write_atomically(path, "".join(kept))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a log, oldest first, without an incomplete last line of a killed run.

    Raises:
        UserError: another line is not a row.
    """
    lines = Path(path).read_bytes().split(b"\n")
    lines.pop()  # empty after the last newline, or torn
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a line of JSON ({error}). Remove it.") from error
        if not isinstance(row, dict) or "step" not in row:
            raise UserError(f'{path}:{number}: expected an object with "step". Remove it.')
        rows.append(cast(dict[str, Any], row))
    return rows


def _plain(value: Any) -> Any:
    """A value that JSON can hold: Python numbers, None for those that are not finite."""
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast(list[Any], value)]
    return _plain(np.asarray(value).tolist())
