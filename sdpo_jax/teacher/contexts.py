"""Context builders: functions that choose what the teacher of each rollout sees.

    SiblingContexts           SDPO: a successful sibling's response, else the environment's feedback
    demonstration_contexts    SDFT: the demonstration that comes with the question

Training and evaluation call the same builder, so that the teacher's accuracy is that of the teacher
that trains. `sdpo_jax.load(..., context=...)` takes any other function with this signature.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from sdpo_jax.config import TeacherConfig
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.teacher.context import (
    TeacherContext,
    choose_context,
    is_success,
    remove_thinking,
    shown_text,
)
from sdpo_jax.teacher.controls import shuffled


class ContextBuilder(Protocol):
    """`build(prompts, group, outcomes, responses, *, seed) -> contexts`.

    It is a deterministic function of these and, if it `Remembers`, of its memory.
    Rollout `n` belongs to prompt `n // group`.

    Args:
      prompts: [P].
      group: `G`, rollouts per prompt.
      outcomes: [N]; empty where nothing is graded.
      responses: [N], decoded text.
      seed: for whatever is drawn.

    Returns:
      [N]; None where the teacher has nothing to see: such a rollout is not distilled.
    """

    def __call__(
        self,
        prompts: Sequence[Prompt],
        group: int,
        outcomes: Sequence[Outcome],
        responses: Sequence[str],
        /,
        *,
        seed: int,
    ) -> list[TeacherContext | None]: ...


@runtime_checkable
class Remembers(Protocol):
    """A context builder that learns from the batches of training; its memory is checkpointed."""

    def remember(
        self,
        prompts: Sequence[Prompt],
        group: int,
        outcomes: Sequence[Outcome],
        responses: Sequence[str],
    ) -> None:
        """Takes note of a batch of training, after its contexts were chosen."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The memory, JSON-serialisable."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores a memory."""
        ...


def context_seed(seed: int, step: int) -> int:
    """The seed of a step's context builder in a run with this seed."""
    return seed * 1_000_003 + step


class SiblingContexts:
    """The contexts of SDPO; see `choose_context`.

    With `teacher.success_buffer` it remembers successes by prompt id; with `teacher.control` it
    shows the context of another question.
    """

    def __init__(self, config: TeacherConfig):
        self._config = config
        self._successes: dict[str, list[str]] = {}

    def __call__(
        self,
        prompts: Sequence[Prompt],
        group: int,
        outcomes: Sequence[Outcome],
        responses: Sequence[str],
        /,
        *,
        seed: int,
    ) -> list[TeacherContext | None]:
        """What the teacher of each rollout sees, `[N]`."""
        contexts = choose_context(
            outcomes,
            responses,
            group,
            self._config,
            seed=seed,
            remembered=[self._successes.get(p.id, []) for p in prompts],
        )
        if self._config.control == "none":
            return contexts
        others = shuffled(contexts, [p.id for p in prompts], seed=seed)
        return [c if o.graded else None for c, o in zip(others, outcomes, strict=True)]

    def remember(
        self,
        prompts: Sequence[Prompt],
        group: int,
        outcomes: Sequence[Outcome],
        responses: Sequence[str],
    ) -> None:
        """Keeps successes, newest first; a text that comes again moves to the front."""
        limit = self._config.success_buffer
        for row, outcome in enumerate(outcomes if limit else ()):
            text = shown_text(responses[row], self._config)
            if text is None or not is_success(outcome, self._config):
                continue
            name = prompts[row // group].id
            others = [old for old in self._successes.get(name, []) if old != text]
            self._successes[name] = [text, *others][:limit]

    def get_state(self) -> dict[str, Any]:
        """The remembered successes, JSON-serialisable."""
        return {name: list(texts) for name, texts in self._successes.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores remembered successes."""
        self._successes = {name: list(texts) for name, texts in state.items()}


def demonstration_contexts(config: TeacherConfig) -> ContextBuilder:
    """The contexts of SDFT: `prompt.data["demonstration"]` for each rollout of a prompt."""

    def build(
        prompts: Sequence[Prompt],
        group: int,
        outcomes: Sequence[Outcome],
        responses: Sequence[str],
        /,
        *,
        seed: int,
    ) -> list[TeacherContext | None]:
        del outcomes, responses, seed
        texts = [prompt.data.get("demonstration") for prompt in prompts]
        if config.remove_thinking:
            texts = [None if text is None else remove_thinking(text) for text in texts]
        contexts = [None if text is None else TeacherContext(text, None) for text in texts]
        return [context for context in contexts for _ in range(group)]

    return build
