"""Equal answers pass, others do not, and what would never end is refused at once."""

import json
import time
from importlib import util

import pytest

from sdpo_jax.environments.kinds.math import (
    Math,
    Problem,
    load_math,
    parse_row,
    same_text,
    why_refused,
)
from sdpo_jax.environments.rows import BadRow
from sdpo_jax.errors import UserError

pytestmark = pytest.mark.skipif(
    util.find_spec("math_verify") is None, reason="needs pip install math-verify"
)


def grade(answer, response, **settings):
    made = Math([Problem("p", "How many?", answer)], [], **settings)
    return made.grade(made.train[0], response)


@pytest.mark.parametrize(
    ("answer", "box", "right"),
    [
        ("18", "18", True),
        ("18", "18.0", True),
        ("18", r"18 \text{ dollars}", True),
        ("1000", "1,000", True),
        (r"\frac{1}{2}", "2/4", True),
        (r"\sqrt{8}", r"2\sqrt2", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("(1,2)", "( 1, 2 )", True),
        (r"\text{Evelyn}", "evelyn", True),
        ("Evelyn", r"\text{Evelyn}", True),
        ("9^{9^{9^{9}}}", "9^{9^{9^{9}}}", True),
        ("18", "19", False),
        ("18", "18, 19", False),
        ("2", r"1 \text{ or } 2", False),
        ("(1,2)", "(2,1)", False),
        ("Evelyn", "nylevE", False),
        ("18", "banana", False),
    ],
)
def test_an_answer_counts_by_its_value(answer, box, right):
    outcome = grade(answer, rf"So it is \boxed{{{box}}}.")
    assert (outcome.passed, outcome.reward, outcome.feedback) == (right, float(right), "")
    assert outcome.metrics == {"well_formed": 1.0, "refused": 0.0}


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{ 1 / 2 }", "1/2"),
        (r"\boxed{1/2} no, \boxed{2}", "2"),
        (r"<think>\boxed{1}</think>\boxed{\text{Evelyn}}", "evelyn"),
        (r"\boxed{}", None),
        ("1/2", None),
        (r"\boxed{9^{9^{9^{9}}}}", "9^{9^{9^{9}}}"),  # read, not evaluated
    ],
)
def test_the_answer_of_a_vote_is_the_last_box_by_its_letters(response, answer):
    made = Math([Problem("p", "How many?", "1")], [])
    assert made.answer(made.train[0], response) == answer


def test_the_last_box_counts_wherever_it_stands_and_thinking_does_not():
    assert grade("2", r"\boxed{1} then \boxed{2}" + " words" * 100).passed
    assert not grade("2", r"\boxed{2} then \boxed{1}").passed
    assert not grade("2", r"<think>\boxed{2}</think> so 2").passed


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ("9^{9^{9}}", "powers or factorials"),
        ("e^{e^{e^{9^{9}}}}", "powers or factorials"),
        ("((9^{999})^{999})^{999}", "powers or factorials"),
        ("10^{100000}", "powers or factorials"),
        ("1000000!", "powers or factorials"),
        ("10^{-17!}", "powers or factorials"),
        ("(9!)!", "powers or factorials"),
        ("(x+1)^{99999}", "powers or factorials"),
        (r"\sum_{n=1}^{9999999} n", "a sum, product, integral or limit"),
        (r"\binom{999999}{5000}", "powers or factorials"),
        ("e^{e^{e^{10}}}", "powers or factorials"),
        (r"\exp(\exp(\exp(9)))", "powers or factorials"),
        ("9" * 61, "more than 60 digits"),
        ("(" * 21 + "1" + ")" * 21, "deeper than 20 levels"),
        ("x" * 501, "longer than 500 characters"),
        ("1" * 2_000_000, "longer than 500 characters"),
    ],
)
def test_what_would_not_end_is_refused_at_once_with_a_reason(box, reason):
    start = time.process_time()
    outcome = grade("18", rf"\boxed{{{box}}}")
    # Computer algebra would take minutes on most of these, or for ever.
    assert time.process_time() - start < 2
    assert not outcome.passed and reason in outcome.feedback
    assert outcome.metrics == {"well_formed": 1.0, "refused": 1.0}


@pytest.mark.parametrize(
    "box",
    ["x^9+x^8+x^7+x^6+x^5+x^4", "e^{x^2}", "2^{1024}-1", "x^{2024}", "12!", r"\frac{(x+1)^3}{2}"],
)
def test_answers_of_usual_size_are_not_refused(box):
    assert why_refused(box) is None


def test_words_are_compared_as_words_and_symbols_as_they_are():
    assert same_text(r"\text{New York}", "new york")
    assert not same_text("X", "x") and not same_text("", "0")


def test_reading_a_box_is_linear_in_what_a_model_can_write():
    for text in ("\\boxed{" * 100_000, "{" * 300_000, "\\boxed{" + "{}" * 200_000):
        assert not grade("1", text).passed


def test_a_worker_is_asked_for_and_references_pass_whole_or_cut():
    solved = Problem("s", "Why?", "4", "2 + 2 = 4 \\boxed{5}")
    made = Math([Problem("p", "How many?", r"\frac{1}{2}"), solved], [])
    assert made.needs_worker
    for prompt in made.train:
        for grade_one in (made.grade, made.grade_truncated):
            assert grade_one(prompt, made.reference(prompt)).passed


def test_a_problem_on_both_sides_is_refused():
    with pytest.raises(UserError, match="stands among the train rows"):
        Math([Problem("a", "How many?", "1")], [Problem("b", "How many?", "1")])


def test_without_the_package_one_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'math-verify>="):
        Math([], [])


# Data


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"question": "Q", "answer": "3 * 4 = <<3*4=12>>12\n#### 1,200"},
            Problem("f:1", "Q", "1200", "3 * 4 = 12"),
        ),
        (
            {"problem": "Q", "solution": r"So $\boxed{\frac{1}{2}}$."},
            Problem("f:1", "Q", r"\frac{1}{2}", r"So $\boxed{\frac{1}{2}}$."),
        ),
        ({"id": 3, "question": "Q", "answer": 204}, Problem("3", "Q", "204")),
        ({"problem": "Q", "answer": "5", "solution": "Count."}, Problem("f:1", "Q", "5", "Count.")),
    ],
)
def test_both_forms_of_rows_are_read(row, problem):
    assert parse_row(row, "f:1") == problem


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": "1"}, '"question" is missing'),
        ({"question": "Q"}, '"answer" is missing'),
        ({"question": "Q", "answer": None}, "answer is null, expected a string or a number"),
        ({"question": "Q", "answer": "Long.\nWords."}, "of several lines, expected one line"),
        ({"question": "Q", "answer": "x #### "}, "the true answer is empty"),
        ({"problem": "Q", "solution": "None."}, "solution has no ####"),
        ({"question": "Q", "answer": "1}"}, "unbalanced braces"),
    ],
)
def test_a_row_without_a_true_answer_says_why(row, reason):
    with pytest.raises(BadRow, match=reason):
        parse_row(row, "f:1")


def test_files_are_read_whole(tmp_path):
    for name, number in (("train", 1), ("test", 2)):
        line = json.dumps({"question": f"Q{number}", "answer": f"#### {number}"})
        (tmp_path / f"{name}.jsonl").write_text(line)
    sides = load_math(tmp_path / "train.jsonl", tmp_path / "test.jsonl")
    assert [[p.answer for p in side] for side in sides[:2]] == [["1"], ["2"]]
