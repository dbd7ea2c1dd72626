r"""Kind `math`: problems with a final answer in `\boxed{}`, compared by value.

The last complete box after the thinking counts. It passes if it equals the true answer by the rules
of docs/environments.md (`math_equality.py`); math-verify's parser reads formulas. The reward is 1
or 0; `metrics` holds `well_formed` (there is a box) and `refused` (the answer was not evaluated,
see `why_refused`).

A few formulas take for ever to evaluate. `needs_worker` selects a worker process with a deadline;
an answer that misses it is wrong (`late`), since the delay is the answer's own. An answer that
obviously explodes (`9^{9^{9}}`, `1000000!`) is refused beforehand, with a reason.

Departures from the reference's grader (lasgroup/SDPO, `verl/utils/reward_score/feedback/math.py`):

* The reference finds a box in the last 100 characters only; here it may stand anywhere, because an
  answer may be longer than that.
* It mentions truncation even if the answer is right; here feedback on a right answer is blank.
* Its switch for feedback on wrong answers prints the truth; here `report_incorrect` does not, and
  `reveal_expected` does.
* It compares by math-verify, which drops words and units, and finds any two numbers equal that are
  close to each other; here both count.
* Thinking does not count.
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sdpo_jax.config import at_least, setting
from sdpo_jax.environments import rows
from sdpo_jax.environments.answer_forms import cut_off, last_boxed, shown, without_thinking
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.environments.math_equality import equal, why_only_text, why_refused
from sdpo_jax.environments.math_spelling import plain, same_text
from sdpo_jax.environments.rows import BadRow, Split, type_name
from sdpo_jax.environments.settings import FilesConfig, WorkerConfig, print_skipped, require_files
from sdpo_jax.errors import UserError

FORM = r"\boxed{your_answer}"
_INSTALL = "pip install 'math-verify>=0.9.0'"
_INSTRUCTION = rf"Think step by step, then put the final answer inside {FORM}."
_FORM = '{"question": "...", "answer": "... #### 18"} or {"problem": "...", "solution": "..."}'

_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class MathConfig(FilesConfig, WorkerConfig):
    """Problems with a number or formula as the answer, compared by math-verify."""

    kind: Literal["math"] = "math"
    report_incorrect: bool = False
    """Whether feedback on a wrong answer states that it is wrong."""
    reveal_expected: bool = False
    """Whether feedback on a wrong answer contains the right one, which gives it away."""
    missing_units: bool = False
    """Whether an answer may lack the unit of measure that the true answer names."""
    relative_tolerance: float = setting(0.0, at_least(0))
    """Relative error that a number may have; 0: it must be exact."""


class Problem(NamedTuple):
    """A problem, its true answer as it would stand in a box, and its worked solution, if any."""

    id: str
    question: str
    answer: str
    solution: str = ""


class Math:
    """The environment: every problem given, in order."""

    needs_worker = True
    late = Outcome(
        0.0,
        False,
        "Comparing the answer in the box took too long. Give it in a simpler form.",
        {"well_formed": 1.0, "refused": 1.0},
    )

    def __init__(
        self,
        train: Sequence[Problem],
        held_out: Sequence[Problem],
        *,
        report_incorrect: bool = False,
        reveal_expected: bool = False,
        missing_units: bool = False,
        relative_tolerance: float = 0.0,
    ):
        """Checks that no problem is on both sides and that math-verify is installed.

        Args:
          train: problems to train on.
          held_out: problems to evaluate on.
          report_incorrect: whether feedback on a wrong answer states that it is wrong.
          reveal_expected: whether it also contains the true answer, which the teacher then copies.
          missing_units: whether an answer may lack the unit that the true answer names.
          relative_tolerance: relative error that a number may have.

        Raises:
          UserError: an id or a problem occurs twice, or the package math-verify is missing.
        """
        if util.find_spec("math_verify") is None:
            raise UserError(f"mathematics is graded by the package math-verify: {_INSTALL}")
        self.train = [_prompt(problem) for problem in train]
        self.held_out = [_prompt(problem) for problem in held_out]
        rows.check_sides(self.train, self.held_out)
        self._report_incorrect, self._reveal = report_incorrect, reveal_expected
        self._missing_units, self._tolerance = missing_units, relative_tolerance

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Passes an equal answer; feedback names the form, or why an answer was not checked.

        May run for a long time: call it in a process that can be killed.
        """
        problem: Problem = prompt.data["problem"]
        given = last_boxed(without_thinking(response))
        if not given:
            box = "The box is empty." if given is not None else "No answer found."
            feedback = f"{box} Put the final answer inside {FORM}."
            return Outcome(0.0, False, feedback, {"well_formed": 0.0, "refused": 0.0})
        same = same_text(given, problem.answer)
        reason = None if same else why_refused(given)
        right = same or (
            reason is None
            and equal(
                given, problem.answer, missing_units=self._missing_units, tolerance=self._tolerance
            )
        )
        metrics = {"well_formed": 1.0, "refused": float(reason is not None)}
        return Outcome(float(right), right, self._complaint(given, problem, right, reason), metrics)

    def _complaint(self, given: str, problem: Problem, right: bool, reason: str | None) -> str:
        if right:
            return ""
        hint = f" Expected: {problem.answer}" if self._reveal else ""
        if reason is not None:
            return f"The answer in the box was not checked: {reason}.{hint}"
        if self._report_incorrect or self._reveal:
            return f"The answer {shown(given)} is wrong.{hint}"
        return ""

    def grade_truncated(self, prompt: Prompt, response: str) -> Outcome:
        """Grades like `grade`; on a failure, the feedback is that the response was cut."""
        return cut_off(self.grade(prompt, response), f"the final answer inside {FORM}")

    def answer(self, prompt: Prompt, response: str) -> str | None:
        r"""The content of the last box without white space and `\text{}`.

        Answers are compared as text, not by value: `1/2` and `\frac{1}{2}` are two answers.
        """
        del prompt
        given = last_boxed(without_thinking(response))
        return plain(given) if given else None

    def reference(self, prompt: Prompt) -> str:
        """The worked solution, if any, and the true answer in a box."""
        problem: Problem = prompt.data["problem"]
        return "\n\n".join(filter(None, [problem.solution, rf"\boxed{{{problem.answer}}}"]))


def build(config: MathConfig) -> Math:
    """Builds the environment from its settings and files."""
    require_files(config)
    sides = load_math(config.train, config.held_out, config.on_error)
    print_skipped(sides.problems)
    for problem in (*sides.train, *sides.held_out):
        if reason := why_only_text(problem.answer):
            answer = shown(problem.answer)
            print(f"{problem.id}: only its own letters match {answer}: {reason}", file=sys.stderr)
    return Math(
        sides.train,
        sides.held_out,
        report_incorrect=config.report_incorrect,
        reveal_expected=config.reveal_expected,
        missing_units=config.missing_units,
        relative_tolerance=config.relative_tolerance,
    )


def _prompt(problem: Problem) -> Prompt:
    content = f"{problem.question}\n\n{_INSTRUCTION}"
    return Prompt(problem.id, ({"role": "user", "content": content},), {"problem": problem})


def load_math(
    train: str | Path, held_out: str | Path, on_error: Literal["stop", "skip"] = "stop"
) -> Split[Problem]:
    r"""Reads two JSONL files in the form of GSM8K or of MATH.

    A row has a `question` (or `problem`) and an `answer` (or `solution`). The true answer is the
    last `\boxed{}`, else what follows the only `####` in the last line, else all of it; it may be a
    number.

    Raises:
      UserError: a file is missing, or holds bad rows.
    """
    return rows.read_sides(train, held_out, parse_row, on_error, form=_FORM, content="problems")


def parse_row(row: dict[str, Any], place: str) -> Problem:
    """Parses one row of the form that `load_math` describes."""
    asked = "problem" if "problem" in row and "question" not in row else "question"
    question = rows.text(rows.get(row, asked), asked)
    key = "solution" if "solution" in row and "answer" not in row else "answer"
    value = rows.get(row, key)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf:
        value = str(value)
    if not isinstance(value, str):
        raise BadRow(f"{key} is {type_name(value)}, expected a string or a number")
    answer, solution = _true_answer(rows.text(value, key), key)
    if not solution and isinstance(more := row.get("solution"), str):
        solution = more.strip()
    return Problem(rows.row_id(row, place), question, answer, solution)


def _true_answer(value: str, key: str) -> tuple[str, str]:
    """Splits a worked solution into the answer and the text before it, without calculator marks."""
    solution, mark, final = value.strip().rpartition("####")
    if (boxed := last_boxed(value)) is not None:
        answer, solution = boxed, value.strip()
    elif mark and "####" not in solution and "\n" not in final:  # Others are Markdown headings.
        answer, solution = final.strip(), _CALCULATOR.sub("", solution).strip()
        answer = answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer
    elif key == "solution":
        raise BadRow(r"solution has no #### and no \boxed{}, expected one of them")
    else:
        answer, solution = value.strip(), ""
    if not answer or "\n" in answer:
        what = "of several lines" if answer else "empty"
        raise BadRow(f"the true answer is {what}, expected one line")
    if last_boxed(rf"\boxed{{{answer}}}") != answer:
        raise BadRow(f"the true answer {shown(answer)} has unbalanced braces")
    return answer, solution
