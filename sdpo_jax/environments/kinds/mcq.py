r"""Kind `mcq`: multiple choice as in SciKnowEval, lettered options answered by one letter.

The answer is the content of the last `<answer>...</answer>`; without tags, of the last
`\boxed{...}` that holds letters of options; without either, the last "answer is (X)" or
"Answer: X". Only the letters of the item's own options count, in their own case, bare or in
parentheses, emphasis or dollars. Several letters, as in "the answer is A, B, C or D", are no
answer. The reward is 1 for the right letter, else 0; `metrics` holds `well_formed`: a letter was
found.

Departures from the reference's graders (lasgroup/SDPO, `verl/utils/reward_score/feedback/`):

* `mcq.py` gives no feedback on a missing answer; here feedback names the expected form, because
  otherwise such a response gives no signal. A wrong letter gets no feedback, as in the reference,
  unless `report_incorrect`: with two options, such feedback gives the answer away.
* `mcq.py` reports `incorrect_format` if the format is right; `well_formed` is true if it is right.
* `mcq.py` accepts text after an `<answer>` that is never closed; here both tags are required.
* `gpqa.py` and `mmlu_pro.py` search for any single letter, the former after converting the text to
  upper case, so that "The answer is C because it is a metal." counts as A. Here nothing does.
* Text up to `</think>` does not count.
* The instruction names the item's letters; the dataset's own instruction names A, B, C, D even if
  there are only A and B (two of five questions in biology). `load_sciknoweval(...,
  dataset_prompt=True)` keeps it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

from sdpo_jax.config import SEED, EnvironmentConfig, setting
from sdpo_jax.environments import rows
from sdpo_jax.environments.answer_forms import cut_off, last_tagged, shown, without_thinking
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.environments.packages import package_folder
from sdpo_jax.environments.rows import BadRow, Split
from sdpo_jax.environments.settings import print_skipped

_OPTION = re.compile(r" ?([A-Z]): ?(.*)")
_WRAPPED = re.compile(r"\\(?:boxed|text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_AROUND = " \t\r\n()[]{}*_$`\"'.\\"
"""What may stand around a letter and says nothing."""
_BOX = re.compile(
    r"\\boxed\s*(?:\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\}){0,200})\}|([A-Z])(?![A-Za-z]))"
)
_BETWEEN = re.compile(r"(?:[\s,;/&]|\b(?:or|and)\b)+")
_MARKUP = re.compile(r"\\[()\[\]]|[$*`]|\\(?:text|mathrm|textbf|mathbf)\{([^{}]{0,40})\}")
_STATED = re.compile(
    r"\b(?i:answer(?: is:?|:)\s{1,3}(?:(?:option|choice|letter)\s)?)(?:\(([A-Z])\)|([A-Z])"
    r"(?=\s{0,3}(?:[.,;:!/&]|$|or\b|and\b)"
    r"|\s(?:as|because|since|which|given that|due to|rather than|instead of)\b))",
    re.MULTILINE,
)
_MORE = re.compile(
    r"\s{0,3}(?:,?\s?or\s(?:(?!not\b)[a-z]{1,12}\s){0,2}\(?([A-Z])\b|\(([A-Z])\)"
    r"|(?:[,;/&]|,?\s?\band\b)\s{0,3}"
    r"(?:(?:also|and|even|maybe|option|perhaps|possibly|so is)\s){0,2}\(?([A-Z])"
    r"(?=\)?\s{0,3}(?:[.,;:!?/&]|$|or\b|and\b|because\b|since\b)))",
    re.MULTILINE,
)
"""A further letter of a list; "(C), A is wrong" goes on with a sentence, not with a letter."""
_QUARTZ = Path("registry", "data", "quartz", "samples.jsonl")
_INSTALL = "pip install --no-deps 'evals>=3.0.1'"


@dataclass(frozen=True)
class McqConfig(EnvironmentConfig):
    """Questions with lettered options, answered by a letter."""

    kind: Literal["mcq"] = "mcq"
    source: str = "quartz"
    """`quartz`, or a folder with `train.jsonl` and `test.jsonl` as SciKnowEval's loader writes."""
    report_incorrect: bool = False
    """Whether feedback on a wrong option states that it is wrong."""
    dataset_prompt: bool = False
    """Whether to keep the dataset's own system message and prompt."""
    seed: int = setting(0, SEED)
    """`quartz`: determines which questions are held out."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row of a file does; skipped rows are counted and named."""


class Question(NamedTuple):
    """A question with lettered options and the letter of the right one."""

    id: str
    question: str
    options: Mapping[str, str]
    answer: str
    messages: tuple[Mapping[str, str], ...] = ()
    """The dataset's own prompt; empty: the prompt is made here."""


class Mcq:
    """The environment: every question given, in order."""

    def __init__(
        self,
        train: Sequence[Question],
        held_out: Sequence[Question],
        *,
        report_incorrect: bool = False,
    ):
        """Checks that no question is on both sides.

        Args:
          train: questions to train on.
          held_out: questions to evaluate on.
          report_incorrect: whether feedback on a wrong option states that it is wrong.

        Raises:
          UserError: an id or a question occurs twice.
        """
        self.train = [_prompt(question) for question in train]
        self.held_out = [_prompt(question) for question in held_out]
        rows.check_sides(self.train, self.held_out)
        self._report_incorrect = report_incorrect

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Passes the right letter; feedback describes the expected form."""
        question: Question = prompt.data["question"]
        given = find_letter(response, question.options)
        if given is None:
            return Outcome(0.0, False, _malformed(response, question), {"well_formed": 0.0})
        right = given == question.answer
        feedback = f"Option {given} is wrong." if self._report_incorrect and not right else ""
        return Outcome(float(right), right, feedback, {"well_formed": 1.0})

    def grade_truncated(self, prompt: Prompt, response: str) -> Outcome:
        """Grades like `grade`; on a failure, the feedback is that the response was cut."""
        return cut_off(self.grade(prompt, response), _form(prompt.data["question"].options))

    def answer(self, prompt: Prompt, response: str) -> str | None:
        """The letter."""
        return find_letter(response, prompt.data["question"].options)

    def reference(self, prompt: Prompt) -> str:
        """The right letter in its tags."""
        return f"<answer>\n{prompt.data['question'].answer}\n</answer>"


def build(config: McqConfig) -> Mcq:
    """Builds the environment from its settings."""
    if config.source == "quartz":
        sides = load_quartz(config.seed)
    else:
        sides = load_sciknoweval(
            config.source, config.on_error, dataset_prompt=config.dataset_prompt
        )
        print_skipped(sides.problems)
    return Mcq(sides.train, sides.held_out, report_incorrect=config.report_incorrect)


def find_letter(response: str, options: Mapping[str, str]) -> str | None:
    """The letter that a response answers with; None if it has none of the options' or several."""
    text = without_thinking(response)
    if (tagged := last_tagged(text)) is not None:
        named = _letters(tagged, options)
    else:
        boxes = (_letters(braced or bare, options) for braced, bare in reversed(_BOX.findall(text)))
        named = next((letters for letters in boxes if letters), None) or _stated(text, options)
    return named.pop() if len(named) == 1 else None


def _letters(content: str, options: Mapping[str, str]) -> set[str]:
    """The options that a text of letters alone names; empty for any other text."""
    if len(content) > 400:  # Unwrapping a thousand levels would take quadratic time.
        return set()
    while content != (bare := _WRAPPED.sub(r"\1", content)):
        content = bare
    found = {piece.strip(_AROUND) for piece in _BETWEEN.split(content.strip(_AROUND))} - {""}
    return found if found <= options.keys() else set()


def _stated(text: str, options: Mapping[str, str]) -> set[str]:
    """The options that the last "answer is" names."""
    text = _MARKUP.sub(lambda match: match[1] or "", text)
    for match in reversed([*_STATED.finditer(text)]):
        if (first := match[1] or match[2]) in options:
            found, more = {first}, _MORE.match(text, match.end())
            while more:
                found.add(more[1] or more[2] or more[3])
                more = _MORE.match(text, more.end())
            return found
    return set()


def _malformed(response: str, question: Question) -> str:
    given = last_tagged(without_thinking(response))
    start = "No answer found" if given is None else "The answer is empty"
    if given:
        start = f'"{shown(given)}" is not one of the letters'
    return f"{start}. End with {_form(question.options)}."


def _form(options: Mapping[str, str]) -> str:
    *most, last = options
    return f"<answer>X</answer>, where X is {', '.join(most)} or {last} and nothing else"


def _prompt(question: Question) -> Prompt:
    data = {"question": question}
    if question.messages:
        return Prompt(question.id, question.messages, data)
    lines = [f"{letter}: {option}" for letter, option in question.options.items()]
    asked = "\n".join([question.question, "", *lines])
    instruction = (
        "Choose the right option. Think step by step inside <reasoning>...</reasoning>, then end "
        f"with {_form(question.options)}."
    )
    system: Mapping[str, str] = {"role": "system", "content": instruction}
    return Prompt(question.id, (system, {"role": "user", "content": asked}), data)


def load_sciknoweval(
    folder: str | Path, on_error: Literal["stop", "skip"] = "stop", *, dataset_prompt: bool = False
) -> Split[Question]:
    """Reads `train.jsonl` and `test.jsonl` in the reference's layout.

    Args:
      folder: one subject, such as `sciknoweval/biology`.
      on_error: what to do with bad rows, see `read_rows`.
      dataset_prompt: whether to keep the rows' own `system` and `prompt`.

    Raises:
      UserError: a file is missing, or holds bad rows.
    """
    folder = Path(folder)

    def parse(row: dict[str, Any], place: str) -> Question:
        question = _sciknoweval(row, f"{folder.name}-{rows.row_id(row, place, 'idx')}")
        return question if dataset_prompt else question._replace(messages=())

    form = '{"idx": ..., "prompt": "...\\n\\nA: ...\\nB: ...", "answer": "A"}'
    files = folder / "train.jsonl", folder / "test.jsonl"
    return rows.read_sides(*files, parse, on_error, form=form, content="questions")


def _sciknoweval(row: Mapping[str, Any], name: str) -> Question:
    kind = row.get("kind", "mcq")
    if kind != "mcq":
        raise BadRow(f'kind is {shown(str(kind))}, expected "mcq"')
    asked = rows.text(rows.get(row, "prompt"), "prompt")
    question = parse_question(name, asked, rows.text(rows.get(row, "answer"), "answer"))
    messages = rows.chat(asked, "prompt")
    if (system := row.get("system")) not in (None, ""):
        messages = ({"role": "system", "content": rows.text(system, "system")}, *messages)
    return question._replace(messages=messages)


def parse_question(name: str, asked: str, answer: str) -> Question:
    r"""Parses a question from text that ends with lines `A: ...`, `B: ...` after a blank line.

    Raises:
      BadRow: there are not at least two options in order, or `answer` is not one of their letters.
    """
    question, _, rest = asked.partition("\n\n")
    while rest and not _OPTION.match(rest):
        more, _, rest = rest.partition("\n\n")
        question = f"{question}\n\n{more}"
    found = [_OPTION.match(line) for line in rest.rstrip().split("\n")]
    while found and found[-1] is None:  # A request such as "Please reason step by step."
        found.pop()
    options = {match[1]: match[2].strip() for match in found if match}
    letters = "".join(options)
    if not 2 <= len(found) == len(letters) or not ascii_uppercase.startswith(letters):
        raise BadRow('prompt: expected options on lines "A: ...", "B: ..." after a blank line')
    if answer not in options:
        raise BadRow(f'answer is "{shown(answer)}", expected one of {", ".join(letters)}')
    return Question(name, question.strip(), options, answer)


def load_quartz(seed: int = 0) -> Split[Question]:
    """Reads QuaRTz, science questions with two options, from the installed package evals.

    The file is read without importing the package. A hash of the seed and the question holds one
    row in four out. Questions that occur twice are dropped, because their answers differ.

    Raises:
      UserError: the package or the file is missing, or a row is not as expected.
    """
    missing = f'environment.source = "quartz" reads its data from the package evals: {_INSTALL}'
    path = package_folder("evals", missing) / _QUARTZ
    form = '{"input": [..., {"content": "..."}], "ideal": "A"}'
    content = f"QuaRTz ({_INSTALL})"
    questions = rows.read_rows(path, _quartz, "stop", form=form, content=content).rows
    counts = Counter(question.question for question in questions)
    once = [question for question in questions if counts[question.question] == 1]
    return Split(*rows.split_by_hash(once, lambda question: question.question, seed))


def _quartz(row: dict[str, Any], place: str) -> Question:
    messages = rows.get(row, "input")
    try:
        asked = messages[-1]["content"]
    except (TypeError, LookupError):
        raise BadRow("input: expected a list of messages with content") from None
    name = f"quartz-{place.rpartition(':')[2]}"
    return parse_question(
        name, rows.text(asked, "input"), rows.text(rows.get(row, "ideal"), "ideal")
    )
