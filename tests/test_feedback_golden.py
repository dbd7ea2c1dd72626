"""One golden string for every class of feedback of every question-answer environment.

The words are part of the method: the teacher reads them. A change here is a change of the data.
"""

from importlib import util

import pytest

from sdpo_jax.environments.bfcl_calls import MAX_CHARACTERS
from sdpo_jax.environments.kinds.bfcl import Bfcl, Row
from sdpo_jax.environments.kinds.math import Math, Problem
from sdpo_jax.environments.kinds.mcq import Mcq, Question
from sdpo_jax.environments.kinds.tool_calls import Task as CallTask
from sdpo_jax.environments.kinds.tool_calls import ToolCalls
from sdpo_jax.environments.kinds.tool_use import Task, ToolCall, ToolUse
from sdpo_jax.environments.rows import is_held_out

CUT = "The response was cut off at the length limit. Be shorter and end with "
LETTERS = "<answer>X</answer>, where X is A, B or C and nothing else"
LINES = 'lines "Action: name" and "Action Input: {JSON object}" for each call'
BOXED = r"Put the final answer inside \boxed{your_answer}."


def mcq(**settings):
    made = Mcq([Question("q", "Which?", {"A": "x", "B": "y", "C": "z"}, "A")], [], **settings)
    return made, made.train[0]


@pytest.mark.parametrize(
    ("settings", "response", "feedback"),
    [
        ({}, "<answer>A</answer>", ""),
        ({}, "<answer>B</answer>", ""),
        ({"report_incorrect": True}, "<answer>B</answer>", "Option B is wrong."),
        ({}, "A", f"No answer found. End with {LETTERS}."),
        ({}, "<answer> </answer>", f"The answer is empty. End with {LETTERS}."),
        ({}, "<answer>E</answer>", f'"E" is not one of the letters. End with {LETTERS}.'),
    ],
)
def test_mcq(settings, response, feedback):
    made, prompt = mcq(**settings)
    assert made.grade(prompt, response).feedback == feedback


def math(**settings):
    pytest.importorskip("math_verify")
    made = Math([Problem("p", "How many?", "18")], [], **settings)
    return made, made.train[0]


REFUSED = "The answer in the box was not checked: "


@pytest.mark.parametrize(
    ("settings", "response", "feedback"),
    [
        ({}, r"\boxed{18}", ""),
        ({}, r"\boxed{19}", ""),
        ({"report_incorrect": True}, r"\boxed{19}", "The answer 19 is wrong."),
        ({"reveal_expected": True}, r"\boxed{19}", "The answer 19 is wrong. Expected: 18"),
        ({}, "18", f"No answer found. {BOXED}"),
        ({}, r"\boxed{ }", f"The box is empty. {BOXED}"),
        ({}, rf"\boxed{{{'x' * 501}}}", f"{REFUSED}it is longer than 500 characters."),
        ({}, rf"\boxed{{{'9' * 61}}}", f"{REFUSED}it holds a number of more than 60 digits."),
        ({}, rf"\boxed{{{'(' * 21}}}", f"{REFUSED}it is nested deeper than 20 levels."),
        (
            {},
            r"\boxed{\sum n}",
            f"{REFUSED}it is not evaluated (a sum, product, integral or limit).",
        ),
        (
            {},
            r"\boxed{\sum_{n=1}^{7} n}",
            f"{REFUSED}it is not evaluated (a sum, product, integral or limit).",
        ),
        (
            {"reveal_expected": True},
            r"\boxed{9^{9^9}}",
            f"{REFUSED}its powers or factorials are too large to evaluate. Expected: 18",
        ),
    ],
)
def test_math(settings, response, feedback):
    made, prompt = math(**settings)
    assert made.grade(prompt, response).feedback == feedback


def tool_use():
    message = {"role": "user", "content": "Go."}
    made = ToolUse([Task("t", (message,), (ToolCall("f", {"a": 1}),))], [])
    return made, made.train[0]


def gym():
    pytest.importorskip("reasoning_gym")
    from sdpo_jax.environments.kinds.reasoning_gym import ReasoningGym

    made = ReasoningGym(
        ["gcd", "decimal_chain_sum", "number_sorting", "n_queens", "countdown"], 5, 0
    )
    return made, {prompt.data["family"]: prompt for prompt in made.train}


END = "End with <answer>...</answer>, with the final answer and nothing else inside."


@pytest.mark.parametrize(
    ("family", "response", "feedback"),
    [
        ("gcd", "12", f"No answer found. {END}"),
        ("gcd", "<answer></answer>", f"The answer is empty. {END}"),
        ("gcd", "<answer>0</answer>", "The answer 0 is wrong."),
        (
            "gcd",
            "<answer>two</answer>",
            "Expected a whole number as the answer, got something else: two",
        ),
        ("gcd", "<answer>0.5</answer>", "Expected a whole number as the answer, got a number: 0.5"),
        ("decimal_chain_sum", "<answer>0</answer>", "The answer 0 is wrong."),
        (
            "decimal_chain_sum",
            "<answer>[]</answer>",
            "Expected a number as the answer, got a list in square brackets: []",
        ),
        (
            "number_sorting",
            "<answer>1</answer>",
            "Expected a list in square brackets as the answer, got a whole number: 1",
        ),
        (
            "countdown",
            "<answer>f(1)</answer>",
            "Expected an expression of numbers, variables of one letter, + - * / ** and "
            "parentheses as the answer, got something else: f(1)",
        ),
        (
            "n_queens",
            "<answer>f()</answer>",
            "Expected text or a list of literals as the answer, got code: f()",
        ),
        ("gcd", f"<answer>{'x' * 10_001}</answer>", "The answer is longer than 10000 characters."),
    ],
)
def test_reasoning_gym(family, response, feedback):
    made, prompts = gym()
    assert made.grade(prompts[family], response).feedback == feedback


def test_a_cut_response_is_told_the_form_unless_its_answer_is_right():
    made, prompt = mcq(report_incorrect=True)
    for response in ("<answer>", "<answer>B</answer>"):
        assert made.grade_truncated(prompt, response).feedback == f"{CUT}{LETTERS}."
    assert made.grade_truncated(prompt, "<answer>A</answer> and").feedback == ""
    made, prompt = tool_use()
    assert (
        made.grade_truncated(prompt, 'Action: f\nAction Input: {"a"').feedback == f"{CUT}{LINES}."
    )
    assert made.grade_truncated(prompt, 'Action: f\nAction Input: {"a": 1}').feedback == ""
    if util.find_spec("math_verify"):
        made, prompt = math()
        cut = made.grade_truncated(prompt, "so").feedback
        assert cut == f"{CUT}the final answer inside \\boxed{{your_answer}}."
        assert made.grade_truncated(prompt, r"\boxed{18} and").feedback == ""
    if util.find_spec("reasoning_gym"):
        made, prompts = gym()
        cut = made.grade_truncated(prompts["gcd"], "so").feedback
        inside = "<answer>...</answer>, with the final answer and nothing else inside"
        assert cut == f"{CUT}{inside}."


# The classes that test_bfcl.py and test_tool_calls.py do not spell out.


def bfcl(**settings):
    function = {
        "name": "go",
        "parameters": {"properties": {"to": {"type": "string"}}, "required": ["to"]},
    }
    rows = [Row("r", "Go.", function, {"to": ["Rome"]})]
    held_out = is_held_out("go", 0)
    made = Bfcl(rows, train_prompts=int(not held_out), held_out_prompts=int(held_out), **settings)
    return made, [*made.train, *made.held_out][0]


MALFORMED = 'malformed call: expected name(argument=value, ...) or {"name": ..., "arguments": ...}'


@pytest.mark.parametrize(
    ("response", "feedback"),
    [
        ("Go to Rome.", MALFORMED),
        ("x" * (MAX_CHARACTERS + 1), "malformed call: longer than 2000 characters"),
        ("go(to=Rome)", "to: expected a literal value"),
        ("go('Rome')", "positional argument: write every argument as name=value"),
        ("run(to='Rome')", "unknown function: run"),
        ("go()", "missing argument: to (string)"),
        ("go(to=1)", "to: expected string, got integer"),
        ("go(to='Oslo', by='train')", 'to: wrong value "Oslo"\nunknown argument: by'),
    ],
)
def test_bfcl(response, feedback):
    made, prompt = bfcl()
    assert made.grade(prompt, response).feedback == feedback


def test_bfcl_reveals_what_it_expected_if_told_to():
    made, prompt = bfcl(reveal_expected=True)
    assert (
        made.grade(prompt, "go(to='Oslo')").feedback == "to: wrong value \"Oslo\"; expected 'Rome'"
    )
    assert made.grade(prompt, "go()").feedback == "missing argument: to (string); expected 'Rome'"


@pytest.mark.parametrize(
    ("response", "feedback"),
    [
        ("set_alarm(", "malformed call: expected tool(argument=value, ...)"),
        ('set_alarm(time="1", time="2")', "repeated argument: time"),
        ("ring()", "unknown tool: ring"),
        ("send_money()", "wrong tool for this request: send_money"),
        (
            "set_alarm(snooze=1)",
            "missing argument: time, 24-hour HH:MM\nmissing argument: day, three-letter weekday\n"
            "unexpected argument: snooze",
        ),
        (
            'set_alarm(time="7:30 pm", day="wed")',
            'time: expected 24-hour HH:MM\nday: wrong value "wed"',
        ),
    ],
)
def test_tool_calls(response, feedback):
    values = {"time": (7, 30, "pm"), "day": "tuesday"}
    task = CallTask("alarm", values, "wake me", ("set_alarm", "send_money", "set_light"))
    made = ToolCalls(train_prompts=1, held_out_prompts=0, families=("alarm",))
    prompt = made.train[0]._replace(data={"task": task, "family": "alarm"})
    assert made.grade(prompt, response).feedback == feedback
