"""The environment protocol: prompts go out, an `Outcome` with feedback in words comes back.

Everything here is host-side Python; no array crosses this boundary.
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
    """

    reward: float
    passed: bool
    feedback: str
    metrics: Mapping[str, float]


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
        """Judges one response, given as decoded text without control tokens."""
        ...


@runtime_checkable
class HasReferences(Protocol):
    """An environment that knows an accepted answer to each of its prompts, for a warm-up by SFT."""

    def reference(self, prompt: Prompt) -> str:
        """An answer that `grade` passes."""
        ...
