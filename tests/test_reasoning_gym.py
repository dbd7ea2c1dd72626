"""reasoning-gym end to end: oracles pass, wrong answers fail with feedback, no answer runs."""

import hashlib
import inspect
import os
import re
import subprocess
import sys
from importlib import util

import pytest

from sdpo_jax.environments.kinds.reasoning_gym import (
    EXACT,
    GUARDS,
    UNSTEADY,
    ReasoningGym,
    form_of,
    is_expression,
    is_literal,
)
from sdpo_jax.errors import UserError

needs_package = pytest.mark.skipif(
    util.find_spec("reasoning_gym") is None, reason="needs pip install reasoning-gym"
)
WRONG = {
    "basic_arithmetic": "-1e9",
    "gcd": "0",
    "spell_backward": "x",
    "number_sorting": "[]",
    "rotate_matrix": "0",
    "fraction_simplification": "1/1",
    "n_queens": "_",
    "simple_integration": "X",
    "game_of_life_halting": "definitely",
    "prime_factorization": "two",
    "string_insertion": "['A']",
}
"""A generator of each kind of answer and scorer, with an answer that is wrong for every puzzle."""


@pytest.fixture(scope="module")
def made():
    pytest.importorskip("reasoning_gym")
    return ReasoningGym(tuple(WRONG), 44, 22, seed=3)


def of(made, family):
    return next(prompt for prompt in made.train if prompt.data["family"] == family)


@needs_package
@pytest.mark.parametrize("family", WRONG)
def test_the_oracle_passes_and_a_wrong_answer_fails_with_feedback(family, made):
    prompts = [p for p in (*made.train, *made.held_out) if p.data["family"] == family]
    assert len(prompts) == 6
    for prompt in prompts:
        for grade in (made.grade, made.grade_truncated):
            right = grade(prompt, f"Let me see. {made.reference(prompt)}")
            assert right == (1.0, True, "", {"well_formed": 1.0}, True)
        wrong = made.grade(prompt, f"<answer>{WRONG[family]}</answer>")
        assert wrong.reward < 0.2 and not wrong.passed and wrong.feedback
        oracle = prompt.data["entry"]["answer"]
        assert len(oracle) < 3 or oracle not in wrong.feedback


@needs_package
def test_a_part_of_the_answer_is_rewarded_and_named_as_a_number(made):
    prompt = of(made, "spell_backward")
    oracle = prompt.data["entry"]["answer"]
    outcome = made.grade(prompt, f"<answer>{oracle}s</answer>")
    assert 0 < outcome.reward < 1 and not outcome.passed
    assert outcome.feedback.endswith(f"is partly right: it scores {outcome.reward:.2f} of 1.")


@needs_package
def test_sides_are_disjoint_and_the_seed_decides_them(made):
    questions = [{p.messages[0]["content"] for p in side} for side in (made.train, made.held_out)]
    assert not questions[0] & questions[1]
    assert (len(questions[0]), len(questions[1])) == (44, 22)
    again, other = (ReasoningGym(("gcd", "lcm"), 6, 3, seed) for seed in (3, 4))
    assert again.train == ReasoningGym(("gcd", "lcm"), 6, 3, 3).train != other.train
    longer = ReasoningGym(("gcd",), 30, 9, 3)
    held_out = {p.messages[0]["content"] for p in longer.held_out}
    assert not held_out & {p.messages[0]["content"] for p in again.train}


_DIGEST = (
    "import hashlib; from sdpo_jax.environments.kinds.reasoning_gym import ReasoningGym; "
    "e = ReasoningGym({names!r}, 44, 22, seed=3); "
    "print(hashlib.sha256(repr([(p.id, p.messages) for p in [*e.train, *e.held_out]])"
    ".encode()).hexdigest())"
)


@needs_package
def test_another_process_makes_the_same_prompts(made):
    text = repr([(p.id, p.messages) for p in [*made.train, *made.held_out]])
    code = _DIGEST.format(names=tuple(WRONG))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert out.strip() == hashlib.sha256(text.encode()).hexdigest()


@needs_package
def test_no_answer_runs_as_code(tmp_path):
    families = ("n_queens", "spiral_matrix", "binary_matrix", "string_insertion", "countdown")
    assert all(GUARDS[name] != "harmless" for name in families)
    made = ReasoningGym(families, 5, 0)
    path = tmp_path / "made"
    for prompt in made.train:
        for code in (
            f"open({str(path)!r}, 'w')",
            f"__import__('os').mkdir({str(path)!r})",
            f"[open({str(path)!r}, 'w') for x in '1']",
            f"(lambda: open({str(path)!r}, 'w'))()",
            f'S(\'open("{path}", "w")\')',
        ):
            assert not made.grade(prompt, f"<answer>{code}</answer>").passed
            assert not path.exists()


@needs_package
def test_every_scorer_that_evaluates_is_known():
    from reasoning_gym.factory import DATASETS

    evaluating = {
        name
        for name, (dataset, _) in DATASETS.items()
        if re.search(r"\b(eval|exec|parse_expr|sympify)\(", inspect.getsource(dataset))
    }
    assert evaluating == set(GUARDS)
    assert set(DATASETS) >= EXACT and set(DATASETS) >= UNSTEADY


@pytest.mark.parametrize(
    "text", ["1", "-1.5", "['a', 'b']", "[[1, 2], (3,)]", "_ _ Q\n_ Q _", "ABC", "1 2 3", "a b("]
)
def test_literals_and_what_is_no_python_may_be_evaluated(text):
    assert is_literal(text)


@pytest.mark.parametrize(
    "text",
    ["f()", "[f()]", "a.b", "a[0]", "[x for x in y]", "lambda: 1", "f'{a}'", "1 + 1", "2 ** 9"],
)
def test_anything_else_may_not(text):
    assert not is_literal(text)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("6*(98 - 54) - 34/66", True),
        ("-exp(x)*sin(x) + C", True),
        ("x**9 + x**8 + x**7 + x**6 + x**5", True),
        ("exp(x**2)", True),
        ("2**1000", True),
        ("2**1001", False),
        ("9**9**9", False),
        ("((9**99)**99)**99", False),
        ("1e99", False),
        ("open('x')", False),
        ("xy", False),
        ("x.y", False),
        ("S(1)", False),
        ("factorial(9)", False),
        ("exp(x, y)", False),
        ("x[0]", False),
        ("x; y", False),
        ("x # y", False),
        ("\u2179", False),
        ("1+" * 300 + "1", False),
        ("(" * 399, False),
    ],
)
def test_only_short_arithmetic_reaches_computer_algebra(text, safe):
    assert is_expression(text) == safe


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("-12", "a whole number"),
        ("4.5e-3", "a number"),
        ("[1, 2]", "a list in square brackets"),
        ("yes", None),
        ("1/2", None),
        (None, None),
    ],
)
def test_the_form_of_an_answer(answer, form):
    assert form_of(answer) == form


@needs_package
@pytest.mark.parametrize(
    ("generators", "counts", "message"),
    [
        (["basic_arithmetics"], (1, 1), "unknown 'basic_arithmetics'; near it: basic_arithmetic"),
        (["qqqqqq"], (1, 1), "unknown 'qqqqqq'; known: ab, acre"),
        (["composite"], (1, 1), "unknown 'composite'"),
        (["ransom_note"], (1, 1), "'ransom_note' makes other puzzles in every process"),
        ([], (1, 1), "none given"),
        (["coin_flip"], (5000, 5000), "'coin_flip' makes about"),
    ],
)
def test_what_cannot_be_made_is_one_clear_error(generators, counts, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ReasoningGym(generators, *counts)


@needs_package
def test_a_generator_without_an_oracle_says_so():
    made = ReasoningGym(["graph_color"], 1, 0)
    with pytest.raises(UserError, match="graph_color has no answers"):
        made.reference(made.train[0])


def test_without_the_package_one_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'reasoning-gym>="):
        ReasoningGym(["gcd"], 1, 1)
