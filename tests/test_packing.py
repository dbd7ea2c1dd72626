"""Pairs of prompt and response in fixed shapes: padded, in bins, end to end, and in rows."""

import random
from typing import Any

import numpy as np
import pytest

from sdpo_jax.data.packing import (
    TOKEN_STEP,
    PackedBatch,
    Pair,
    assign_rows,
    assign_shared_prompts,
    bucket,
    pack_rows,
    pack_shared_prompts,
    pad_rows,
    shared_prompts,
    size_bucket,
)
from sdpo_jax.model import BLOCK_TOKENS


def take(batches, count: int) -> list[list]:
    return [next(batches) for _ in range(count)]


def pack_form(form: str, bins: list[list[Pair]], *, width: int) -> PackedBatch:
    if form == "end to end":
        return pack_bins(pack_shared_prompts, bins)
    return pack_bins(pack_rows, bins, width=width)


def pack_bins(pack, bins: list[list[Pair]], **options) -> PackedBatch:
    """The pairs of each bin in a shard of its own."""
    pairs, members = flatten(bins), []
    for chosen in bins:
        start = sum(map(len, members))
        members.append(list(range(start, start + len(chosen))))
    return pack(pairs, members, **options)


def flatten(batches: list[list]) -> list:
    return [item for batch in batches for item in batch]


def test_bucket_is_the_smallest_positive_multiple_that_holds():
    assert [bucket(n, 4) for n in (0, 1, 4, 5, 8)] == [4, 4, 4, 8, 8]
    with pytest.raises(ValueError, match="multiple >= 1"):
        bucket(3, 0)


@pytest.mark.parametrize("rows", [[], [[]], [[5], [], [0, 0, 7]], [[1] * 9] * 4])
def test_padded_rows_hold_each_row_and_nothing_else(rows: list[list[int]]):
    tokens, lengths = pad_rows(rows, multiple=4, rows_multiple=3)
    assert tokens.dtype == lengths.dtype == np.int32
    assert tokens.shape[0] == len(lengths) == bucket(len(rows), 3)
    assert tokens.shape[1] == bucket(max(map(len, rows), default=0), 4)
    assert [list(tokens[i, : lengths[i]]) for i in range(len(rows))] == rows
    assert tokens.sum() == sum(map(sum, rows))
    assert lengths.sum() == sum(map(len, rows))


@pytest.mark.parametrize("step", [64, TOKEN_STEP])
def test_few_sizes_hold_any_number_and_add_at_most_an_eighth(step: int):
    sizes = [size_bucket(n, step) for n in range(65_537)]
    assert all(size >= max(1, n) for n, size in enumerate(sizes))
    assert all(8 * size <= 9 * n for n, size in enumerate(sizes) if n > 8 * step)
    assert all(size - n < step for n, size in enumerate(sizes) if 0 < n <= 8 * step)
    assert sizes == sorted(sizes)
    # Eight steps, and eight sizes more for each doubling: no more programs are compiled.
    doublings = {64: 7, 512: 4}[step]
    assert 8 * step * 2**doublings == 65_536 and len(set(sizes)) == 8 + 8 * doublings
    assert all(size % step == 0 and size_bucket(size, step) == size for size in set(sizes))


def draw_pairs(groups: int, siblings: int, seed: int = 0) -> list[Pair]:
    """Siblings that do not stand side by side, every token another one."""
    draw, ids = random.Random(seed), iter(range(1, 100_000))
    prompts = [[next(ids) for _ in range(draw.randint(1, 9))] for _ in range(groups)]
    return [
        Pair(prompt, [next(ids) for _ in range(draw.randint(1, 7))])
        for _ in range(siblings)
        for prompt in prompts
    ]


def load(pairs: list[Pair], members: list[int]) -> int:
    """Tokens of a bin, a shared prompt once."""
    chosen = [pairs[i] for i in members]
    prompts = {tuple(prompt) for prompt, _ in chosen}
    return sum(map(len, prompts)) + sum(len(response) for _, response in chosen)


@pytest.mark.parametrize("bins", [1, 2, 3, 8, 50])
def test_each_pair_goes_to_one_bin_and_siblings_stay_together_where_they_fit(bins: int):
    pairs = draw_pairs(groups=9, siblings=4)
    members = assign_shared_prompts(pairs, bins)
    assert len(members) == bins and sorted(flatten(members)) == list(range(36))
    assert all(m == sorted(m) for m in members)
    assert (
        assign_shared_prompts(pairs, bins) == members
    )  # a function of its arguments: all hosts agree
    share = load(pairs, list(range(36))) / bins
    for group in shared_prompts(pairs):
        homes = [m for m in members if set(m) & set(group)]
        if load(pairs, group) <= share:
            assert len(homes) == 1
    if bins == 50:
        assert max(map(len, members)) == 1


def test_pairs_of_one_prompt_are_one_group_in_the_order_of_occurrence():
    pairs = [Pair([1], [2]), Pair([3], [4]), Pair([1], [5]), Pair([1, 2], [6]), Pair([3], [2])]
    assert shared_prompts(pairs) == [[0, 2], [1, 4], [3]]


def test_a_group_larger_than_a_bins_share_is_cut_and_its_prompt_repeated():
    pairs = [Pair([1] * 4, [2] * 10)] * 6 + [Pair([3], [4])]
    members = assign_shared_prompts(pairs, 4)
    assert sorted(flatten(members)) == list(range(7))
    assert max(load(pairs, m) for m in members) <= 4 + 2 * 10


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bins", [2, 4, 8])
def test_bins_are_evenly_full(bins: int, seed: int):
    pairs = draw_pairs(groups=40, siblings=8, seed=seed)
    loads = [load(pairs, m) for m in assign_shared_prompts(pairs, bins)]
    largest = max(load(pairs, group) for group in shared_prompts(pairs))
    # None is fuller than the least by more than what was put last; and with many, far less.
    assert max(loads) - min(loads) <= largest
    assert max(loads) <= 1.05 * sum(loads) / bins


def test_whole_rows_go_to_bins_so_that_cutting_adds_none():
    pairs = draw_pairs(groups=30, siblings=2)
    whole = pack_bins(pack_rows, [pairs], width=16).tokens
    for bins in (1, 3, 7):
        members = assign_rows(pairs, bins, width=16)
        assert sorted(flatten(members)) == list(range(60))
        cut = [pack_rows(pairs, [m], width=16).tokens for m in members]
        assert sum(map(len, cut)) <= len(whole)
        assert max(map(len, cut)) - min(map(len, cut)) <= 1
    assert assign_rows(pairs[:2], 3, width=32)[1:] == [[], []]  # one row fills one bin


def test_pairs_end_to_end_by_hand():
    bins = [[Pair([5, 6], [1, 2, 3]), Pair([7], [4]), Pair([5, 6], [8, 9])], [Pair([5, 6], [7, 7])]]
    laid = pack_bins(pack_shared_prompts, bins)
    assert laid.tokens.shape == laid.positions.shape == (2, TOKEN_STEP) and laid.segments is None
    # A prompt once, then what continues it without its last token.
    assert laid.tokens[:, :8].tolist() == [[5, 6, 1, 2, 8, 7, 0, 0], [5, 6, 7, 0, 0, 0, 0, 0]]
    assert laid.positions[:, :8].tolist() == [[0, 1, 2, 3, 2, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert not laid.tokens[:, 8:].any() and not laid.positions[:, 8:].any()
    assert laid.table is not None and laid.blocks is not None
    assert laid.blocks.tolist() == [4, 2]
    # First query, how many, prompt and its length, first own token.
    assert laid.table[0, :4].tolist() == [
        [0, 2, 0, 0, 0],
        [2, 2, 0, 2, 2],
        [4, 1, 0, 2, 4],
        [5, 1, 0, 0, 5],
    ]
    assert laid.table[1, :2].tolist() == [[0, 2, 0, 0, 0], [2, 1, 0, 2, 2]]
    assert not laid.table[0, 4:].any() and not laid.table[1, 2:].any()
    # Pair after pair: the prompt's last token predicts the first of each response.
    assert [take.tolist() for take in laid.target_positions] == [[1, 2, 3, 5, 1, 4], [1, 2]]
    arrays: list[Any] = [*laid[1:3], *laid[4:6], *laid.target_positions]
    assert {x.dtype for x in arrays} == {np.dtype(np.int32)}


def test_long_sequences_are_cut_into_blocks_that_cover_each_token_once():
    pairs = [Pair([1] * prompt, [2] * response) for prompt, response in SIZES]
    laid = pack_bins(pack_shared_prompts, [pairs, pairs[:1]])
    assert laid.table is not None and laid.blocks is not None
    for table, count in zip(laid.table, laid.blocks, strict=True):
        first, size, shared, shared_size, own = table[:count].T
        assert ((size > 0) & (size <= BLOCK_TOKENS)).all()
        assert (first[1:] == (first + size)[:-1]).all() and first[0] == 0
        assert ((first - own) % BLOCK_TOKENS == 0).all()
        assert (shared + shared_size <= own).all()
        # A continuation sees a whole prompt: it lies in blocks of its own before.
        assert set(shared_size) <= {0, *(prompt for prompt, _ in SIZES)}
    total = laid.table[0, :, 1].sum()
    assert total == 200 + 1 + 64 + sum(response - 1 for _, response in SIZES)


# Prompts of three lengths; responses that fill blocks exactly, or are one token.
SIZES = [(200, 64), (200, 65), (200, 1), (1, 130), (1, 2), (64, 129)]


def seen_from(laid: PackedBatch, number: int, place: int) -> list[int]:
    """The tokens that a place of a bin attends to, itself last, as table or segments say."""
    tokens = laid.tokens.reshape(len(laid.target_positions), -1)[number]
    if laid.segments is not None:
        segments = laid.segments.reshape(len(laid.target_positions), -1)[number]
        start = place - place % laid.tokens.shape[1]
        row = slice(start, place + 1)
        return tokens[row][segments[row] == segments[place]].tolist()
    assert laid.table is not None and laid.blocks is not None
    table = laid.table[number, : laid.blocks[number]]
    ((_, _, shared, size, own),) = (x for x in table if x[0] <= place < x[0] + x[1])
    return [*tokens[shared : shared + size].tolist(), *tokens[own : place + 1].tolist()]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", ["end to end", "rows"])
def test_each_response_token_is_predicted_from_its_prompt_and_the_response_before_it(
    form: str, seed: int
):
    pairs = [*draw_pairs(groups=5, siblings=4, seed=seed), Pair([1] * 200, [2, 3] * 70)]
    bins = [[pairs[i] for i in members] for members in assign_shared_prompts(pairs, 3)]
    laid = (
        pack_bins(pack_shared_prompts, bins)
        if form == "end to end"
        else pack_bins(pack_rows, bins, width=340)
    )
    positions = laid.positions.reshape(len(bins), -1)
    for number, (chosen, take) in enumerate(zip(bins, laid.target_positions, strict=True)):
        known = [[*p, *r[:i]] for p, r in chosen for i in range(len(r))]
        assert [seen_from(laid, number, place) for place in take] == known
        assert positions[number][take].tolist() == [len(tokens) - 1 for tokens in known]


def test_a_shared_prompt_stands_once_and_every_other_token_too():
    pairs = draw_pairs(groups=6, siblings=5)
    laid = pack_bins(pack_shared_prompts, [pairs])
    assert laid.blocks is not None and laid.table is not None
    stands = laid.tokens[0, : laid.table[0, : laid.blocks[0], 1].sum()].tolist()
    prompts = {token for prompt, _ in pairs for token in prompt}
    assert sorted(stands) == sorted(prompts | {t for _, r in pairs for t in r[:-1]})
    assert not laid.tokens[0, len(stands) :].any()


@pytest.mark.parametrize("form", ["end to end", "rows"])
def test_bins_and_responses_may_be_empty(form: str):
    bins = [[Pair([7, 8, 9], []), Pair([7, 8, 9], [1, 2])], []]
    laid = (
        pack_bins(pack_shared_prompts, bins)
        if form == "end to end"
        else pack_bins(pack_rows, bins, width=5)
    )
    # In rows the longer pair stands first.
    assert laid.target_positions[0].tolist() == [2, 3] and laid.target_positions[1].tolist() == []
    assert laid.tokens.shape[0] % 2 == 0
    if laid.blocks is not None:
        assert laid.blocks.tolist() == [2, 0]


def test_packed_rows_hold_every_token_exactly_once():
    draw = random.Random(0)
    sizes = [(draw.randint(1, 9), draw.randint(0, 7)) for _ in range(60)]
    ids = iter(range(1, 10_000))
    pairs = [Pair([next(ids) for _ in range(p)], [next(ids) for _ in range(r)]) for p, r in sizes]
    packed = pack_bins(pack_rows, [pairs], width=16)
    assert packed.segments is not None and packed.table is None and packed.blocks is None
    assert packed.tokens.shape[1] == 16
    every = [token for prompt, response in pairs for token in (*prompt, *response)]
    assert sorted(packed.tokens[packed.segments > 0]) == every
    assert not packed.tokens[packed.segments == 0].any()
    seen = []
    for row, segments, positions in zip(
        packed.tokens, packed.segments, packed.positions, strict=True
    ):
        assert set(segments) - {0} == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            seen.append(list(row[segments == segment]))
            assert list(positions[segments == segment]) == list(range(len(seen[-1])))
    assert sorted(seen) == [[*prompt, *response] for prompt, response in pairs]
    assert packed.tokens.shape[0] < 60 / 1.5  # far fewer rows than pairs


def test_packed_rows_by_hand():
    bins = [[Pair([1, 2], [3]), Pair([4], [5, 6]), Pair([7, 8, 9], [])], [Pair([9], [9])]]
    packed = pack_bins(pack_rows, bins, width=5)
    assert packed.segments is not None
    # Longest first, each into the first row with room; as many rows in each bin.
    assert packed.tokens.tolist() == [
        [1, 2, 3, 0, 0],
        [4, 5, 6, 0, 0],
        [7, 8, 9, 0, 0],
        [9, 9, 0, 0, 0],
        [0] * 5,
        [0] * 5,
    ]
    assert packed.segments.sum(axis=1).tolist() == [3, 3, 3, 2, 0, 0]
    assert [take.tolist() for take in packed.target_positions] == [[1, 5, 6], [0]]
    wide = pack_bins(pack_rows, bins[:1], width=6)
    assert wide.segments is not None
    assert wide.tokens.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]]
    assert wide.segments.tolist() == [[1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert wide.positions.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 0, 0]]
    # Predicted inside its own segment: the token before it.
    assert wide.target_positions[0].tolist() == [1, 3, 4]


def test_pairs_that_fit_no_row_are_refused():
    with pytest.raises(ValueError, match="expected sequences of at most 3 tokens, got 4"):
        pack_bins(pack_rows, [[Pair([1], [2]), Pair([1, 2], [3, 4])]], width=3)
