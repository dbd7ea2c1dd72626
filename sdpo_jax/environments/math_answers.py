r"""Mathematics with a final answer in `\boxed{}`, checked by value.

The last box counts. It passes if it is the true answer letter by letter, or if math-verify finds
both equal (`1/2` and `\frac{2}{4}`). Reward is 1 or 0; `metrics` holds `well_formed` (there is a
box) and `refused` (math-verify was not asked, see `why_refused`).

math-verify runs computer algebra on what the model wrote, which may not come to an end; its own
deadline works in a main thread only and not inside long operations of C code. So it is off here:
`needs_worker` asks for a worker process with a deadline, and what obviously explodes (`9^{9^{9}}`,
`1000000!`) is refused before, with a reason.

Departures from the reference's grader (lasgroup/SDPO, `verl/utils/reward_score/feedback/math.py`):

* It reads a box in the last 100 characters only; here it may stand anywhere, for a long answer is
  longer than that.
* It speaks of truncation even where the answer is right; here feedback on a right answer is blank.
* Its switch for wrong answers prints the truth; here `say_wrong` does not, `reveal_expected` does.
* Answers in words are compared as words: math-verify reads `\text{}`-less words as products of
  their letters, so that anagrams are equal.
* Text up to `</think>` does not count.
"""

import logging
import re
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sdpo_jax.environments.answer_forms import cut_off, last_boxed, shown, without_thinking
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.environments.rows import (
    BadRow,
    Split,
    check_sides,
    get,
    read_sides,
    row_id,
    text,
    type_name,
)
from sdpo_jax.errors import UserError

MAX_CHARACTERS, MAX_DIGITS, MAX_DEPTH = 500, 60, 20
MAX_POWER = 10_000
"""Product of nested exponents; of what stands in front of a factorial, a tenth."""
MAX_EXPANSION = 20
"""Power of a group with variables, such as `(x + 1)^{20}`: it is multiplied out."""
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


class Problem(NamedTuple):
    """A problem, its true answer as it would stand in a box, and a worked solution, if there is."""

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
        say_wrong: bool = False,
        reveal_expected: bool = False,
    ):
        """Checks that no problem is on both sides and that math-verify is installed.

        Args:
          train: problems to learn from.
          held_out: problems to evaluate on.
          say_wrong: whether feedback says of a wrong answer that it is wrong.
          reveal_expected: whether it also holds the true answer, which the teacher then copies.

        Raises:
          UserError: an id or a problem occurs twice, or the package math-verify is missing.
        """
        if util.find_spec("math_verify") is None:
            raise UserError(f"mathematics is graded by the package math-verify: {_INSTALL}")
        self.train = [_prompt(problem) for problem in train]
        self.held_out = [_prompt(problem) for problem in held_out]
        check_sides(self.train, self.held_out)
        self._say_wrong, self._reveal = say_wrong, reveal_expected

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Passes an equal answer; feedback names the form, or why an answer was not checked.

        May run for long: call it in a process that can be killed, in any thread.
        """
        problem: Problem = prompt.data["problem"]
        given = last_boxed(without_thinking(response))
        if not given:
            box = "The box is empty." if given is not None else "No answer found."
            feedback = f"{box} Put the final answer inside {FORM}."
            return Outcome(0.0, False, feedback, {"well_formed": 0.0, "refused": 0.0})
        right = same_text(given, problem.answer)
        reason = None if right else why_refused(given)
        if not right and reason is None:
            right = equal(given, problem.answer)
        metrics = {"well_formed": 1.0, "refused": float(reason is not None)}
        return Outcome(float(right), right, self._complaint(given, problem, right, reason), metrics)

    def _complaint(self, given: str, problem: Problem, right: bool, reason: str | None) -> str:
        if right:
            return ""
        hint = f" Expected: {problem.answer}" if self._reveal else ""
        if reason is not None:
            return f"The answer in the box was not checked: {reason}.{hint}"
        if self._say_wrong or self._reveal:
            return f"The answer {shown(given)} is wrong.{hint}"
        return ""

    def grade_truncated(self, prompt: Prompt, response: str) -> Outcome:
        """The verdict of `grade`; feedback on a failure says that the response was cut."""
        return cut_off(self.grade(prompt, response), f"the final answer inside {FORM}")

    def answer(self, prompt: Prompt, response: str) -> str | None:
        r"""What the last box holds, without white space and marks of text.

        By its letters, not its value: `1/2` and `\frac{1}{2}` are two answers of a vote.
        """
        del prompt
        given = last_boxed(without_thinking(response))
        return _plain(given) if given else None

    def reference(self, prompt: Prompt) -> str:
        """The worked solution, if there is one, and the true answer in a box."""
        problem: Problem = prompt.data["problem"]
        return "\n\n".join(filter(None, [problem.solution, rf"\boxed{{{problem.answer}}}"]))


def _prompt(problem: Problem) -> Prompt:
    content = f"{problem.question}\n\n{_INSTRUCTION}"
    return Prompt(problem.id, ({"role": "user", "content": content},), {"problem": problem})


def same_text(given: str, answer: str) -> bool:
    """Whether two answers are the same letters, with or without LaTeX's marks of text."""
    return given == answer or _plain(given) == _plain(answer)


def _plain(answer: str) -> str:
    """Words are compared without case and marks of text; anything else without white space."""
    words = _LATEX_TEXT.sub(r"\1", answer).strip(" $.")
    return words.casefold() if _WORD.fullmatch(words) else "".join(words.split())


def why_refused(answer: str) -> str | None:
    """Why an answer is not handed to computer algebra; None: it may be."""
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
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _power(answer: str) -> int:
    """A bound of how far exponents multiply: those of groups, which may be nested, and one more.

    Of an exponent the largest integer counts. A number that is raised inside an exponent is a
    tower, and counts as more than is allowed.
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
    """Whether a group is raised to a large power in an answer with variables."""
    if not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", answer)):
        return False
    groups = re.finditer(r"[)}\]]\s*(?:\^|\*\*)\s*", answer)
    exponents = [_argument(answer, match.end())[0] for match in groups]
    return any(int(n) > MAX_EXPANSION for e in exponents for n in _DIGITS.findall(e))


def _argument(answer: str, start: int) -> tuple[str, int]:
    """The group or token that begins at a place, and where it ends."""
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
    """The largest number in front of `!`; the factorial of anything else is more than allowed."""
    largest = 0
    for match in re.finditer(r"(\d*)\s*(!+|\\factorial)", answer):
        plain = match[1] and match[2] == "!"
        largest = max(largest, int(match[1]) if plain else MAX_POWER)
    return largest


def equal(given: str, answer: str) -> bool:
    """Whether math-verify finds two answers equal; runs without any deadline.

    Where the true answer is a word, or is refused itself, only the same text is equal.
    """
    words = _LATEX_TEXT.sub(r"\1", answer).strip(" $.")
    if _WORD.fullmatch(words) or why_refused(answer) is not None:
        return False
    from math_verify import parse, verify

    # It warns once that it has no deadline, which is on purpose here.
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
    return read_sides(train, held_out, parse_row, on_error, form=_FORM, content="problems")


def parse_row(row: dict[str, Any], place: str) -> Problem:
    """One row as `load_math` expects it."""
    asked = "problem" if "problem" in row and "question" not in row else "question"
    question = text(get(row, asked), asked)
    key = "solution" if "solution" in row and "answer" not in row else "answer"
    value = get(row, key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise BadRow(f"{key} is {type_name(value)}, expected a string or a number")
    answer, solution = _true_answer(text(value, key), key)
    if not solution and isinstance(more := row.get("solution"), str):
        solution = more.strip()
    return Problem(row_id(row, place), question, answer, solution)


def _true_answer(value: str, key: str) -> tuple[str, str]:
    """The answer, and the solution that leads to it, without GSM8K's calculator marks."""
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
