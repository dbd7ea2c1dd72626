"""Reports from the field about the graders beside mathematics and code, by their right verdicts."""

import json
import time

import pytest

from sdpo_jax.environments.answer_forms import without_thinking
from sdpo_jax.environments.bfcl_calls import Call, complaints, parse_call
from sdpo_jax.environments.code.extract import extract
from sdpo_jax.environments.kinds import bfcl
from sdpo_jax.environments.kinds.bfcl import Bfcl, load_rows
from sdpo_jax.environments.kinds.mcq import Mcq, Question, find_letter
from sdpo_jax.environments.kinds.tool_calls import ToolCalls
from sdpo_jax.environments.kinds.tool_use import Task, ToolCall, ToolUse
from sdpo_jax.errors import UserError

OPTIONS = {"A": "gas", "B": "liquid", "C": "metal", "D": "salt"}


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("a<think>b</think>c", "c"),
        ("b</think>c", "c"),
        ("<think>b", ""),
        ("a <think>b", "a "),
        ("<think>a</think>b<think>c", "b"),
        ("<think></think>", ""),
        ("a", "a"),
    ],
)
def test_unfinished_thinking_has_no_answer(response, answer):
    assert without_thinking(response) == answer


# Programs

PROGRAM = "n = int(input())\nprint(n)"
PYTHON = f"```python\n{PROGRAM}\n```"
SHELL = "```bash\n$ python solution.py\n3\n3\n$ python solution.py\n12\n12\n```"


@pytest.mark.parametrize(
    "response",
    [
        f"{PYTHON}\nRun it:\n{SHELL}",
        f"{SHELL}\nwith\n{PYTHON}",
        f"```python\n{PROGRAM}  # a longer draft that is wrong\n```\nBetter:\n{PYTHON}",
        f"```\n{PROGRAM}\n```\n{SHELL}\n",
        f"```\n{PROGRAM}\n```\nIt prints\n```\n[1, 2, 3]\n```",
        f"```\n{PROGRAM}\n```\n```js\nconsole.log(prompt())\n```",
        f"{PYTHON}\n```python\n>>> main()\n3\n```",
        f"{PYTHON}\n```text\nprint(3), a very long line of output\n```",
        f"{PYTHON}\n```json\n{{}}\n```\n```python\n```",
        f"Answer: ```python\n{PROGRAM}\n```",
        f"1. Answer:```py\n{PROGRAM}\n```",
        f"Answer: ~~~python\n{PROGRAM}\n~~~",
        f"The `input` is read by ``int``:\n~~~~Python3\n{PROGRAM}\n~~~~",
        f"```python\n{PROGRAM}```",
        f"```python\n{PROGRAM}\n``` This prints n.",
        f"```python\n{PROGRAM}\n``` This prints n.\n{SHELL}",
        f"Answer: ```python\r\n{PROGRAM}\r\n```\r\n",
        f"```python\r{PROGRAM}\r```\r",
        f"``` {{.python .numberLines}}\n{PROGRAM}\n```",
        f"```py3\n{PROGRAM}\n```\n```python-repl\nanother_long_call(with_arguments=1)\n```",
        f"<think>{SHELL}</think>{PYTHON}",
        f"Use ```code``` like this:\n{PYTHON}",
    ],
)
def test_the_last_block_of_python_is_the_program(response):
    program, cut_off = extract(response)
    assert (program or "").rstrip() == PROGRAM and not cut_off


def test_a_program_may_hold_fences_in_its_text():
    program = 's = "```"\nprint(s)'
    assert extract(f"```python\n{program}\n```") == (program, False)


@pytest.mark.parametrize(
    ("response", "cut_off"),
    [
        (f"<think>{PYTHON}", True),
        (f"Answer: ```python\n{PROGRAM}", True),
        ("inline ```code``` and ```more```", False),
        ("```python\n```\n", False),
    ],
)
def test_what_is_unfinished_is_no_program(response, cut_off):
    assert extract(response) == (None, cut_off)


@pytest.mark.parametrize(
    "piece",
    ["```python\n", "```\n-\n```\n", "a ```\n", "a ```py\nb```\n", "-", "~~~\n(", "`~", " ", "\r"],
)
def test_a_program_is_found_in_linear_time(piece):
    start = time.process_time()
    extract(piece * (400_000 // len(piece)))
    extract(f"a ```{' ' * 100_000}!" + piece)
    extract("```\n" + piece * (400_000 // len(piece)) + "\n```")
    assert time.process_time() - start < 10


# Multiple choice


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        # A formula in a box hides neither a stated letter nor a letter in an earlier box.
        (r"We get \boxed{\langle H\rangle \ll \Delta E}. The answer is (D).", "D"),
        (r"\boxed{42}. The answer is C.", "C"),
        (r"\boxed{}. The answer is (C).", "C"),
        (r"\boxed{C: metal}. The answer is (C).", "C"),
        (r"\boxed{C}, because \boxed{E = mc^2}", "C"),
        (r"\boxed{E}. The answer is (D)", "D"),
        (r"\boxed{C} and \boxed{D", "C"),
        # What stands around a letter says nothing.
        ("<answer>(B)</answer>", "B"),
        ("<answer>**B**</answer>", "B"),
        ("<answer>B.</answer>", "B"),
        ("<answer>[B]</answer>", "B"),
        ("<answer>$B$</answer>", "B"),
        (r"<answer>\boxed{\text{(B)}}</answer>", "B"),
        (r"<answer>\(B\)</answer>", "B"),
        (r"The final answer is: $\boxed{C}$", "C"),
        (r"\boxed{\textbf{\text{(C)}}}", "C"),
        (r"\boxed {C}", "C"),
        (r"\boxed C", "C"),
        ("<answer>()</answer>", None),
        ("<answer>-B</answer>", None),
        ("<answer>AB</answer>", None),
        # Words that are letters, and sentences that name other letters.
        ("The answer is C because it is a metal.", "C"),
        ("The answer is C because I computed it.", "C"),
        ("The answer is B. Note that A is a distractor.", "B"),
        ("The answer is (C), A is wrong.", "C"),
        ("The answer is (C) and A is wrong.", "C"),
        ("The answer is C, not A.", "C"),
        ("The answer is (C), which beats A and B.", "C"),
        ("The answer is (C) and beats B.", "C"),
        ("The answer is C and D is irrelevant.", "C"),
        ("The answer is (C) and not A.", "C"),
        ("The answer is C, because A is a gas.", "C"),
        ("The answer is C or metal.", "C"),
        ("The answer is (C) or, in short, C.", "C"),
        # Markup, words and signs around a stated letter.
        ("The correct answer is: C", "C"),
        ("the Answer is C", "C"),
        ("Answer: C", "C"),
        ("**Answer: C**", "C"),
        ("**Answer:** C", "C"),
        ("Therefore, the answer is: **C**", "C"),
        ("The answer is option C.", "C"),
        ("The answer is: choice (C)", "C"),
        (r"The answer is \(C\).", "C"),
        (r"The answer is $\text{C}$.", "C"),
        (r"The answer is \(\text{(C)}\).", "C"),
        (r"So the answer is \textbf{C}.", "C"),
        ("The answer is `C`.", "C"),
        ("The answer is C: copper is a metal.", "C"),
        ("The answer is (C) copper.", "C"),
        ("The answer is\n\nC", "C"),
        ("The answer is C rather than B.", "C"),
        ("The answer is C as it conducts.", "C"),
        ("The answer is C, which is a metal.", "C"),
        ("The answer is not A. The answer is C.", "C"),
        ("The answer is A and not B.", "A"),
        ("Answer: A. No, answer: C.", "C"),
        ("<answer>C,</answer>", "C"),
        ("<answer>`C`</answer>", "C"),
        (r"<answer>\boxed{C}</answer>", "C"),
        (r"<answer>C</answer> \boxed{D}", "C"),
        ("<answer>C</answer> <answer>D", "C"),
        ("<answer>C</answer></think><answer>D</answer>", "D"),
        (r"\boxed{C}, \boxed{D}", "D"),
        ("Answer: A metal conducts.", None),
        ("The answer is A metal.", None),
        ("The answer is not A.", None),
        ("The answer is neither A nor B.", None),
        ("The answer is either A or B.", None),
        ("The answer is E.", None),
        ("Answer: A, B", None),
        (r"Answer: $A$ or $B$", None),
        (r"The answer is \text{A and B}.", None),
        (r"The answer is \textbf{A} or \textbf{B}.", None),
        ("The answer is A: B and C are wrong.", "A"),
        ("The answer is options A and B.", None),
        ("<answer>option C</answer>", None),
        ("<answer>C) copper</answer>", None),
        ("<answer>,</answer>", None),
        ("<answer>A|B</answer>", None),
        ("<answer>A\nB</answer>", None),
        ("<answer>AB</answer>", None),
        ("<answer></answer>The answer is C.", None),
        (r"\boxed{A \text{ or } B}", None),
        (r"\boxed{A \quad B}", None),
        (r"\boxed{E}", None),
        # Several letters are no answer.
        ("The answer is A, B, C or D.", None),
        ("The answer is A, B, C or D", None),
        ("The answer is A, B, C, or D, whatever it is", None),
        ("The answer is (A), (B), (C) or (D).", None),
        ("The answer is (A) or (B).", None),
        ("The answer is (A)(B).", None),
        ("The answer is A or perhaps B because I do not know.", None),
        ("The answer is (A) or equivalently option B", None),
        ("The answer is **A** or **B**.", None),
        ("The answer is A and also B.", None),
        ("The answer is A and B", None),
        ("The answer is (A) and so is B.", None),
        ("The answer is A/B.", None),
        ("The answer is A & B", None),
        ("The answer is A; B; C", None),
        ("The answer is A, maybe B.", None),
        ("The answer is C. No: the answer is A or B.", None),
        ("<answer>A, B, C or D</answer>", None),
        ("<answer>(A) (B)</answer>", None),
        ("<answer>A and B</answer>", None),
        (r"\boxed{A, B}", None),
        (r"\boxed{\text{A or B}}", None),
        (r"\boxed{A, B}. The answer is (A).", None),
        ("<think>The answer is (C)", None),
        ("<think><answer>C</answer> but", None),
        (r"<think>\boxed{C}</think> Hm. <think>\boxed{C}", None),
    ],
)
def test_one_letter_is_read_and_several_are_not(response, letter):
    assert find_letter(response, OPTIONS) == letter
    question = Question("q", "What is copper?", OPTIONS, "C")
    made = Mcq([question], [])
    assert made.grade(made.train[0], response).passed == (letter == "C")


@pytest.mark.parametrize(
    "piece",
    [
        r"\boxed{A",
        r"\boxed{{a}",
        r"\boxed{x{y}{",
        "answer is (A), ",
        r"\text{",
        "A, ",
        r"\textbf{A",
    ],
)
def test_reading_a_letter_is_linear_in_the_response(piece):
    for text in (piece * 50_000, f"<answer>{piece * 50_000}</answer>"):
        assert find_letter(text, OPTIONS) in (None, "A")


# Calls


def function(**types):
    properties = {
        name: schema if isinstance(schema, dict) else {"type": schema}
        for name, schema in types.items()
    }
    return {"name": "do.it", "parameters": {"type": "dict", "properties": properties}}


@pytest.mark.parametrize(
    ("schema", "accepted", "value", "found"),
    [
        ("number", [5], 5, []),
        ("number", [5], 5.0, []),
        ("number", [2.5, 5], 5, []),
        ("number", [5], 6, ["a: wrong value 6"]),
        ("number", [1], True, ["a: expected number, got boolean"]),
        ("number", [5], "5", ["a: expected number, got string"]),
        ("number", [5, ""], None, ["a: expected number, got null"]),
        ("object", [{"x": [1, 2]}], {"x": 2}, []),
        ("object", [{"x": [1]}], {"x": 3}, ["a.x: wrong value 3"]),
        ("object", [{"x": [1]}], [1], ["a: expected object, got array"]),
        ({"type": "array", "items": {"type": "number"}}, [[1, 2.5]], [1, 2.5], []),
        ({"type": "array", "items": {"type": "number"}}, [[1.0, 2.5]], [1, 2.5], []),
        ({"type": "array", "items": {"type": "number"}}, [[1]], ["1"],
         ["a[0]: expected number, got string"]),
        ({"type": "array", "items": {"type": "object"}}, [[{"x": [1]}]], [{"x": 1}], []),
        ({"type": "object", "properties": {"x": {"type": "number"}}}, [{"x": [1]}], {"x": "1"},
         ["a.x: expected number, got string"]),
        ({}, ["x"], "X", []),
    ],
)  # fmt: skip
def test_the_types_of_json_schema_are_compared(schema, accepted, value, found):
    call = Call("do.it", {"a": value})
    assert complaints(call, function(a=schema), {"a": accepted}) == found


def written(folder, schema, accepted):
    (folder / "possible_answer").mkdir()
    asked = {"id": "r", "question": [[{"role": "user", "content": "Do it."}]]}
    answer = {"id": "r", "ground_truth": [{"do.it": {"a": accepted}}]}
    (folder / bfcl.QUESTIONS).write_text(json.dumps({**asked, "function": [function(a=schema)]}))
    (folder / "possible_answer" / bfcl.QUESTIONS).write_text(json.dumps(answer))
    return folder


def test_a_row_with_a_number_is_read_and_graded(tmp_path):
    rows = load_rows(written(tmp_path, "number", [5]))
    made = Bfcl(rows, train_prompts=1, held_out_prompts=0, seed=4)
    assert made.grade(made.train[0], "do.it(a=5)").passed


@pytest.mark.parametrize(
    ("schema", "accepted", "reason"),
    [
        ("int", [5], "a has the type 'int', expected one of string, boolean"),
        ({"type": ["number", "null"]}, [5], "a has the type ['number', 'null'], expected one of"),
        ({"type": "array", "items": {"type": "str"}}, [["x"]], "a[] has the type 'str'"),
        ({"type": "dict", "properties": {"x": {"type": "any of"}}}, [{}], "a.x has the type"),
        ({"type": "array", "items": ["number"]}, [[1]], "a[] has the type None"),
        ("number", 5, "a has no list of accepted values"),
        ("object", [{"x": 5}], "a.x has no list of accepted values"),
        ("array", [[[{"x": 5}]]], "a.x has no list of accepted values"),
    ],
)
def test_a_row_that_cannot_be_compared_is_refused_with_its_reason(
    schema, accepted, reason, tmp_path
):
    with pytest.raises(UserError) as caught:
        load_rows(written(tmp_path, schema, accepted))
    assert "row 'r'" in str(caught.value) and reason in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        "```python\r\ndo.it(a=5)\r\n```",
        "```\r\ndo.it(a=5)\r\n```\r\n",
        "~~~python\ndo.it(a=5)\n~~~",
        "````py\ndo.it(a=5)\n````",
        "```json \n{\"name\": \"do.it\",\r\n \"arguments\": {\"a\": 5}}\n```",
        "do.it(\r\n    a=5,\r\n)\r\n",
        "<think>```python\nno()\n```</think>\r\n\r\n```python\r\ndo.it(a=5)\r\n```",
    ],
)  # fmt: skip
def test_line_breaks_and_fences_do_not_matter(answer):
    assert parse_call(answer) == Call("do.it", {"a": 5})


@pytest.mark.parametrize(
    "answer",
    [
        "<think>no</think><think>do.it(a=5)",
        "<think>do.it(a=5)",
        "```\ndo.it(a=5)",
        "```\ndo.it(a=5)\n~~~",
    ],
)
def test_unfinished_answers_are_no_call(answer):
    assert isinstance(parse_call(answer), str)


def test_a_call_in_unfinished_thinking_is_no_call():
    call = 'Action: a\nAction Input: {"x":1}'
    task = Task("t", ({"role": "user", "content": "Do a."},), (ToolCall("a", {"x": 1}),))
    made = ToolUse([task], [])
    for response, passed in (
        (f"<think> I could do\n{call}\nbut maybe", False),
        (f"{call}\n<think>or", True),
        (f"<think>hm</think>{call}", True),
        (call.replace("\n", "\r\n"), True),
    ):
        assert made.grade(made.train[0], response).passed == passed
    toy = ToolCalls(train_prompts=1, held_out_prompts=1, allow_preamble=True)
    right = toy.reference(toy.train[0])
    assert toy.grade(toy.train[0], f"<think>so\n</think>{right}").passed
    assert not toy.grade(toy.train[0], f"<think>so\n{right}").passed


def test_feedback_on_a_toy_call_can_be_encoded():
    toy = ToolCalls(train_prompts=12, held_out_prompts=1)
    for prompt in toy.train:
        call = toy.reference(prompt)
        name, _, rest = call.partition("(")
        for argument in rest[:-1].split(", "):
            key = argument.partition("=")[0]
            outcome = toy.grade(prompt, f'{name}({key}="\\ud800")')
            assert not outcome.passed and outcome.feedback.encode()
