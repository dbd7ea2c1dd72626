"""Calls are read as JSON and compared one with one, in any order; feedback word by word."""

import json

import pytest

from sdpo_jax.environments.kinds.tool_use import (
    FORM,
    Task,
    ToolCall,
    ToolUse,
    load_tool_use,
    parse_calls,
    parse_row,
    write_calls,
)
from sdpo_jax.environments.rows import BadRow
from sdpo_jax.errors import UserError

BOOK = ToolCall("book", {"city": "Rome", "days": 3, "room": {"beds": 2, "views": ["sea"]}})
PAY = ToolCall("pay", {"amount": 10, "card": True})
TASK = Task("t", ({"role": "user", "content": "Book and pay."},), (BOOK, PAY))


def grade(calls, expected=(BOOK, PAY), **settings):
    made = ToolUse([TASK._replace(calls=tuple(expected))], [], **settings)
    answer = calls if isinstance(calls, str) else write_calls(calls)
    return made.grade(made.train[0], answer)


def change(call, **changes):
    merged = {**call.input, **changes}
    return call._replace(input={k: v for k, v in merged.items() if v is not None})


@pytest.mark.parametrize(
    "response",
    [
        write_calls([BOOK, PAY]),
        write_calls([PAY, BOOK]),
        f"Thought: two.\n{write_calls([BOOK])}\nThought: pay.\n{write_calls([PAY])}\nDone.",
        write_calls([BOOK, PAY]).replace("\nAction Input:", "\n\nAction Input:\n"),
        write_calls([change(BOOK, days=3.0), PAY]),
        "<think>Action: pay\nAction Input: {}</think>" + write_calls([BOOK, PAY]),
        write_calls([BOOK, PAY]).replace("Action: pay", "Action: `pay`"),
    ],
)
def test_the_expected_calls_pass_in_any_order_and_among_words(response):
    assert grade(response) == (1.0, True, "", {"well_formed": 1.0}, True)


def test_an_action_inside_an_input_is_text():
    note = ToolCall("note", {"text": "Action: pay\nAction Input: {}", "more": {"}": "{"}})
    assert parse_calls(write_calls([note, PAY])) == [note, PAY]


@pytest.mark.parametrize(
    ("calls", "feedback"),
    [
        ([change(BOOK, city="Oslo"), PAY], ['book: city: wrong value "Oslo"']),
        ([change(BOOK, days="3"), PAY], ["book: days: expected a number, got a string"]),
        ([BOOK, change(PAY, card=1)], ["pay: card: expected a boolean, got a number"]),
        ([BOOK, change(PAY, amount=True)], ["pay: amount: expected a number, got a boolean"]),
        ([change(BOOK, room={"beds": 2}), PAY], ['book: room: wrong value {"beds": 2}']),
        ([change(BOOK, city=None), PAY], ["book: missing argument city"]),
        ([change(BOOK, pool=1), PAY], ["book: unknown argument pool"]),
        ([BOOK], ["A call is missing."]),
        ([BOOK, PAY, PAY], ["pay: this call is not wanted here."]),
        (
            [BOOK, PAY._replace(action="buy")],
            ["buy: this call is not wanted here.", "A call is missing."],
        ),
        (
            [change(BOOK, city="Oslo", days=None, pool=1), change(PAY, amount=11)],
            [
                'book: city: wrong value "Oslo"',
                "book: missing argument days",
                "book: unknown argument pool",
                "pay: amount: wrong value 11",
            ],
        ),
    ],
)
def test_feedback_names_call_and_argument_and_lists_everything(calls, feedback):
    assert grade(calls) == (0.0, False, "\n".join(feedback), {"well_formed": 1.0}, True)


def test_inputs_at_the_wrong_call_do_not_pass():
    first, second = ToolCall("f", {"a": 1}), ToolCall("f", {"b": 2})
    assert grade([second, first], [first, second]).passed
    merged = [ToolCall("f", {"a": 1, "b": 2}), ToolCall("f", {})]
    assert not grade(merged, [first, second]).passed
    assert not grade([first, first], [first, second]).passed
    swapped = [ToolCall("f", {"x": 1}), ToolCall("g", {"x": 2})]
    assert not grade([ToolCall("f", {"x": 2}), ToolCall("g", {"x": 1})], swapped).passed


def test_true_is_not_one_even_beside_its_twin():
    one, true = ToolCall("f", {"a": 1}), ToolCall("f", {"a": True})
    for given in ([true, one], [one, true], [true, true]):
        assert not grade(given, [one, one]).passed
    assert grade([true, one], [one, true]).passed


def test_a_wrong_call_is_compared_with_the_one_nearest_to_it():
    near, far = ToolCall("f", {"a": 1, "b": 2}), ToolCall("f", {"a": 8, "b": 9})
    given = [ToolCall("f", {"a": 8, "b": 7}), near]
    assert grade(given, [near, far]).feedback == "f: b: wrong value 7"


@pytest.mark.parametrize(
    ("response", "feedback"),
    [
        ("", f"No call found: expected {FORM}."),
        ("I would book(city=Rome).", f"No call found: expected {FORM}."),
        ("Action: book", f'Call 1 (book): no "Action Input:" follows, expected {FORM}.'),
        ("Action:\nAction Input: {}", 'Call 1: no name after "Action:".'),
        (
            "Action: book\nAction Input: city=Rome",
            "Call 1 (book): the input is not JSON: Expecting value, character 1.",
        ),
        (
            "Action: book\nAction Input: {}\nAction: pay\nAction Input: {'a': 1}",
            "Call 2 (pay): the input is not JSON: Expecting property name enclosed in double "
            "quotes, character 2.",
        ),
        (
            "Action: f\nAction Input: [1]",
            "Call 1 (f): the input is a list, expected a JSON object.",
        ),
        ('Action: f\nAction Input: {"a": 1, "a": 2}', "Call 1 (f): the argument a is given twice."),
        ('Action: f\nAction Input: {"a": NaN}', "Call 1 (f): NaN is not a JSON value."),
        (
            # Deeper than any supported Python decodes: 3.13 reads nearly 10,000 levels.
            "Action: f\nAction Input: " + '{"a":' + "[" * 15_000,
            "Call 1 (f): the input is nested too deep or holds a huge number.",
        ),
        (
            "Action: f\nAction Input: " + '{"a":' * 20 + "1" + "}" * 20,
            "Call 1 (f): the input is nested deeper than 16 levels.",
        ),
        ("Action: f\nAction Input: {}\n" * 17, "More than 16 calls."),
        ("x" * 20_001, "The answer is longer than 20000 characters."),
    ],
)
def test_what_cannot_be_read_says_why(response, feedback):
    assert grade(response) == (0.0, False, feedback, {"well_formed": 0.0}, True)


def test_feedback_holds_expected_values_only_if_told_to():
    wrong = [change(BOOK, city="Oslo", days=None)]
    shy, frank = grade(wrong).feedback, grade(wrong, reveal_expected=True).feedback
    assert not any(word in shy for word in ("Rome", "3", "pay", "10"))
    assert frank.splitlines() == [
        'book: city: wrong value "Oslo"; expected "Rome"',
        "book: missing argument days; expected 3",
        "A call is missing: Action: pay",
        'Action Input: {"amount": 10, "card": true}',
    ]


def test_feedback_can_be_encoded_whatever_the_answer_spells():
    for name in ("book", "\\ud800"):
        answer = 'Action: NAME\nAction Input: {"\\ud800": 1, "city": "\\udfff"}'.replace(
            "NAME", name
        )
        grade(answer).feedback.encode()
    grade('Action: \ud800\nAction Input: {"a": 1}').feedback.encode()


def test_the_reference_passes_whole_or_cut():
    made = ToolUse([TASK], [])
    for one in (made.grade, made.grade_truncated):
        assert one(made.train[0], made.reference(made.train[0])).passed


def test_a_task_on_both_sides_is_refused():
    with pytest.raises(UserError, match="stands among the train rows"):
        ToolUse([TASK], [TASK._replace(id="other")])


# Data


def test_rows_of_either_spelling_are_read(tmp_path):
    ours = [{"action": call.action, "input": call.input} for call in (BOOK, PAY)]
    theirs = [{"Action": c.action, "Action_Input": json.dumps(c.input)} for c in (BOOK, PAY)]
    for name, answer in (("a", ours), ("b", json.dumps(ours)), ("c", theirs)):
        row = {"id": name, "prompt": "Book and pay.", "answer": answer}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    assert load_tool_use(tmp_path / "a.jsonl", tmp_path / "b.jsonl").train == [
        TASK._replace(id="a")
    ]
    assert load_tool_use(tmp_path / "c.jsonl", tmp_path / "b.jsonl").train[0].calls == (BOOK, PAY)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([], "answer is empty, expected a list of calls"),
        ({"action": "f"}, "answer is an object, expected a list of calls"),
        ("{", "answer is no JSON"),
        (["f"], r"answer\[0\] is a string, expected an object"),
        ([{"input": {}}], r'answer\[0\]: "action" is missing'),
        ([{"action": "f"}], r'answer\[0\]: "input" is missing'),
        ([{"action": "f", "input": [1]}], r"answer\[0\]\.input is a list, expected an object"),
        ([{"action": "`f`", "input": {}}], "answer cannot be written as lines"),
        ([{"action": "f", "input": {"a": "\ud800"}}], "half of a surrogate pair"),
    ],
)
def test_a_row_without_calls_says_why(answer, reason):
    with pytest.raises(BadRow, match=reason):
        parse_row({"prompt": "Book.", "answer": answer}, "f:1")
