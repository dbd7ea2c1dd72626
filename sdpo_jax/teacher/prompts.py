"""Writes teacher prompts and renders them to token ids, each distinct prompt once."""

from collections.abc import Mapping, Sequence

from sdpo_jax.config import TeacherConfig
from sdpo_jax.environments.base import Prompt
from sdpo_jax.teacher.context import ATTEMPTS, TeacherContext, Wording, fit_reprompt
from sdpo_jax.tokens import Tokenizer


class TeacherPrompts:
    """Renders teacher prompts of a run."""

    def __init__(self, config: TeacherConfig, tokenizer: Tokenizer, wording: Wording = ATTEMPTS):
        self._config, self._wording = config, wording
        self._tokenizer = tokenizer

    def __call__(
        self, questions: Sequence[tuple[Mapping[str, str], ...]], contexts: Sequence[TeacherContext]
    ) -> tuple[list[list[int]], list[bool]]:
        """Ids of each row's teacher prompt, and whether any of its context survived the cut."""
        known: dict[tuple[str, TeacherContext], tuple[list[int], bool]] = {}
        rendered: list[tuple[list[int], bool]] = []
        for messages, context in zip(questions, contexts, strict=True):
            key = (repr(messages), context)
            if key not in known:
                fitted = fit_reprompt(
                    messages,
                    context,
                    self._tokenizer,
                    max_prompt_tokens=self._config.max_prompt_tokens,
                    max_feedback_tokens=self._config.max_feedback_tokens,
                    wording=self._wording,
                )
                ids = self._tokenizer.render(fitted.messages)
                known[key] = (ids, fitted.context is not None)
            rendered.append(known[key])
        return [ids for ids, _ in rendered], [shown for _, shown in rendered]

    def of_rollouts(
        self, prompts: Sequence[Prompt], group: int, contexts: Sequence[TeacherContext | None]
    ) -> list[list[int] | None]:
        """Ids of each rollout's teacher prompt, `[N]`; None where nothing of a context is left."""
        rows = [i for i, context in enumerate(contexts) if context is not None]
        ids, survived = self(
            [prompts[i // group].messages for i in rows],
            [context for context in contexts if context is not None],
        )
        rendered: list[list[int] | None] = [None] * len(contexts)
        for i, row, signal in zip(rows, ids, survived, strict=True):
            rendered[i] = row if signal else None
        return rendered
