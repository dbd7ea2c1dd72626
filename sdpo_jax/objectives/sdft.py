"""SDFT: the student answers the questions of demonstrations, the teacher was shown them.

    demonstrations -> question -> student's own response          sampled, not graded
                   -> question + demonstration -> teacher          re-scores that response
                   divergence of both, mean over responses of token means -> update

The same loss, teacher and passes as SDPO; what the teacher sees comes from data instead of from an
environment (arXiv 2601.19897, section 3). Departures from the authors' code, each tested: the
importance weight is of the student before each update over the sampler (theirs compares two engines
on the same weights, which are one here); a demonstration that is too long loses its end.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdpo_jax.config import Config
from sdpo_jax.config.objectives import SdftConfig
from sdpo_jax.data.jsonl import Demonstration
from sdpo_jax.data.pipeline import PromptBatches
from sdpo_jax.environments.base import Prompt
from sdpo_jax.model import Params
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.prompts import prompt_ids
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.rollouts.sampler import Sampler
from sdpo_jax.teacher.context import TeacherContext, remove_thinking
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.tokens import Tokenizer
from sdpo_jax.training.teacher_pass import TeacherPass
from sdpo_jax.training.updates import Update, split_mini_batches


class SdftSource:
    """Demonstrations, answered by the student and re-scored by a teacher that has read them."""

    def __init__(
        self,
        config: Config,
        objective: SdftConfig,
        demonstrations: PromptBatches[Demonstration],
        tokenizer: Tokenizer,
        sampler: Sampler,
        teacher_prompts: TeacherPrompts,
        teacher_pass: TeacherPass,
    ):
        self._config, self._objective = config, objective
        self._demonstrations, self._tokenizer, self._sampler = demonstrations, tokenizer, sampler
        self._teacher_prompts, self._teacher_pass = teacher_prompts, teacher_pass

    def __call__(
        self, params: Params, teacher_params: Params, step: int, clock: PhaseTimer
    ) -> tuple[list[Update], dict[str, float]]:
        """Samples answers and makes the updates of one batch of demonstrations."""
        demonstrations = next(self._demonstrations)
        experience, metrics = self._sample(params, demonstrations, step, clock)
        with clock.phase("teacher"):
            prompts = self._prompts(demonstrations)
            active = np.asarray([ids is not None for ids in prompts])
            skip = self._objective.skip_first_tokens
            parts = split_mini_batches(
                self._config,
                experience,
                active,
                active & (experience.lengths > skip),
                self._objective.reduction,
                self._teacher_pass.form,
                skip=skip,
            )
            updates = self._teacher_pass(experience, parts, prompts, teacher_params, params, clock)
        metrics["teacher_signal"] = float(np.mean(active))
        return updates, metrics | {"generations": step * len(experience.texts)}

    def _sample(
        self, params: Params, demonstrations: Sequence[Demonstration], step: int, clock: PhaseTimer
    ) -> tuple[RolloutBatch, dict[str, float]]:
        config = self._config.rollout
        group = config.rollouts_per_prompt
        prompts = [Prompt(d.id, d.messages, {}) for d in demonstrations]
        with clock.phase("rollout"):
            ids = [prompt_ids(self._tokenizer, p, config.max_prompt_tokens) for p in prompts]
            rollouts = self._sampler(
                params,
                ids,
                group=group,
                max_tokens=config.max_response_tokens,
                temperature=config.temperature,
                seed=self._config.seed,
                step=step,
            )
        clock.count("rollout", int(rollouts.lengths.sum()))
        responses = rollouts.responses()
        log_probs = zip(rollouts.log_probs, rollouts.lengths, strict=True)
        experience = RolloutBatch(
            prompts=prompts,
            group=group,
            prompt_ids=[row for row in ids for _ in range(group)],
            response_ids=responses,
            log_probs=[row[:n] for row, n in log_probs],
            lengths=rollouts.lengths,
            texts=[self._tokenizer.decode(row) for row in responses],
            outcomes=[],
        )
        return experience, {
            "response_tokens": float(np.mean(rollouts.lengths)),
            "truncated": float(1.0 - np.mean(rollouts.stopped)),
        }

    def _prompts(self, demonstrations: Sequence[Demonstration]) -> list[list[int] | None]:
        """Each response's teacher prompt; None where nothing of the demonstration is left in it."""
        hides, group = (
            self._config.teacher.remove_thinking,
            self._config.rollout.rollouts_per_prompt,
        )
        shown = [remove_thinking(d.response) if hides else d.response for d in demonstrations]
        ids, survived = self._teacher_prompts(
            [d.messages for d in demonstrations], [TeacherContext(text, None) for text in shown]
        )
        rows = [row if signal else None for row, signal in zip(ids, survived, strict=True)]
        return [row for row in rows for _ in range(group)]

    def wait(self) -> None:
        """Nothing runs here."""

    def get_state(self) -> dict[str, Any]:
        """Position in the demonstrations."""
        return self._demonstrations.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position."""
        self._demonstrations.set_state(state)
