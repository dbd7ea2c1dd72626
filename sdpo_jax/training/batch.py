"""From ragged rollouts to the fixed shapes of the compiled update. Host-side numpy.

    split_mini_batches    the rows of each optimiser update, their weights, and how they are packed
    repack                other prompts (the teacher's) before the same responses, in the same order
    make_sequences        a packed micro-batch as device arrays
    place_tokens          ragged values of the response tokens as a device array [D, n, c]

A pair is a prompt followed by a response. Student and teacher pack the pairs of a micro-batch each
in their own rows and read the predictions in the same order, so that both meet at `[d, n, c]`.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.data.packing import (
    PACKED_ROWS,
    SHARED_PROMPTS,
    PackedBatch,
    Packing,
    Pair,
    size_bucket,
    token_count,
)
from sdpo_jax.devices import Devices
from sdpo_jax.losses.reductions import sequence_mean_weights, token_mean_weights
from sdpo_jax.losses.weights import skip_first_tokens
from sdpo_jax.model import Blocks
from sdpo_jax.rollouts.rollout_batch import RolloutBatch
from sdpo_jax.training.step import Sequences

Reduction = Literal["token_mean", "sequence_mean"]


class BatchLayout(NamedTuple):
    """How pairs become rows of tokens."""

    share_prompts: bool
    """Pack end to end, a prompt once for all its siblings; else in rows, apart by segment ids."""
    micro_batch_tokens: int
    """Tokens of the student's pass on each shard of the rows."""
    head_chunk_tokens: int
    """Tokens on each shard whose logits exist at a time."""
    shards: int

    @property
    def packing(self) -> Packing:
        """The functions that pack."""
        return SHARED_PROMPTS if self.share_prompts else PACKED_ROWS


class MiniBatch(NamedTuple):
    """The rows of one optimiser update that are worth computing, packed, with their weights."""

    rows: list[int]  # indices in the rollout batch
    pairs: list[Pair]  # prompts and responses of the student
    micro_batches: list[PackedBatch]
    weights: list[NDArray[np.float32]]  # [|y|] for each row
    denominator: float  # of the reduction
    graded_rows: NDArray[np.intp]  # of the rollout batch: all rows that the denominator knows

    @property
    def token_count(self) -> int:
        """Tokens of prompts and responses, without padding."""
        return token_count(self.pairs)


def split_mini_batches(
    rollouts: RolloutBatch,
    mini_batches: int,
    layout: BatchLayout,
    *,
    active: NDArray[np.bool_],
    worth: NDArray[np.bool_],
    reduction: Reduction,
    skip: int = 0,
) -> list[MiniBatch]:
    """Splits a rollout batch by prompts into optimiser updates; an empty one makes no update.

    Args:
      rollouts: `N` rows; those that could not be graded are absent: no denominator knows them.
      mini_batches: optimiser updates.
      layout: how rows are packed.
      active: [N], rows that count in the reduction.
      worth: [N], rows to compute. A row that is active but not worth computing has no gradient.
      reduction: see `reduction_weights`.
      skip: first tokens of each response that are left out.
    """
    total, found, graded = len(rollouts.texts), list[MiniBatch](), rollouts.graded
    size = total // mini_batches
    for start in range(0, total, size):
        block = start + np.flatnonzero(graded[start : start + size])
        kept = np.flatnonzero(worth[block] & active[block])
        if len(kept) == 0:
            continue
        lengths, mask = rollouts.lengths[block], response_mask(rollouts, block)
        weights, denominator = reduction_weights(
            lengths, active[block], int(lengths.max()), reduction, mask, skip
        )
        rows = block[kept].tolist()
        pairs = [Pair(rollouts.prompt_ids[i], rollouts.response_ids[i]) for i in rows]
        ragged = [weights[i, : lengths[i]] for i in kept]
        packed = split_micro_batches(pairs, layout)
        found.append(MiniBatch(rows, pairs, packed, ragged, denominator, block))
    return found


def response_mask(rollouts: RolloutBatch, rows: NDArray[np.intp]) -> list[NDArray[np.bool_]] | None:
    """Which response tokens of these rows the model wrote; None: all of them."""
    return None if rollouts.response_mask is None else [rollouts.response_mask[i] for i in rows]


def reduction_weights(
    lengths: NDArray[np.int32],
    active: NDArray[np.bool_],
    max_tokens: int,
    reduction: Reduction,
    response_mask: Sequence[NDArray[np.bool_]] | None = None,
    skip: int = 0,
) -> tuple[NDArray[np.float32], float]:
    """Weight of each token `[N, T]` and the denominator, over all rows of an update.

    Inactive rows (no teacher signal) have weight 0; `sequence_mean` still counts them in the
    denominator. `response_mask` marks the tokens of each row that the model wrote; no other token
    counts, nor do the first `skip` that it wrote (SDFT, arXiv 2601.19897).
    """
    mask = (np.arange(max_tokens)[None] < lengths[:, None]) & active[:, None]
    if response_mask is not None:
        for line, written in zip(mask, response_mask, strict=True):
            line[: len(written)] &= written
    reduce = token_mean_weights if reduction == "token_mean" else sequence_mean_weights
    weights, denominator = reduce(skip_first_tokens(mask, skip))
    return np.asarray(weights), float(denominator)


def split_micro_batches(pairs: Sequence[Pair], layout: BatchLayout) -> list[PackedBatch]:
    """Packs an update's pairs into as few micro-batches as the token limit allows.

    Raises:
      ValueError: a prompt is empty: nothing would predict the first token of its response.
    """
    for number, pair in enumerate(pairs):
        if not pair.prompt:
            raise ValueError(f"pair {number} has an empty prompt, expected at least one token")
    room, packing, shards = (
        layout.micro_batch_tokens * layout.shards,
        layout.packing,
        layout.shards,
    )
    # No packing needs fewer micro-batches than this lower bound.
    count = max(1, min(len(pairs), -(-packing.fewest_tokens(pairs) // room)))
    while True:
        bins = packing.assign_bins(pairs, count * shards)
        cuts = [bins[i : i + shards] for i in range(0, len(bins), shards)]
        packed = [packing.pack(pairs, members) for members in cuts]
        # A single sequence longer than the limit does not get shorter by further cuts.
        if count >= len(pairs) or max(x.tokens.size for x in packed) <= room:
            return [_with_chunks(x, layout) for x in packed if any(x.members)]
        count += 1


def _with_chunks(packed: PackedBatch, layout: BatchLayout) -> PackedBatch:
    """Chooses the head's chunks: room for every response token, from the packed shape alone."""
    most = max(len(targets) for targets in packed.target_positions)
    size = packed.tokens.size // layout.shards
    room = size if most <= size else size_bucket(most)
    chunk = min(room, layout.head_chunk_tokens)
    return packed._replace(chunks=-(-room // chunk), chunk_tokens=chunk, filled=-(-most // chunk))


def repack(pairs: Sequence[Pair], packed: PackedBatch, layout: BatchLayout) -> PackedBatch:
    """Packs other prompts before the same responses: same members, same places `[d, n, c]`."""
    chunks = {"chunks": packed.chunks, "chunk_tokens": packed.chunk_tokens, "filled": packed.filled}
    return layout.packing.pack(pairs, packed.members)._replace(**chunks)


def make_sequences(packed: PackedBatch, devices: Devices) -> Sequences:
    """Tokens, attention and target positions of one micro-batch, on the devices."""
    put = devices.put_rows
    if packed.table is None:
        attention = put(packed.segments)
    else:
        attention = Blocks(put(packed.table), put(packed.blocks))
    targets = put(_fill(packed, packed.target_positions, np.int32))
    return Sequences(put(packed.tokens), put(packed.positions), attention, targets)


def place_tokens(per_pair: Sequence[Any], packed: PackedBatch, dtype: Any, devices: Devices) -> Any:
    """Ragged per-token values of all pairs to a device array `[D, n, c]`, zero beyond the data."""
    shards = [
        np.concatenate([np.asarray(per_pair[i], dtype) for i in members] or [np.zeros(0, dtype)])
        for members in packed.members
    ]
    return devices.put_rows(_fill(packed, shards, dtype))


def rows_of_tokens(mini_batch: MiniBatch, arrays: Sequence[Any]) -> list[NDArray[np.float32]]:
    """Values `[D, n, c]` of micro-batches as values `[|y|]` of each row; undoes `place_tokens`."""
    found: dict[int, NDArray[np.float32]] = {}
    for packed, array in zip(mini_batch.micro_batches, arrays, strict=True):
        values = np.asarray(array, np.float32)
        for line, members in zip(values.reshape(len(values), -1), packed.members, strict=True):
            ends = np.cumsum([len(mini_batch.pairs[i].response) for i in members], dtype=np.int64)
            # What follows the last response is padding.
            found |= zip(members, np.split(line, ends)[:-1], strict=True)
    return [found[i] for i in range(len(mini_batch.rows))]


def rollout_numbers(pairs: Sequence[Pair], packed: PackedBatch) -> list[NDArray[np.int32]]:
    """For each token the number of its rollout in its shard, from 1 on.

    The number is 0 for pairs of other micro-batches.
    """
    number = {i: n for shard in packed.members for n, i in enumerate(shard, 1)}
    return [np.full(len(p.response), number.get(i, 0), np.int32) for i, p in enumerate(pairs)]


def _fill(packed: PackedBatch, shards: Sequence[Any], dtype: Any) -> Any:
    out = np.zeros((len(shards), packed.chunks * packed.chunk_tokens), dtype)
    for line, values in zip(out, shards, strict=True):
        line[: len(values)] = values
    return out.reshape(len(shards), packed.chunks, packed.chunk_tokens)
