"""Random responses for every grader: no exception, the same verdict again, rewards within bounds.

`python tests/fuzz_graders.py 100000` runs the whole; a test runs a small part. Responses are random
characters or right answers that were damaged: cut, repeated, nested, with huge numbers, half of a
character, tags that never close. Programs of `code` and `nano_code` run in a sandbox that returns
made-up observations, which may be as bad as a program can make them.
"""

import json
import math
import random
import re
import signal
import sys
import time
import traceback
import zlib
from collections import Counter
from importlib import util
from typing import Any

from sdpo_jax.environments.base import GradesTruncated, HasAnswers, HasReferences
from sdpo_jax.environments.code.problems import Case, Equals, InBox, Prints, Problem
from sdpo_jax.environments.kinds import bfcl, code, mcq, nano_code, tool_calls, tool_use
from sdpo_jax.environments.sandbox import Call, Check, Observation, Run
from sdpo_jax.environments.template import Sums

SECONDS = 20
"""No grading may take longer."""
SPICES = [
    *("<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "}", "{", "[", "]", "(", ")"),
    *(",", "```", "```python\n", "~~~", "\n", "\r\n", "\x00", "\x85", "\u2028", "\ud800"),
    *("\udfff", "\ufffd", "\\ud800", "\\u0000", "nan", "inf", "-inf", "1e999", "9" * 400),
    *("9" * 5000, "-0", "0.1", "1/0", "9**9**9", "\\frac{1}{0}", "\\sqrt", "^{9^{9^9}}"),
    *("\\text{", "10000!", "\\cdot", "$", "%", "\\", "True", "None", "lambda: 0", "A", "or B"),
    *("answer is ", "Action: ", "Action Input: ", '"', "'", "{" * 300, "[" * 3000, "(" * 300),
    *('{"a":' * 200, "\\boxed{" * 300, "-" * 3000, "def f():\n", "#", "\U0001f600", "\u0661"),
    *("\u00bd", "\u0130", "e\u0301", "\u202e", "\ufeff", "\xa0", "#### 1"),
]  # fmt: skip
VALUES: list[Any] = [
    *(0, 1, -1, 4, True, None, "", "x", "\ud800", 1.5, math.inf, math.nan, 10**400, [], {}),
    *([[[[]]]], {"a": [None]}, {"name": "x", "arguments": {}}, "9" * 5000, [math.nan]),
]


BYTES = [("latin-1", "strict"), ("utf-8", "surrogateescape"), ("utf-16-le", "ignore")]


_WRAPPED = re.compile(
    r"(.*<answer>|.*\\boxed\{|.*```python\n)(.*)(</answer>.*|\}[^}]*|\n```.*)", re.DOTALL
)


class Pool:
    """A sandbox that returns made-up observations, the same for the same program."""

    tier = "unsafe-local"

    def run(self, programs: Any) -> list[list[Observation]]:
        """Observations that depend on the program's text alone."""
        return [self._one(program) for program in programs]

    def _one(self, program: Any) -> list[Observation]:
        seed = zlib.crc32(program.source.encode(errors="surrogatepass"))
        draw, made = random.Random(seed), list[Observation]()
        statuses = ["done"] * 6 + ["error", "time_limit", "memory_limit", "output_limit", "died"]
        for _ in program.tests:
            text = "".join(draw.choices(SPICES, k=draw.randrange(4)))
            made.append(
                Observation(draw.choice(statuses), text, draw.choice(VALUES), text, text)  # pyright: ignore[reportArgumentType]
            )
        return made

    def close(self) -> None:
        """Nothing is open."""


def environments(*, whole: bool) -> dict[str, Any]:
    """One environment of each kind, small enough to be made at once."""
    doubled = tuple(
        Case(Call("double", (n,)), Equals(2 * n), f"{n}", f"{2 * n}") for n in (1, 5, 70)
    )
    printed = (Case(Run("4 1\n"), Prints("5\n"), "4 1", "5"),)
    boxed = (Case(Check("assert double(3) == 6"), InBox(), "assert double(3) == 6", "nothing"),)
    program = "```python\ndef double(n):\n    return 2 * n\n```"
    tests = {"calls": doubled, "prints": printed, "checked": boxed}
    problems = [Problem(name, f"Do {name}.", t, reference=program) for name, t in tests.items()]
    options = {"A": "x", "B": "y", "C": "z", "D": "w"}
    questions = [mcq.Question(f"q{i}", f"Which {i}?", options, "ABCD"[i % 4]) for i in range(8)]
    tool = tool_use.ToolCall("get", {"a": 1, "b": [1.5, {"c": None}], "d": "x"})
    task = tool_use.Task("t", ({"role": "user", "content": "Do it."},), (tool, tool))
    made: dict[str, Any] = {
        "template": Sums(0),
        "tool_calls": tool_calls.ToolCalls(train_prompts=24, held_out_prompts=4),
        "tool_calls with words": tool_calls.ToolCalls(
            train_prompts=24, held_out_prompts=4, allow_preamble=True
        ),
        "bfcl": _bfcl(),
        "mcq": mcq.Mcq(questions, []),
        "tool_use": tool_use.ToolUse([task], []),
        "code": code.Code(problems, problems, sandbox=Pool()),
        "code in fractions": code.Code(problems, problems, sandbox=Pool(), reward="fraction"),
        "nano_code": nano_code.NanoCode(train_prompts=12, held_out_prompts=2, sandbox=Pool()),
    }
    if util.find_spec("math_verify") is not None:
        made["math"] = _math()
    if util.find_spec("reasoning_gym") is not None:
        made["reasoning_gym"] = _gym(whole)
    return made


def _bfcl() -> Any:
    types = {
        **{"s": ("string", "x, y"), "i": ("integer", 5), "f": ("float", 1.5)},
        **{"b": ("boolean", True), "l": ("array", [1, 2]), "n": ("number", 2)},
        **{"d": ("dict", {"k": [1, ""]})},
        **{"t": ("tuple", [1, 2]), "a": ("any", "z"), "o": ("object", {"k": [[1]]})},
    }  # fmt: skip
    properties = {name: {"type": kind} for name, (kind, _) in types.items()}
    parameters = {"type": "dict", "properties": properties, "required": ["s", "i"]}
    accepted = {name: [value] for name, (_, value) in types.items()}
    rows = [
        bfcl.Row(str(i), "Do it.", {"name": f"do.it{i}", "parameters": parameters}, accepted)
        for i in range(8)
    ]
    return bfcl.Bfcl(rows, train_prompts=1, held_out_prompts=1, reveal_expected=True)


def _math() -> Any:
    from sdpo_jax.environments.kinds.math import Math
    from sdpo_jax.environments.kinds.math import Problem as MathProblem

    golds = [
        "18",
        "\\frac{1}{2}",
        "x^2+2x+1",
        "(1,2)",
        "\\text{Evelyn}",
        "\\sqrt{8}",
        "0.5",
        "3\\pi",
    ]
    golds += ["\\{1,2\\}", "[0,1)", "1.38\\times10^{-23}", "x=4", "90^\\circ", "1,000"]
    return Math([MathProblem(str(i), f"How many {i}?", gold) for i, gold in enumerate(golds)], [])


def _gym(whole: bool) -> Any:
    from sdpo_jax.environments.kinds.reasoning_gym import UNSTEADY, UNTRUSTED, ReasoningGym

    names = [
        "basic_arithmetic",
        "countdown",
        "word_sorting",
        "coin_flip",
        "spiral_matrix",
        "sudoku",
    ]
    if whole:
        from reasoning_gym.factory import DATASETS

        names = sorted(DATASETS.keys() - UNSTEADY - UNTRUSTED - {"composite"})
    return ReasoningGym(names, 2 * len(names), 0, seed=3)


def damaged(text: str, draw: random.Random) -> str:
    """A response made of a right answer, damaged as a whole or within its tags, or of nothing."""
    inside = _WRAPPED.fullmatch(text)
    if inside and draw.random() < 0.6:
        return inside[1] + _damaged(inside[2], draw) + inside[3]
    return _damaged(text, draw)


def _damaged(text: str, draw: random.Random) -> str:
    if draw.random() < 0.1:
        data = draw.randbytes(draw.randrange(80))
        return data.decode(*draw.choice(BYTES))
    for _ in range(draw.randrange(4)):
        i, j = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        spice = draw.choice(SPICES)
        change = draw.randrange(8)
        if change == 0:
            text = text[:i] + text[j:]
        elif change == 1:
            text = text[:i] + spice + text[j:]
        elif change == 2:
            text = text[:i] + spice + text[i:]
        elif change == 3:
            text = text[:j] + text[i:]
        elif change == 4:
            text = spice + text + draw.choice(SPICES)
        elif change == 5:
            text = "".join(spice if c.isdigit() and draw.random() < 0.3 else c for c in text)
        elif change == 6:
            text = draw.choice(["<answer>{}</answer>", "\\boxed{{{}}}", "<think>{}"]).format(text)
        else:
            text = text.replace(draw.choice(" (){}[]=,:"), spice, draw.randrange(1, 4))
    return text[:60_000]


class Endless(BaseException):
    """A grading took too long; graders must not catch it."""


def _stop(*_: object) -> None:
    raise Endless


def problem(environment: Any, prompt: Any, response: str) -> str:
    """What is wrong with the grading of a response; empty if nothing is."""
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        grades = [environment.grade]
        if isinstance(environment, GradesTruncated):
            grades.append(environment.grade_truncated)
        for grade in grades:
            outcome = grade(prompt, response)
            found = _fault(outcome) or ("" if grade(prompt, response) == outcome else "changes")
            if found:
                return found
        if isinstance(environment, HasAnswers):
            answers = [environment.answer(prompt, response) for _ in range(2)]
            return "" if answers[0] == answers[1] else "another answer the second time"
    except Endless:
        return f"longer than {SECONDS} s"
    except Exception:
        return traceback.format_exc(limit=-3)
    finally:
        signal.alarm(0)
    return ""


def _fault(outcome: Any) -> str:
    if not (isinstance(outcome.reward, float) and 0.0 <= outcome.reward <= 1.0):
        return f"reward {outcome.reward!r}"
    if type(outcome.passed) is not bool or (outcome.passed and outcome.reward < 1.0):
        return f"passed {outcome.passed!r} with reward {outcome.reward!r}"
    try:
        outcome.feedback.encode()
    except UnicodeError:
        return f"feedback that cannot be encoded: {outcome.feedback[:100]!r}"
    finite = all(math.isfinite(value) for value in outcome.metrics.values())
    return "" if finite and outcome.graded else f"not graded, or metrics {outcome.metrics}"


def fuzz(made: dict[str, Any], count: int, seed: int, *, seconds: float = math.inf) -> list[Any]:
    """Grades `count` responses, in turn by every environment; returns the findings."""
    draw, found, times = random.Random(seed), list[Any](), Counter[str]()
    began, number, names = time.perf_counter(), 0, list(made)
    while number < count and time.perf_counter() - began < seconds:
        name = names[number % len(names)]
        environment, start = made[name], time.perf_counter()
        prompt = draw.choice(environment.train)
        # A generator without an oracle has no reference.
        known = isinstance(environment, HasReferences) and _oracle(prompt) is not None
        response = damaged(environment.reference(prompt) if known else "f(1)", draw)
        wrong = problem(environment, prompt, response)
        if wrong:
            found.append((name, prompt.id, response, wrong))
        times[name] += time.perf_counter() - start  # pyright: ignore[reportArgumentType]
        number += 1
    print(f"{number} gradings in {time.perf_counter() - began:.0f} s, {len(found)} findings")
    print({name: round(value, 1) for name, value in times.most_common()})
    return found


def _oracle(prompt: Any) -> Any:
    return prompt.data["entry"]["answer"] if "entry" in prompt.data else ""


def main() -> int:
    """Runs as many gradings as the command line says; prints every finding as a line of JSON."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    found = fuzz(environments(whole=True), count, seed)
    for row in found[:200]:
        print(json.dumps([text[-700:] for text in row]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
