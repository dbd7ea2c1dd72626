r"""Kind `math`: problems with a final answer in `\boxed{}`, compared by value with math-verify.

The last box counts. It passes if it equals the true answer as text, or if math-verify finds both
equal (`1/2` and `\frac{2}{4}`). The reward is 1 or 0; `metrics` holds `well_formed` (there is a
box) and `refused` (math-verify was not called, see `why_refused`).

math-verify runs computer algebra on the model's answer, which may never terminate. Its own timeout
works in the main thread only and not inside long operations of C code, so it is off here. Instead,
`needs_worker` selects a worker process with a deadline, and an answer that obviously explodes
(`9^{9^{9}}`, `1000000!`) is refused beforehand, with a reason.

Departures from the reference's grader (lasgroup/SDPO, `verl/utils/reward_score/feedback/math.py`):

* The reference finds a box in the last 100 characters only; here it may stand anywhere, because an
  answer may be longer than that.
* It mentions truncation even if the answer is right; here feedback on a right answer is blank.
* Its switch for feedback on wrong answers prints the truth; here `report_incorrect` does not, and
  `reveal_expected` does.
* Answers in words are compared as words: math-verify parses words outside `\text{}` as products of
  letters, so that anagrams are equal.
* Text up to `</think>` does not count.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sdpo_jax.environments import rows
from sdpo_jax.environments.answer_forms import cut_off, last_boxed, shown, without_thinking
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.environments.rows import BadRow, Split, type_name
from sdpo_jax.environments.settings import FilesConfig, WorkerConfig, print_skipped, require_files
from sdpo_jax.errors import UserError

MAX_CHARACTERS, MAX_DIGITS, MAX_DEPTH = 500, 60, 20
MAX_POWER = 10_000
"""Bound on the product of nested exponents; a tenth of it bounds the operand of a factorial."""
MAX_EXPANSION = 20
"""Bound on the power of a group with variables, such as `(x + 1)^{20}`, which is expanded."""
FORM = r"\boxed{your_answer}"
_INSTALL = "pip install 'math-verify>=0.9.0'"
_INSTRUCTION = rf"Think step by step, then put the final answer inside {FORM}."
_FORM = '{"question": "...", "answer": "... #### 18"} or {"problem": "...", "solution": "..."}'

_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORD = re.compile(r"[^\W\d_]{3,}(?:[ '-]+[^\W\d_]+)*\.?")
_DIGITS = re.compile(r"\d+")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*")
_TOKEN = re.compile(r"\\[A-Za-z]+|[-+]?\s*[\d.]+|.", re.DOTALL)
_UNBOUNDED = re.compile(r"\\(?:sum|prod|i*int|oint|lim|binom|[dt]binom|choose|Gamma)(?![A-Za-z])")
_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class MathConfig(FilesConfig, WorkerConfig):
    """Problems with a number or formula as the answer, compared by math-verify."""

    kind: Literal["math"] = "math"
    report_incorrect: bool = False
    """Whether feedback on a wrong answer states that it is wrong."""
    reveal_expected: bool = False
    """Whether feedback on a wrong answer contains the right one, which gives it away."""


class Problem(NamedTuple):
    """A problem, its true answer as it would stand in a box, and its worked solution, if any."""

    id: str
    question: str
    answer: str
    solution: str = ""


class Math:
    """The environment: every problem given, in order."""

    needs_worker = True

    def __init__(
        self,
        train: Sequence[Problem],
        held_out: Sequence[Problem],
        *,
        report_incorrect: bool = False,
        reveal_expected: bool = False,
    ):
        """Checks that no problem is on both sides and that math-verify is installed.

        Args:
          train: problems to train on.
          held_out: problems to evaluate on.
          report_incorrect: whether feedback on a wrong answer states that it is wrong.
          reveal_expected: whether it also contains the true answer, which the teacher then copies.

        Raises:
          UserError: an id or a problem occurs twice, or the package math-verify is missing.
        """
        if util.find_spec("math_verify") is None:
            raise UserError(f"mathematics is graded by the package math-verify: {_INSTALL}")
        self.train = [_prompt(problem) for problem in train]
        self.held_out = [_prompt(problem) for problem in held_out]
        rows.check_sides(self.train, self.held_out)
        self._report_incorrect, self._reveal = report_incorrect, reveal_expected

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
        right = same or (reason is None and equal(given, problem.answer))
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
        return _plain(given) if given else None

    def reference(self, prompt: Prompt) -> str:
        """The worked solution, if any, and the true answer in a box."""
        problem: Problem = prompt.data["problem"]
        return "\n\n".join(filter(None, [problem.solution, rf"\boxed{{{problem.answer}}}"]))


def build(config: MathConfig) -> Math:
    """Builds the environment from its settings and files."""
    require_files(config)
    sides = load_math(config.train, config.held_out, config.on_error)
    print_skipped(sides.problems)
    return Math(
        sides.train,
        sides.held_out,
        report_incorrect=config.report_incorrect,
        reveal_expected=config.reveal_expected,
    )


def _prompt(problem: Problem) -> Prompt:
    content = f"{problem.question}\n\n{_INSTRUCTION}"
    return Prompt(problem.id, ({"role": "user", "content": content},), {"problem": problem})


def same_text(given: str, answer: str) -> bool:
    r"""Whether two answers are the same text, with or without `\text{}` and the like."""
    return given == answer or _plain(given) == _plain(answer)


def _plain(answer: str) -> str:
    r"""Normalizes an answer: words to lower case without `\text{}`, others without white space."""
    words = _LATEX_TEXT.sub(r"\1", answer).strip(" $.")
    return words.casefold() if _WORD.fullmatch(words) else "".join(words.split())


def why_refused(answer: str) -> str | None:
    """The reason why an answer must not reach computer algebra; None if it may."""
    if len(answer) > MAX_CHARACTERS:
        return f"it is longer than {MAX_CHARACTERS} characters"
    if any(len(number) > MAX_DIGITS for number in _DIGITS.findall(answer)):
        return f"it holds a number of more than {MAX_DIGITS} digits"
    if _depth(answer) > MAX_DEPTH:
        return f"it is nested deeper than {MAX_DEPTH} levels"
    if _UNBOUNDED.search(answer):
        return "it is not evaluated (a sum, product, integral, limit or binomial)"
    if _expands(answer):
        return f"an expression with variables is raised to more than the power {MAX_EXPANSION}"
    if _power(answer) > MAX_POWER or _largest_factorial(answer) > MAX_POWER // 10:
        return "its powers or factorials are too large to evaluate"
    return None


def _depth(answer: str) -> int:
    steps = ((character in "([{") - (character in ")]}") for character in answer)
    return max(accumulate(steps, initial=0))


def _power(answer: str) -> int:
    """An upper bound on the product of nested exponents: those of groups, and one plain one.

    An exponent counts as its largest integer. A power inside an exponent is a tower and counts as
    more than is allowed.
    """
    nested = plain = 1
    for match in _EXPONENT.finditer(answer):
        exponent, end = _argument(answer, match.end())
        raised = re.search(r"\d[\s})]*(?:\^|\*\*)", exponent)
        if raised or (_EXPONENT.match(answer, end) and _DIGITS.search(exponent)):
            return MAX_POWER + 1
        size = max([1, *map(int, _DIGITS.findall(exponent))])
        if answer[: match.start()].rstrip()[-1:] in (")", "}", "]"):
            nested *= size
        else:
            plain = max(plain, size)
    return nested * plain


def _expands(answer: str) -> bool:
    """Whether an answer with variables raises a group to a large power."""
    if not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", answer)):
        return False
    groups = re.finditer(r"[)}\]]\s*(?:\^|\*\*)\s*", answer)
    exponents = [_argument(answer, match.end())[0] for match in groups]
    return any(int(n) > MAX_EXPANSION for e in exponents for n in _DIGITS.findall(e))


def _argument(answer: str, start: int) -> tuple[str, int]:
    """The group or token that begins at `start`, and the position after it."""
    if answer[start : start + 1] not in ("{", "("):
        token = _TOKEN.match(answer, start)
        return (token[0], token.end()) if token else ("", start)
    depth = 0
    for end in range(start, len(answer)):
        depth += (answer[end] in "({") - (answer[end] in ")}")
        if depth == 0:
            return answer[start : end + 1], end + 1
    return answer[start:], len(answer)


def _largest_factorial(answer: str) -> int:
    """The largest integer before `!`; the factorial of anything else exceeds the bound."""
    found = re.findall(r"(\d*)\s*(!+|\\factorial)", answer)
    return max((int(n) if n and mark == "!" else MAX_POWER for n, mark in found), default=0)


def equal(given: str, answer: str) -> bool:
    """Whether math-verify finds two answers equal; runs without a deadline.

    If the true answer is a word, or would be refused itself, only the same text is equal.
    """
    words = _LATEX_TEXT.sub(r"\1", answer).strip(" $.")
    if _WORD.fullmatch(words) or why_refused(answer) is not None:
        return False
    from math_verify import parse, verify

    # math-verify warns that it has no timeout, which is intended here.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    without_deadline: Any = None  # Accepted, though `parse` declares an int.
    expected, found = (
        parse(rf"\boxed{{{text}}}", parsing_timeout=without_deadline) for text in (answer, given)
    )
    return bool(verify(expected, found, timeout_seconds=without_deadline))


def load_math(
    train: str | Path, held_out: str | Path, on_error: Literal["stop", "skip"] = "stop"
) -> Split[Problem]:
    r"""Reads two JSONL files in the form of GSM8K or of MATH.

    A row has a `question` (or `problem`) and an `answer` (or `solution`). The true answer is what
    follows the last `####`, else the last `\boxed{}`, else all of it; it may be a number.

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
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadRow(f"{key} is {type_name(value)}, expected a string or a number")
    answer, solution = _true_answer(rows.text(value, key), key)
    if not solution and isinstance(more := row.get("solution"), str):
        solution = more.strip()
    return Problem(rows.row_id(row, place), question, answer, solution)


def _true_answer(value: str, key: str) -> tuple[str, str]:
    """Splits a worked solution into the answer and the text before it, without calculator marks."""
    solution, mark, final = value.rpartition("####")
    if mark:
        answer, solution = final.strip().replace(",", ""), _CALCULATOR.sub("", solution).strip()
    elif (boxed := last_boxed(value)) is not None:
        answer, solution = boxed, value.strip()
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
