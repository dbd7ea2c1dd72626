"""From graded rollouts to what an update learns from: one function per objective.

Each drops the rows that cannot move the parameters before any compute, and divides by a denominator
that still knows them. A generation batch is cut into `mini_batches` by prompts; each makes one
update.
"""

from collections.abc import Callable, Sequence
from functools import partial
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
    Form,
    MicroBatchPlan,
    Pair,
    Reduction,
    make_sequences,
    make_tokens,
    plan,
    reduction_weights,
)
from sdpo_jax.training.clock import Clock
from sdpo_jax.training.experience import Experience
from sdpo_jax.training.step import Batch, MicroBatch, Sequences


class Update(NamedTuple):
    """What one optimiser update needs."""

    batch: Batch
    constants: Any
    tokens: int
    """Of prompts and responses, without padding."""


class Part(NamedTuple):
    """The rows of one mini-batch that are worth computing, with their weights."""

    rows: list[int]
    pairs: list[Pair]  # of the student
    micro_batches: list[MicroBatchPlan]
    weights: list[NDArray[np.float32]]  # of each row's tokens
    denominator: float


def cut_into_parts(
    config: Config,
    experience: Experience,
    active: NDArray[np.bool_],
    worth: NDArray[np.bool_],
    reduction: Reduction,
    form: Form,
) -> list[Part]:
    """Mini-batches of the rows that are `worth` computing; an empty one makes no update.

    `active` rows count in the reduction; a row that is active but not worth computing has zero
    gradient. Rows that could not be graded are absent: no denominator knows them.
    """
    total, parts, graded = len(experience.texts), list[Part](), experience.graded
    size = total // config.train.mini_batches
    for start in range(0, total, size):
        block = start + np.flatnonzero(graded[start : start + size])
        kept = np.flatnonzero(worth[block] & active[block])
        if len(kept) == 0:
            continue
        lengths = experience.lengths[block]
        own = None if experience.own is None else [experience.own[i] for i in block]
        weights, denominator = reduction_weights(
            lengths, active[block], int(lengths.max()), reduction, own
        )
        rows = block[kept].tolist()
        pairs = [Pair(experience.prompt_ids[i], experience.response_ids[i]) for i in rows]
        spread = [weights[i, : lengths[i]] for i in kept]
        parts.append(Part(rows, pairs, plan(pairs, form), spread, denominator))
    return parts


TeacherForward = Callable[[Params, Sequences], jax.Array]
TeacherHead = Callable[[Params], jax.Array]


class SdpoUpdates:
    """Contexts, the teacher's forward pass, and the tokens to distil."""

    def __init__(
        self,
        config: Config,
        objective: SdpoObjective,
        devices: Devices,
        form: Form,
        teacher_prompts: TeacherPrompts,
        teacher_forward: TeacherForward,
        teacher_head: TeacherHead,
    ):
        self._config, self._objective = config, objective
        self._devices, self._form, self._teacher_prompts = devices, form, teacher_prompts
        self._teacher_forward, self._teacher_head = teacher_forward, teacher_head

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
            parts = cut_into_parts(
                self._config, experience, active, active, self._objective.reduction, self._form
            )
            # All teacher passes run before the first update: the teacher may be the student.
            pair = [teacher_params]
            if self._config.teacher.weights == "trust_region":
                pair.append(params)
            heads = [self._teacher_head(x) for x in pair] if parts else []
            updates = [
                self._update(experience, part, prompts, pair, heads, clock) for part in parts
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
        count = max(1, int(experience.graded.sum()))
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
        weights: list[Params],
        heads: list[jax.Array],
        clock: Clock,
    ) -> Update:
        """`weights`: the teacher's; with a trust region the student's, too, for the same prompt."""
        pairs = [
            Pair(ids, experience.response_ids[i])
            for i in part.rows
            if (ids := teacher_prompts[i]) is not None
        ]
        clock.count("teacher", _tokens(pairs))
        old = [experience.log_probs[i] for i in part.rows]

        def tokens(micro_batch: MicroBatchPlan) -> SdpoTokens:
            sequences = make_sequences(pairs, micro_batch, self._form, self._devices)
            place = partial(make_tokens, micro_batch=micro_batch, devices=self._devices)
            hidden = [self._teacher_forward(x, sequences) for x in weights]
            return SdpoTokens(
                teacher_hidden=hidden[0],
                targets=place([p.response for p in pairs], dtype=np.int32),
                old_log_probs=place(old, dtype=np.float32),
                live_hidden=hidden[1] if len(hidden) > 1 else None,
            )

        temperature = jnp.float32(self._config.rollout.temperature)
        constants = SdpoConstants(heads[0], temperature)
        if len(heads) > 1:
            coefficient = jnp.float32(self._config.teacher.trust_region)
            constants = SdpoConstants(heads[0], temperature, heads[1], coefficient)
        return make_update(part, tokens, constants, self._form, self._devices)


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


def make_update(
    part: Part,
    tokens: Callable[[MicroBatchPlan], Any],
    constants: Any,
    form: Form,
    devices: Devices,
) -> Update:
    """The student's side of an update; `tokens` makes what the objective knows of each token."""
    micro_batches = [
        MicroBatch(
            make_sequences(part.pairs, micro_batch, form, devices),
            make_tokens(part.weights, micro_batch, np.float32, devices),
            tokens(micro_batch),
            np.int32(micro_batch.filled),  # pyright: ignore[reportArgumentType]
        )
        for micro_batch in part.micro_batches
    ]
    batch = Batch(micro_batches, jnp.float32(part.denominator))
    return Update(batch, constants, _tokens(part.pairs))


def _tokens(pairs: Sequence[Pair]) -> int:
    return sum(len(prompt) + len(response) for prompt, response in pairs)
