"""Calls environments: grades lists of responses, steps episodes, and checks what comes back.

No other module calls `grade` or `step`. An exception that leaves them, or a return value that is
not an `Outcome`, is a bug of the environment: it becomes one `UserError` with the prompt, the line
and the environment's own traceback. It never becomes a reward of 0, which would train the model.
"""

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast, runtime_checkable

from sdpo_jax.environments.base import (
    Environment,
    Episode,
    GradesBatches,
    GradesTruncated,
    GradesTruncatedBatches,
    HasAnswers,
    HasEpisodes,
    Outcome,
    Prompt,
    Step,
    StepsBatches,
)
from sdpo_jax.errors import UserError

_SHOWN_CHARACTERS = 300


@runtime_checkable
class GradesRows(Protocol):
    """An environment that grades mixed batches itself: one in worker processes."""

    def grade_rows(
        self, prompts: Sequence[Prompt], responses: Sequence[str], truncated: Sequence[bool]
    ) -> list[Outcome]:
        """One checked outcome for each row, in order."""
        ...


class Grader:
    """Grades lists of responses, by workers, by `grade_many`, or by `grade` one after the other."""

    def __init__(self, environment: Environment):
        self._environment = environment

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        truncated: Sequence[bool] | None = None,
    ) -> list[Outcome]:
        """One outcome for each pair `(prompts[i], responses[i])`, in order.

        Args:
          prompts: [N].
          responses: [N], decoded without control tokens.
          truncated: [N], whether a response was cut at the token limit; None: none was. Only
            environments with `grade_truncated` or `grade_truncated_many` use it.

        Raises:
          UserError: the environment raised, or did not return an outcome.
        """
        cut = [False] * len(responses) if truncated is None else list(truncated)
        if not len(prompts) == len(responses) == len(cut):
            raise ValueError(
                "expected as many prompts as responses and flags; "
                f"got {len(prompts)}, {len(responses)} and {len(cut)}"
            )
        if isinstance(self._environment, GradesRows):
            return self._environment.grade_rows(prompts, responses, cut)
        outcomes: dict[int, Outcome] = {}
        for is_cut, grade in ((False, self._whole), (True, self._truncated)):
            rows = [i for i, flag in enumerate(cut) if bool(flag) == is_cut]
            graded = grade([prompts[i] for i in rows], [responses[i] for i in rows])
            outcomes |= zip(rows, graded, strict=True)
        return [outcomes[i] for i in range(len(responses))]

    def _whole(self, prompts: list[Prompt], responses: list[str]) -> list[Outcome]:
        environment = self._environment
        if isinstance(environment, GradesBatches):
            return _grade_batch("grade_many", environment.grade_many, prompts, responses)
        return _grade_each("grade", environment.grade, prompts, responses)

    def _truncated(self, prompts: list[Prompt], responses: list[str]) -> list[Outcome]:
        environment = self._environment
        if isinstance(environment, GradesTruncatedBatches):
            grade = environment.grade_truncated_many
            return _grade_batch("grade_truncated_many", grade, prompts, responses)
        if isinstance(environment, GradesTruncated):
            grade = environment.grade_truncated
            return _grade_each("grade_truncated", grade, prompts, responses)
        return self._whole(prompts, responses)


class OpenEpisodes:
    """The episodes of a list of prompts, stepped one by one or, with `step_many`, together."""

    def __init__(self, environment: HasEpisodes, prompts: Sequence[Prompt]):
        """Starts one for each of `prompts` [N].

        Raises:
          UserError: the environment raised.
        """
        self._environment, self._prompts = environment, list(prompts)
        self._episodes: list[Episode] = []
        for prompt in prompts:
            with _explained("reset", [prompt]):
                self._episodes.append(environment.reset(prompt))

    def __call__(
        self, rows: Sequence[int], responses: Sequence[str], truncated: Sequence[bool]
    ) -> list[Step]:
        """The steps of episodes `rows`, in order; see `StepsBatches.step_many`.

        Raises:
          UserError: the environment raised, or did not return a step.
        """
        prompts, episodes = [self._prompts[i] for i in rows], [self._episodes[i] for i in rows]
        if isinstance(self._environment, StepsBatches):
            with _explained("step_many", prompts):
                steps = self._environment.step_many(episodes, responses, truncated)
            if len(steps) != len(prompts):
                raise UserError(
                    f"step_many of the environment: {len(steps)} steps for {len(prompts)} "
                    "responses; expected one for each, in order"
                )
            pairs = zip(steps, prompts, strict=True)
            return [_check_step(step, "step_many", prompt) for step, prompt in pairs]
        steps: list[Step] = []
        for episode, prompt, response in zip(episodes, prompts, responses, strict=True):
            with _explained("step", [prompt]):
                step = episode.step(response)
            steps.append(_check_step(step, "step", prompt))
        return steps


def answers_of(
    environment: Environment, prompts: Sequence[Prompt], responses: Sequence[str]
) -> list[str | None] | None:
    """The final answers of `N` responses to `P` prompts; None: the environment extracts none.

    Raises:
      UserError: `answer` raised, or returned something else than text or None.
    """
    if not isinstance(environment, HasAnswers):
        return None
    group, found = len(responses) // len(prompts), list[str | None]()
    for i, response in enumerate(responses):
        prompt = prompts[i // group]
        with _explained("answer", [prompt], "text or None"):
            given: Any = environment.answer(prompt, response)
        if given is not None and not isinstance(given, str):
            raise UserError(
                f"answer of the environment returned {_short(given)} for prompt {prompt.id!r}; "
                "expected text, or None where a response has no answer"
            )
        found.append(given)
    return found


def failed_share(outcomes: Sequence[Outcome]) -> float:
    """Share of the responses that the environment could not grade."""
    return sum(not outcome.graded for outcome in outcomes) / len(outcomes) if outcomes else 0.0


def refuse_failures(
    prompts: Sequence[Prompt], outcomes: Sequence[Outcome], limit: float, where: str
) -> None:
    """Stops a run whose environment fails too often; row `n` answers prompt `n // G`.

    Raises:
      UserError: more than `limit` of the outcomes are not graded.
    """
    share = failed_share(outcomes)
    if share <= limit:
        return
    failed = [i for i, outcome in enumerate(outcomes) if not outcome.graded]
    group = len(outcomes) // len(prompts)
    reason = outcomes[failed[0]].feedback.strip()[:_SHOWN_CHARACTERS] or "it gave no reason"
    raise UserError(
        f"{where}: the environment could not grade {len(failed)} of {len(outcomes)} responses "
        f"({share:.0%}), expected at most {limit:.0%} (environment.max_failed_share). The first "
        f"was one to prompt {prompts[failed[0] // group].id!r}: {reason}. "
        "Mend what failed; checkpoints are kept, and the same command goes on from the last one."
    )


def _grade_each(
    name: str,
    grade: Callable[[Prompt, str], Outcome],
    prompts: Sequence[Prompt],
    responses: Sequence[str],
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for prompt, response in zip(prompts, responses, strict=True):
        with _explained(name, [prompt]):
            outcome = grade(prompt, response)
        outcomes.append(_check(outcome, name, prompt))
    return outcomes


def _grade_batch(
    name: str,
    grade: Callable[[Sequence[Prompt], Sequence[str]], list[Outcome]],
    prompts: Sequence[Prompt],
    responses: Sequence[str],
) -> list[Outcome]:
    if not prompts:
        return []
    with _explained(name, prompts):
        outcomes = grade(prompts, responses)
    if len(outcomes) != len(prompts):
        raise UserError(
            f"{name} of the environment: {len(outcomes)} outcomes for {len(prompts)} "
            "responses; expected one for each, in order"
        )
    return [_check(o, name, prompt) for prompt, o in zip(prompts, outcomes, strict=True)]


@contextmanager
def _explained(
    name: str, prompts: Sequence[Prompt], expected: str = "an Outcome"
) -> Iterator[None]:
    """Turns an exception of the environment into a `UserError`; a `UserError` passes through."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        which, place = _which(prompts), place_of(error, __file__)
        raise UserError(
            f"{name} of the environment failed for {which} at {place}: a bug of the environment, "
            f"expected {expected} for every text.\n{own_traceback(error, __file__)}"
        ) from error


def _which(prompts: Sequence[Prompt]) -> str:
    if len(prompts) == 1:
        return f"prompt {prompts[0].id!r}"
    return f"one of {len(prompts)} prompts, {prompts[0].id!r} to {prompts[-1].id!r},"


def place_of(error: BaseException, caller: str) -> str:
    """The innermost `file:line` of the environment's own code at which an exception was raised.

    `caller` is the file that called the environment: its frames do not count.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = list(traceback.extract_tb(_below(error.__traceback__, caller)))
    # Installed packages and the standard library are not the environment's own.
    standard = str(Path(traceback.__file__).parent)
    own = [f for f in frames if "site-packages" not in Path(f.filename).parts]
    own = [f for f in own if not f.filename.startswith(standard)] or frames
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "an unknown line"


def own_traceback(error: BaseException, caller: str) -> str:
    """The traceback without the outermost frames, those of the file `caller`."""
    trace = _below(error.__traceback__, caller)
    return "".join(traceback.format_exception(type(error), error, trace, limit=-8)).rstrip()


def _below(trace: TracebackType | None, caller: str) -> TracebackType | None:
    """Skips the outermost frames of a caller and of Python's import system."""
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if name != caller and not name.startswith("<frozen"):
            break
        trace = trace.tb_next
    return trace


def _check(outcome: Any, name: str, prompt: Prompt) -> Outcome:
    """Refuses a value that is not an outcome, before it enters metrics and rewards."""
    problem = _problem(outcome)
    if problem is None:
        return cast(Outcome, outcome)
    raise UserError(
        f"{name} of the environment returned {problem} for prompt {prompt.id!r}; expected "
        "Outcome(reward: a finite number, passed: bool, feedback: str, metrics: numbers by name)"
    )


def _check_step(step: Any, name: str, prompt: Prompt) -> Step:
    """Refuses a value that is not a step."""
    # `Any`: an environment may break its annotations.
    told: Any = (step.observation, step.instruction) if isinstance(step, Step) else (0, 0)
    if not isinstance(told[0], str | None) or not isinstance(told[1], str):
        raise UserError(
            f"{name} of the environment returned {_short(step)} for prompt {prompt.id!r}; expected "
            "Step(observation: text, or None at the end of the episode, outcome: Outcome, "
            "instruction: text)"
        )
    _check(step.outcome, name, prompt)
    return step


def _problem(outcome: Any) -> str | None:
    if not isinstance(outcome, Outcome):
        return _short(outcome)
    given: Any = outcome  # An environment may break its annotations.
    try:
        finite = math.isfinite(given.reward)
        metrics = {str(k): math.isfinite(v) for k, v in given.metrics.items()}
    except (TypeError, ValueError, AttributeError):
        return _short(outcome)
    if not finite:
        return f"the reward {_short(given.reward)}"
    if not isinstance(given.feedback, str):
        return f"the feedback {_short(given.feedback)}"
    broken = [name for name, is_finite in metrics.items() if not is_finite]
    return f"a metric {broken[0]!r} that is not finite" if broken else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
