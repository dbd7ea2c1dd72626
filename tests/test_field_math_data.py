"""Where an answer stands in a response or a row, and what becomes of one that never ends."""

import json
from importlib import util

import pytest

from sdpo_jax.environments.answer_forms import last_boxed, without_thinking
from sdpo_jax.environments.base import JudgesLate
from sdpo_jax.environments.kinds.math import MathConfig, build, parse_row
from sdpo_jax.environments.math_equality import why_only_text
from sdpo_jax.environments.rows import BadRow

pytestmark = pytest.mark.skipif(
    util.find_spec("math_verify") is None, reason="needs pip install math-verify"
)


def written(folder, train, held_out):
    for side, given in (("train", train), ("test", held_out)):
        rows = [{"id": f"{side}{i}", "question": f"{side}{i}", "answer": a} for i, a in given]
        (folder / side).write_text("\n".join(map(json.dumps, rows)))
    return MathConfig(train=str(folder / "train"), held_out=str(folder / "test"))


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed 2.", "2"),
        (r"\boxed {2}", "2"),
        (r"\boxed2", "2"),
        (r"\boxed\pi", r"\pi"),
        (r"\fbox{5}", "5"),
        (r"\boxed{7} and so \boxed{5", "7"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxedness{5}", None),
    ],
)
def test_the_last_complete_box_counts(text, box):
    assert last_boxed(text) == box


def test_boxes_in_boxes_are_read_in_linear_time():
    depth = 200_000
    assert last_boxed("\\boxed{" * depth + "1" + "}" * depth) == "1"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("<think>a", ""),
        ("<think>a</think>b<think>c", "b"),
        ("b", "b"),
    ],
)
def test_unfinished_thinking_is_no_answer(response, answer):
    assert without_thinking(response) == answer


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"answer": "work\n#### (3, 4)"}, "(3, 4)"),
        ({"answer": "#### [2,5)"}, "[2,5)"),
        ({"answer": "work\n#### -1,200.5"}, "-1200.5"),
        ({"solution": "We get \\boxed{5}.\n#### Done"}, "5"),
        ({"solution": r"our answer is $\boxed 2$."}, "2"),
        ({"solution": r"so $\fbox{5}$."}, "5"),
        ({"answer": 1e-05}, "1e-05"),
        ({"answer": "3e8"}, "3e8"),
    ],
)
def test_true_answers_are_read_as_the_files_mean_them(row, answer):
    assert parse_row({"question": "Q", **row}, "f:1").answer == answer


@pytest.mark.parametrize(
    "row",
    [
        {"solution": "#### Step 1\nWe add.\n#### Step 2"},
        {"solution": "#### Step 1\nWe add."},
        {"answer": float("inf")},
    ],
)
def test_headings_and_infinite_numbers_are_no_true_answers(row):
    with pytest.raises(BadRow):
        parse_row({"question": "Q", **row}, "f:1")


def test_true_answers_that_only_their_letters_match_are_named_at_load(tmp_path, capsys):
    train, held_out = ["5", r"\sum_{n} n", "Evelyn"], [r"9^{9^{9}}", r"5 \to 3", "2km"]
    build(written(tmp_path, enumerate(train), enumerate(held_out)))
    named = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in named] == ["train1", "test0", "test1"]
    assert why_only_text(r"\frac{1}{2} \text{ km}") is None


def test_an_answer_that_never_ends_is_wrong_and_graded(tmp_path):
    made = build(written(tmp_path, [(0, "7")], [(0, "7")]))
    assert isinstance(made, JudgesLate)
    assert (made.late.passed, made.late.graded, made.late.reward) == (False, True, 0.0)
    assert "took too long" in made.late.feedback
