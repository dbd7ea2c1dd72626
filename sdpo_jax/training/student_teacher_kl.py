"""How far the teacher's weights stand from the student's: their divergence without a context.

    mean over tokens of D(p(. | x, y_<t), q(. | x, y_<t)),  q with the teacher's weights

Both read the plain question and the student's own answer, so that what is left is the lag of the
weights: the part of the training's divergence that no context causes. It takes two forward passes,
and is therefore measured at evaluations alone, on some of their answers. Validated against numpy
(tests/test_student_teacher_kl.py).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.config import Config
from sdpo_jax.config.objectives import SdftConfig, SdpoConfig
from sdpo_jax.devices import Devices
from sdpo_jax.losses.fused_linear import PerTokenLoss, fused_linear_loss
from sdpo_jax.losses.per_token import SdpoSharedInputs, SdpoTokenInputs, sdpo_per_token
from sdpo_jax.model import Model, Params
from sdpo_jax.objectives.per_token import divergence_of
from sdpo_jax.training.batch import (
    BatchLayout,
    MicroBatchPlan,
    Pair,
    make_sequences,
    make_tokens,
    plan,
)
from sdpo_jax.training.step import head_on_shards, teacher_forward


class StudentTeacherKl:
    """The compiled passes, and what they are of."""

    def __init__(
        self,
        config: Config,
        objective: SdpoConfig | SdftConfig,
        model: Model,
        devices: Devices,
        form: BatchLayout,
    ):
        """The divergence, and the temperature, are those of the training."""
        self._devices, self._form = devices, form
        self._temperature = jnp.float32(config.rollout.temperature)
        in_region = config.teacher.weights == "trust_region"
        self._coefficient = jnp.float32(config.teacher.trust_region) if in_region else None
        loss = sdpo_per_token(divergence_of(objective))
        self._apart = devices.jit(partial(_apart, loss), out_shardings=devices.replicated)
        self._forward = devices.jit(partial(teacher_forward, model), out_shardings=devices.rows)
        self._head = devices.jit(model.head, out_shardings=devices.head)

    def __call__(
        self,
        student: Params,
        teacher: Params,
        prompts: Sequence[list[int]],
        responses: Sequence[Sequence[int]],
    ) -> dict[str, float]:
        """`student_teacher_kl` in nats, over all tokens of the responses, one for each prompt."""
        pairs = [Pair(*x) for x in zip(prompts, map(list, responses), strict=True)]
        heads = [self._head(x) for x in (student, teacher)]
        found = [self._of(pairs, x, (student, teacher), heads) for x in plan(pairs, self._form)]
        total = sum(float(x) for x in self._devices.fetch(found))
        return {"student_teacher_kl": total / max(1, sum(len(p.response) for p in pairs))}

    def _of(
        self,
        pairs: list[Pair],
        micro_batch: MicroBatchPlan,
        weights: tuple[Params, Params],
        heads: list[jax.Array],
    ) -> jax.Array:
        """[], the sum of a micro-batch."""
        sequences = make_sequences(pairs, micro_batch, self._form, self._devices)
        place = partial(make_tokens, micro_batch=micro_batch, devices=self._devices)
        student, teacher = (self._forward(x, sequences) for x in weights)
        live = None if self._coefficient is None else (student, heads[0])
        tokens = SdpoTokenInputs(
            teacher,
            place([p.response for p in pairs], dtype=np.int32),
            live_hidden=live and live[0],  # the student itself, where the teacher mixes both
        )
        constants = SdpoSharedInputs(
            heads[1], self._temperature, live and live[1], self._coefficient
        )
        there = place([np.ones(len(p.response)) for p in pairs], dtype=np.bool_)
        chunks = jnp.int32(micro_batch.filled)
        return self._apart(student, heads[0], tokens, constants, there, chunks)


def _apart(
    loss: PerTokenLoss,
    hidden: jax.Array,
    head: jax.Array,
    tokens: SdpoTokenInputs,
    constants: SdpoSharedInputs,
    there: jax.Array,
    chunks: jax.Array,
) -> jax.Array:
    """[], the divergence of all tokens that are there, a chunk of the head at a time."""
    flat = partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[3:]))
    piece, weights = there.shape[2], jnp.zeros(there.size, jnp.float32)
    _, metrics = head_on_shards(
        partial(fused_linear_loss, loss, chunk=piece, block=piece),
        (flat(hidden), flat(tokens), weights),
        head,
        (constants, chunks),
    )
    return jnp.sum(jnp.where(flat(there), metrics["divergence"], 0.0))
