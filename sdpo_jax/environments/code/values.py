"""When a value that was observed is the one that was expected, both as JSON gives them.

* A boolean equals a boolean alone: `1` is not `true`. (Python and LiveCodeBench take it.)
* A tuple is a list: JSON knows no other.
* Against an expected integer a number has to be equal: 2.0 is 2 (the SDPO reference refuses it).
* Against an expected float a number may differ by 1e-6 of it, or by 1e-9: the last digits depend on
  the order of operations, which no question fixes. (The reference compares the digits.)
* Strings, null, keys of objects and lengths have to be the same; nothing is converted.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

RELATIVE, ABSOLUTE = 1e-6, 1e-9


def same_value(given: Any, expected: Any) -> bool:
    """Whether `given` counts as `expected`.

    Recursion goes no deeper than `expected`, which is ours, so a program cannot exhaust the stack.
    """
    if isinstance(given, list | tuple) and isinstance(expected, list | tuple):
        ours, theirs = cast("Sequence[Any]", given), cast("Sequence[Any]", expected)
        return len(ours) == len(theirs) and all(map(same_value, ours, theirs))
    if isinstance(given, dict) and isinstance(expected, dict):
        pairs, wanted = cast("dict[Any, Any]", given), cast("dict[Any, Any]", expected)
        return pairs.keys() == wanted.keys() and all(
            same_value(pairs[key], value) for key, value in wanted.items()
        )
    if type(expected) is float and type(given) in (int, float):
        return _close(given, expected)
    if type(expected) is int and type(given) in (int, float):
        return given == expected
    return type(given) is type(expected) and given == expected


def _close(given: Any, expected: float) -> bool:
    try:
        return math.isclose(given, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    except OverflowError:  # an integer beyond every float
        return False
