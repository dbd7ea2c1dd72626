"""Divergence between the student's and the teacher's weights on the same prompt, without a context.

    mean over tokens of D(p(. | x, y_<t), q(. | x, y_<t)),  q with the teacher's weights

Both read the plain question and the student's own answer, so that only the difference of the
weights is left: the part of the training's divergence that no context causes. It takes two forward
passes, and is therefore measured at evaluations alone, on some of their answers. Validated against
numpy (tests/test_student_teacher_kl.py).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.losses.fused_linear import PerTokenLoss
from sdpo_jax.losses.per_token import Divergence, SdpoSharedInputs, SdpoTokenInputs, sdpo_per_token
from sdpo_jax.model import Params
from sdpo_jax.training.batch import PackedBatch, Pair, make_sequences, split_micro_batches
from sdpo_jax.training.engine import Engine, Models
from sdpo_jax.training.step import token_values
from sdpo_jax.training.teacher_pass import shared_inputs


class StudentTeacherKl:
    """The compiled measurement, in the objective's own divergence and temperature."""

    def __init__(self, engine: Engine, divergence: Divergence):
        self._engine = engine
        loss = partial(_sum, sdpo_per_token(divergence))
        self._sum = engine.devices.jit(loss, out_shardings=engine.devices.replicated)

    def __call__(
        self,
        student: Params,
        teacher: Params,
        prompts: Sequence[list[int]],
        responses: Sequence[Sequence[int]],
    ) -> dict[str, float]:
        """`student_teacher_kl` in nats, a mean over all tokens of the responses."""
        engine, models = self._engine, Models(student, teacher, None)
        pairs = [Pair(*x) for x in zip(prompts, map(list, responses), strict=True)]
        head, shared = engine.head(student), shared_inputs(engine, models)
        packed = split_micro_batches(pairs, engine.layout)
        found = [self._of(pairs, x, models, head, shared) for x in packed]
        total = sum(float(x) for x in engine.devices.fetch(found))
        return {"student_teacher_kl": total / max(1, sum(len(p.response) for p in pairs))}

    def _of(
        self,
        pairs: list[Pair],
        packed: PackedBatch,
        models: Models,
        head: jax.Array,
        shared: SdpoSharedInputs,
    ) -> jax.Array:
        """[], the sum of a micro-batch."""
        engine = self._engine
        sequences = make_sequences(packed, engine.devices)
        student, teacher = (engine.forward(x, sequences) for x in models[:2])
        targets = engine.place([p.response for p in pairs], packed, np.int32)
        # With a trust region the teacher mixes both models: the other one is the student itself.
        live = None if shared.live_head is None else student
        inputs = SdpoTokenInputs(teacher, targets, live_hidden=live)
        there = engine.place([np.ones(len(p.response)) for p in pairs], packed, np.bool_)
        return self._sum(student, head, inputs, shared, there, jnp.int32(packed.filled))


def _sum(
    loss: PerTokenLoss,
    hidden: jax.Array,
    head: jax.Array,
    inputs: SdpoTokenInputs,
    shared: SdpoSharedInputs,
    there: jax.Array,
    chunks: jax.Array,
) -> jax.Array:
    """[], the divergence of all tokens that are there."""
    values = token_values(loss, hidden, head, inputs, shared, chunks)["divergence"]
    return jnp.sum(jnp.where(there, values, 0.0))
