"""Demonstrations from a JSONL file, validated whole before anything is compiled.

A row is `{"prompt": ..., "response": "..."}`, with an optional `"id"`; other keys are ignored.
The prompt is a string (one user message) or a list of `{"role": ..., "content": ...}`. Blank lines,
CRLF and a byte-order mark are tolerated.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from sdpo_jax.errors import UserError

_ROLES = ("system", "user", "assistant", "tool")
_SHOWN = 20
_TYPE_NAMES: dict[type, str] = {
    **{dict: "an object", list: "a list", str: "a string", bool: "a boolean"},
    **{int: "a number", float: "a number", type(None): "null"},
}


class Demonstration(NamedTuple):
    """A question with the answer to learn."""

    id: str
    """The row's own, or `file:line`."""
    messages: tuple[Mapping[str, str], ...]
    response: str


class Demonstrations(NamedTuple):
    """The good rows of a file, and a line for each bad one: `file:line: reason`."""

    rows: list[Demonstration]
    problems: list[str]


class _BadRow(Exception):
    """Why a row cannot be used."""


def read_demonstrations(path: str | Path, on_error: Literal["stop", "skip"]) -> Demonstrations:
    """Reads and validates a whole file.

    Args:
        path: a UTF-8 file with one JSON object a line.
        on_error: `stop` raises one error that lists the bad rows; `skip` leaves them out and
            returns the list.

    Raises:
        UserError: the file cannot be read, has no usable row, or has a bad row under `stop`.
    """
    path = Path(path)
    rows: list[Demonstration] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    for number, raw in enumerate(_read(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = _row(raw, f"{path.name}:{number}")
            if row.id in first_line:
                raise _BadRow(f'id "{row.id}" is taken by line {first_line[row.id]}')
        except _BadRow as reason:
            problems.append(f"{path}:{number}: {reason}")
        else:
            first_line[row.id] = number
            rows.append(row)
    if not rows and not problems:
        raise UserError(f'{path}: no rows, expected {{"prompt": ..., "response": ...}} a line')
    if problems and (on_error == "stop" or not rows):
        raise UserError(_summary(path, problems, bool(rows)))
    return Demonstrations(rows, problems)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected JSONL with demonstrations") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _summary(path: Path, problems: list[str], some_good: bool) -> str:
    lines = [f"{path}: {len(problems)} bad row{'s' if len(problems) > 1 else ''}"]
    lines += [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  ... and {len(problems) - _SHOWN} more")
    if some_good:
        lines.append('mend them, or set data.on_error = "skip" to leave them out')
    else:
        lines.append("no usable row is left")
    return "\n".join(lines)


def _row(raw: bytes, place: str) -> Demonstration:
    value = _json(raw)
    if not isinstance(value, dict):
        raise _BadRow(f"{_name(value)}, expected an object")
    row = cast(dict[str, Any], value)
    prompt, response = _get(row, "prompt"), _text(_get(row, "response"), "response")
    if isinstance(prompt, list):
        messages = _messages(cast(list[Any], prompt))
    else:
        messages = ({"role": "user", "content": _text(prompt, "prompt", "a string or a list")},)
    name = row.get("id", place)
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    return Demonstration(_text(name, "id"), messages, response)


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        raise _BadRow(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise _BadRow(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number with too many digits
        raise _BadRow(f"unreadable JSON: {error}") from None


def _messages(items: list[Any]) -> tuple[Mapping[str, str], ...]:
    if not items:
        raise _BadRow("prompt is empty")
    messages: list[Mapping[str, str]] = []
    for number, item in enumerate(items):
        where = f"prompt[{number}]"
        if not isinstance(item, dict):
            raise _BadRow(f"{where} is {_name(item)}, expected an object")
        message = cast(dict[str, Any], item)
        role = _get(message, "role", where)
        if role not in _ROLES:
            raise _BadRow(
                f"{where}.role is {json.dumps(role)}, expected one of {', '.join(_ROLES)}"
            )
        content = _text(_get(message, "content", where), f"{where}.content")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] not in ("user", "tool"):
        last = messages[-1]["role"]
        raise _BadRow(
            f"the last message is from {last}, expected user or tool: the answer follows it"
        )
    return tuple(messages)


def _get(row: dict[str, Any], key: str, where: str = "") -> Any:
    if key in row:
        return row[key]
    others = {name.lower(): name for name in row}
    near = difflib.get_close_matches(key, others, n=1)
    hint = f'; found "{others[near[0]]}"' if near else ""
    raise _BadRow(f'{where + ": " if where else ""}"{key}" is missing{hint}')


def _text(value: Any, key: str, expected: str = "a string") -> str:
    if not isinstance(value, str):
        raise _BadRow(f"{key} is {_name(value)}, expected {expected}")
    if not value.strip():
        raise _BadRow(f"{key} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadRow(f"{key} holds half of a surrogate pair, which no tokenizer can encode")
    return value


def _name(value: Any) -> str:
    return _TYPE_NAMES[type(value)]
