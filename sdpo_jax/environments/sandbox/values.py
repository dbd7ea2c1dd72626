"""Strict JSON for the values that a program returns, written in the box and read outside.

`dumps` runs beside the program, which may tamper with it; the effect is another value, which the
program could have returned anyway. `loads` runs in the trusted process and trusts nothing.
"""

import json
import math
from typing import Any, cast

MAX_DEPTH = 100
"""Lists and objects inside each other; deeper values are an error."""


class NotJsonError(ValueError):
    """A value that has no exact JSON form, or text that is not strict JSON."""


def dumps(value: Any, limit: int) -> str:
    """The JSON text of a value of exactly the JSON types; tuples become lists.

    Raises `NotJsonError` for anything else: a subclass of `int`, NaN, a key that is no string, a
    cycle (by its depth), text of more than `limit` characters.
    """
    budget = [limit]
    text = json.dumps(_exact(value, 0, budget), allow_nan=False, separators=(",", ":"))
    if len(text) > limit:
        raise NotJsonError(f"the value is longer than {limit} bytes as JSON")
    return text


def loads(text: str) -> Any:
    """The value of a JSON text; raises `NotJsonError` for what `dumps` would not have written."""
    try:
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise NotJsonError(f"not strict JSON: {error}") from error
    return _exact(value, 0, [len(text)])


def _exact(value: Any, depth: int, budget: list[int]) -> Any:
    """The value, copied from exact types; `budget` counts down, so that sharing is bounded."""
    budget[0] -= 1
    if budget[0] < 0:
        raise NotJsonError("the value is too long as JSON")
    kind: Any = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return _text(value, budget)
    if kind is int:
        # Python limits the digits of an integer because their conversion is quadratic.
        if value.bit_length() > 14_000:
            raise NotJsonError("an integer of more than 4,200 digits is not JSON")
        return value
    if kind is float:
        if not math.isfinite(value):
            raise NotJsonError(f"{value} is not a JSON value")
        return value
    if depth >= MAX_DEPTH:
        raise NotJsonError(f"the value is nested deeper than {MAX_DEPTH}")
    if kind is list or kind is tuple:
        return [_exact(item, depth + 1, budget) for item in value]
    if kind is dict:
        items = cast(dict[Any, Any], value).items()
        return {_key(key, budget): _exact(item, depth + 1, budget) for key, item in items}
    raise NotJsonError(f"a value of type {kind.__name__} is not JSON")


def _key(key: Any, budget: list[int]) -> str:
    if type(key) is not str:
        raise NotJsonError(f"a key of type {type(key).__name__} is not JSON")
    return _text(key, budget)


def _text(value: str, budget: list[int]) -> str:
    """Checks that UTF-8 can encode a string: printing a lone surrogate would fail."""
    budget[0] -= len(value)
    if budget[0] < 0:
        raise NotJsonError("the value is too long as JSON")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise NotJsonError("a string with a lone surrogate is not JSON") from error
    return value


def _refuse(name: str) -> Any:
    raise NotJsonError(f"{name} is not a JSON value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise NotJsonError("an object names a key twice")
    return found
