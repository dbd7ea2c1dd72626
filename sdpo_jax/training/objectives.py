"""From graded rollouts to what an update learns from: one function per objective.

Each drops the rows that cannot move the parameters before any compute, and divides by a denominator
that still knows them. A generation batch is cut into `mini_batches` by prompts; each makes one
update.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import Config, GrpoObjective, SdpoObjective
from sdpo_jax.devices import Devices
from sdpo_jax.losses.objectives import GrpoConstants, GrpoTokens, SdpoConstants, SdpoTokens
from sdpo_jax.losses.policy_gradient import group_advantages
from sdpo_jax.model import Params
from sdpo_jax.teacher.context import choose_context
from sdpo_jax.teacher.prompts import TeacherPrompts
from sdpo_jax.training.batch import (
    Layout,
    Reduction,
    cut_rows,
    layout,
    make_rows,
    make_tokens,
    reduction_weights,
)
from sdpo_jax.training.clock import Clock
from sdpo_jax.training.experience import Experience
from sdpo_jax.training.step import Batch, Rows


class Update(NamedTuple):
    """What one optimiser update needs."""

    batch: Batch
    constants: Any
    tokens: int
    """Of prompts and responses, without padding."""


class Part(NamedTuple):
    """The rows of one mini-batch that are worth computing, with their weights."""

    rows: list[int]
    shape: Layout
    weights: NDArray[np.float32]  # [A·R, T]
    denominator: float


def cut_into_parts(
    config: Config,
    experience: Experience,
    active: NDArray[np.bool_],
    worth: NDArray[np.bool_],
    reduction: Reduction,
    devices: Devices,
) -> list[Part]:
    """Mini-batches of the rows that are `worth` computing; an empty one makes no update.

    `active` rows count in the reduction; a row that is active but not worth computing has zero
    gradient.
    """
    total, parts = len(experience.texts), []
    size = total // config.train.mini_batches
    shape = layout(
        size,
        experience.longest,
        micro_batch_rows=config.train.micro_batch_rows,
        shards=devices.row_shards,
    )
    for start in range(0, total, size):
        block = slice(start, start + size)
        weights, denominator = reduction_weights(
            experience.lengths[block], active[block], shape.response_tokens, reduction
        )
        kept = np.flatnonzero(worth[block] & active[block])
        if len(kept) == 0:
            continue
        padded = np.zeros((shape.micro_batches * shape.rows, shape.response_tokens), np.float32)
        padded[: len(kept)] = weights[kept]
        parts.append(Part([start + int(i) for i in kept], shape, padded, denominator))
    return parts


TeacherForward = Callable[[Params, Rows], tuple[jax.Array, jax.Array]]


class SdpoUpdates:
    """Contexts, the teacher's forward pass, and the tokens to distil."""

    def __init__(
        self,
        config: Config,
        objective: SdpoObjective,
        devices: Devices,
        teacher_prompts: TeacherPrompts,
        teacher_forward: TeacherForward,
    ):
        self._config, self._objective, self._devices = config, objective, devices
        self._teacher_prompts, self._teacher_forward = teacher_prompts, teacher_forward

    def __call__(
        self, experience: Experience, teacher_params: Params, *, step: int, clock: Clock
    ) -> tuple[list[Update], dict[str, float]]:
        """Updates of one generation batch, and how much of it had a teacher signal."""
        with clock.phase("teacher"):
            prompts, metrics = self._contexts(experience, step)
            active = np.asarray([ids is not None for ids in prompts])
            parts = cut_into_parts(
                self._config, experience, active, active, self._objective.reduction, self._devices
            )
            # All teacher passes run before the first update: the teacher may be the student.
            updates = [
                self._update(experience, part, prompts, teacher_params, clock) for part in parts
            ]
            jax.block_until_ready(updates)
        return updates, metrics

    def _contexts(
        self, experience: Experience, step: int
    ) -> tuple[list[list[int] | None], dict[str, float]]:
        contexts = choose_context(
            experience.outcomes,
            experience.texts,
            experience.group,
            self._config.teacher,
            seed=self._config.seed * 1_000_003 + step,
        )
        rows = [i for i, context in enumerate(contexts) if context is not None]
        questions = [experience.prompts[i // experience.group].messages for i in rows]
        shown = [c for c in contexts if c is not None]
        ids, survived = self._teacher_prompts(questions, shown)
        prompts: list[list[int] | None] = [None] * len(contexts)
        for i, row, signal in zip(rows, ids, survived, strict=True):
            prompts[i] = row if signal else None
        count = len(contexts)
        return prompts, {
            "teacher_signal": sum(p is not None for p in prompts) / count,
            "shown/demonstration": sum(c.demonstration is not None for c in shown) / count,
            "shown/feedback": sum(c.feedback is not None for c in shown) / count,
        }

    def _update(
        self,
        experience: Experience,
        part: Part,
        teacher_prompts: list[list[int] | None],
        teacher_params: Params,
        clock: Clock,
    ) -> Update:
        devices, shape = self._devices, part.shape
        responses = [experience.response_ids[i] for i in part.rows]
        teacher_ids = [ids for i in part.rows if (ids := teacher_prompts[i]) is not None]
        clock.count("teacher", _tokens(teacher_ids, responses))
        hidden, head = self._teacher_forward(
            teacher_params, make_rows(teacher_ids, responses, shape, devices)
        )
        old = [experience.log_probs[i] for i in part.rows]
        tokens = SdpoTokens(
            teacher_hidden=hidden,
            targets=make_tokens(responses, shape, np.int32, devices),
            old_log_probs=make_tokens(old, shape, np.float32, devices),
        )
        constants = SdpoConstants(head, jnp.float32(self._config.rollout.temperature))
        return _update(experience, part, tokens, constants, devices)


class GrpoUpdates:
    """Group-relative advantages on every token of a response."""

    def __init__(self, config: Config, objective: GrpoObjective, devices: Devices):
        self._config, self._objective, self._devices = config, objective, devices

    def __call__(
        self, experience: Experience, teacher_params: Params, *, step: int, clock: Clock
    ) -> tuple[list[Update], dict[str, float]]:
        """Updates of one generation batch, and how much of it had an advantage."""
        del teacher_params, step
        with clock.phase("advantages"):
            rewards = jnp.asarray([o.reward for o in experience.outcomes], jnp.float32)
            advantages = np.asarray(group_advantages(rewards, experience.group))
            active, worth = np.ones(len(advantages), np.bool_), advantages != 0.0
            parts = cut_into_parts(
                self._config, experience, active, worth, self._objective.reduction, self._devices
            )
            updates = [self._update(experience, part, advantages) for part in parts]
        return updates, {"advantage_signal": float(np.mean(worth))}

    def _update(
        self, experience: Experience, part: Part, advantages: NDArray[np.float32]
    ) -> Update:
        devices, shape = self._devices, part.shape
        responses = [experience.response_ids[i] for i in part.rows]
        old = [experience.log_probs[i] for i in part.rows]
        spread = [np.full(len(experience.response_ids[i]), advantages[i]) for i in part.rows]
        tokens = GrpoTokens(
            targets=make_tokens(responses, shape, np.int32, devices),
            old_log_probs=make_tokens(old, shape, np.float32, devices),
            advantages=make_tokens(spread, shape, np.float32, devices),
        )
        constants = GrpoConstants(jnp.float32(self._config.rollout.temperature))
        return _update(experience, part, tokens, constants, devices)


def _update(
    experience: Experience, part: Part, tokens: Any, constants: Any, devices: Devices
) -> Update:
    prompts = [experience.prompt_ids[i] for i in part.rows]
    responses = [experience.response_ids[i] for i in part.rows]
    rows = make_rows(prompts, responses, part.shape, devices)
    weights = cut_rows(part.weights, part.shape, devices)
    batch = Batch(rows, weights, tokens, jnp.float32(part.denominator))
    return Update(batch, constants, _tokens(prompts, responses))


def _tokens(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> int:
    return sum(map(len, prompts)) + sum(map(len, responses))
