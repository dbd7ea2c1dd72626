"""Whatever a response holds, a grader returns one verdict (a small part of `fuzz_graders.py`)."""

import itertools
import math

import fuzz_graders
import pytest

from sdpo_jax.environments.base import Outcome
from sdpo_jax.environments.template import Sums


def test_no_response_makes_a_grader_raise_or_change_its_mind():
    assert fuzz_graders.fuzz(fuzz_graders.environments(whole=False), 1500, seed=1) == []


@pytest.mark.slow
def test_many_responses_make_no_grader_raise_or_change_its_mind():
    assert fuzz_graders.fuzz(fuzz_graders.environments(whole=True), 100_000, seed=0) == []


COUNT = itertools.count()
FAULTS = {
    "raises": lambda text: int(text),
    "a changing reward": lambda text: Outcome(next(COUNT) % 7 / 7, False, "", {}),
    "a reward beyond 1": lambda text: Outcome(float(len(text)), False, "", {}),
    "no finite reward": lambda text: Outcome(math.nan, False, "", {}),
    "half a character": lambda text: Outcome(0.0, False, text, {}),
    "passes for nothing": lambda text: Outcome(0.0, True, "", {}),
    "not graded": lambda text: Outcome(0.0, False, "", {}, graded=False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    broken = Sums(0)
    setattr(broken, "grade", lambda prompt, response: FAULTS[fault](response))  # noqa: B010
    assert fuzz_graders.fuzz({"broken": broken}, 300, seed=1)
