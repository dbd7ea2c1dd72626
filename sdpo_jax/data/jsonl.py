"""Demonstrations from a JSONL file, validated whole before anything is compiled.

A row is `{"prompt": ..., "response": "..."}`, with an optional `"id"`; other keys are ignored.
The prompt is a string (one user message) or a list of `{"role": ..., "content": ...}`. Blank lines,
CRLF and a byte-order mark are tolerated.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sdpo_jax.environments.rows import Rows, chat, get, read_rows, row_id, text


class Demonstration(NamedTuple):
    """A question with the answer to learn."""

    id: str
    """The row's own, or `file:line`."""
    messages: tuple[Mapping[str, str], ...]
    response: str


def read_demonstrations(path: str | Path, on_error: Literal["stop", "skip"]) -> Rows[Demonstration]:
    """Reads and validates a whole file.

    Args:
        path: a UTF-8 file with one JSON object a line.
        on_error: `stop` raises one error that lists the bad rows; `skip` leaves them out and
            returns the list.

    Raises:
        UserError: the file cannot be read, has no usable row, or has a bad row under `stop`.
    """
    return read_rows(
        path,
        _row,
        on_error,
        form='{"prompt": ..., "response": ...}',
        content="demonstrations",
        skip='data.on_error = "skip"',
    )


def _row(row: dict[str, Any], place: str) -> Demonstration:
    prompt, response = get(row, "prompt"), text(get(row, "response"), "response")
    messages = chat(prompt, "prompt")
    return Demonstration(row_id(row, place), messages, response)
