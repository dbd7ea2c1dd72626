"""Programming problems and their test cases.

A `Case` separates the two sides of a test: `test` enters the sandbox with the model's program;
`verdict`, the expected observation, never does.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from sdpo_jax.environments.sandbox.protocol import Limits, Test


class Equals(NamedTuple):
    """The observed value has to equal this one."""

    expected: Any
    tuples: bool = False
    """Whether a tuple equals a list: what was written as JSON has no tuples."""


class Prints(NamedTuple):
    """Standard output has to equal this text, except for white space and spellings of numbers."""

    expected: str
    lines: bool = False
    """Whether the lines have to be the same, as LiveCodeBench compares them."""


class Holds(NamedTuple):
    """This expression has to be true of the observed values `_0`, `_1`, ...

    It is evaluated by `expressions.evaluate`, not by Python.
    """

    expression: str


class InBox(NamedTuple):
    """The test decides inside the sandbox, where the program could tamper with it: no exception."""


Verdict = Equals | Prints | Holds | InBox


class Case(NamedTuple):
    """One test."""

    test: Test
    verdict: Verdict
    input: str
    """The input as feedback shows it."""
    expected: str
    """The expected result as feedback shows it."""
    public: bool = False
    """Whether the question itself shows the case; then feedback may always show it."""


class Problem(NamedTuple):
    """A question with its tests."""

    id: str
    question: str
    cases: tuple[Case, ...]
    prelude: str = ""
    """Source that runs before the program and does not count in its line numbers."""
    limits: Limits = Limits()
    reference: str = ""
    """A response that passes, if one is known."""
    difficulty: str = ""
    """The dataset's label, such as `hard`; evaluation splits accuracy by it."""


def public_cases(problem: Problem, share: float, seed: int) -> tuple[int, ...]:
    """Sorted indices of the cases that training and feedback may use, determined by the seed.

    They are the cases that the question shows, filled up at random to ⌊share · n⌋, at least one.
    The reference (`data/split_tests.py`) draws half of the hidden tests with one generator for all
    problems, so that removing a problem changes the draws of the others; here each problem has its
    own generator.
    """
    count = max(1, int(share * len(problem.cases)))
    shown = [i for i, case in enumerate(problem.cases) if case.public]
    others = [i for i, case in enumerate(problem.cases) if not case.public]
    random.Random(f"public_cases:{seed}:{problem.id}").shuffle(others)
    return tuple(sorted([*shown, *others[: max(0, count - len(shown))]]))


def split(problems: Sequence[Problem], held_out_share: float, seed: int) -> list[list[Problem]]:
    """Splits problems into training and held-out ones; both keep the order of `problems`."""
    order = list(range(len(problems)))
    random.Random(f"split:{seed}").shuffle(order)
    held_out = set(order[: round(held_out_share * len(problems))])
    return [
        [p for i, p in enumerate(problems) if (i in held_out) == wanted] for wanted in (False, True)
    ]
