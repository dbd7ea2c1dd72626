"""Reads and validates JSONL files as a whole, before anything is compiled.

A file is UTF-8 with one JSON object per line. Blank lines, CRLF and a byte-order mark are
tolerated; keys that `parse` does not read are ignored. Every bad row becomes one line
`file:line: reason` in the error message.
"""

import difflib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, cast

from sdpo_jax.environments.base import Prompt
from sdpo_jax.errors import UserError

_ROLES = ("system", "user", "assistant", "tool")
_SHOWN = 20
_TYPE_NAMES: dict[type, str] = {
    **{dict: "an object", list: "a list", str: "a string", bool: "a boolean"},
    **{int: "a number", float: "a number", type(None): "null"},
}


class Identified(Protocol):
    """A row with an id."""

    @property
    def id(self) -> str:
        """Unique in its file."""
        ...


Row = TypeVar("Row", bound=Identified)


class Rows(NamedTuple, Generic[Row]):
    """The good rows of a file, and a line for each bad one: `file:line: reason`."""

    rows: list[Row]
    problems: list[str]


class Split(NamedTuple, Generic[Row]):
    """Rows to train on, rows to evaluate on, and a line for each row that was skipped."""

    train: Sequence[Row]
    held_out: Sequence[Row]
    problems: Sequence[str] = ()


class BadRow(Exception):
    """A row cannot be used; the message is the reason."""


def read_rows(
    path: str | Path,
    parse: Callable[[dict[str, Any], str], Row],
    on_error: Literal["stop", "skip"],
    *,
    form: str,
    content: str = "rows",
    skip: str = 'on_error = "skip"',
) -> Rows[Row]:
    """Reads and validates a whole file.

    Args:
        path: a UTF-8 file with one JSON object per line.
        parse: makes a row of an object and its place, `file:line`; raises `BadRow` with a reason.
        on_error: `stop` raises one error that lists the bad rows; `skip` leaves them out and
            returns the list.
        form: how a line looks, for the message about an empty file.
        content: what the file holds, for the message about a missing one.
        skip: the setting that skips bad rows, as the user writes it.

    Raises:
        UserError: the file cannot be read, has no usable row, or has a bad row under `stop`.
    """
    path = Path(path)
    rows, problems = _parsed(path, _read(path, content), parse)
    if not rows and not problems:
        raise UserError(f"{path}: no rows, expected {form} a line")
    if problems and (on_error == "stop" or not rows):
        raise UserError(_summary(path, problems, bool(rows), skip))
    return Rows(rows, problems)


def read_sides(
    train: str | Path,
    held_out: str | Path,
    parse: Callable[[dict[str, Any], str], Row],
    on_error: Literal["stop", "skip"],
    *,
    form: str,
    content: str,
) -> Split[Row]:
    """Applies `read_rows` to a training file and a held-out file."""
    read = partial(read_rows, parse=parse, on_error=on_error, form=form, content=content)
    first, second = read(train), read(held_out)
    return Split(first.rows, second.rows, [*first.problems, *second.problems])


def _parsed(
    path: Path, content: bytes, parse: Callable[[dict[str, Any], str], Row]
) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = parse(_object(raw), f"{path.name}:{number}")
            if row.id in first_line:
                raise BadRow(f'id "{row.id}" is taken by line {first_line[row.id]}')
        except BadRow as reason:
            problems.append(f"{path}:{number}: {reason}")
        else:
            first_line[row.id] = number
            rows.append(row)
    return rows, problems


def _read(path: Path, content: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected JSONL with {content}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _summary(path: Path, problems: list[str], some_good: bool, skip: str) -> str:
    lines = [f"{path}: {len(problems)} bad row{'s' if len(problems) > 1 else ''}"]
    lines += [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  ... and {len(problems) - _SHOWN} more")
    remedy = f"mend them, or set {skip} to leave them out"
    return "\n".join([*lines, remedy if some_good else "no usable row is left"])


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8").strip(), parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number with too many digits
        raise BadRow(f"unreadable JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRow(f"{type_name(value)}, expected an object")
    return cast(dict[str, Any], value)


def no_constant(name: str) -> None:
    """A `parse_constant` for `json.loads` that refuses NaN and the infinities."""
    raise ValueError(f"{name} is no JSON value")


def get(row: Mapping[str, Any], key: str, where: str = "") -> Any:
    """The value of a required key; `where` names the object in the error message."""
    if key in row:
        return row[key]
    others = {name.lower(): name for name in row}
    near = difflib.get_close_matches(key, others, n=1)
    hint = f'; found "{others[near[0]]}"' if near else ""
    raise BadRow(f'{where + ": " if where else ""}"{key}" is missing{hint}')


def text(value: Any, key: str, expected: str = "a string") -> str:
    """Checks that a value is a string that is not blank and that a tokenizer can encode."""
    if not isinstance(value, str):
        raise BadRow(f"{key} is {type_name(value)}, expected {expected}")
    if not value.strip():
        raise BadRow(f"{key} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow(f"{key} holds half of a surrogate pair, which no tokenizer can encode")
    return value


def row_id(row: Mapping[str, Any], place: str, key: str = "id") -> str:
    """The row's id, a string or an integer; without one, its place."""
    name = row.get(key, place)
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    return text(name, key)


def chat(value: Any, key: str) -> tuple[Mapping[str, str], ...]:
    """Chat messages from a string (one user message) or from a list of messages."""
    if not isinstance(value, list):
        return ({"role": "user", "content": text(value, key, "a string or a list")},)
    messages = [_message(item, f"{key}[{i}]") for i, item in enumerate(cast(list[Any], value))]
    if not messages:
        raise BadRow(f"{key} is empty")
    if (last := messages[-1]["role"]) not in ("user", "tool"):
        raise BadRow(
            f"the last message is from {last}, expected user or tool: the answer follows it"
        )
    return tuple(messages)


def _message(item: Any, where: str) -> Mapping[str, str]:
    if not isinstance(item, dict):
        raise BadRow(f"{where} is {type_name(item)}, expected an object")
    message = cast(dict[str, Any], item)
    role = get(message, "role", where)
    if role not in _ROLES:
        raise BadRow(f"{where}.role is {json.dumps(role)}, expected one of {', '.join(_ROLES)}")
    return {"role": role, "content": text(get(message, "content", where), f"{where}.content")}


def type_name(value: Any) -> str:
    """The JSON name of a decoded value's type, such as `a list`."""
    return _TYPE_NAMES[type(value)]


def is_held_out(key: str, seed: int) -> bool:
    """Whether a hash of `key` and `seed` holds a row out: one in four, whatever the other rows."""
    return zlib.crc32(f"{seed}:{key}".encode(errors="replace")) % 4 == 0


def split_by_hash(
    rows: Sequence[Row], key: Callable[[Row], str], seed: int
) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to hold out, see `is_held_out`; both keep their order."""
    sides: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        sides[is_held_out(key(row), seed)].append(row)
    return sides


def check_sides(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Refuses duplicate prompts: one on both sides would make held-out accuracy measure memory.

    Raises:
        UserError: an id or the exact text of a prompt occurs twice.
    """
    seen: dict[str, str] = {}
    for prompt, side in [*((p, "train") for p in train), *((p, "held-out") for p in held_out)]:
        question = json.dumps([dict(message) for message in prompt.messages], sort_keys=True)
        for key, what in ((f"id {prompt.id}", "id"), (question, "prompt")):
            if key in seen:
                raise UserError(
                    f"the {side} {what} of {prompt.id!r} stands among the {seen[key]} rows too, "
                    "expected each once; remove one of the two"
                )
            seen[key] = side
