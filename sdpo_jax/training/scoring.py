"""Log-probabilities of the sampled tokens under a model that is not trained."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sdpo_jax.devices import Devices
from sdpo_jax.losses.fused_linear import fused_linear_loss
from sdpo_jax.losses.per_token import SdpoSharedInputs, SdpoTokenInputs
from sdpo_jax.losses.reference_kl import (
    ReferenceKlSharedInputs,
    ReferenceKlTokenInputs,
    ScoreSharedInputs,
    ScoreTokenInputs,
    score_per_token,
)
from sdpo_jax.model import Model, Params
from sdpo_jax.training.batch import MicroBatchPlan
from sdpo_jax.training.step import head_on_shards, teacher_forward
from sdpo_jax.training.token_metrics import sampled
from sdpo_jax.training.updates import MiniBatch, Update


class Scores(NamedTuple):
    """Of each row of a part, on the host, `[|y|]` each."""

    log_probs: list[NDArray[np.float32]]  # log q(y_t)
    entropies: list[NDArray[np.float32]]  # H(q_t)


class Scorer:
    """The compiled passes over responses that yield numbers and no gradient."""

    def __init__(self, model: Model, devices: Devices, temperature: float):
        self._devices, self._temperature = devices, jnp.float32(temperature)
        self._score = devices.jit(_score, out_shardings=devices.rows)
        self._forward = devices.jit(partial(teacher_forward, model), out_shardings=devices.rows)
        self._head = devices.jit(model.head, out_shardings=devices.head)

    def of_teacher(
        self, part: MiniBatch, tokens: list[SdpoTokenInputs], constants: SdpoSharedInputs
    ) -> Scores:
        """What the teacher, or the trust region around it, says of a part's tokens."""
        rest = ScoreSharedInputs(constants.temperature, constants.live_head, constants.coefficient)
        found = [
            self._score(
                known.teacher_hidden,
                constants.teacher_head,
                ScoreTokenInputs(known.targets, known.live_hidden),
                rest,
                jnp.int32(micro_batch.filled),
            )
            for known, micro_batch in zip(tokens, part.micro_batches, strict=True)
        ]
        fetched = self._devices.fetch(found)
        return Scores(*(_of_rows(part, [x[k] for x in fetched]) for k in ("log_prob", "entropy")))

    def anchored(self, updates: list[Update], reference: Params) -> list[Update]:
        """Updates that know the reference's log-probabilities of their tokens, without a context.

        One forward pass of the reference over the student's own sequences.
        """
        head = self._head(reference) if updates else None
        constants = ScoreSharedInputs(self._temperature)

        def anchor(update: Update) -> Update:
            micro_batches: list[Any] = []
            for one in update.batch.micro_batches:
                hidden, targets = self._forward(reference, one.sequences), sampled(one.tokens)
                scores = self._score(hidden, head, ScoreTokenInputs(targets), constants, one.chunks)
                tokens = ReferenceKlTokenInputs(one.tokens, targets, scores["log_prob"])
                micro_batches.append(one._replace(tokens=tokens))
            batch = update.batch._replace(micro_batches=micro_batches)
            constants_of = ReferenceKlSharedInputs(update.constants, self._temperature)
            return update._replace(batch=batch, constants=constants_of)

        return [anchor(update) for update in updates]


def _score(
    hidden: jax.Array,
    head: jax.Array,
    tokens: ScoreTokenInputs,
    constants: ScoreSharedInputs,
    chunks: jax.Array,
) -> dict[str, jax.Array]:
    """`log_prob` and `entropy`, `[D, n, c]` each, a chunk of the head at a time."""
    shape = tokens.targets.shape
    flat = partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[3:]))
    weights = jnp.zeros(tokens.targets.size, jnp.float32)
    _, metrics = head_on_shards(
        partial(fused_linear_loss, score_per_token(), chunk=shape[2], block=shape[2]),
        (flat(hidden), flat(tokens), weights),
        head,
        (constants, chunks),
    )
    return {name: metrics[name].reshape(shape) for name in ("log_prob", "entropy")}


def _of_rows(part: MiniBatch, values: list[Any]) -> list[NDArray[np.float32]]:
    """`[D, n, c]` of each micro-batch to the ragged values of each row; undoes `make_tokens`."""
    rows: dict[int, NDArray[np.float32]] = {}
    for micro_batch, array in zip(part.micro_batches, values, strict=True):
        rows |= _of_micro_batch(part, micro_batch, np.asarray(array, np.float32))
    return [rows[i] for i in range(len(part.rows))]


def _of_micro_batch(
    part: MiniBatch, micro_batch: MicroBatchPlan, array: NDArray[np.float32]
) -> dict[int, NDArray[np.float32]]:
    found: dict[int, NDArray[np.float32]] = {}
    for line, members in zip(array.reshape(len(array), -1), micro_batch.members, strict=True):
        start = 0
        for member in members:
            end = start + len(part.pairs[member].response)
            found[member] = line[start:end]
            start = end
    return found
