"""What one optimiser update is made of: the rows worth computing, packed, with their weights."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sdpo_jax.config import Config
from sdpo_jax.devices import Devices
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.training.batch import (
    BatchLayout,
    MicroBatchPlan,
    Pair,
    Reduction,
    make_sequences,
    make_tokens,
    plan,
    reduction_weights,
    rollout_numbers,
)
from sdpo_jax.training.step import Batch, MicroBatch


class Update(NamedTuple):
    """What one optimiser update needs."""

    batch: Batch
    constants: Any
    tokens: int
    """Of prompts and responses, without padding."""


class MiniBatch(NamedTuple):
    """The rows of one mini-batch that are worth computing, with their weights."""

    rows: list[int]
    pairs: list[Pair]  # of the student
    micro_batches: list[MicroBatchPlan]
    weights: list[NDArray[np.float32]]  # of each row's tokens
    denominator: float
    block: NDArray[np.intp] | None = None  # all graded rows of the mini-batch


def split_mini_batches(
    config: Config,
    experience: RolloutBatch,
    active: NDArray[np.bool_],
    worth: NDArray[np.bool_],
    reduction: Reduction,
    form: BatchLayout,
    *,
    skip: int = 0,
) -> list[MiniBatch]:
    """Mini-batches of the rows that are `worth` computing; an empty one makes no update.

    `active` rows count in the reduction; a row that is active but not worth computing has zero
    gradient. Rows that could not be graded are absent: no denominator knows them, nor the first
    `skip` tokens of each response.
    """
    total, parts, graded = len(experience.texts), list[MiniBatch](), experience.graded
    size = total // config.train.mini_batches
    for start in range(0, total, size):
        block = start + np.flatnonzero(graded[start : start + size])
        kept = np.flatnonzero(worth[block] & active[block])
        if len(kept) == 0:
            continue
        lengths = experience.lengths[block]
        own = own_of(experience, block)
        weights, denominator = reduction_weights(
            lengths, active[block], int(lengths.max()), reduction, own, skip
        )
        rows = block[kept].tolist()
        pairs = [Pair(experience.prompt_ids[i], experience.response_ids[i]) for i in rows]
        spread = [weights[i, : lengths[i]] for i in kept]
        parts.append(MiniBatch(rows, pairs, plan(pairs, form), spread, denominator, block))
    return parts


def own_of(experience: RolloutBatch, rows: NDArray[np.intp]) -> list[NDArray[np.bool_]] | None:
    """Which tokens of these rows the model wrote; None: all of them."""
    return None if experience.own is None else [experience.own[i] for i in rows]


def make_update(
    part: MiniBatch,
    tokens: Callable[[MicroBatchPlan], Any],
    constants: Any,
    form: BatchLayout,
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
    return Update(batch, constants, token_count(part.pairs))


def with_outcomes(
    update: Update, part: MiniBatch, verdicts: NDArray[np.int32], devices: Devices
) -> Update:
    """An update whose tokens know how their rollouts ended; `verdicts[N]` as from `diagnostics`."""

    def known(one: MicroBatch, micro_batch: MicroBatchPlan) -> MicroBatch:
        numbers = rollout_numbers(part.pairs, micro_batch)
        signed = [verdicts[i] * x for i, x in zip(part.rows, numbers, strict=True)]
        return one._replace(outcomes=make_tokens(signed, micro_batch, np.int32, devices))

    pairs = zip(update.batch.micro_batches, part.micro_batches, strict=True)
    batch = update.batch._replace(micro_batches=[known(*x) for x in pairs])
    return update._replace(batch=batch)


def in_order(part: MiniBatch, tokens: Sequence[Any]) -> Callable[[MicroBatchPlan], Any]:
    """For `make_update`: tokens that were made before, one for each of the part's micro-batches."""
    ready = dict(zip(map(id, part.micro_batches), tokens, strict=True))
    return lambda micro_batch: ready[id(micro_batch)]


def token_count(pairs: Sequence[Pair]) -> int:
    """Tokens of prompts and responses, without padding."""
    return sum(len(prompt) + len(response) for prompt, response in pairs)
