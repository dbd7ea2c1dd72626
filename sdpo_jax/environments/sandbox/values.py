"""The values that a program returns, as JSON text that keeps what `==` of Python says of them.

None, booleans, strings, finite floats, integers and lists are written as JSON. Every other value is
an object with one key, its kind: `{"tuple":[1,2]}`, `{"dict":[key,value,...]}`. An instance of a
subclass (Counter, a named tuple, a member of an IntEnum) is written as its base, with the methods
of the base, and a numpy scalar or array as what its `tolist` gives.

`dumps` runs beside the program, which may tamper with it; the effect is another value, which the
program could have returned anyway. `loads` runs in the trusted process, trusts nothing, and builds
exact types only: an object that equals everything does not pass.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import chain, islice
from typing import Any, cast

MAX_DEPTH = 100
"""Containers inside each other; deeper values are an error."""
_BIG = 1 << 14_000
"""Larger integers are written in hex: Python limits decimal digits, whose conversion is slow."""
_LISTED = ("collections.deque", "array.array", "builtins.dict_values", "builtins.dict_items")
_USER = ("Dict", "List", "String")
_LONG_RANGE, _EQUAL_HASHES, _EXPONENT = 1_000_000, 100, 10_000
_WRITE: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "builtins.list": ("", lambda v: [*list.__iter__(v)]),
    "builtins.str": ("", str.__str__),
    "builtins.int": ("", int.__int__),
    "builtins.float": ("", float.__float__),
    "builtins.tuple": ("tuple", lambda v: [*tuple.__iter__(v)]),
    "builtins.dict": ("dict", lambda v: [*chain.from_iterable(dict.items(v))]),
    "builtins.set": ("set", lambda v: [*set.__iter__(v)]),
    "builtins.frozenset": ("frozenset", lambda v: [*frozenset.__iter__(v)]),
    "builtins.complex": ("complex", lambda v: [v.real, v.imag]),
    "builtins.range": ("range", lambda v: [v.start, v.stop, v.step]),
    "builtins.dict_keys": ("frozenset", list),
    "decimal.Decimal": ("decimal", str),
    "fractions.Fraction": ("fraction", lambda v: [v.numerator, v.denominator]),
    **dict.fromkeys(("builtins.bytes", "builtins.bytearray"), ("bytes", lambda v: bytes(v).hex())),
    **dict.fromkeys(_LISTED, ("deque", list)),
    **dict.fromkeys(("builtins.mappingproxy", "collections.ChainMap"), ("", dict)),
    **dict.fromkeys((f"collections.User{n}" for n in _USER), ("", lambda v: v.data)),
    **dict.fromkeys(("numpy.ndarray", "numpy.generic"), ("", lambda v: v.tolist())),
}
"""How a type's value is written: the kind, and its content; `""`: the content stands for it. By
name, because a box must not import what the program does not use."""


class NotJsonError(ValueError):
    """A value that cannot leave the box, or text that `dumps` would not have written."""


def dumps(value: Any, limit: int) -> str:
    """The text of a value; a value that is used up by reading (a generator) is an iterator outside.

    Raises `NotJsonError` for an object of another type, a cycle (by its depth), and text of more
    than `limit` bytes; `UnicodeEncodeError` for half a surrogate pair.
    """
    plain = _plain(value, 0, [limit])
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if len(text.encode()) > limit:
        raise NotJsonError(f"the returned value is longer than {limit} bytes")
    return text


def _plain(value: Any, depth: int, budget: list[int]) -> Any:
    """The value in JSON types; `budget` counts down, so that sharing is bounded."""
    kind: Any = type(value)
    budget[0] -= len(value) if kind is str else 1
    if budget[0] < 0:
        raise NotJsonError("the returned value is too long")
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_BIG < value < _BIG else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if depth >= MAX_DEPTH:
        raise NotJsonError(f"the returned value is nested deeper than {MAX_DEPTH}")
    tag, content = _content(value, kind, budget[0])
    if not tag and type(content) is not list:
        return _plain(content, depth + 1, budget)
    if type(content) is list:
        content = [_plain(item, depth + 1, budget) for item in content]
    return {tag: content} if tag else content


def _content(value: Any, kind: Any, left: int) -> tuple[str, Any]:
    for base in kind.__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if name in _WRITE:
            tag, content = _WRITE[name]
            return tag, content(value)
    if hasattr(kind, "__next__"):
        return "iterator", [*islice(value, left + 1)]
    raise NotJsonError(f"a value of type {kind.__name__} cannot be compared")


def loads(text: str) -> Any:
    """The value of a text; raises `NotJsonError` for what `dumps` would not have written."""
    try:
        return _made(json.loads(text, parse_constant=_refuse, object_pairs_hook=tuple), 0)
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise NotJsonError(f"no value of a program: {error}") from error


def _made(item: Any, depth: int) -> Any:
    if isinstance(item, str):
        item.encode()  # printing a lone surrogate would fail
    elif isinstance(item, float) and not math.isfinite(item):
        raise NotJsonError(f"{item} is not a JSON value")
    elif isinstance(item, list | tuple):
        if depth > MAX_DEPTH:
            raise NotJsonError(f"nested deeper than {MAX_DEPTH}")
        if isinstance(item, list):
            return [_made(part, depth + 1) for part in cast("list[Any]", item)]
        ((tag, content),) = cast("tuple[Any, ...]", item)
        if not isinstance(content, list | str):
            raise NotJsonError("no value of a program")
        return _READ[tag](_made(content, depth))
    return item


def _hashed(items: Sequence[Any]) -> Sequence[Any]:
    """Refuses keys chosen to have one hash: a set of them takes quadratic time."""
    found: dict[int, int] = {}
    for key in map(hash, items):
        found[key] = found.get(key, 0) + 1
    if max(found.values(), default=0) > _EQUAL_HASHES:
        raise NotJsonError("too many keys with the same hash")
    return items


def _dict(items: Sequence[Any]) -> dict[Any, Any]:
    return dict(zip(_hashed(items[::2]), items[1::2], strict=True))


def _decimal(text: Any) -> Any:
    made = import_module("decimal").Decimal(text)
    if made.is_snan() or (made.is_finite() and abs(made.adjusted()) > _EXPONENT):
        raise NotJsonError("a Decimal out of bounds")  # its conversion to int would never end
    return made


def _refuse(name: str) -> Any:
    raise NotJsonError(f"{name} is not a JSON value")


_READ: Mapping[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "tuple": tuple,
    "dict": _dict,
    "set": lambda items: set(_hashed(items)),
    "frozenset": lambda items: frozenset(_hashed(items)),
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda bounds: range(*bounds)[:_LONG_RANGE],  # reading a longer one takes too long
    "iterator": iter,
    "deque": deque,
    "decimal": _decimal,
    "fraction": lambda parts: import_module("fractions").Fraction(*map(int.__index__, parts)),
}
