"""Feedback word for word: every class, which one is chosen, the limits, what stays hidden."""

import pytest

from sdpo_jax.environments.code.feedback import MAX_CHARACTERS, Record, write_feedback
from sdpo_jax.environments.code.problems import Case, Equals, InBox, Prints
from sdpo_jax.environments.sandbox.protocol import Call, Check, Limits, Observation, Run

LIMITS = Limits(cpu_seconds=2.5, memory_mb=512, output_bytes=1000)
CALL = Case(Call("f", (1,)), Equals([3]), "[1, 2]\n4", "[3]")
STDIN = Case(Run("5 0\n"), Prints("2\n"), "5 0\n", "2\n")
ASSERT = Case(Check("assert f(1) == 2"), InBox(), "assert f(1) == 2", "no exception")
ERROR = Observation("error", error="ValueError: no\nLine 3 in f (Solution.py)", stdout="a\nb\n")


def feedback(*seen, visible=True, **options):
    records = [
        Record(i, case, observation, False, visible)
        for i, (case, observation) in enumerate(seen, 1)
    ]
    return write_feedback(records, limits=LIMITS, **options)


def test_a_runtime_error_shows_the_error_the_input_and_what_was_printed():
    assert feedback((CALL, ERROR)) == (
        "Runtime Error\nValueError: no\nLine 3 in f (Solution.py)\n\n"
        "On Input\n[1, 2]\n4\n\n"
        "Printed\na\nb"
    )


def test_lines_of_the_prelude_are_not_counted():
    text = "E: x\nLine 2 in help (Solution.py)\nLine 9 in f (Solution.py)\nLine 9 in the rain"
    assert feedback((CALL, Observation("error", error=text)), skip_lines=5) == (
        "Runtime Error\nE: x\nLine 4 in f (Solution.py)\nLine 9 in the rain\n\nOn Input\n[1, 2]\n4"
    )


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ("time_limit", "Time Limit Exceeded\nIt may use 2.5 s of processor time for each test."),
        ("memory_limit", "Memory Limit Exceeded\nIt may use 512 MB of memory."),
        ("output_limit", "Output Limit Exceeded\nIt may print 1000 bytes."),
        ("died", "No Result\nThe program ended before there was a result."),
    ],
)
def test_limits_are_named_with_their_size(status, text):
    assert feedback((STDIN, Observation(status))) == f"{text}\n\nOn Input\n5 0"


def test_a_wrong_answer_shows_input_output_and_expected():
    seen = Observation("done", value=[4], stdout="debug 1\n")
    assert feedback((CALL, seen)) == (
        "Test 1: Wrong Answer\n\nInput\n[1, 2]\n4\n\nYour Output\n[4]\n\nExpected\n[3]\n\n"
        "Printed\ndebug 1"
    )
    assert feedback((CALL, seen), show_expected=False) == (
        "Test 1: Wrong Answer\n\nInput\n[1, 2]\n4\n\nYour Output\n[4]\n\nPrinted\ndebug 1"
    )


def test_a_wrong_output_of_a_script_shows_standard_error_as_printed():
    seen = Observation("done", stdout="3\n", stderr="note\n")
    assert feedback((STDIN, seen)) == (
        "Test 1: Wrong Answer\n\nInput\n5 0\n\nYour Output\n3\n\nExpected\n2\n\nPrinted\nnote"
    )
    assert "Your Output\n(nothing)\n" in feedback((STDIN, Observation("done")))


def test_a_failed_assert_is_a_wrong_answer():
    assert feedback((ASSERT, Observation("error", error="AssertionError"))) == (
        "Test 1: Wrong Answer\n\nInput\nassert f(1) == 2\n\nYour Output\nAssertionError\n\n"
        "Expected\nno exception"
    )
    assert feedback((ASSERT, ERROR)).startswith("Runtime Error\nValueError: no")


def test_the_class_is_the_first_that_applies_whatever_the_order_of_the_tests():
    wrong, late = Observation("done", value=0), Observation("time_limit")
    rest = [Observation(s) for s in ("memory_limit", "output_limit", "died")]
    names = ["Runtime", "Time", "Memory", "Output", "No Result", "Test"]
    seen = [ERROR, late, *rest, wrong]
    for first in range(len(seen)):
        for order in (seen[first:], seen[: first - 1 if first else None : -1]):
            text = feedback(*((CALL, observation) for observation in order))
            assert text.startswith(names[first])


def test_text_that_a_program_prints_chooses_no_class():
    seen = Observation("done", stdout="Error: Runtime Error\nTime Limit Exceeded")
    assert feedback((STDIN, seen)).startswith("Test 1: Wrong Answer")


def test_the_two_shortest_wrong_answers_are_shown():
    def wrong(size):
        return CALL._replace(input="7" * size), Observation("done", value=0)

    text = feedback(wrong(9), wrong(2), wrong(30), wrong(1))
    assert [line for line in text.split("\n") if line.startswith("Test")] == [
        "Test 4: Wrong Answer",
        "Test 2: Wrong Answer",
    ]


def test_limits_of_size_hold():
    lines = "\n".join("9" * 400 for _ in range(30))
    seen = Observation("done", value="8" * 5000, stdout=lines)
    text = feedback(*[(CALL._replace(input=lines, expected="1" * 999), seen)] * 2)
    assert len(text) == MAX_CHARACTERS and text.endswith("...")
    block = "9" * 250 + "..."
    assert text.startswith("Test 1: Wrong Answer\n\nInput\n" + "\n".join([block] * 7)[:1950])
    short = feedback((CALL._replace(input="1\n" * 12), Observation("done", value="8" * 999)))
    assert "Input\n" + "1\n" * 8 + "... (4 more lines)\n\nYour Output\n'" in short
    assert len(short.split("Your Output\n")[1].split("\n\n")[0]) == 250


def test_printed_text_is_ten_lines_of_300_characters():
    many = "\n".join("y" * 400 for _ in range(5)) + "\nz" * 30
    printed = feedback((CALL, ERROR._replace(stdout=many))).split("Printed\n")[1].split("\n")
    assert printed == [*["y" * 300 + "..."] * 5, *"zzzzz", "... (25 more lines)"]


def test_a_hidden_test_is_named_and_not_shown():
    secret = CALL._replace(input="SECRET", expected="SECRET")
    for status, name in (("error", "Runtime Error"), ("done", "Wrong Answer")):
        seen = Observation(status, value="SECRET", error="KeyError: SECRET", stdout="SECRET")
        text = feedback((secret, seen), visible=False)
        assert text == f"All visible tests pass, a hidden test does not: {name}"


def test_a_failed_visible_test_says_nothing_of_hidden_ones():
    shown = Record(1, CALL, Observation("done", value=0), False, True)
    secret = CALL._replace(input="SECRET", expected="SECRET")
    hidden = Record(2, secret, ERROR._replace(error="KeyError: SECRET"), False, False)
    text = write_feedback([shown, hidden], limits=LIMITS)
    assert text.startswith("Test 1: Wrong Answer") and "SECRET" not in text


def test_what_passes_gets_no_feedback():
    assert write_feedback([Record(1, CALL, ERROR, True, True)], limits=LIMITS) == ""
    assert write_feedback([], limits=LIMITS) == ""


def test_escapes_and_addresses_never_reach_feedback():
    seen = Observation("error", error="E: <f at 0x7f00ab>\x1b[31m", stdout="\x1b[2Jpid 77\x07")
    text = feedback((CALL._replace(input="\x1b[1m5"), seen))
    assert "\x1b" not in text and "\x07" not in text
    assert "E: <f at 0x...>" in text and "pid ..." in text and "On Input\n5" in text
