"""Answers that do not depend on the question: does one of them get a reward (`sdpo env check`)?

A policy finds an answer that pays everywhere sooner than it learns the task. Two kinds are tried:
constants (`0`, `nan`, `A`, `[]`), and lists that hold the right answer among others (all options of
a prompt, every number from 0 to 20, the right answers of all prompts). An answer may be right for
some prompts by chance: those then have one right answer, and they are no more than chance explains.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.environments.grading import Grader

CONSTANTS = (
    *("", "0", "1", "-1", "2", "10", "nan", "inf", "True", "False", "None", "yes", "no", "A", "B"),
    *("C", "D", "x", "[]", "{}", "[0]", '""', "0, 1, 2, 3", "1 2 3 4 5 6 7 8 9 10", "0/1", "1*1"),
)
FORMS = ("{}", "\\boxed{{{}}}", "<answer>{}</answer>", "The answer is {}.")
VALUES = ("0", "1", "-1", "True", "False", "None", '""', "[]", "range(21)", 'float("nan")')
"""What the constant programs return and print."""
PROGRAM_PROMPTS = 6
UNLIKELY = 1e-4
"""Below this probability, chance does not explain how many prompts an answer passes."""
JOINED = (", ".join, " or ".join, "".join)
_OPTION = re.compile(r"^\(?([A-Z])[:.)] ", re.MULTILINE)
_FUNCTION = re.compile(r"\bdef (\w+)\(")


class Answers(NamedTuple):
    """One blind answer in one spelling: a response to each prompt."""

    kind: str
    name: str
    responses: list[str]  # [N]


class Paid(NamedTuple):
    """A blind answer that got a reward; `problem` says why that is more than chance."""

    name: str
    found: str
    problem: str


def blind_answers(
    grade: Grader, sample: Sequence[Prompt], references: Sequence[str], *, runs_programs: bool
) -> tuple[int, list[Paid]]:
    """Grades every blind answer on a sample of prompts.

    Args:
      grade: grades lists of responses.
      sample: [N] prompts.
      references: [N] right answers, or none.
      runs_programs: whether responses are programs; then few prompts get few programs.

    Returns:
      How many answers were tried, and those that got a reward, the most paid first.
    """
    forms = FORMS[:1] if runs_programs else FORMS
    if runs_programs:
        sample, references = sample[:PROGRAM_PROMPTS], references[:PROGRAM_PROMPTS]
    answers = [*_constants(sample, forms), *_lists(sample, references, forms)]
    answers += _programs(sample) if runs_programs else []
    prompts = [prompt for _ in answers for prompt in sample]
    outcomes = grade(prompts, [text for _, _, column in answers for text in column])
    best: dict[tuple[str, str], tuple[float, int]] = {}
    for i, (kind, name, _) in enumerate(answers):
        column = outcomes[i * len(sample) : (i + 1) * len(sample)]
        paid = sum(map(_is_full, column)) + sum(o.reward for o in column if not _is_full(o)) / 1e3
        best[kind, name] = max(best.get((kind, name), (0.0, 0)), (paid, -i))
    ranked = sorted((item for item in best.items() if item[1][0] > 0), key=lambda item: -item[1][0])
    found: list[Paid] = []
    for (kind, name), (_, at) in ranked:
        column = outcomes[-at * len(sample) : (1 - at) * len(sample)]
        found.append(_paid(grade, kind, name, sample, references, column))
    return len(best), found


def _is_full(outcome: Outcome) -> bool:
    return outcome.passed or outcome.reward >= 1.0


def _constants(sample: Sequence[Prompt], forms: Sequence[str]) -> list[Answers]:
    return [
        Answers("constant", value, [form.format(value)] * len(sample))
        for value in CONSTANTS
        for form in forms
    ]


def _lists(
    sample: Sequence[Prompt], references: Sequence[str], forms: Sequence[str]
) -> list[Answers]:
    """Answers that hold the right one among others, joined and one after the other."""
    listed = {
        "every number from 0 to 20": [[str(i) for i in range(21)]] * len(sample),
        "all options of the prompt": [_options(prompt) for prompt in sample],
    }
    made: list[Answers] = []
    for name, column in listed.items():
        for form in forms if all(column) else ():
            texts = [[form.format(join(items)) for items in column] for join in JOINED]
            texts.append(["\n".join(map(form.format, items)) for items in column])
            made += [Answers("list", name, text) for text in texts]
    if len(every := list(dict.fromkeys(references))) > 1:
        texts = "\n".join(every), ", ".join(every), f"[{', '.join(every)}]"
        name = "the right answers of all prompts"
        made += [Answers("list", name, [text] * len(sample)) for text in texts]
    return made


def _options(prompt: Prompt) -> list[str]:
    return sorted(set(_OPTION.findall(prompt.messages[-1]["content"])))


def _programs(sample: Sequence[Prompt]) -> list[Answers]:
    """Programs that return and print one value, whatever they are asked for."""
    names = [_FUNCTION.findall(prompt.messages[-1]["content"]) for prompt in sample]
    return [
        Answers("program", f"return {value}", [_program(functions, value) for functions in names])
        for value in VALUES
    ]


def _program(functions: Sequence[str], value: str) -> str:
    made = [f"def {name}(*arguments, **named):\n    return {value}" for name in functions]
    class_ = f"class Solution:\n    def __getattr__(self, name):\n        return lambda *_: {value}"
    return "\n".join(["```python", *made, class_, f"print({value})", "```"])


def _paid(
    grade: Grader,
    kind: str,
    name: str,
    sample: Sequence[Prompt],
    references: Sequence[str],
    outcomes: Sequence[Outcome],
) -> Paid:
    full = [i for i, outcome in enumerate(outcomes) if _is_full(outcome)]
    share = len(full) / len(sample)
    found = f"{name!r} passes {len(full)} of {len(sample)} prompts ({share:.0%})"
    if not full:
        mean = sum(outcome.reward for outcome in outcomes) / len(sample)
        found = f"{name!r} passes no prompt, but its mean reward is {mean:.2g}"
    problem = ""
    if len(full) > 1 and references and (other := _other(grade, sample, references, full)):
        problem = f"it passes {sample[full[0]].id!r} and {other!r}, which have different answers"
    elif _chance(len(full), sample) < UNLIKELY:
        problem = "chance does not explain so many"
    what = f"{problem}; tighten `grade`, or mix the right answers better" if problem else ""
    return Paid(f"{kind} answer", found, what)


def _other(
    grade: Grader, sample: Sequence[Prompt], references: Sequence[str], full: Sequence[int]
) -> str | None:
    """A prompt among `full` for which the right answer of the first is wrong; None if none."""
    first, *rest = full
    outcomes = grade([sample[i] for i in rest], [references[first]] * len(rest))
    failed = (i for i, outcome in zip(rest, outcomes, strict=True) if not _is_full(outcome))
    return next((sample[i].id for i in failed), None)


def _chance(passed: int, sample: Sequence[Prompt]) -> float:
    """How likely one answer is right for at least so many prompts; without options, in half."""
    p = sum(1 / max(2, len(_options(prompt))) for prompt in sample) / len(sample)
    n = len(sample)
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(passed, n + 1))
