"""The teacher's prompts of a generation batch, and the successes that outlive it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sdpo_jax.config import Config
from sdpo_jax.environments.base import Outcome, Prompt
from sdpo_jax.rollouts.diagnostics import overlap
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.teacher.context import TeacherContext, choose_context, is_success, shown_text
from sdpo_jax.teacher.controls import shuffled
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.tokens import Tokenizer


class ContextBuilder(Protocol):
    """What the teacher of each rollout sees."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        group: int,
        outcomes: Sequence[Outcome],
        responses: Sequence[str],
        *,
        seed: int,
    ) -> Sequence[TeacherContext | None]:
        """[N] contexts of P prompts with `group` rollouts each; None where there is no signal."""
        ...


class Contexts:
    """Chooses contexts; with `teacher.success_buffer` it remembers successes by prompt id.

    Another builder takes the place of successful siblings and feedback, controls and memory.
    """

    def __init__(
        self,
        config: Config,
        teacher_prompts: TeacherPrompts,
        tokenizer: Tokenizer,
        build: ContextBuilder | None = None,
    ):
        self._config, self._teacher_prompts = config, teacher_prompts
        self._tokenizer, self._build = tokenizer, build
        self._successes: dict[str, list[str]] = {}

    def __call__(
        self, experience: RolloutBatch, step: int
    ) -> tuple[list[list[int] | None], dict[str, float]]:
        """Ids of each rollout's teacher prompt, `[N]`, None without a signal; and metrics."""
        contexts = self.choose(experience, step)
        self._remember(experience)
        prompts, shown = self.render(experience, contexts), [c for c in contexts if c is not None]
        count = max(1, int(experience.graded.sum()))
        return prompts, {
            "teacher_signal": sum(p is not None for p in prompts) / count,
            "shown/demonstration": sum(c.demonstration is not None for c in shown) / count,
            "shown/feedback": sum(c.feedback is not None for c in shown) / count,
            **self._copied(experience, contexts),
        }

    def render(
        self, experience: RolloutBatch, contexts: Sequence[TeacherContext | None]
    ) -> list[list[int] | None]:
        """Ids of each rollout's teacher prompt, `[N]`; None where no context is left of it."""
        rows = [i for i, context in enumerate(contexts) if context is not None]
        ids, survived = self._teacher_prompts(
            [experience.prompts[i // experience.group].messages for i in rows],
            [context for context in contexts if context is not None],
        )
        prompts: list[list[int] | None] = [None] * len(contexts)
        for i, row, signal in zip(rows, ids, survived, strict=True):
            prompts[i] = row if signal else None
        return prompts

    def choose(self, experience: RolloutBatch, step: int) -> list[TeacherContext | None]:
        """What the teacher of each rollout of a step is shown, `[N]`; None for nothing."""
        teacher, seed = self._config.teacher, self._config.seed * 1_000_003 + step
        if self._build is not None:
            batch = experience
            built = self._build(batch.prompts, batch.group, batch.outcomes, batch.texts, seed=seed)
            return list(built)
        contexts = choose_context(
            experience.outcomes,
            experience.texts,
            experience.group,
            teacher,
            seed=seed,
            remembered=[self._successes.get(p.id, []) for p in experience.prompts],
        )
        if teacher.control == "none":
            return contexts
        others = shuffled(contexts, [p.id for p in experience.prompts], seed=seed)
        graded = experience.graded
        return [c if ok else None for c, ok in zip(others, graded, strict=True)]

    def _remember(self, experience: RolloutBatch) -> None:
        """Newest first; a text that comes again moves to the front."""
        limit = self._config.teacher.success_buffer
        for row, outcome in enumerate(experience.outcomes if limit else ()):
            text = shown_text(experience.texts[row], self._config.teacher)
            if text is None or not is_success(outcome, self._config.teacher):
                continue
            name = experience.prompts[row // experience.group].id
            others = [old for old in self._successes.get(name, []) if old != text]
            self._successes[name] = [text, *others][:limit]

    def _copied(
        self, experience: RolloutBatch, contexts: Sequence[TeacherContext | None]
    ) -> dict[str, float]:
        """How much of the responses stands in the demonstrations that their teachers see."""
        encoded: dict[str, list[int]] = {}
        shares: list[float] = []
        for ids, context in zip(experience.response_ids, contexts, strict=True):
            if context is not None and (text := context.demonstration) is not None:
                if text not in encoded:
                    encoded[text] = self._tokenizer.encode(text)
                shares.append(overlap(ids, encoded[text]))
        return {"demonstration_overlap": sum(shares) / len(shares)} if shares else {}

    def get_state(self) -> dict[str, Any]:
        """What is remembered, JSON-serialisable."""
        return {name: list(texts) for name, texts in self._successes.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to what was remembered."""
        self._successes = {name: list(texts) for name, texts in state.items()}
