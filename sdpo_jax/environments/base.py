"""The environment protocol: prompts go out, an `Outcome` with feedback in words comes back.

Everything here is host-side Python; no array crosses this boundary. An environment has `train`,
`held_out` and `grade`. What else it may have are the small protocols below: each is recognised by
its method, none is needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Prompt(NamedTuple):
    """One question.

    `messages` are chat messages (`{"role": ..., "content": ...}`), the last one from the user.
    `data` is what the environment needs to grade an answer; the model never sees it.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    data: Mapping[str, Any]


class Outcome(NamedTuple):
    """What the environment says about one response.

    `reward` is what policy gradients see, and decides against `teacher.success_threshold` whether
    the response may serve as a demonstration; `passed` is what accuracy counts; `feedback` says in
    words what went wrong and is blank if nothing did.

    `graded` is False where the environment could not judge: a sandbox that did not start, a worker
    that died, a judge that cannot be reached. It says nothing about the response. Such a rollout
    has no part in loss, advantages, demonstrations and accuracy; `environment/failed` counts it;
    its `feedback` says what failed and is shown to the user, never to a model.
    """

    reward: float
    passed: bool
    feedback: str
    metrics: Mapping[str, float]
    graded: bool = True


def not_graded(reason: str) -> Outcome:
    """The outcome of a response that could not be judged."""
    return Outcome(0.0, False, reason, {}, graded=False)


class Environment(Protocol):
    """Prompts with a grader."""

    @property
    def train(self) -> Sequence[Prompt]:
        """Prompts to learn from."""
        ...

    @property
    def held_out(self) -> Sequence[Prompt]:
        """Prompts to evaluate on, disjoint from `train`."""
        ...

    def grade(self, prompt: Prompt, response: str) -> Outcome:
        """Judges one response, given as decoded text without control tokens.

        An exception that leaves it is a bug of the environment and stops the run.
        """
        ...


@runtime_checkable
class HasReferences(Protocol):
    """An environment that knows an accepted answer to each of its prompts, for a warm-up by SFT."""

    def reference(self, prompt: Prompt) -> str:
        """An answer that `grade` passes."""
        ...


@runtime_checkable
class HasAnswers(Protocol):
    """An environment whose responses end in an answer that several may share, for majority votes.

    It is called in the trainer's process: it reads, and evaluates nothing.
    """

    def answer(self, prompt: Prompt, response: str) -> str | None:
        """The answer in a form that equal answers share; None: the response has none."""
        ...


@runtime_checkable
class GradesBatches(Protocol):
    """An environment that grades several responses at a time, as one with a sandbox does."""

    def grade_many(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Outcome]:
        """One outcome for each pair `(prompts[i], responses[i])`, in order; `grade` of each."""
        ...


@runtime_checkable
class GradesTruncated(Protocol):
    """An environment that says something else of a response that was cut at the token limit."""

    def grade_truncated(self, prompt: Prompt, response: str) -> Outcome:
        """Judges a response that did not come to its end."""
        ...


@runtime_checkable
class GradesTruncatedBatches(Protocol):
    """`grade_truncated` for several responses at a time; where there is one, it is asked alone."""

    def grade_truncated_many(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> list[Outcome]:
        """One outcome for each pair, in order; `grade_truncated` of each."""
        ...


@runtime_checkable
class NeedsWorker(Protocol):
    """An environment whose `grade` may not come back, or must run in a main thread of its own.

    A recipe's environment with `needs_worker` true is graded in worker processes, with a deadline.
    """

    @property
    def needs_worker(self) -> bool:
        """Whether it does."""
        ...


class Step(NamedTuple):
    """What an environment says after a turn of an episode.

    `observation` is the text of the next user message; None: the episode is over. `outcome` judges
    the episode as if it ended here: limits (`rollout.max_turns`, a response that was cut) may end
    it at any turn. Of an episode only the outcome of its last turn counts. An outcome that is not
    graded ends the episode, whatever the observation. `instruction` follows the observation; it is
    not cut where the observation has too many tokens.
    """

    observation: str | None
    outcome: Outcome
    instruction: str = ""


class Episode(Protocol):
    """One conversation about a prompt."""

    def step(self, response: str) -> Step:
        """Answers the model's next turn, given as decoded text without control tokens."""
        ...


@runtime_checkable
class HasEpisodes(Protocol):
    """An environment that answers in text, for `rollout.max_turns` above 1.

    Any other environment then gets the episodes of `sdpo_jax.environments.retries`. `grade` still
    judges single responses: those of the teacher, and all where `rollout.max_turns` is 1.
    """

    def reset(self, prompt: Prompt) -> Episode:
        """A new episode. The same responses must always get the same steps."""
        ...


@runtime_checkable
class StepsBatches(Protocol):
    """An environment that answers several of its episodes at a time."""

    def step_many(
        self, episodes: Sequence[Any], responses: Sequence[str], truncated: Sequence[bool]
    ) -> list[Step]:
        """One step for each `(episodes[i], responses[i])`, in order; `step` of each.

        `truncated[i]`: the response was cut at the token limit, and its episode ends.
        """
        ...
