"""Fields of the settings classes: permitted ranges, and whether a resumed run may change them."""

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Range(NamedTuple):
    """The permitted values of a number. NaN is in no range."""

    holds: Callable[[Any], bool]
    words: str
    """The range as an error message states it, after "expected"."""


class Problem(NamedTuple):
    """A setting that does not fit the others."""

    key: str
    """`SECTION.NAME`."""
    expected: str
    """What its value would have to be, as an error message states it after "expected"."""
    others: tuple[str, ...] = ()
    """Keys of the other settings that take part: where one of them is wrong by itself, this problem
    is only its consequence and is not reported."""


def setting(default: T, permitted: Range | None = None, *, may_change: bool = False) -> T:
    """A dataclass field with a default. Every number needs a range.

    Args:
      default: of the field.
      permitted: the values that a recipe may give it.
      may_change: whether a run may resume with another value: it affects where the run writes, how
        far it goes, or how the machine splits the same sums, but not the result.
    """
    return field(default=default, metadata={"range": permitted, "may_change": may_change})


def at_least(minimum: float) -> Range:
    """Finite numbers from `minimum` up."""
    words = f"at least {minimum}" if minimum else "0 or more"
    return Range(lambda value: minimum <= value < math.inf, words)


def above(bound: float) -> Range:
    """Numbers above `bound`; infinity, which switches a cap off, is one."""
    return Range(lambda value: value > bound, f"above {bound}")


def between(low: float, high: float) -> Range:
    """Numbers from `low` to `high`, both included."""
    return Range(lambda value: low <= value <= high, f"from {low} to {high}")


POSITIVE = Range(lambda value: 0 < value < math.inf, "above 0, finite")
POSITIVE_SHARE = Range(lambda value: 0 < value <= 1, "above 0, at most 1")
PROPER_SHARE = Range(lambda value: 0 < value < 1, "above 0 and below 1")
FINITE = Range(math.isfinite, "a finite number")
SEED = between(0, 2**32 - 1)
