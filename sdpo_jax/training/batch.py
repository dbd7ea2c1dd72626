"""From ragged rollouts to the fixed shapes of the compiled step. Host-side numpy.

A pair is a prompt followed by a response. The teacher's pairs are the same responses after other
prompts; both passes lay the pairs of a bin out in their own way and read the predictions in the
same order, so that student and teacher meet at `[d, n, c]`.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.data.packing import (
    PackedBatch,
    Pair,
    lay_end_to_end,
    lay_in_rows,
    shared_prompts,
    size_bucket,
    spread,
    spread_rows,
)
from sdpo_jax.devices import Devices
from sdpo_jax.losses.reductions import sequence_mean_weights, token_mean_weights
from sdpo_jax.losses.weights import skip_first_tokens
from sdpo_jax.model import Blocks
from sdpo_jax.training.step import Sequences

Reduction = Literal["token_mean", "sequence_mean"]


class BatchLayout(NamedTuple):
    """How pairs become rows of tokens."""

    share_prompts: bool
    """End to end, a prompt once for all its siblings; else in packed rows, apart by segment."""
    micro_batch_tokens: int
    """Of the student's pass, for each shard of the rows."""
    head_chunk_tokens: int
    """For each shard of the rows, too."""
    shards: int


class MicroBatchPlan(NamedTuple):
    """Which pairs run together, and where the tokens of their responses stand."""

    members: list[list[int]]  # for each shard, indices of its pairs
    chunks: int  # `n`
    chunk_tokens: int  # `c`, of each shard
    filled: int  # chunks that hold tokens


def reduction_weights(
    lengths: NDArray[np.int32],
    active: NDArray[np.bool_],
    max_tokens: int,
    reduction: Reduction,
    own: Sequence[NDArray[np.bool_]] | None = None,
    skip: int = 0,
) -> tuple[NDArray[np.float32], float]:
    """Weight of each token `[N, T]` and the denominator, over all rows of an update.

    Inactive rows (no teacher signal) have weight 0; `sequence_mean` still counts them in the
    denominator. `own` says which tokens of each row the model wrote; no other token counts, nor do
    the first `skip` of each row's own (SDFT, arXiv 2601.19897).
    """
    mask = (np.arange(max_tokens)[None] < lengths[:, None]) & active[:, None]
    if own is not None:
        for line, written in zip(mask, own, strict=True):
            line[: len(written)] &= written
    reduce = token_mean_weights if reduction == "token_mean" else sequence_mean_weights
    weights, denominator = reduce(skip_first_tokens(mask, skip))
    return np.asarray(weights), float(denominator)


def plan(pairs: Sequence[Pair], form: BatchLayout) -> list[MicroBatchPlan]:
    """Cuts an update's pairs, in the student's form, into micro-batches of shards.

    Raises:
      ValueError: a prompt is empty: nothing would predict the first token of its response.
    """
    for number, pair in enumerate(pairs):
        if not pair.prompt:
            raise ValueError(f"pair {number} has an empty prompt, expected at least one token")
    room = form.micro_batch_tokens * form.shards
    # Fewer would not do.
    count = max(1, min(len(pairs), -(-_tokens(pairs, form) // room)))
    while True:
        bins = _spread(pairs, count * form.shards, form)
        cuts = [bins[i : i + form.shards] for i in range(0, len(bins), form.shards)]
        laid = [_lay(pairs, members, form) for members in cuts]
        # One sequence longer than the limit is no reason to go on cutting.
        if count >= len(pairs) or max(x.tokens.size for x in laid) <= room:
            return [
                _in_chunks(x, members, form)
                for x, members in zip(laid, cuts, strict=True)
                if any(members)
            ]
        count += 1


def _tokens(pairs: Sequence[Pair], form: BatchLayout) -> int:
    """At least this many are computed, padding aside."""
    if form.share_prompts:
        prompts = sum(len(pairs[group[0]].prompt) for group in shared_prompts(pairs))
        return prompts + sum(max(0, len(response) - 1) for _, response in pairs)
    return sum(len(prompt) + len(response) for prompt, response in pairs)


def _width(pairs: Sequence[Pair]) -> int:
    return size_bucket(max((len(p) + len(r) for p, r in pairs), default=1))


def _spread(pairs: Sequence[Pair], bins: int, form: BatchLayout) -> list[list[int]]:
    if form.share_prompts:
        return spread(pairs, bins=bins)
    return spread_rows(pairs, width=_width(pairs), bins=bins)


def _lay(pairs: Sequence[Pair], members: Sequence[Sequence[int]], form: BatchLayout) -> PackedBatch:
    bins = [[pairs[i] for i in shard] for shard in members]
    if form.share_prompts:
        return lay_end_to_end(bins)
    return lay_in_rows(bins, width=_width(pairs))


def _in_chunks(laid: PackedBatch, members: list[list[int]], form: BatchLayout) -> MicroBatchPlan:
    """Room for every response token, in chunks that follow from the shape alone."""
    most = max(len(take) for take in laid.take)
    size = laid.tokens.size // form.shards
    room = size if most <= size else size_bucket(most)
    chunk = min(room, form.head_chunk_tokens)
    return MicroBatchPlan(members, -(-room // chunk), chunk, -(-most // chunk))


def make_sequences(
    pairs: Sequence[Pair], micro_batch: MicroBatchPlan, form: BatchLayout, devices: Devices
) -> Sequences:
    """Tokens, attention and places of prediction of one micro-batch, on the devices."""
    laid = _lay(pairs, micro_batch.members, form)
    if laid.table is None:
        attention = devices.put_rows(laid.segments)
    else:
        attention = Blocks(devices.put_rows(laid.table), devices.put_rows(laid.blocks))
    take = _fill(micro_batch, laid.take, np.int32)
    put = devices.put_rows
    return Sequences(put(laid.tokens), put(laid.positions), attention, put(take))


def make_tokens(
    per_pair: Sequence[Any], micro_batch: MicroBatchPlan, dtype: Any, devices: Devices
) -> Any:
    """Ragged per-token values of all pairs to `[D, n, c]`, zero beyond the data."""
    shards = [
        np.concatenate([np.asarray(per_pair[i], dtype) for i in members] or [np.zeros(0, dtype)])
        for members in micro_batch.members
    ]
    return devices.put_rows(_fill(micro_batch, shards, dtype))


def rollout_numbers(pairs: Sequence[Pair], micro_batch: MicroBatchPlan) -> list[NDArray[np.int32]]:
    """Of each token the number of its rollout in its shard, from 1 on; 0 in other micro-batches."""
    number = {i: n for shard in micro_batch.members for n, i in enumerate(shard, 1)}
    return [np.full(len(p.response), number.get(i, 0), np.int32) for i, p in enumerate(pairs)]


def _fill(micro_batch: MicroBatchPlan, shards: Sequence[Any], dtype: Any) -> Any:
    out = np.zeros((len(shards), micro_batch.chunks * micro_batch.chunk_tokens), dtype)
    for line, values in zip(out, shards, strict=True):
        line[: len(values)] = values
    return out.reshape(len(shards), micro_batch.chunks, micro_batch.chunk_tokens)
