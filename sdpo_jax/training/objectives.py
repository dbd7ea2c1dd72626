"""From graded rollouts to what an update learns from: one class per objective.

Each drops the rows that cannot move the parameters before any compute, and divides by a denominator
that still knows them. A generation batch is cut into `mini_batches` by prompts; each makes one
update.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import Config, GrpoObjective, SdpoObjective
from sdpo_jax.devices import Devices
from sdpo_jax.losses.objectives import GrpoConstants, GrpoTokens
from sdpo_jax.losses.policy_gradient import group_advantages
from sdpo_jax.model import Params
from sdpo_jax.teacher.context import TeacherContext, choose_context
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.training.batch import Form, MicroBatchPlan, make_tokens
from sdpo_jax.training.clock import Clock
from sdpo_jax.training.experience import Experience
from sdpo_jax.training.teacher_pass import TeacherPass
from sdpo_jax.training.updates import Part, Update, cut_into_parts, make_update


class SdpoUpdates:
    """Contexts, the teacher's forward pass, and the tokens to distil."""

    def __init__(
        self,
        config: Config,
        objective: SdpoObjective,
        teacher_prompts: TeacherPrompts,
        teacher_pass: TeacherPass,
    ):
        self._config, self._objective = config, objective
        self._teacher_prompts, self._teacher_pass = teacher_prompts, teacher_pass

    def __call__(
        self,
        experience: Experience,
        params: Params,
        teacher_params: Params,
        *,
        step: int,
        clock: Clock,
    ) -> tuple[list[Update], dict[str, float]]:
        """Updates of one generation batch, and how much of it had a teacher signal."""
        with clock.phase("teacher"):
            prompts, metrics = self._contexts(experience, step)
            active = np.asarray([ids is not None for ids in prompts])
            form = self._teacher_pass.form
            parts = cut_into_parts(
                self._config, experience, active, active, self._objective.reduction, form
            )
            updates = self._teacher_pass(experience, parts, prompts, teacher_params, params, clock)
        return updates, metrics

    def _contexts(
        self, experience: Experience, step: int
    ) -> tuple[list[list[int] | None], dict[str, float]]:
        contexts = contexts_of(self._config, experience, step)
        rows = [i for i, context in enumerate(contexts) if context is not None]
        questions = [experience.prompts[i // experience.group].messages for i in rows]
        shown = [c for c in contexts if c is not None]
        ids, survived = self._teacher_prompts(questions, shown)
        prompts: list[list[int] | None] = [None] * len(contexts)
        for i, row, signal in zip(rows, ids, survived, strict=True):
            prompts[i] = row if signal else None
        count = max(1, int(experience.graded.sum()))
        return prompts, {
            "teacher_signal": sum(p is not None for p in prompts) / count,
            "shown/demonstration": sum(c.demonstration is not None for c in shown) / count,
            "shown/feedback": sum(c.feedback is not None for c in shown) / count,
        }


def contexts_of(config: Config, experience: Experience, step: int) -> list[TeacherContext | None]:
    """What the teacher of each rollout of a step is shown, None for nothing."""
    return choose_context(
        experience.outcomes,
        experience.texts,
        experience.group,
        config.teacher,
        seed=config.seed * 1_000_003 + step,
    )


class GrpoUpdates:
    """Group-relative advantages on every token of a response."""

    def __init__(self, config: Config, objective: GrpoObjective, devices: Devices, form: Form):
        self._config, self._objective = config, objective
        self._devices, self._form = devices, form

    def __call__(
        self,
        experience: Experience,
        params: Params,
        teacher_params: Params,
        *,
        step: int,
        clock: Clock,
    ) -> tuple[list[Update], dict[str, float]]:
        """Updates of one generation batch, and how much of it had an advantage."""
        del params, teacher_params, step
        with clock.phase("advantages"):
            advantages = graded_advantages(experience)
            active, worth = np.ones(len(advantages), np.bool_), advantages != 0.0
            parts = cut_into_parts(
                self._config, experience, active, worth, self._objective.reduction, self._form
            )
            updates = [self._update(experience, part, advantages) for part in parts]
        signal = worth[experience.graded]
        return updates, {"advantage_signal": float(np.mean(signal)) if len(signal) else 0.0}

    def _update(
        self, experience: Experience, part: Part, advantages: NDArray[np.float32]
    ) -> Update:
        responses = [experience.response_ids[i] for i in part.rows]
        old = [experience.log_probs[i] for i in part.rows]
        repeated = [np.full(len(experience.response_ids[i]), advantages[i]) for i in part.rows]

        def tokens(micro_batch: MicroBatchPlan) -> GrpoTokens:
            place = partial(make_tokens, micro_batch=micro_batch, devices=self._devices)
            return GrpoTokens(
                targets=place(responses, dtype=np.int32),
                old_log_probs=place(old, dtype=np.float32),
                advantages=place(repeated, dtype=np.float32),
            )

        constants = GrpoConstants(jnp.float32(self._config.rollout.temperature))
        return make_update(part, tokens, constants, self._form, self._devices)


def graded_advantages(experience: Experience) -> NDArray[np.float32]:
    """Advantages [N] among the graded siblings; 0 for a rollout that could not be graded."""
    rewards = np.asarray([o.reward for o in experience.outcomes], np.float32)
    graded = experience.graded.reshape(-1, experience.group)
    siblings = np.repeat(graded.sum(axis=1), experience.group)  # [N]
    advantages = np.zeros(len(rewards), np.float32)
    for count in np.unique(siblings[experience.graded]).tolist():
        rows = np.flatnonzero(experience.graded & (siblings == count))
        advantages[rows] = np.asarray(group_advantages(jnp.asarray(rewards[rows]), count))
    return advantages
