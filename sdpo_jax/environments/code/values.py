"""Compares an observed value with the expected one, and shows values.

Values are exact built-in types (`sandbox/values.py`), and `==` of Python decides: `True` is 1, a
tuple is no list, an expected integer needs an equal number, nan equals nothing. One departure: an
expected float tolerates a relative error of 1e-6 or an absolute one of 1e-9, because the last
digits depend on the order of operations, which no question fixes. (The reference compares the
digits.) Members of sets and keys are compared exactly.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

RELATIVE, ABSOLUTE = 1e-6, 1e-9


def same_value(given: Any, expected: Any, *, tuples: bool = False) -> bool:
    """Whether `given` equals `expected`; with `tuples` a tuple equals a list, as JSON has none.

    The recursion is no deeper than `expected`, so a program cannot exhaust the stack.
    """
    kinds = type(given), type(expected)
    if set(kinds) <= {list, tuple} and (tuples or kinds[0] is kinds[1]):
        ours, theirs = cast("Sequence[Any]", given), cast("Sequence[Any]", expected)
        return len(ours) == len(theirs) and all(
            same_value(*pair, tuples=tuples) for pair in zip(ours, theirs, strict=True)
        )
    if isinstance(given, dict) and isinstance(expected, dict):
        pairs, wanted = cast("dict[Any, Any]", given), cast("dict[Any, Any]", expected)
        return pairs.keys() == wanted.keys() and all(
            same_value(pairs[key], value, tuples=tuples) for key, value in wanted.items()
        )
    if type(expected) is float and hasattr(given, "__float__") and given != expected:
        return close(given, expected)
    return bool(given == expected)


def close(given: Any, expected: float) -> bool:
    """Whether a number is within the tolerance of a float."""
    try:
        near = math.isclose(given, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        return near and math.isfinite(expected)
    except (OverflowError, ValueError):  # an integer beyond every float
        return False


def shown(value: Any) -> str:
    """The value as Python source, the same in every process: members of sets are sorted."""
    kind = type(value)
    if kind is float and not math.isfinite(value):
        return f"float('{value}')"
    if kind is int:  # `repr` refuses numbers of more than 4,300 digits
        return repr(value) if value.bit_length() < 14_000 else hex(value)
    if kind is dict:
        return f"{{{', '.join(f'{shown(k)}: {shown(v)}' for k, v in value.items())}}}"
    if kind in (set, frozenset):
        inner = f"{{{', '.join(sorted(map(shown, value)))}}}" if value else ""
        return inner if kind is set and value else f"{kind.__name__}({inner})"
    if kind is list:
        return f"[{', '.join(map(shown, value))}]"
    if kind is tuple:
        return f"({', '.join(map(shown, value))}{',' if len(value) == 1 else ''})"
    return repr(value)
