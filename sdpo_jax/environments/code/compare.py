"""Compares an observation with the expected result, outside the sandbox.

Values are compared by `values.same_value`, printed text by one of two rules:

* LiveCodeBench's for its rows: as many lines, stripped; a line has to be equal, or its words have
  to be equal decimal numbers (`2.50` is `2.5`, `0.333333` is not `0.333333333`).
* For other rows, whose origin is not known: the same words, as in the SDPO reference, which reads a
  line break as a blank. Numbers may be spelled in another way, and an expected number with a point
  or an exponent has the tolerance of `values.same_value`. The reference compares text, and drops a
  final `-` of the expected text.
"""

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, cast

from sdpo_jax.environments.code.expressions import EvaluationError, evaluate_text
from sdpo_jax.environments.code.problems import Case, Equals, Holds, InBox, Prints
from sdpo_jax.environments.code.values import close, same_value
from sdpo_jax.environments.sandbox.protocol import Observation


def passes(case: Case, observation: Observation) -> bool:
    """Whether an observation with status `done` satisfies the case; any other status fails."""
    if observation.status != "done":
        return False
    match case.verdict:
        case Equals(expected, tuples):
            return same_value(observation.value, expected, tuples=tuples)
        case Prints(expected, lines):
            return (same_lines if lines else same_words)(observation.stdout, expected)
        case Holds(expression):
            return _holds(expression, observation.value)
        case InBox():
            return True


def same_lines(given: str, expected: str) -> bool:
    """Whether two texts have the same lines, or numbers in them that are equal as decimals."""
    ours, theirs = (text.strip().split("\n") for text in (given, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def same_words(given: str, expected: str) -> bool:
    """Whether two texts have the same words in the same order, numbers up to the tolerance."""
    ours, theirs = given.split(), expected.split()
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_line(given: str, expected: str) -> bool:
    if given.strip() == expected.strip():
        return True
    numbers = [[_number(word) for word in line.split()] for line in (given, expected)]
    return numbers[0] == numbers[1] and None not in numbers[0]


def _same_word(given: str, expected: str) -> bool:
    if given == expected:
        return True
    one, other = _number(given), _number(expected)
    if one is None or other is None:
        return False
    # An integer is exact however long it is.
    is_exact = expected.lstrip("+-").isdigit()
    return one == other or (not is_exact and close(float(one), float(other)))


def _number(word: str) -> Decimal | None:
    try:
        number = Decimal(word)
    except (InvalidOperation, ValueError):
        return None
    # Infinite numbers and nan equal only themselves as text.
    return number if number.is_finite() else None


def _holds(expression: str, value: Any) -> bool:
    values = cast("Sequence[Any]", value) if isinstance(value, list) else ()
    try:
        return bool(evaluate_text(expression, {f"_{i}": item for i, item in enumerate(values)}))
    except EvaluationError:
        return False
