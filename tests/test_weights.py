"""Weights and masks against numpy: formulas, means, and what they do where nothing is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax_versions import enable_x64

from sdpo_jax.losses.distillation import sdpo_loss
from sdpo_jax.losses.reductions import sequence_mean, token_mean
from sdpo_jax.losses.weights import (
    disagreement_weights,
    log_ratio,
    outcome_routing,
    pass_rate_weights,
    positive_only,
    skip_first_tokens,
    span_mask,
    teacher_entropy_weights,
    truncated_importance_weights,
)

FLOAT32 = 1e-6
MASK = np.array([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
MASK_DTYPES = ["bool", "int32", "float32", "bfloat16"]


def random(*shape, seed=0):
    return np.float32(np.random.default_rng(seed).normal(size=shape))


def test_both_corrections_multiply_and_padding_has_none():
    """Law 16: the update's weight times the sampler's; padding is 0 through the mask."""
    new, old, rollout = (random(3, 4, seed=i) for i in range(3))
    rollout[0, 3] = np.nan
    logits, teacher = random(2, 3, 4, 5, seed=3)
    weights = truncated_importance_weights(new, old, cap=2.0) * truncated_importance_weights(
        old, rollout, cap=2.0
    )
    want = np.minimum(np.exp(new - old), 2.0) * np.minimum(np.exp(old - rollout), 2.0)
    assert np.any(np.exp(new - old) > 2.0) and np.any(np.exp(old - rollout) > 2.0)
    np.testing.assert_allclose(weights, want, rtol=FLOAT32)
    plain = sdpo_loss(logits, teacher, MASK, alpha=0.5).per_token
    weighted = sdpo_loss(logits, teacher, MASK, alpha=0.5, weights=weights).per_token
    expected = np.where(MASK, plain * np.where(MASK, want, 0.0), 0.0)
    np.testing.assert_allclose(weighted, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(weighted)[MASK == 0], 0.0)


def test_a_token_that_neither_policy_can_draw_has_ratio_one_and_no_nan():
    new, old = jnp.array([-jnp.inf, -jnp.inf, -1.0]), jnp.array([-jnp.inf, -1.0, -jnp.inf])
    np.testing.assert_array_equal(log_ratio(new, old), [0.0, -20.0, 20.0])
    gradient = jax.grad(lambda x: jnp.sum(log_ratio(x, old)))(new)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_entropy_weights_are_the_formula_of_mean_one_over_the_mask(dtype):
    entropies = np.abs(random(3, 4))
    entropies[0, 3] = np.nan  # masked
    got = teacher_entropy_weights(entropies, jnp.array(MASK, dtype), beta=1.5)
    raw = np.where(MASK, np.exp(-1.5 * entropies), 0.0)
    np.testing.assert_allclose(got, raw * MASK.sum() / raw.sum(), rtol=FLOAT32)
    np.testing.assert_allclose(np.sum(np.asarray(got)) / MASK.sum(), 1.0, rtol=FLOAT32)
    even = teacher_entropy_weights(entropies, jnp.array(MASK, dtype), beta=0.0)
    np.testing.assert_array_equal(even, MASK)


def test_entropy_weights_have_mean_one_however_undecided_the_teacher_is():
    """exp(-20 · 11) is no float32; its ratio to exp(-20 · 10.9) is."""
    got = teacher_entropy_weights(jnp.array([[11.0, 10.9]]), jnp.ones((1, 2)), beta=20.0)
    want = np.exp([-2.0, 0.0])
    np.testing.assert_allclose(got, [2 * want / want.sum()], rtol=1e-4)  # 11 · 20 rounds to 2e-5


def test_disagreement_weights_are_the_formula_and_bounded():
    jsd = np.linspace(0.0, np.log(2), 7, dtype=np.float32)
    for beta, most in [(0.0, 0.5), (8.0, 0.5), (1e3, 1.0)]:
        got = disagreement_weights(jnp.array(jsd), beta=beta, max_reduction=most)
        want = 1 - 2 * most * (1 / (1 + np.exp(-beta * np.float64(jsd))) - 0.5)
        np.testing.assert_allclose(got, want, rtol=FLOAT32, atol=FLOAT32)
        assert np.all((got >= 1 - most) & (got <= 1)) and np.all(np.diff(got) <= 0)
    assert disagreement_weights(jnp.ones(2, jnp.bfloat16), beta=1.0, max_reduction=1.0).dtype == (
        jnp.float32
    )


@pytest.mark.parametrize("dtype", ["bool", "int32", "float32"])
def test_pass_rate_weights_are_the_formula_of_mean_one(dtype):
    passed = np.array([1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1])
    got = pass_rate_weights(jnp.array(passed, dtype), 4)
    raw = np.repeat(np.sqrt([0.25, 3 / 16, 0.0]), 4)
    np.testing.assert_allclose(got, raw / raw.mean(), rtol=FLOAT32)
    np.testing.assert_allclose(np.mean(got), 1.0, rtol=FLOAT32)
    floored = pass_rate_weights(jnp.array(passed, dtype), 4, floor=0.1)
    raw = np.maximum(raw, 0.1)
    np.testing.assert_allclose(floored, raw / raw.mean(), rtol=FLOAT32)


@pytest.mark.parametrize("verdict", [0, 1])
def test_groups_that_agree_weigh_nothing_without_a_floor_and_alike_with_one(verdict):
    passed = jnp.full(6, verdict)
    np.testing.assert_array_equal(pass_rate_weights(passed, 3), 0.0)
    np.testing.assert_allclose(pass_rate_weights(passed, 3, floor=0.1), 1.0, rtol=FLOAT32)
    np.testing.assert_array_equal(pass_rate_weights(passed, 1), 0.0)


@pytest.mark.parametrize("dtype", ["bool", "int32", "float32"])
def test_every_rollout_takes_exactly_one_route(dtype):
    passed, has_teacher = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])
    routes = outcome_routing(jnp.array(passed, dtype), jnp.array(has_teacher, dtype))
    np.testing.assert_array_equal(routes.distill, [0, 1, 0, 0])
    np.testing.assert_array_equal(routes.distill + routes.policy_gradient, 1.0)


def test_positive_only_follows_the_sign():
    got = positive_only(jnp.array([[1e-30, 0.0], [-0.0, -2.0]]))
    np.testing.assert_array_equal(got, [[1, 0], [0, 0]])


ROWS = {
    "right padded": ([1, 1, 1, 0], [0, 0, 1, 0]),
    "left padded": ([0, 1, 1, 1], [0, 0, 0, 1]),
    "with gaps": ([1, 0, 1, 1], [0, 0, 0, 1]),
    "too short": ([0, 0, 1, 0], [0, 0, 0, 0]),
    "empty": ([0, 0, 0, 0], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_the_first_active_tokens_are_skipped_wherever_a_row_begins(dtype):
    mask, want = (np.array(x) for x in zip(*ROWS.values(), strict=True))
    got = skip_first_tokens(jnp.array(mask, dtype), 2)
    assert got.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.float32(got), want)
    np.testing.assert_array_equal(np.float32(skip_first_tokens(jnp.array(mask, dtype), 0)), mask)


def test_a_fraction_in_a_mask_is_an_active_token():
    got = skip_first_tokens(jnp.array([[0.5, 0.0, 0.25, 1.0]]), 1)
    np.testing.assert_array_equal(got, [[0.0, 0.0, 0.25, 1.0]])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(-2, 9), st.integers(-2, 9)), min_size=2, max_size=2))
def test_a_span_mask_is_the_union_of_its_spans(spans):
    starts, ends = (jnp.array([x]) for x in zip(*spans, strict=True))
    got = span_mask(starts, ends, 7)
    want = [float(any(start <= i < end for start, end in spans)) for i in range(7)]
    np.testing.assert_array_equal(got, [want])


def test_spans_of_a_batch_stay_in_their_rows():
    got = span_mask(jnp.array([[0, 2], [1, 0]]), jnp.array([[1, 4], [2, 0]]), 4)
    np.testing.assert_array_equal(got, [[1, 0, 1, 1], [0, 1, 0, 0]])


DETACHED = {
    "entropy": lambda x: teacher_entropy_weights(x, jnp.ones_like(x), beta=1.0),
    "disagreement": lambda x: disagreement_weights(x, beta=8.0, max_reduction=0.5),
    "pass rate": lambda x: pass_rate_weights(x[0], 2),
    "positive": positive_only,
    "importance": lambda x: truncated_importance_weights(x, 2 * x, cap=2.0),
    "routes": lambda x: outcome_routing(x, x).policy_gradient,
}


@pytest.mark.parametrize("weigh", DETACHED.values(), ids=DETACHED.keys())
def test_weights_are_detached_and_the_same_under_jit(weigh):
    x = jnp.array([[0.1, 0.9, 0.4, 0.0], [0.2, 0.3, 0.5, 0.6]])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(weigh(x)))(x), 0.0)
    np.testing.assert_allclose(jax.jit(weigh)(x), weigh(x), rtol=FLOAT32, atol=FLOAT32)


def test_where_nothing_is_active_weights_are_zero_and_finite():
    nothing = jnp.zeros((2, 3))
    np.testing.assert_array_equal(teacher_entropy_weights(jnp.ones((2, 3)), nothing, beta=1.0), 0.0)
    np.testing.assert_array_equal(skip_first_tokens(nothing, 1), 0.0)
    np.testing.assert_array_equal(
        span_mask(jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 1), jnp.int32), 3), 0.0
    )


@pytest.mark.parametrize("reduce", [token_mean, sequence_mean])
@pytest.mark.parametrize("loss_dtype", ["float32", "float64"])
def test_a_mask_of_any_dtype_counts_alike_in_the_precision_of_the_loss(reduce, loss_dtype):
    """A third of a float32 mask in a float64 loss was off by 2e-8."""
    with enable_x64(loss_dtype == "float64"):
        loss = jnp.array(random(3, 4), loss_dtype)
        want = reduce(loss, jnp.array(MASK, loss_dtype)).mean()
        for dtype in MASK_DTYPES:
            got = reduce(loss, jnp.array(MASK, dtype))
            assert got.total.dtype == got.weight.dtype == jnp.dtype(loss_dtype)
            np.testing.assert_array_equal(got.mean(), want)
