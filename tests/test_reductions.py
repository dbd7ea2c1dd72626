"""(sum, weight), divided once: hand-counted, and independent of how the batch is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo_jax.losses.reductions import (
    divide,
    sequence_mean,
    sequence_mean_weights,
    token_mean,
    token_mean_weights,
)

LOSS = np.array([[1.0, 2.0, 6.0], [4.0, 8.0, 16.0]], np.float32)
MASK = np.array([[1, 1, 1], [1, 0, 0]])
REDUCTIONS = [(token_mean, token_mean_weights), (sequence_mean, sequence_mean_weights)]


def test_hand_counted():
    assert token_mean(jnp.array(LOSS), jnp.array(MASK)).mean() == 13.0 / 4.0
    assert sequence_mean(jnp.array(LOSS), jnp.array(MASK)).mean() == (3.0 + 4.0) / 2.0


def test_sequence_mean_counts_rows_without_an_active_token():
    loss = jnp.concatenate([jnp.array(LOSS), jnp.array(LOSS)])
    mask = jnp.concatenate([jnp.array(MASK), jnp.zeros_like(jnp.array(MASK))])
    assert sequence_mean(loss, mask).mean() == (3.0 + 4.0) / 4.0
    assert token_mean(loss, mask).mean() == 13.0 / 4.0


@pytest.mark.parametrize("reduce, weigh", REDUCTIONS)
def test_weights_and_denominator_say_the_same_as_the_reduction(reduce, weigh):
    weights, denominator = weigh(MASK)
    output = reduce(LOSS, MASK)
    np.testing.assert_allclose(np.sum(np.asarray(weights) * LOSS), output.total, rtol=1e-6)
    assert denominator == output.weight
    assert weights.shape == MASK.shape and weights.dtype == jnp.float32


@pytest.mark.parametrize("reduce, _", REDUCTIONS)
@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32, jnp.bfloat16])
def test_a_mask_may_have_any_dtype_and_live_on_the_host(reduce, _, dtype):
    mask = np.asarray(MASK).astype(dtype)
    np.testing.assert_array_equal(reduce(LOSS, mask).mean(), reduce(LOSS, MASK).mean())


@pytest.mark.parametrize("reduce, _", REDUCTIONS)
def test_an_all_zero_mask_gives_zero_and_no_gradient(reduce, _):
    def loss(x):
        return reduce(x, jnp.zeros_like(x)).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.array(LOSS))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("reduce, _", REDUCTIONS)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_masked_tokens_are_exactly_absent(reduce, _, garbage):
    loss = jnp.array(np.where(MASK, LOSS, garbage).astype(np.float32))
    value, gradient = jax.value_and_grad(lambda x: reduce(x, jnp.array(MASK)).mean())(loss)
    assert value == reduce(LOSS, MASK).mean()
    np.testing.assert_array_equal(np.asarray(gradient)[MASK == 0], 0.0)
    assert np.all(np.isfinite(gradient))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3, 6]))
def test_the_result_does_not_depend_on_the_micro_batch_size(seed, rows):
    random = np.random.default_rng(seed)
    loss = random.normal(size=(6, 5)).astype(np.float32)
    mask = np.arange(5) < random.integers(0, 6, size=(6, 1))
    for reduce, _ in REDUCTIONS:
        parts = [reduce(loss[i : i + rows], mask[i : i + rows]) for i in range(0, 6, rows)]
        total = jnp.sum(jnp.stack([part.total for part in parts]))
        weight = jnp.sum(jnp.stack([part.weight for part in parts]))
        np.testing.assert_allclose(divide(total, weight), reduce(loss, mask).mean(), atol=2e-6)


def test_padding_on_the_right_changes_nothing():
    pad = [(0, 0), (0, 4)]
    loss, mask = np.pad(LOSS, pad, constant_values=7.0), np.pad(MASK, pad)
    for reduce, _ in REDUCTIONS:
        assert reduce(loss, mask).mean() == reduce(LOSS, MASK).mean()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"per_token \[2, 3\], mask \[2, 2\]"):
        token_mean(LOSS, MASK[:, :2])
