"""Writes feedback on the tests of a program, in the style of LeetCode.

Each response gets one class, the first that applies, as in the SDPO reference: an exception; the
time limit; no program (or a response that was cut off); up to two wrong answers, those with the
shortest input and output. A response that passes gets no feedback. The limits are the reference's:
2000 characters in total, inputs of 8 lines of 250 characters, outputs of 250 characters, printed
text of 10 lines of 300.

Departures:

* The wording is our own.
* Exceeded limits of memory and output, and a program that ends without a result, are classes of
  their own after the time limit (in the reference: wrong answers with an internal text).
* The class comes from the sandbox's status, never from text that the program wrote; the reference
  searches for a prefix that a program can print.
* Printed text is sanitized, and shown as `Printed` if the answer is a returned value (the reference
  has a separate function for that).
* Feedback on a hidden test holds only its class: neither input nor expected value nor error text,
  which often quotes the input.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from sdpo_jax.environments.code.problems import Case, InBox
from sdpo_jax.environments.code.values import shown
from sdpo_jax.environments.sandbox.protocol import Limits, Observation, Run
from sdpo_jax.environments.sanitize import sanitize

MAX_CHARACTERS = 2000
NO_PROGRAM = (
    "No Program\n\nThe response holds no complete code block. Put the whole program into one block "
    "that starts with ```python and ends with ```."
)
CUT_OFF = (
    "Cut Off\n\nThe response ended at its length limit before the program was complete. Reason "
    "more briefly and finish the code block."
)
HIDDEN = "All visible tests pass, a hidden test does not: {name}"
_NAMES = {
    "error": "Runtime Error",
    "time_limit": "Time Limit Exceeded",
    "memory_limit": "Memory Limit Exceeded",
    "output_limit": "Output Limit Exceeded",
    "died": "No Result",
    "done": "Wrong Answer",
}
"""Classes by status, in order of precedence."""
# A program can write such a line itself, with more digits than Python converts.
_PLACE = re.compile(r"(?m)^Line (\d{1,9}) in .* \(Solution\.py\)$\n?")


class Record(NamedTuple):
    """The result of one test."""

    number: int
    """The test's number in feedback, from 1."""
    case: Case
    observation: Observation
    passed: bool
    visible: bool
    """Whether feedback may show it."""


def write_feedback(
    records: Sequence[Record], *, limits: Limits, show_expected: bool = True, skip_lines: int = 0
) -> str:
    """Writes the feedback on a response; blank if all tests passed.

    Args:
      records: results of all tests that ran.
      limits: the limits of each test.
      show_expected: whether feedback on a wrong answer shows the expected one, as the reference's.
      skip_lines: lines of source before the program, which line numbers do not count.
    """
    failed = [record for record in records if not record.passed]
    visible = [record for record in failed if record.visible]
    if not failed:
        return ""
    for status in _NAMES:
        chosen = [record for record in visible or failed if _class(record) == status]
        if not chosen:
            continue
        if not visible:
            return HIDDEN.format(name=_NAMES[status])
        if status == "done":
            shortest = sorted(chosen, key=_size)[:2]
            text = "\n\n".join(_wrong_answer(record, show_expected) for record in shortest)
        else:
            text = _stopped(chosen[0], limits, skip_lines)
        return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 3] + "..."
    return ""  # only failures of the sandbox are left


def _class(record: Record) -> str:
    failed_assert = record.observation.error.startswith("AssertionError")
    if failed_assert and isinstance(record.case.verdict, InBox):
        return "done"
    return record.observation.status


def _size(record: Record) -> tuple[int, int]:
    return len(record.case.input) + len(_output(record)), record.number


def _output(record: Record) -> str:
    if isinstance(record.case.test, Run):
        return record.observation.stdout
    if isinstance(record.case.verdict, InBox):
        return record.observation.error
    return shown(record.observation.value)


def _stopped(record: Record, limits: Limits, skip_lines: int) -> str:
    status = record.observation.status
    reasons = {
        "error": _error(record.observation.error, skip_lines),
        "time_limit": f"It may use {limits.cpu_seconds:g} s of processor time for each test.",
        "memory_limit": f"It may use {limits.memory_mb} MB of memory.",
        "output_limit": f"It may print {limits.output_bytes} bytes.",
        "died": "The program ended before there was a result.",
    }
    parts = [f"{_NAMES[status]}\n{reasons[status]}", f"On Input\n{_input(record.case.input)}"]
    return "\n\n".join([*parts, *_printed(record)])


def _error(text: str, skip_lines: int) -> str:
    """The error text of the sandbox with line numbers of the program itself."""

    def place(match: re.Match[str]) -> str:
        number = int(match[1]) - skip_lines
        return match[0].replace(f"Line {match[1]} ", f"Line {number} ", 1) if number > 0 else ""

    text = _PLACE.sub(place, text) if skip_lines else text
    return sanitize(text, max_lines=16, max_line_characters=300, max_characters=1000)


def _wrong_answer(record: Record, show_expected: bool) -> str:
    parts = [
        f"Test {record.number}: Wrong Answer",
        f"Input\n{_input(record.case.input)}",
        f"Your Output\n{_short(_output(record)) or '(nothing)'}",
    ]
    if show_expected:
        parts.append(f"Expected\n{_short(record.case.expected)}")
    return "\n\n".join([*parts, *_printed(record)])


def _printed(record: Record) -> list[str]:
    is_run = isinstance(record.case.test, Run)
    text = record.observation.stderr if is_run else record.observation.stdout
    # Standard error then holds the traceback, which repeats the error with foreign frames.
    if is_run and record.observation.status == "error":
        return []
    shown = sanitize(text, max_lines=10, max_line_characters=300, max_characters=MAX_CHARACTERS)
    return [f"Printed\n{shown}"] if shown else []


def _input(text: str) -> str:
    return sanitize(text, max_lines=8, max_line_characters=250, max_characters=MAX_CHARACTERS)


def _short(text: str) -> str:
    return sanitize(text, max_lines=20, max_line_characters=250, max_characters=250)
