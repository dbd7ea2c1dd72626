"""The environment protocol: prompts, and a grader that returns an `Outcome` with feedback in words.

Everything here is plain Python on the host; no arrays cross this boundary. An environment has
`train`, `held_out` and `grade`. The other protocols below are optional; each is recognized by its
method.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Prompt(NamedTuple):
    """One question.

    `messages` are chat messages (`{"role": ..., "content": ...}`), the last one from the user.
    `data` holds what the environment needs to grade an answer; the model never sees it.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    data: Mapping[str, Any]


class Outcome(NamedTuple):
    """The grade of one response.

    Policy gradients use `reward`; a response whose reward reaches `teacher.success_threshold` may
    serve as a demonstration. Accuracy counts `passed`. `feedback` describes in words what went
    wrong and is blank if nothing did. `metrics` holds further numbers by name.

    `graded` is False where grading itself failed: a sandbox that did not start, a worker that died,
    a judge that cannot be reached. Such a rollout is excluded from loss, advantages, demonstrations
    and accuracy, and counted in `environment/failed`. Its `feedback` then describes the failure and
    is shown to the user, never to a model.
    """

    reward: float
    passed: bool
    feedback: str
    metrics: Mapping[str, float]
    graded: bool = True


def not_graded(reason: str) -> Outcome:
    """Returns the outcome of a response whose grading failed for `reason`."""
    return Outcome(0.0, False, reason, {}, graded=False)


class Environment(Protocol):
    """Prompts with a grader."""

    @property
    def train(self) -> Sequence[Prompt]:
        """Prompts to train on."""
        ...

    @property
    def held_out(self) -> Sequence[Prompt]:
        """Prompts to evaluate on, disjoint from `train`."""
        ...

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Grades one response, given as decoded text without control tokens.

        An exception that leaves this method is a bug of the environment and stops the run.
        """
        ...


@runtime_checkable
class HasReferences(Protocol):
    """An environment with a reference answer to each of its prompts, for a warm-up by SFT."""

    def reference(self, prompt: Prompt) -> str:
        """Returns an answer that `grade` passes."""
        ...


@runtime_checkable
class HasAnswers(Protocol):
    """An environment that extracts the final answer of a response, for majority votes.

    `answer` runs in the trainer's process, so it must only parse and never evaluate.
    """

    def answer(self, prompt: Prompt, response: str) -> str | None:
        """Returns the final answer in a canonical form; None if the response has none."""
        ...


@runtime_checkable
class GradesBatches(Protocol):
    """An environment that grades several responses at a time, such as one with a sandbox."""

    def grade_many(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Outcome]:
        """Returns `grade(prompts[i], responses[i])` for each `i`, in order."""
        ...


@runtime_checkable
class GradesTruncated(Protocol):
    """An environment with other feedback for a response that was cut at the token limit."""

    def grade_truncated(self, prompt: Prompt, response: str) -> Outcome:
        """Grades a response that was cut before its end."""
        ...


@runtime_checkable
class GradesTruncatedBatches(Protocol):
    """An environment that grades several cut responses at a time.

    `grade_truncated_many` takes precedence over `grade_truncated`.
    """

    def grade_truncated_many(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> list[Outcome]:
        """Returns `grade_truncated(prompts[i], responses[i])` for each `i`, in order."""
        ...


@runtime_checkable
class NeedsWorker(Protocol):
    """An environment whose `grade` may hang, or must run in the main thread of a process.

    If `needs_worker` is true, responses are graded in worker processes with a deadline.
    """

    @property
    def needs_worker(self) -> bool:
        """Whether grading needs a worker process."""
        ...


@runtime_checkable
class JudgesLate(Protocol):
    """An environment that runs in workers and blames the response for a missed deadline."""

    @property
    def late(self) -> Outcome:
        """The outcome of a response whose worker missed the deadline, or died three times."""
        ...


class Step(NamedTuple):
    """An environment's reply to one turn of an episode.

    `observation` is the text of the next user message; None ends the episode. `outcome` grades the
    episode as if it ended here, because limits (`rollout.max_turns`, a response that was cut) may
    end it at any turn; only the outcome of the last turn counts. An outcome that is not graded ends
    the episode, whatever the observation. `instruction` is appended to the observation and is never
    cut, whereas the observation is cut to `teacher.max_feedback_tokens`.
    """

    observation: str | None
    outcome: Outcome
    instruction: str = ""


class Episode(Protocol):
    """One conversation about a prompt."""

    def step(self, response: str) -> Step:
        """Replies to the model's next turn, given as decoded text without control tokens."""
        ...


@runtime_checkable
class HasEpisodes(Protocol):
    """An environment with episodes of several turns, for `rollout.max_turns` above 1.

    Any other environment then gets the episodes of `sdpo_jax.environments.retries`. `grade` is
    still used for single responses: those of the teacher, and all if `rollout.max_turns` is 1.
    """

    def reset(self, prompt: Prompt) -> Episode:
        """Starts a new episode. The same responses must always produce the same steps."""
        ...


@runtime_checkable
class StepsBatches(Protocol):
    """An environment that steps several of its episodes at a time."""

    def step_many(
        self, episodes: Sequence[Any], responses: Sequence[str], truncated: Sequence[bool]
    ) -> list[Step]:
        """Returns `episodes[i].step(responses[i])` for each `i`, in order.

        If `truncated[i]`, the response was cut at the token limit and its episode ends.
        """
        ...
