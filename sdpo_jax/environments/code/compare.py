"""Compares an observation with the expected result, outside the sandbox.

Values are compared by `values.same_value`. Printed text (`same_output`) has to have the same words
between white space. Departures from the SDPO reference: it strips both ends and reads a line break
as a blank, so that a blank at the end of a line is an error, and it drops a final `-` of the
expected text. As in the reference, numbers in text are compared as written.
"""

from collections.abc import Sequence
from typing import Any, cast

from sdpo_jax.environments.code.expressions import EvaluationError, evaluate_text
from sdpo_jax.environments.code.problems import Case, Equals, Holds, InBox, Prints
from sdpo_jax.environments.code.values import same_value
from sdpo_jax.environments.sandbox.protocol import Observation


def passes(case: Case, observation: Observation) -> bool:
    """Whether an observation with status `done` satisfies the case; any other status fails."""
    if observation.status != "done":
        return False
    match case.verdict:
        case Equals(expected):
            return same_value(observation.value, expected)
        case Prints(expected):
            return same_output(observation.stdout, expected)
        case Holds(expression):
            return _holds(expression, observation.value)
        case InBox():
            return True


def same_output(given: str, expected: str) -> bool:
    """Whether two texts have the same words in the same order."""
    return given.split() == expected.split()


def _holds(expression: str, value: Any) -> bool:
    values = cast("Sequence[Any]", value) if isinstance(value, list) else ()
    try:
        return bool(evaluate_text(expression, {f"_{i}": item for i, item in enumerate(values)}))
    except EvaluationError:
        return False
