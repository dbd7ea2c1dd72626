"""Pairs in fixed shapes: lengths alone say what is text, and every token meets its target."""

import jax
import numpy as np
import pytest
import tiny

from sdpo_jax.data.packing import TOKEN_STEP, Pair
from sdpo_jax.model import Blocks
from sdpo_jax.training.batch import (
    BatchLayout,
    make_sequences,
    place_tokens,
    reduction_weights,
    repack,
    split_micro_batches,
)

PROMPTS = [[5, 6, 7], [8], [5, 6, 7]]
RESPONSES = [[1, 2], [3, 4, 0], [0]]  # 0 ends a response here, and it is also what padding holds
PAIRS = [Pair(*x) for x in zip(PROMPTS, RESPONSES, strict=True)]
SHARED = BatchLayout(share_prompts=True, micro_batch_tokens=1024, head_chunk_tokens=5, shards=1)
PACKED = SHARED._replace(share_prompts=False)
LAYOUTS = pytest.mark.parametrize("layout", [SHARED, PACKED], ids=["shared", "packed"])


def shape_of(packed):
    """What the lengths alone decide."""
    return packed.members, packed.chunks, packed.chunk_tokens, packed.filled


@pytest.fixture(scope="module")
def devices():
    return tiny.make_devices()


def test_a_micro_batch_by_hand_with_shared_prompts(devices):
    (micro_batch,) = split_micro_batches(PAIRS, SHARED)
    # Room for as many predictions as tokens, in chunks of 5; six of them fill two.
    chunks = -(-TOKEN_STEP // 5)
    assert shape_of(micro_batch) == ([[0, 1, 2]], chunks, 5, 2)
    tokens, positions, attention, take = make_sequences(repack(PAIRS, micro_batch, SHARED), devices)
    assert tokens.shape == positions.shape == (1, TOKEN_STEP) and take.shape == (1, chunks, 5)
    assert tokens[0, :8].tolist() == [5, 6, 7, 1, 8, 3, 4, 0]
    assert positions[0, :8].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert isinstance(attention, Blocks) and attention.filled.tolist() == [4]
    # The last prompt token predicts the first response token; nothing is read at the last one.
    assert take[0, :2].tolist() == [[2, 3, 4, 5, 6], [2, 0, 0, 0, 0]]
    assert not take[0, 2:].any()
    targets = place_tokens(RESPONSES, micro_batch, np.int32, devices)
    assert targets[0, :2].tolist() == [[1, 2, 3, 4, 0], [0, 0, 0, 0, 0]]


def test_a_micro_batch_by_hand_in_packed_rows(devices):
    (micro_batch,) = split_micro_batches(PAIRS, PACKED)
    assert shape_of(micro_batch) == ([[0, 1, 2]], 13, 5, 2)
    tokens, positions, segments, take = make_sequences(repack(PAIRS, micro_batch, PACKED), devices)
    assert isinstance(segments, jax.Array)
    assert tokens.shape == positions.shape == segments.shape == (1, 64)
    assert tokens[0, :14].tolist() == [5, 6, 7, 1, 2, 8, 3, 4, 0, 5, 6, 7, 0, 0]
    assert segments[0, :14].tolist() == [1] * 5 + [2] * 4 + [3] * 4 + [0]
    assert positions[0, :14].tolist() == [*range(5), *range(4), *range(4), 0]
    assert take[0, :2].tolist() == [[2, 3, 5, 6, 7], [11, 0, 0, 0, 0]]


@LAYOUTS
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_each_taken_place_predicts_its_target(layout, shards):
    """For a student's and a teacher's prompts, which lie in their own ways."""
    random, devices = np.random.default_rng(0), tiny.make_devices(data=shards)
    layout = layout._replace(shards=shards, micro_batch_tokens=64)
    responses = [tiny.random_ids(random, n) for n in (1, 7, 16, 20, 3, 11, 30, 2, 9, 40)]
    lengths = [3, 1, 20, 5, 9, 7, 12, 2, 30, 4]
    prompts = [tiny.random_ids(random, n) for n in lengths]
    pairs = [Pair(prompts[i // 2], r) for i, r in enumerate(responses)]
    taught = [Pair(prompts[9 - i // 3] * 4, r) for i, r in enumerate(responses)]
    micro_batches = split_micro_batches(pairs, layout)
    assert len(micro_batches) > 1 or shards == 4
    assert sorted(i for m in micro_batches for s in m.members for i in s) == list(range(10))
    for micro_batch in micro_batches:
        targets = place_tokens(responses, micro_batch, np.int32, devices)
        assert targets.shape == (shards, micro_batch.chunks, micro_batch.chunk_tokens)
        for chosen in (pairs, taught):
            sequences = make_sequences(repack(chosen, micro_batch, layout), devices)
            assert sequences.target_positions.shape == targets.shape
            tokens, positions, take, target = (
                np.asarray(x).reshape(shards, -1)
                for x in (
                    sequences.tokens,
                    sequences.positions,
                    sequences.target_positions,
                    targets,
                )
            )
            for shard, members in enumerate(micro_batch.members):
                flat = [(chosen[i], t) for i in members for t in range(len(chosen[i].response))]
                count = len(flat)
                assert count <= micro_batch.filled * micro_batch.chunk_tokens
                assert target[shard, :count].tolist() == [p.response[t] for p, t in flat]
                assert not target[shard, count:].any() and not take[shard, count:].any()
                here = take[shard, :count]
                before = [[*p.prompt, *p.response][len(p.prompt) + t - 1] for p, t in flat]
                assert tokens[shard, here].tolist() == before
                places = [len(p.prompt) + t - 1 for p, t in flat]
                assert positions[shard, here].tolist() == places


@LAYOUTS
def test_a_stop_id_equal_to_the_padding_id_changes_nothing(layout, devices):
    renamed = [p._replace(response=[i or 60 for i in p.response]) for p in PAIRS]
    ((micro_batch,), other) = (split_micro_batches(pairs, layout) for pairs in (PAIRS, renamed))
    assert [shape_of(x) for x in other] == [shape_of(micro_batch)]
    a, b = (
        make_sequences(repack(pairs, micro_batch, layout), devices) for pairs in (PAIRS, renamed)
    )
    for x, y in zip(jax.tree.leaves(a[1:]), jax.tree.leaves(b[1:]), strict=True):
        np.testing.assert_array_equal(x, y)
    restored = np.where(np.asarray(b.tokens) == 60, 0, b.tokens)
    np.testing.assert_array_equal(restored, a.tokens)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="pair 1 has an empty prompt"):
        split_micro_batches([Pair([1], [2]), Pair([], [2])], SHARED)


@LAYOUTS
def test_no_pairs_make_no_micro_batch(layout):
    assert split_micro_batches([], layout._replace(shards=4)) == []


# Lengths as rollouts have them: most are short, some reach the limit.


def long_tail(longest, count=512, siblings=8, prompt=64):
    random = np.random.default_rng(0)
    # Of deviation one, the mean of exp is exp(1 / 2).
    drawn = np.exp(random.normal(np.log(longest / 8) - 0.5, 1.0, size=count))
    lengths = np.clip(drawn, 1, longest).astype(int)
    assert abs(lengths.mean() / (longest / 8) - 1) < 0.1 and lengths.max() > longest / 2
    return [Pair([i // siblings] * prompt, [1] * int(n)) for i, n in enumerate(lengths)]


def sizes_of(pairs, layout, devices):
    """Places that each micro-batch computes, and how many of them hold a token."""
    for micro_batch in split_micro_batches(pairs, layout):
        sequences = make_sequences(repack(pairs, micro_batch, layout), devices)
        if isinstance(sequences.attention, Blocks):
            table, filled = (np.asarray(x) for x in sequences.attention)
            real = sum(rows[:n, 1].sum() for rows, n in zip(table, filled, strict=True))
        else:
            real = (np.asarray(sequences.attention) > 0).sum()
        yield sequences.tokens.size, int(real), micro_batch


@LAYOUTS
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("longest", [1024, 4096])
def test_of_what_is_computed_at_most_an_eighth_and_a_bit_is_padding(layout, shards, longest):
    pairs, devices = long_tail(longest), tiny.make_devices(data=shards)
    layout = layout._replace(shards=shards, micro_batch_tokens=8192, head_chunk_tokens=1024)
    computed, real, micro_batches = zip(*sizes_of(pairs, layout, devices), strict=True)
    responses = sum(len(r) for _, r in pairs)
    if layout.share_prompts:
        # Siblings that do not fit together repeat their prompt: a percent.
        want = 64 * 64 + responses - 512
        assert want <= sum(real) < 1.02 * want
    else:
        want = 512 * 64 + responses
        assert sum(real) == want
    assert sum(computed) <= 1.15 * want
    assert max(computed) <= 8192 * shards
    # And few shapes: each is a program.
    shapes = zip(computed, [(m.chunks, m.chunk_tokens) for m in micro_batches], strict=True)
    assert len(set(shapes)) <= 4
    # The head is paid for the tokens that are there, up to a chunk.
    for m in micro_batches:
        most = max(sum(len(pairs[i].response) for i in members) for members in m.members)
        assert m.chunks * m.chunk_tokens >= m.filled * m.chunk_tokens >= most
        assert (m.filled - 1) * m.chunk_tokens < most


def test_a_plan_is_a_function_of_the_lengths():
    pairs, layout = long_tail(1024, count=64), SHARED._replace(shards=2, micro_batch_tokens=512)
    for share in (True, False):
        layout = layout._replace(share_prompts=share)
        renamed = [Pair([n + 100 for n in p], [7] * len(r)) for p, r in pairs]
        cuts = [split_micro_batches(x, layout) for x in (pairs, list(pairs), renamed)]
        shapes = [[shape_of(x) for x in cut] for cut in cuts]
        assert shapes[0] == shapes[1] == shapes[2]


@LAYOUTS
def test_a_pair_longer_than_the_limit_is_computed_all_the_same(layout, devices):
    pairs = [Pair([1], [2] * 300), Pair([1], [3] * 10), Pair([4], [5] * 10)]
    micro_batches = split_micro_batches(pairs, layout._replace(micro_batch_tokens=64))
    assert sorted(i for m in micro_batches for s in m.members for i in s) == [0, 1, 2]
    assert all(any(m.members) for m in micro_batches)


@LAYOUTS
def test_every_shard_has_rows_and_some_may_hold_nothing(layout):
    devices, layout = tiny.make_devices(data=4, fsdp=2), layout._replace(shards=8)
    (micro_batch,) = split_micro_batches(PAIRS, layout)
    assert len(micro_batch.members) == 8
    sequences = make_sequences(repack(PAIRS, micro_batch, layout), devices)
    assert sequences.tokens.shape[0] % 8 == 0 and sequences.target_positions.shape[0] == 8
    assert len(sequences.tokens.sharding.device_set) == 8
    assert not sequences.tokens.sharding.is_fully_replicated
    # A chunk of the head holds about as many tokens as was asked for, over all shards.
    assert micro_batch.chunk_tokens == layout.head_chunk_tokens


def test_chunks_hold_more_predictions_than_tokens_were_laid(devices):
    """Many short siblings: a prompt's end predicts the first token of each."""
    pairs = [Pair([1], [2, 3])] * (TOKEN_STEP - 1)
    (micro_batch,) = split_micro_batches(pairs, SHARED)
    sequences = make_sequences(repack(pairs, micro_batch, SHARED), devices)
    predictions = 2 * len(pairs)
    assert sequences.tokens.size == TOKEN_STEP < predictions <= sequences.target_positions.size
    assert micro_batch.filled == -(-predictions // 5)


def test_reduction_weights_have_their_closed_forms():
    lengths, active = np.array([2, 4, 1], np.int32), np.array([True, True, False])
    weights, denominator = reduction_weights(lengths, active, 5, "token_mean")
    assert weights.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [0] * 5]
    assert denominator == 6  # active tokens
    weights, denominator = reduction_weights(lengths, active, 5, "sequence_mean")
    assert weights.tolist() == [[0.5, 0.5, 0, 0, 0], [0.25] * 4 + [0], [0] * 5]
    assert denominator == 3  # all rows


@pytest.mark.parametrize(("reduction", "expected"), [("token_mean", 0), ("sequence_mean", 2)])
def test_without_any_active_row_the_weights_are_zero_and_finite(reduction, expected):
    lengths, active = np.array([2, 4], np.int32), np.zeros(2, np.bool_)
    weights, denominator = reduction_weights(lengths, active, 4, reduction)
    assert not weights.any() and denominator == expected
