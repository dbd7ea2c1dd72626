"""Programs through the real sandbox: honest ones pass, wrong and lying ones get nothing."""

import pytest

from sdpo_jax.environments.base import (
    GradesBatches,
    GradesTruncated,
    GradesTruncatedBatches,
    HasReferences,
)
from sdpo_jax.environments.code.feedback import CUT_OFF, NO_PROGRAM
from sdpo_jax.environments.code.problems import Case, Equals, InBox, Prints, Problem
from sdpo_jax.environments.grading import Grader
from sdpo_jax.environments.kinds.code import Code
from sdpo_jax.environments.sandbox import open_sandbox
from sdpo_jax.environments.sandbox.protocol import Call, Check, Limits, Observation, Run
from sdpo_jax.errors import UserError

LIMITS = Limits(cpu_seconds=1.0, wall_seconds=5.0)
DOUBLE = Problem(
    "double",
    "Double a number.",
    tuple(Case(Call("double", (n,)), Equals(2 * n), f"{n}", f"{2 * n}") for n in (1, 5, 70, 900)),
    limits=LIMITS,
)
SUM = Problem(
    "sum",
    "Add the numbers.",
    tuple(Case(Run(f"{n} 1\n"), Prints(f"{n + 1}\n"), f"{n} 1", f"{n + 1}") for n in (4, 50)),
    limits=LIMITS,
)
CHECKED = Problem(
    "checked",
    "Double a number.",
    (
        Case(Call("double", (2,)), Equals(4), "2", "4"),
        Case(Check("assert double(3) == 6"), InBox(), "assert double(3) == 6", "no exception"),
    ),
    limits=LIMITS,
)
WITH_PRELUDE = DOUBLE._replace(
    id="prelude", prelude="import math\ndef helper(n):\n    return 2 * n"
)
PROBLEMS = {p.id: p for p in (DOUBLE, SUM, CHECKED, WITH_PRELUDE)}


@pytest.fixture(scope="module")
def sandbox():
    box = open_sandbox("unsafe-local", slots=2)
    yield box
    box.close()


def fenced(source):
    return f"Here it is.\n\n```python\n{source}\n```"


def make(sandbox, **options):
    problems = list(PROBLEMS.values())
    return Code(problems, problems, sandbox=sandbox, **options)


def grade_all(environment, pairs):
    by_id = {prompt.id: prompt for prompt in environment.held_out}
    prompts = [by_id[name] for name, _ in pairs]
    return environment.grade_many(prompts, [fenced(source) for _, source in pairs])


HONEST = [
    ("double", "def double(n):\n    return n * 2"),
    ("double", "class Solution:\n    def double(self, n: int) -> int:\n        return n + n"),
    (
        "double",
        "import functools, sys\ndef double(n):\n    try:\n        raise ValueError\n"
        "    except ValueError:\n        return divmod(n * 4, 2)[0]",
    ),
    ("sum", "a, b = map(int, input().split())\nprint(a + b)"),
    (
        "sum",
        "import sys\ndef main():\n    print(*[sum(map(int, sys.stdin.read().split()))])\n"
        "if __name__ == '__main__':\n    main()\n    sys.exit(0)",
    ),
    ("checked", "double = lambda n: n * 2"),
    ("prelude", "def double(n):\n    return helper(int(math.fabs(n)))"),
    ("prelude", "from __future__ import annotations\ndef double(n: Unknown):\n    return 2 * n"),
]


def test_a_prompt_carries_the_difficulty_of_its_problem(sandbox):
    made = Code([], [DOUBLE, SUM._replace(difficulty="hard")], sandbox=sandbox)
    assert [prompt.data["difficulty"] for prompt in made.held_out] == ["", "hard"]


def test_honest_programs_pass(sandbox):
    for (name, source), outcome in zip(HONEST, grade_all(make(sandbox), HONEST), strict=True):
        assert outcome.passed and outcome.reward == 1.0 and outcome.feedback == "", (
            source,
            outcome,
        )
        assert outcome.metrics == {
            "tests_passed": 1.0,
            "well_formed": 1.0,
            "trust_in_box": 0.5 if name == "checked" else 0.0,
            "timed_out": 0.0,
        }


ALWAYS = """
class Always(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __repr__(self): return "2"
def double(n):
    return Always(n)
"""
FRAMES = """
import sys, gc
def found(n):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    for item in [*seen, *gc.get_objects()]:
        if isinstance(item, dict) and "expected" in item:
            return item["expected"]
    for item in [*seen, *gc.get_objects()]:
        value = getattr(item, "expected", None)
        if value is not None:
            return value
    return n
def double(n):
    try:
        return found(n)
    except Exception:
        return n
"""
LYING = [
    ("double", ALWAYS),
    ("double", "class A:\n    def __eq__(self, o): return True\ndef double(n):\n    return A()"),
    ("double", FRAMES),
    ("double", "import os\nos._exit(0)"),
    ("double", "import os\ndef double(n):\n    os._exit(0)"),
    ("double", "import sys\ndef double(n):\n    sys.exit(0)"),
    ("double", "def double(n):\n    print(2 * n)"),
    (
        "double",
        "def double(n):\n    print('done')\n    print('{\"status\": \"done\"}')\n    return True",
    ),
    ("double", "import json\njson.dumps = lambda *a, **k: '2'\ndef double(n):\n    return n"),
    (
        "double",
        "import builtins\nbuiltins.isinstance = lambda *a: True\ndef double(n):\n    return n",
    ),
    ("double", "def double(n):\n    return float('nan')"),
    ("double", "def double(n):\n    return 2 if n == 1 else 10"),  # the first tests alone
    ("double", "def double(n):\n    return str(2 * n)"),
    ("double", "def triple(n):\n    return 2 * n"),
    ("sum", "import os\nprint(5)\nos._exit(0)"),
    ("sum", "print('5\\n51')"),
    ("sum", "raise SystemExit(0)"),
    ("sum", "import sys\nsys.stdout.write('5')"),
    ("checked", "import builtins\ndef double(n):\n    raise SystemExit(0)"),
    ("checked", "import os\ndef double(n):\n    if n == 3:\n        os._exit(0)\n    return 2 * n"),
]


def test_wrong_and_lying_programs_get_nothing(sandbox):
    for (_, source), outcome in zip(LYING, grade_all(make(sandbox), LYING), strict=True):
        assert outcome.reward == 0.0 and not outcome.passed and outcome.graded, (source, outcome)
        assert outcome.feedback


def test_a_program_can_only_lie_where_the_test_runs_inside(sandbox):
    lie = (
        "class A:\n    def __eq__(self, o): return True\n"
        "def double(n):\n    return A() if n == 3 else 4"
    )
    (outcome,) = grade_all(make(sandbox), [("checked", lie)])
    # This is what `trust_in_box` counts, and why asserts are converted.
    assert outcome.passed and outcome.metrics["trust_in_box"] == 0.5


def test_a_loop_is_timed_out_and_told_so(sandbox):
    quick = SUM._replace(cases=SUM.cases[:1], limits=LIMITS._replace(cpu_seconds=0.25))
    environment = Code([quick], [], sandbox=sandbox)
    outcome = environment.grade(environment.train[0], fenced("while True:\n    pass"))
    assert outcome.feedback.startswith("Time Limit Exceeded\nIt may use 0.25 s of processor time")
    assert outcome.metrics["timed_out"] == 1.0 and outcome.reward == 0.0


def test_real_errors_have_the_programs_own_lines(sandbox):
    source = "def inner(n):\n    return 1 / 0\ndef double(n):\n    return inner(n)"
    pairs = [("double", source), ("prelude", source), ("double", "def double(n)\n    return n")]
    plain, after_prelude, syntax = grade_all(make(sandbox, public_share=1.0), pairs)
    assert (
        plain.feedback
        == after_prelude.feedback
        == (
            "Runtime Error\nZeroDivisionError: division by zero\nLine 4 in double (Solution.py)\n"
            "Line 2 in inner (Solution.py)\n\nOn Input\n1"
        )
    )
    assert syntax.feedback.startswith("Runtime Error\nSyntaxError: expected ':'\nLine 1 in")


def test_training_runs_the_public_tests_and_evaluation_all_of_them(sandbox):
    environment = make(sandbox, show_expected=True)
    train, held_out = environment.train[0], environment.held_out[0]
    shown = [DOUBLE.cases[i] for i in train.data["task"].graded]
    assert len(shown) == 2
    known = {case.test.arguments[0]: case.verdict.expected for case in shown}
    cheat = fenced(f"def double(n):\n    return {known!r}.get(n, -1)")
    assert environment.grade(train, cheat).passed
    outcome = environment.grade(held_out, cheat)
    assert not outcome.passed and outcome.metrics["tests_passed"] == 0.5
    assert outcome.feedback == "All visible tests pass, a hidden test does not: Wrong Answer"
    assert make(sandbox, public_share=1.0).train[0].data["task"].graded == (0, 1, 2, 3)


def test_no_hidden_test_shows_in_feedback(sandbox):
    environment = make(sandbox)
    prompt = environment.held_out[0]
    hidden = set(prompt.data["task"].graded) - prompt.data["task"].visible
    sources = ["def double(n):\n    return 0", "def double(n):\n    raise KeyError(n)", "pass"]
    for outcome in environment.grade_many([prompt] * 3, [fenced(s) for s in sources]):
        for i in hidden:
            assert f"\n{DOUBLE.cases[i].input}\n" not in f"{outcome.feedback}\n"


def test_reward_is_sparse_unless_a_fraction_is_wanted(sandbox):
    half = [("double", "def double(n):\n    return 2 * n if n < 50 else 0")]
    (sparse,) = grade_all(make(sandbox), half)
    (fraction,) = grade_all(make(sandbox, reward="fraction"), half)
    assert (sparse.reward, fraction.reward) == (0.0, 0.5)
    assert sparse.metrics == fraction.metrics and not fraction.passed


def test_expected_values_are_shown_unless_switched_off(sandbox):
    wrong = [("sum", "print(0)")]
    (shown,) = grade_all(make(sandbox, public_share=1.0), wrong)
    (kept,) = grade_all(make(sandbox, public_share=1.0, show_expected=False), wrong)
    assert "Expected\n5" in shown.feedback
    assert "Expected" not in kept.feedback and "\n51" not in kept.feedback


def test_a_response_without_a_program_never_reaches_the_sandbox():
    class Closed:
        tier = "closed"

        def run(self, programs):
            assert not programs
            return []

        def close(self):
            pass

    environment = make(Closed())
    prompt = environment.train[0]
    outcome = environment.grade(prompt, "I do not know.")
    assert outcome.feedback == NO_PROGRAM and outcome.metrics["well_formed"] == 0.0
    assert environment.grade(prompt, "```python\ndef double(n):").feedback == CUT_OFF
    assert environment.grade_truncated(prompt, "Let me think about").feedback == CUT_OFF


def test_a_truncated_response_with_a_whole_program_is_judged_by_it(sandbox):
    environment = make(sandbox)
    answer = fenced("def double(n):\n    return n * 2") + "\n\nThis works bec"
    assert environment.grade_truncated(environment.train[0], answer).passed


class Counting:
    """The real one; notes how many programs came at a time."""

    tier = "counting"

    def __init__(self, sandbox):
        self._sandbox, self.batches = sandbox, []

    def run(self, programs):
        self.batches.append(len(programs))
        return self._sandbox.run(programs)

    def close(self):
        pass


def test_truncated_responses_of_a_batch_go_to_the_sandbox_together(sandbox):
    counting = Counting(sandbox)
    environment = make(counting)
    right, wrong = (fenced(f"def double(n):\n    return n * {k}") for k in (2, 3))
    texts = [right, "Let me think", wrong, right, right]
    cut = [True, True, True, False, True]
    outcomes = Grader(environment)([environment.train[0]] * len(texts), texts, cut)
    assert counting.batches == [1, 3]
    one_by_one = [
        (environment.grade_truncated if is_cut else environment.grade)(environment.train[0], text)
        for text, is_cut in zip(texts, cut, strict=True)
    ]
    assert outcomes == one_by_one
    assert [o.passed for o in outcomes] == [True, False, False, True, True]
    assert outcomes[1].feedback == CUT_OFF


class Broken:
    """Runs as the real one, and then loses the observations of some tests."""

    tier = "broken"

    def __init__(self, sandbox, lost):
        self._sandbox, self._lost = sandbox, lost

    def run(self, programs):
        gone = Observation("infrastructure", error="the box did not start")
        return [
            [gone if i in self._lost else o for i, o in enumerate(seen)]
            for seen in self._sandbox.run(programs)
        ]

    def close(self):
        pass


def test_a_failure_of_the_sandbox_is_no_wrong_answer(sandbox):
    right = [("double", "def double(n):\n    return 2 * n")]
    (outcome,) = grade_all(make(Broken(sandbox, {1})), right)
    assert not outcome.graded and "the box did not start" in outcome.feedback
    wrong = [("double", "def double(n):\n    return 0")]
    (settled,) = grade_all(make(Broken(sandbox, {1})), wrong)
    assert settled.graded and settled.reward == 0.0
    (open_,) = grade_all(make(Broken(sandbox, {1}), reward="fraction"), wrong)
    assert not open_.graded


def test_settings_that_make_no_sense_are_refused(sandbox):
    for share in (0.0, 1.5):
        with pytest.raises(UserError, match=r"public_share: .* at most 1"):
            make(sandbox, public_share=share)
    with pytest.raises(UserError, match=r"reward: .*sparse"):
        make(sandbox, reward="dense")
    with pytest.raises(UserError, match="no tests"):
        Code([Problem("empty", "?", ())], [], sandbox=sandbox)
    with pytest.raises(UserError, match="'double' has no known solution"):
        environment = make(sandbox)
        environment.reference(environment.train[0])


def test_it_offers_what_the_grader_looks_for(sandbox):
    environment = make(sandbox)
    assert isinstance(environment, GradesBatches)
    assert isinstance(environment, GradesTruncated)
    assert isinstance(environment, GradesTruncatedBatches)
    assert isinstance(environment, HasReferences)
