"""Compares an observed value with the expected one, both decoded from JSON.

* A boolean equals only a boolean: `1` is not `true` (Python and LiveCodeBench accept it).
* A tuple equals a list, because JSON has no tuples.
* An expected integer needs an equal number: 2.0 equals 2 (the SDPO reference refuses it).
* An expected float tolerates a relative error of 1e-6 or an absolute one of 1e-9: the last digits
  depend on the order of operations, which no question fixes. (The reference compares the digits.)
* Strings, null, keys of objects and lengths have to be equal; nothing is converted.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

RELATIVE, ABSOLUTE = 1e-6, 1e-9


def same_value(given: Any, expected: Any) -> bool:
    """Whether `given` equals `expected`.

    The recursion is no deeper than `expected`, so a program cannot exhaust the stack.
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
