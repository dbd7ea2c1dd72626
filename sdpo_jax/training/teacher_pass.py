"""The teacher's forward over the student's own responses, and the update that distills it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.config import Config
from sdpo_jax.devices import Devices
from sdpo_jax.losses.per_token import SdpoSharedInputs, SdpoTokenInputs
from sdpo_jax.losses.sequence_importance import SdftTokenInputs
from sdpo_jax.model import Params
from sdpo_jax.rollouts.phase_timer import PhaseTimer
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.training.batch import (
    BatchLayout,
    MicroBatchPlan,
    Pair,
    make_sequences,
    make_tokens,
    rollout_numbers,
)
from sdpo_jax.training.step import Sequences
from sdpo_jax.training.updates import MiniBatch, Update, in_order, make_update, token_count

TeacherForward = Callable[[Params, Sequences], jax.Array]
"""`(params, sequences) -> [D, n, c, width]`, compiled: `step.teacher_forward` of a model."""

TeacherHead = Callable[[Params], jax.Array]
"""`params -> [width, V]`, compiled, as the loss wants the head to lie."""


class TeacherOutputs(NamedTuple):
    """What the teacher knows of one part."""

    tokens: list[Any]  # of each micro-batch, `SdpoTokenInputs` or `SdftTokenInputs`
    constants: SdpoSharedInputs


class TeacherPass:
    """Re-scores responses after other prompts; knows nothing of where those come from."""

    def __init__(
        self,
        config: Config,
        devices: Devices,
        form: BatchLayout,
        forward: TeacherForward,
        head: TeacherHead,
        *,
        number_rollouts: bool = False,
    ):
        """With `number_rollouts` the tokens are `SdftTokenInputs`, with weights per response."""
        self.form, self._number_rollouts = form, number_rollouts
        self._config, self._devices = config, devices
        self._forward, self._head = forward, head

    def __call__(
        self,
        experience: RolloutBatch,
        parts: Sequence[MiniBatch],
        prompts: Sequence[list[int] | None],
        teacher_params: Params,
        params: Params,
        clock: PhaseTimer,
    ) -> list[Update]:
        """One update for each part; arguments as in `sides`."""
        sides = self.sides(experience, parts, prompts, teacher_params, params, clock)
        updates = [
            make_update(part, in_order(part, side.tokens), side.constants, self.form, self._devices)
            for part, side in zip(parts, sides, strict=True)
        ]
        jax.block_until_ready(updates)
        return updates

    def sides(
        self,
        experience: RolloutBatch,
        parts: Sequence[MiniBatch],
        prompts: Sequence[list[int] | None],
        teacher_params: Params,
        params: Params,
        clock: PhaseTimer,
    ) -> list[TeacherOutputs]:
        """What the teacher knows of each part's tokens.

        All passes run before the first update: the teacher may be the student.

        Args:
          experience: the responses.
          parts: their rows that are worth computing.
          prompts: ids of each row's teacher prompt, `[N]`; those of the parts' rows exist.
          teacher_params: the teacher's weights.
          params: the student's; read with a trust region, whose teacher mixes both.
          clock: counts the teacher's tokens.
        """
        weights = [teacher_params]
        if self._config.teacher.weights == "trust_region":
            weights.append(params)
        heads = [self._head(x) for x in weights] if parts else []
        return [self._side(experience, part, prompts, weights, heads, clock) for part in parts]

    def _side(
        self,
        experience: RolloutBatch,
        part: MiniBatch,
        prompts: Sequence[list[int] | None],
        weights: list[Params],
        heads: list[jax.Array],
        clock: PhaseTimer,
    ) -> TeacherOutputs:
        pairs = [
            Pair(ids, experience.response_ids[i])
            for i in part.rows
            if (ids := prompts[i]) is not None
        ]
        clock.count("teacher", token_count(pairs))
        old = [experience.log_probs[i] for i in part.rows]

        def tokens(micro_batch: MicroBatchPlan) -> SdpoTokenInputs | SdftTokenInputs:
            sequences = make_sequences(pairs, micro_batch, self.form, self._devices)
            place = partial(make_tokens, micro_batch=micro_batch, devices=self._devices)
            hidden = [self._forward(x, sequences) for x in weights]
            distilled = SdpoTokenInputs(
                teacher_hidden=hidden[0],
                targets=place([p.response for p in pairs], dtype=np.int32),
                old_log_probs=place(old, dtype=np.float32),
                live_hidden=hidden[1] if len(hidden) > 1 else None,
            )
            if not self._number_rollouts:
                return distilled
            numbers = rollout_numbers(pairs, micro_batch)
            return SdftTokenInputs(distilled, place(numbers, dtype=np.int32))

        temperature = jnp.float32(self._config.rollout.temperature)
        constants = SdpoSharedInputs(heads[0], temperature)
        if len(heads) > 1:
            coefficient = jnp.float32(self._config.teacher.trust_region)
            constants = SdpoSharedInputs(heads[0], temperature, heads[1], coefficient)
        return TeacherOutputs([tokens(x) for x in part.micro_batches], constants)
