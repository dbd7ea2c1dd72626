"""Packs ragged token rows into fixed shapes. Host-side numpy; each distinct shape is a compilation.

There are two packings. `SHARED_PROMPTS` puts sequences end to end, a prompt once for all its
siblings; on a CPU that is the faster form. `PACKED_ROWS` fills rows of one width, sequences apart
by segment ids, which is what the attention kernel of a TPU reads.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdpo_jax.model import BLOCK_TOKENS


def bucket(n: int, multiple: int) -> int:
    """Returns the smallest positive multiple of `multiple` that holds `n`."""
    if n < 0 or multiple < 1:
        raise ValueError(f"bucket({n}, {multiple}): expected n >= 0 and multiple >= 1")
    return max(1, -(-n // multiple)) * multiple


def pad_rows(
    rows: Sequence[Sequence[int]], *, multiple: int, rows_multiple: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Pads rows on the right with 0; only the lengths say what is text.

    Args:
        rows: token ids, ragged.
        multiple: the padded length S is a multiple of this.
        rows_multiple: the number of rows B is a multiple of this; added rows have length 0.

    Returns:
        tokens [B, S] and lengths [B], both int32.
    """
    lengths = np.zeros(bucket(len(rows), rows_multiple), np.int32)  # [B]
    lengths[: len(rows)] = [len(row) for row in rows]
    tokens = np.zeros((len(lengths), bucket(int(lengths.max()), multiple)), np.int32)  # [B, S]
    for line, row in zip(tokens, rows, strict=False):
        line[: len(row)] = row
    return tokens, lengths


def size_bucket(n: int, step: int = 64, *, sizes: int = 8) -> int:
    """Rounds `n` up to one of `sizes` bucket sizes per power of two, all multiples of `step`.

    `sizes` is itself a power of two. Beyond `sizes * step`, at most `1 / sizes` is added.

    >>> [size_bucket(n) for n in (0, 65, 4608, 4609)]
    [64, 128, 4608, 5120]
    """
    return bucket(n, max(step, (1 << (max(n, 1) - 1).bit_length()) // (2 * sizes)))


TOKEN_STEP, TOKEN_SIZES = 512, 16
"""Bucket sizes of sequences packed end to end: few shapes for small batches, where compiling would
cost more than the padding, and little padding for large ones."""


class Pair(NamedTuple):
    """A prompt, and the response whose tokens are to be predicted."""

    prompt: Sequence[int]
    response: Sequence[int]


def token_count(pairs: Sequence[Pair]) -> int:
    """Tokens of prompts and responses, without padding."""
    return sum(len(prompt) + len(response) for prompt, response in pairs)


def shared_prompts(pairs: Sequence[Pair]) -> list[list[int]]:
    """Indices of the pairs of each distinct prompt, in the order of first occurrence."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(tuple(pair.prompt), []).append(index)
    return list(groups.values())


class PackedBatch(NamedTuple):
    """The token rows of one micro-batch, and where each response token is predicted. int32.

    `target_positions` lists, pair after pair, the place in the shard (its rows one after the other)
    whose hidden state predicts each response token. A response's last token predicts nothing and
    may be absent from the rows. Shard `d` has the response tokens of its `members` in `chunks`
    chunks of `chunk_tokens`, of which the first `filled` hold tokens of some shard.
    """

    members: list[list[int]]  # for each shard, indices of its pairs
    tokens: NDArray[np.int32]  # [B, S]
    positions: NDArray[np.int32]  # [B, S], from 0 in each sequence
    segments: NDArray[np.int32] | None  # [B, S], 1, 2, ... in a row, 0 for padding
    table: NDArray[np.int32] | None  # [B, K, 5], see `sdpo_jax.model.Blocks`
    blocks: NDArray[np.int32] | None  # [B], filled rows of the table
    target_positions: list[NDArray[np.int32]]  # for each shard
    chunks: int = 0
    chunk_tokens: int = 0
    filled: int = 0


class Packing(NamedTuple):
    """One way to put pairs into rows of tokens, as pure functions."""

    fewest_tokens: Callable[[Sequence[Pair]], int]
    """`(pairs) -> tokens` that any packing of these pairs computes at least."""
    assign_bins: Callable[[Sequence[Pair], int], list[list[int]]]
    """`(pairs, bins) -> indices of the pairs of each bin`, so that bins are evenly full."""
    pack: Callable[[Sequence[Pair], list[list[int]]], PackedBatch]
    """`(pairs, members) -> PackedBatch`, one shard for each list of members."""


def _fewest_shared_tokens(pairs: Sequence[Pair]) -> int:
    prompts = sum(len(pairs[group[0]].prompt) for group in shared_prompts(pairs))
    return prompts + sum(max(0, len(response) - 1) for _, response in pairs)


def assign_shared_prompts(pairs: Sequence[Pair], bins: int) -> list[list[int]]:
    """Indices of the pairs of each bin, so that bins are evenly full.

    Siblings stay together, to share their prompt, unless they are more than a bin's share.
    """
    if bins == 1:
        return [list(range(len(pairs)))]
    groups = shared_prompts(pairs)
    total = sum(
        len(pairs[group[0]].prompt) + sum(len(pairs[i].response) for i in group) for group in groups
    )
    pieces: list[tuple[int, list[int]]] = []
    for group in groups:
        prompt = len(pairs[group[0]].prompt)
        size, piece = prompt, list[int]()
        for index in group:
            response = len(pairs[index].response)
            if piece and (size + response) * bins > total:
                pieces.append((size, piece))
                size, piece = prompt, []
            size, piece = size + response, [*piece, index]
        pieces.append((size, piece))
    loads, members = [0] * bins, [list[int]() for _ in range(bins)]
    for size, piece in sorted(pieces, key=lambda p: (-p[0], p[1])):
        least = loads.index(min(loads))
        loads[least] += size
        members[least] += piece
    return [sorted(m) for m in members]


def assign_rows(pairs: Sequence[Pair], bins: int, *, width: int | None = None) -> list[list[int]]:
    """Indices of the pairs of each bin: the rows that all pairs fill together, dealt out in turn.

    `pack_rows` makes the same rows of a bin, however many bins there are; `width` as there.
    """
    width = _row_width(pairs) if width is None else width
    places, _ = _first_fit_decreasing([len(p) + len(r) for p, r in pairs], width)
    members = [list[int]() for _ in range(bins)]
    for index, (row, _, _) in enumerate(places):
        members[row % bins].append(index)
    return members


def pack_shared_prompts(pairs: Sequence[Pair], members: list[list[int]]) -> PackedBatch:
    """Packs the pairs of each shard end to end, a shared prompt once; one row for each shard."""
    laid = [_end_to_end([pairs[i] for i in shard]) for shard in members]
    width = size_bucket(max(len(tokens) for tokens, *_ in laid), TOKEN_STEP, sizes=TOKEN_SIZES)
    # Sequences of 16 tokens or more fit into the first size; others ask for a larger one.
    rows = max(width // 16, size_bucket(max(len(table) for _, _, table, _ in laid)))
    shape = (len(laid), width)
    tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    table = np.zeros((len(laid), rows, 5), np.int32)
    for i, (ids, places, blocks, _) in enumerate(laid):
        tokens[i, : len(ids)], positions[i, : len(ids)] = ids, places
        table[i, : len(blocks)] = blocks
    counts = np.asarray([len(blocks) for _, _, blocks, _ in laid], np.int32)
    targets = [np.asarray(t, np.int32) for *_, t in laid]
    return PackedBatch(members, tokens, positions, None, table, counts, targets)


def _end_to_end(pairs: Sequence[Pair]) -> tuple[list[int], list[int], NDArray[np.int32], list[int]]:
    """Tokens, positions, table of blocks, and where each response token is predicted."""
    tokens, positions, blocks = list[int](), list[int](), list[tuple[int, ...]]()
    targets: list[list[int]] = [[] for _ in pairs]

    def add(ids: Sequence[int], first_position: int, shared: int, shared_count: int) -> int:
        own = len(tokens)
        for offset in range(0, len(ids), BLOCK_TOKENS):
            count = min(BLOCK_TOKENS, len(ids) - offset)
            blocks.append((own + offset, count, shared, shared_count, own))
        tokens.extend(ids)
        positions.extend(range(first_position, first_position + len(ids)))
        return own

    for group in shared_prompts(pairs):
        prompt = pairs[group[0]].prompt
        start = add(prompt, 0, 0, 0)
        for index in group:
            response = pairs[index].response
            own = add(response[:-1], len(prompt), start, len(prompt))
            places = [start + len(prompt) - 1, *range(own, own + len(response) - 1)]
            targets[index] = places[: len(response)]
    flat = [place for places in targets for place in places]
    return tokens, positions, np.asarray(blocks, np.int32).reshape(-1, 5), flat


def _row_width(pairs: Sequence[Pair]) -> int:
    return size_bucket(max((len(p) + len(r) for p, r in pairs), default=1))


def pack_rows(
    pairs: Sequence[Pair], members: list[list[int]], *, width: int | None = None
) -> PackedBatch:
    """Packs the pairs of each shard into rows of one width, longest first, apart by segment ids.

    By default the width holds the longest of all pairs, also of those that are in no shard, so that
    every micro-batch of a mini-batch has the same.

    Raises:
      ValueError: a pair is longer than `width`.
    """
    longest = max((len(p) + len(r) for p, r in pairs), default=0)
    width = _row_width(pairs) if width is None else width
    if longest > width:
        raise ValueError(f"expected sequences of at most {width} tokens, got {longest}")
    shards = [[pairs[i] for i in shard] for shard in members]
    placed = [_first_fit_decreasing([len(p) + len(r) for p, r in shard], width) for shard in shards]
    rows = max(1, *(count for _, count in placed))
    rows = bucket(rows, max(1, 1 << max(0, (rows - 1).bit_length() - 4)))
    shape = (len(placed) * rows, width)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    targets: list[NDArray[np.int32]] = []
    for number, (shard, (places, _)) in enumerate(zip(shards, placed, strict=True)):
        flat: list[int] = []
        for (prompt, response), (row, start, segment) in zip(shard, places, strict=True):
            size = len(prompt) + len(response)
            here = number * rows + row, slice(start, start + size)
            tokens[here] = [*prompt, *response]
            positions[here], segments[here] = np.arange(size), segment
            first = row * width + start + len(prompt) - 1
            flat += range(first, first + len(response))
        targets.append(np.asarray(flat, np.int32))
    return PackedBatch(members, tokens, positions, segments, None, None, targets)


def _first_fit_decreasing(sizes: list[int], room: int) -> tuple[list[tuple[int, int, int]], int]:
    """Returns (row, first column, segment) of each item, and the number of rows."""
    used: list[int] = []
    count: list[int] = []
    places = [(0, 0, 0)] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, u in enumerate(used) if u + sizes[item] <= room), len(used))
        if row == len(used):
            used.append(0)
            count.append(0)
        count[row] += 1
        places[item] = (row, used[row], count[row])
        used[row] += sizes[item]
    return places, len(used)


SHARED_PROMPTS = Packing(_fewest_shared_tokens, assign_shared_prompts, pack_shared_prompts)
PACKED_ROWS = Packing(token_count, assign_rows, pack_rows)
