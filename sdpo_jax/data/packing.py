"""Ragged token rows in fixed shapes. Host-side numpy; every distinct shape is one compilation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


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


class PackedRows(NamedTuple):
    """Several (prompt, response) pairs to a row, apart by segment. All int32.

    The hidden state that predicts the response token at flat position `i` stands at `i - 1`.
    """

    tokens: NDArray[np.int32]
    """[B, S], 0 where nothing stands."""
    segments: NDArray[np.int32]
    """[B, S], 1, 2, ... within a row; 0 where nothing stands."""
    positions: NDArray[np.int32]
    """[B, S], from 0 in each segment."""
    response_index: NDArray[np.int32]
    """[M], flat position in [B * S] of each response token, pair after pair."""
    response_owner: NDArray[np.int32]
    """[M], the pair that the token belongs to."""


def pack_rows(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, row_tokens: int, rows_multiple: int
) -> PackedRows:
    """Packs (prompt, response) pairs into rows, longest first, each into the first row with room.

    Args:
        pairs: token ids; no prompt is empty, since its end predicts the first response token.
        row_tokens: S.
        rows_multiple: B is a multiple of this; added rows are empty.
    """
    sizes = [len(prompt) + len(response) for prompt, response in pairs]
    for number, (prompt, _) in enumerate(pairs):
        if not prompt:
            raise ValueError(f"pair {number} has an empty prompt, expected at least one token")
        if sizes[number] > row_tokens:
            text = f"pair {number} has {sizes[number]} tokens, expected at most {row_tokens}"
            raise ValueError(text)
    places, row_count = _first_fit_decreasing(sizes, row_tokens)
    shape = (bucket(row_count, rows_multiple), row_tokens)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    index: list[int] = []
    owner: list[int] = []
    for number, ((prompt, response), (row, start, segment)) in enumerate(
        zip(pairs, places, strict=True)
    ):
        here = slice(start, start + sizes[number])
        tokens[row, here] = [*prompt, *response]
        segments[row, here] = segment
        positions[row, here] = np.arange(sizes[number])
        first = row * row_tokens + start + len(prompt)
        index += range(first, first + len(response))
        owner += [number] * len(response)
    responses = np.asarray(index, np.int32), np.asarray(owner, np.int32)  # [M], [M]
    return PackedRows(tokens, segments, positions, *responses)


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
