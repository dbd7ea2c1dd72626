"""Ragged rows in fixed shapes: lengths alone say what is text, and every token meets its target."""

import numpy as np
import pytest
import tiny

from sdpo_jax.training.batch import Layout, layout, make_rows, make_tokens, reduction_weights

PROMPTS = [[5, 6, 7], [8], [9, 9, 9, 9, 9]]
RESPONSES = [[1, 2], [3, 4, 0], [0]]  # 0 ends a response here, and it is also what padding holds
SHAPE = Layout(micro_batches=2, rows=2, response_tokens=16)


@pytest.fixture(scope="module")
def devices():
    return tiny.make_devices()


def flat(array):
    array = np.asarray(array)
    return array.reshape(-1, *array.shape[2:])


def test_rows_by_hand(devices):
    rows = make_rows(PROMPTS, RESPONSES, SHAPE, devices)
    assert rows.tokens.shape == rows.segments.shape == rows.positions.shape == (2, 2, 32)
    assert rows.take.shape == (2, 2, 16)
    assert flat(rows.tokens)[:, :7].tolist() == [
        [5, 6, 7, 1, 2, 0, 0],
        [8, 3, 4, 0, 0, 0, 0],
        [9, 9, 9, 9, 9, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    # The last prompt token predicts the first response token; nothing is read at the last one.
    assert flat(rows.take)[:, :4].tolist() == [[2, 3, 0, 0], [0, 1, 2, 0], [4, 0, 0, 0], [0] * 4]
    assert flat(rows.segments).sum(axis=1).tolist() == [5, 4, 6, 0]
    assert (flat(rows.positions) == np.arange(32)).all()
    assert rows.filled == 2


def test_the_token_after_each_taken_column_is_the_response_token(devices):
    random = np.random.default_rng(0)
    responses = [tiny.random_ids(random, n) for n in (1, 7, 16)]
    targets = flat(make_tokens(responses, SHAPE, np.int32, devices))
    for prompt_lengths in ((3, 1, 20), (9, 30, 2)):  # a student's and a teacher's prompts
        prompts = [tiny.random_ids(random, n) for n in prompt_lengths]
        rows = make_rows(prompts, responses, SHAPE, devices)
        tokens, take = flat(rows.tokens), flat(rows.take)
        for i, response in enumerate(responses):
            columns = take[i, : len(response)] + 1
            assert tokens[i, columns].tolist() == response
            assert targets[i, : len(response)].tolist() == response
            assert (targets[i, len(response) :] == 0).all()


def test_a_stop_id_equal_to_the_padding_id_changes_nothing(devices):
    renamed = [[i or 60 for i in row] for row in RESPONSES]
    zero, other = (make_rows(PROMPTS, r, SHAPE, devices) for r in (RESPONSES, renamed))
    for field in ("positions", "segments", "take", "filled"):
        np.testing.assert_array_equal(getattr(zero, field), getattr(other, field))
    restored = np.where(np.asarray(other.tokens) == 60, 0, other.tokens)
    np.testing.assert_array_equal(restored, zero.tokens)
    text = np.asarray(zero.segments) > 0
    assert text.sum() == sum(map(len, PROMPTS)) + sum(map(len, RESPONSES))


def test_more_rows_than_the_layout_holds_are_refused(devices):
    with pytest.raises(ValueError, match="at most 4 rows, got 6"):
        make_rows(PROMPTS * 2, RESPONSES * 2, SHAPE, devices)


@pytest.mark.parametrize(
    ("capacity", "micro_batch_rows", "shards", "expected"),
    [
        (8, 4, 1, (2, 4)),
        (8, 32, 1, (1, 8)),  # never more rows than there are
        (9, 4, 1, (3, 4)),
        (8, 1, 1, (8, 1)),
        (8, 2, 8, (1, 8)),  # every shard gets a row
        (12, 5, 4, (2, 8)),
    ],
)
def test_layouts_hold_their_capacity_in_whole_shards(capacity, micro_batch_rows, shards, expected):
    shape = layout(capacity, 17, micro_batch_rows=micro_batch_rows, shards=shards)
    assert (shape.micro_batches, shape.rows) == expected
    assert shape.micro_batches * shape.rows >= capacity and shape.rows % shards == 0
    assert shape.response_tokens == 32


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
