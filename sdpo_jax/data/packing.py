"""Ragged token rows in fixed shapes. Host-side numpy; every distinct shape is one compilation."""

from collections.abc import Sequence
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
    """Returns the smallest size that holds `n`, of multiples of `step`, `sizes` to a power of two.

    `sizes` is a power of two, too. Beyond `sizes * step`, at most `1 / sizes` is added.

    >>> [size_bucket(n) for n in (0, 65, 4608, 4609)]
    [64, 128, 4608, 5120]
    """
    return bucket(n, max(step, (1 << (max(n, 1) - 1).bit_length()) // (2 * sizes)))


TOKEN_STEP, TOKEN_SIZES = 512, 16
"""Of the tokens laid end to end: few shapes for small batches, where compiling would cost more than
the padding, and little padding for large ones."""


class Pair(NamedTuple):
    """A prompt, and the response whose tokens are to be predicted."""

    prompt: Sequence[int]
    response: Sequence[int]


def shared_prompts(pairs: Sequence[Pair]) -> list[list[int]]:
    """Indices of the pairs of each distinct prompt, in the order of first occurrence."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(tuple(pair.prompt), []).append(index)
    return list(groups.values())


def spread(pairs: Sequence[Pair], *, bins: int) -> list[list[int]]:
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


def spread_rows(pairs: Sequence[Pair], *, width: int, bins: int) -> list[list[int]]:
    """Indices of the pairs of each bin: of the rows that all pairs fill together, each bin some.

    `lay_in_rows` makes the same rows of a bin, however many bins there are.
    """
    places, _ = _first_fit_decreasing([len(p) + len(r) for p, r in pairs], width)
    members = [list[int]() for _ in range(bins)]
    for index, (row, _, _) in enumerate(places):
        members[row % bins].append(index)
    return members


class PackedBatch(NamedTuple):
    """Token rows of one shape with the place of every prediction. All int32.

    `take` holds, pair after pair, the place in the bin (its rows one after the other) whose hidden
    state predicts each response token. A response's last token predicts nothing and may be absent.
    """

    tokens: NDArray[np.int32]  # [B, S]
    positions: NDArray[np.int32]  # [B, S], from 0 in each sequence
    segments: NDArray[np.int32] | None  # [B, S], 1, 2, ... in a row, 0 where nothing stands
    table: NDArray[np.int32] | None  # [B, K, 5], see `sdpo_jax.model.Blocks`
    blocks: NDArray[np.int32] | None  # [B], filled rows of the table
    take: list[NDArray[np.int32]]  # for each bin


def lay_end_to_end(bins: Sequence[Sequence[Pair]]) -> PackedBatch:
    """Lays the pairs of each bin end to end, a shared prompt once; one row to a bin."""
    laid = [_end_to_end(pairs) for pairs in bins]
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
    take = [np.asarray(t, np.int32) for *_, t in laid]
    return PackedBatch(tokens, positions, None, table, counts, take)


def _end_to_end(
    pairs: Sequence[Pair],
) -> tuple[list[int], list[int], NDArray[np.int32], list[int]]:
    """Tokens, positions, table of blocks, and where each response token is predicted."""
    tokens, positions, blocks = list[int](), list[int](), list[tuple[int, ...]]()
    take: list[list[int]] = [[] for _ in pairs]

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
            take[index] = places[: len(response)]
    flat = [place for places in take for place in places]
    return tokens, positions, np.asarray(blocks, np.int32).reshape(-1, 5), flat


def lay_in_rows(bins: Sequence[Sequence[Pair]], *, width: int) -> PackedBatch:
    """Packs the pairs of each bin into rows of `width` tokens, longest first, apart by segment."""
    placed: list[tuple[list[tuple[int, int, int]], int]] = []
    for pairs in bins:
        sizes = [len(prompt) + len(response) for prompt, response in pairs]
        if max(sizes, default=0) > width:
            raise ValueError(f"expected sequences of at most {width} tokens, got {max(sizes)}")
        placed.append(_first_fit_decreasing(sizes, width))
    rows = max(1, *(count for _, count in placed))
    rows = bucket(rows, max(1, 1 << max(0, (rows - 1).bit_length() - 4)))
    shape = (len(placed) * rows, width)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    take: list[NDArray[np.int32]] = []
    for number, (pairs, (places, _)) in enumerate(zip(bins, placed, strict=True)):
        flat: list[int] = []
        for (prompt, response), (row, start, segment) in zip(pairs, places, strict=True):
            size = len(prompt) + len(response)
            here = number * rows + row, slice(start, start + size)
            tokens[here] = [*prompt, *response]
            positions[here], segments[here] = np.arange(size), segment
            first = row * width + start + len(prompt) - 1
            flat += range(first, first + len(response))
        take.append(np.asarray(flat, np.int32))
    return PackedBatch(tokens, positions, segments, None, None, take)


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
