"""Programming problems: what is asked, what runs in the sandbox, what is then expected of it.

A `Case` keeps the two sides of a test apart. `test` goes into the sandbox with the model's program;
`verdict` never does: it says outside what the observation must be.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from sdpo_jax.environments.sandbox.protocol import Limits, Test


class Equals(NamedTuple):
    """The value observed has to be this one."""

    expected: Any


class Prints(NamedTuple):
    """Standard output has to be this text, white space apart."""

    expected: str


class Holds(NamedTuple):
    """This expression has to be true of the list of values observed, `_0`, `_1`, ...

    It is evaluated by `expressions.evaluate`, not by Python.
    """

    expression: str


class InBox(NamedTuple):
    """The test itself decides, where the program could tamper with it: it has to end in peace."""


Verdict = Equals | Prints | Holds | InBox


class Case(NamedTuple):
    """One test."""

    test: Test
    verdict: Verdict
    input: str
    """As feedback shows it."""
    expected: str
    """As feedback shows it."""
    public: bool = False
    """Shown in the question itself; feedback may show it whatever the seed says."""


class Problem(NamedTuple):
    """A question with its tests."""

    id: str
    question: str
    cases: tuple[Case, ...]
    prelude: str = ""
    """Source that runs before the program; the program's line numbers do not count it."""
    limits: Limits = Limits()
    reference: str = ""
    """A response that passes, where one is known."""
    difficulty: str = ""
    """As the data say, such as `hard`; evaluation splits accuracy by it."""


def public_cases(problem: Problem, share: float, seed: int) -> tuple[int, ...]:
    """Which cases training and feedback may use: sorted indices, the same for the same seed.

    Those that the question shows, filled up at random to ⌊share · n⌋, at least one. The reference
    (`data/split_tests.py`) draws half of the hidden tests with one generator over all problems, so
    that leaving out a problem changes those after it; here each problem has its own.
    """
    count = max(1, int(share * len(problem.cases)))
    shown = [i for i, case in enumerate(problem.cases) if case.public]
    others = [i for i, case in enumerate(problem.cases) if not case.public]
    random.Random(f"public_cases:{seed}:{problem.id}").shuffle(others)
    return tuple(sorted([*shown, *others[: max(0, count - len(shown))]]))


def split(problems: Sequence[Problem], held_out_share: float, seed: int) -> list[list[Problem]]:
    """Problems to learn from and problems to evaluate on, disjoint, in their own order."""
    order = list(range(len(problems)))
    random.Random(f"split:{seed}").shuffle(order)
    held_out = set(order[: round(held_out_share * len(problems))])
    return [
        [p for i, p in enumerate(problems) if (i in held_out) == wanted] for wanted in (False, True)
    ]
