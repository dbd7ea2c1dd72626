"""Divergences against float64 numpy written from the formulas, and the laws of their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from sdpo_jax.losses.divergences import entropy, forward_kl, generalized_jsd, reverse_kl
from sdpo_jax.losses.vocabulary import log_softmax

ALPHAS = [0.0, 0.3, 0.5, 1.0]


def random_log_probs(seed, *shape, scale=2.0):
    logits = scale * np.random.default_rng(seed).normal(size=shape)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def numpy_kl(p, q):
    return np.sum(np.exp(p) * (p - q), axis=-1)


def numpy_divergence(student, teacher, alpha):
    if alpha == 0.0:
        return numpy_kl(teacher, student)
    if alpha == 1.0:
        return numpy_kl(student, teacher)
    mixture = np.log((1 - alpha) * np.exp(student) + alpha * np.exp(teacher))
    return (1 - alpha) * numpy_kl(student, mixture) + alpha * numpy_kl(teacher, mixture)


@pytest.mark.parametrize("alpha", [*ALPHAS, 0.01, 0.99])
def test_value_is_the_formula_in_float64(x64, alpha):
    student, teacher = random_log_probs(0, 4, 5, 11), random_log_probs(1, 4, 5, 11)
    got = generalized_jsd(jnp.array(student), jnp.array(teacher), alpha=alpha)
    assert got.dtype == jnp.float64 and got.shape == (4, 5)
    np.testing.assert_allclose(got, numpy_divergence(student, teacher, alpha), rtol=1e-12)


def test_the_ends_are_the_two_kls_and_differ():
    student, teacher = random_log_probs(0, 3, 7), random_log_probs(1, 3, 7)
    s, t = jnp.float32(student), jnp.float32(teacher)
    np.testing.assert_array_equal(generalized_jsd(s, t, alpha=0.0), forward_kl(s, t))
    np.testing.assert_array_equal(generalized_jsd(s, t, alpha=1.0), reverse_kl(s, t))
    np.testing.assert_allclose(forward_kl(s, t), numpy_kl(teacher, student), rtol=1e-5)
    np.testing.assert_allclose(reverse_kl(s, t), numpy_kl(student, teacher), rtol=1e-5)
    assert np.all(np.abs(forward_kl(s, t) - reverse_kl(s, t)) > 1e-2)


def test_the_middle_vanishes_at_the_ends_at_the_rate_of_the_kls(x64):
    student, teacher = random_log_probs(0, 7), random_log_probs(1, 7)
    s, t, small = jnp.array(student), jnp.array(teacher), 1e-7
    near_0 = generalized_jsd(s, t, alpha=small) / small
    near_1 = generalized_jsd(s, t, alpha=1 - small) / small
    np.testing.assert_allclose(near_0, numpy_kl(teacher, student), rtol=1e-5)
    np.testing.assert_allclose(near_1, numpy_kl(student, teacher), rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 30.0))
def test_jensen_shannon_is_symmetric_and_between_zero_and_log_two(seed, scale):
    s = jnp.float32(random_log_probs(seed, 9, scale=scale))
    t = jnp.float32(random_log_probs(seed + 1, 9, scale=scale))
    value = generalized_jsd(s, t, alpha=0.5)
    np.testing.assert_allclose(value, generalized_jsd(t, s, alpha=0.5), rtol=1e-5, atol=1e-7)
    assert -1e-6 <= value <= np.log(2) + 1e-6


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equal_distributions_have_loss_zero_and_gradient_zero(alpha):
    logits = 3.0 * jax.random.normal(jax.random.key(0), (5, 13))
    teacher = log_softmax(logits)  # jax's own is compiled, and may round in another way

    def loss(logits):
        return jnp.sum(generalized_jsd(log_softmax(logits), teacher, alpha=alpha))

    value, gradient = jax.value_and_grad(loss)(logits)
    assert value == 0.0
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)  # a softmax sums to 1 within rounding


@pytest.mark.parametrize("alpha", [*ALPHAS, 0.9])
def test_gradient_is_that_of_the_full_formula_mixture_included(x64, alpha):
    student, teacher = random_log_probs(0, 3, 6), random_log_probs(1, 3, 6)

    def loss(logits):
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        return jnp.sum(generalized_jsd(log_probs, jnp.array(teacher), alpha=alpha))

    check_grads(loss, (jnp.array(student),), order=1, modes=["rev"], rtol=1e-6, atol=1e-8)
    gradient, step = jax.grad(loss)(jnp.array(student)), 1e-6
    for row, column in [(0, 0), (1, 3), (2, 5)]:
        values = []
        for sign in (1, -1):
            moved = student.copy()
            moved[row, column] += sign * step
            moved -= np.log(np.sum(np.exp(moved), axis=-1, keepdims=True))
            values.append(numpy_divergence(moved, teacher, alpha).sum())
        finite_difference = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose(gradient[row, column], finite_difference, rtol=1e-5, atol=1e-9)


def test_reverse_kl_gradient_is_the_policy_gradient_of_the_log_ratio(x64):
    student, teacher = random_log_probs(0, 8), random_log_probs(1, 8)

    def loss(logits):
        return reverse_kl(jax.nn.log_softmax(logits), jnp.array(teacher))

    probability, ratio = np.exp(student), student - teacher
    closed_form = probability * (ratio - np.sum(probability * ratio))
    gradient = jax.grad(loss)(jnp.array(student))
    np.testing.assert_allclose(gradient, closed_form, atol=1e-14)
    score = np.eye(8) - probability  # row v: the gradient of log π(v) by the logits
    expectation = np.sum((probability * ratio)[:, None] * score, axis=0)
    np.testing.assert_allclose(gradient, expectation, atol=1e-14)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_teacher_gets_no_gradient(alpha):
    s, t = jnp.float32(random_log_probs(0, 6)), jnp.float32(random_log_probs(1, 6))
    gradient = jax.grad(lambda t: generalized_jsd(s, t, alpha=alpha))(t)
    np.testing.assert_array_equal(gradient, 0.0)


IMPOSSIBLE = {
    "both": ([0.0, 1.0, -np.inf], [1.0, 0.0, -np.inf]),
    "student": ([0.0, 1.0, -np.inf], [1.0, 0.0, 2.0]),
    "teacher": ([0.0, 1.0, 2.0], [1.0, 0.0, -np.inf]),
    "certain student": ([0.0, -np.inf, -np.inf], [1.0, 0.0, 2.0]),
    "certain and disjoint": ([0.0, -np.inf, -np.inf], [-np.inf, 0.0, -np.inf]),
    "certain and equal": ([0.0, -np.inf, -np.inf], [0.0, -np.inf, -np.inf]),
    "lowest float": ([0.0, -3.4e38, -1e9], [-1e9, 0.0, -3.4e38]),
}


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("student, teacher", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible_tokens_give_finite_values_and_gradients(alpha, student, teacher):
    teacher = jax.nn.log_softmax(jnp.float32(teacher))

    def loss(logits):
        return generalized_jsd(jax.nn.log_softmax(logits), teacher, alpha=alpha)

    value, gradient = jax.value_and_grad(loss)(jnp.float32(student))
    assert np.isfinite(value) and value >= -1e-6 and np.all(np.isfinite(gradient))
    by_log_probs = jax.grad(lambda s: generalized_jsd(s, teacher, alpha=alpha))
    assert np.all(np.isfinite(by_log_probs(jax.nn.log_softmax(jnp.float32(student)))))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_token_impossible_for_both_is_absent(alpha):
    student, teacher = random_log_probs(0, 5), random_log_probs(1, 5)
    s, t = np.append(student, -np.inf), np.append(teacher, -np.inf)
    got = generalized_jsd(jnp.float32(s), jnp.float32(t), alpha=alpha)
    np.testing.assert_allclose(got, numpy_divergence(student, teacher, alpha), rtol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_bfloat16_is_computed_in_float32(alpha):
    s = jnp.array(random_log_probs(0, 3, 64), jnp.bfloat16)
    t = jnp.array(random_log_probs(1, 3, 64), jnp.bfloat16)
    got = generalized_jsd(s, t, alpha=alpha)
    want = generalized_jsd(s.astype(jnp.float32), t.astype(jnp.float32), alpha=alpha)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


def test_small_divergences_keep_their_digits():
    """The naive mixture in float32 leaves nothing of a divergence of 1e-8."""
    student = random_log_probs(0, 32)
    shift = 1e-3 * np.random.default_rng(1).normal(size=32)
    s = np.float32(student).astype(np.float64)
    t = np.float32(student + shift).astype(np.float64)
    got = generalized_jsd(jnp.float32(s), jnp.float32(t), alpha=0.5)
    np.testing.assert_allclose(got, numpy_divergence(s, t, 0.5), rtol=1e-3, atol=2e-9)


def test_entropy_is_the_formula_and_survives_impossible_tokens():
    log_probs = random_log_probs(0, 4, 9)
    want = -np.sum(np.exp(log_probs) * log_probs, axis=-1)
    padded = np.concatenate([log_probs, np.full((4, 1), -np.inf)], axis=-1)
    np.testing.assert_allclose(entropy(jnp.float32(padded)), want, rtol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_jit_and_vmap_change_nothing(alpha):
    s, t = jnp.float32(random_log_probs(0, 3, 4, 6)), jnp.float32(random_log_probs(1, 3, 4, 6))

    def loss(s, t):
        return generalized_jsd(s, t, alpha=alpha)

    np.testing.assert_allclose(jax.jit(loss)(s, t), loss(s, t), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.vmap(loss))(s, t), loss(s, t), atol=1e-6)


def test_bad_arguments_name_what_came():
    s = jnp.zeros((2, 3))
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"\[0, 1\], got {alpha}"):
            generalized_jsd(s, s, alpha=alpha)
    with pytest.raises(ValueError, match=r"\[2, 3\], teacher_log_probs \[2, 4\]"):
        forward_kl(s, jnp.zeros((2, 4)))
