"""The SDPO loss from logits: importance weights, masks, temperature, its estimator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax.losses.distillation import sdpo_loss
from sdpo_jax.losses.divergences import reverse_kl
from sdpo_jax.losses.reductions import sequence_mean
from sdpo_jax.losses.weights import truncated_importance_weights

ALPHAS = [0.0, 0.3, 0.5, 1.0]


def random_logits(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numpy_log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def batch():
    student, teacher = random_logits(0, 3, 4, 7), random_logits(1, 3, 4, 7)
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    return jnp.array(student), jnp.array(teacher), jnp.array(mask)


def test_reverse_kl_of_the_paper_by_hand():
    student, teacher, mask = batch()
    s, t = numpy_log_softmax(student), numpy_log_softmax(teacher)
    kl = np.sum(np.exp(s) * (s - t), axis=-1) * np.asarray(mask)
    output = sdpo_loss(student, teacher, mask, alpha=1.0)
    np.testing.assert_allclose(output.per_token, kl, atol=1e-6)
    np.testing.assert_allclose(output.mean(), kl.sum() / 5, rtol=1e-5)
    rows = kl[0].sum() / 3 + kl[1].sum() / 2
    np.testing.assert_allclose(sequence_mean(output.per_token, mask).mean(), rows / 3, rtol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_same_logits_have_loss_zero_and_gradient_zero(alpha):
    student, _, mask = batch()
    value, gradient = jax.value_and_grad(
        lambda x: sdpo_loss(x, student + 2.0, mask, alpha=alpha).mean()
    )(student)
    np.testing.assert_allclose(value, 0.0, atol=1e-7)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_row_without_a_teacher_has_no_gradient(alpha):
    student, teacher, mask = batch()
    gradient = jax.grad(lambda x: sdpo_loss(x, teacher, mask, alpha=alpha).total)(student)
    np.testing.assert_array_equal(np.asarray(gradient)[np.asarray(mask) == 0], 0.0)
    assert np.all(np.any(np.asarray(gradient)[np.asarray(mask) == 1] != 0, axis=-1))


def test_no_gradient_to_teacher_or_weights():
    student, teacher, mask = batch()
    weights = jnp.ones(mask.shape)

    def loss(teacher, weights):
        return sdpo_loss(student, teacher, mask, alpha=0.5, weights=weights).total

    for gradient in jax.grad(loss, argnums=(0, 1))(teacher, weights):
        np.testing.assert_array_equal(gradient, 0.0)


def test_weights_multiply_the_loss_of_a_token():
    student, teacher, mask = batch()
    weights = jnp.array(random_logits(2, 3, 4)) ** 2
    plain = sdpo_loss(student, teacher, mask, alpha=0.5)
    weighted = sdpo_loss(student, teacher, mask, alpha=0.5, weights=weights)
    np.testing.assert_allclose(weighted.per_token, plain.per_token * weights, rtol=1e-6)
    assert (
        weighted.weight == plain.weight
    )  # weights correct the loss, they are not part of the mean


def test_an_empty_batch_is_a_finite_zero():
    student, teacher, mask = batch()
    value, gradient = jax.value_and_grad(
        lambda x: sdpo_loss(x, teacher, jnp.zeros_like(mask), alpha=0.5).mean()
    )(student)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_padding_on_the_right_changes_nothing():
    student, teacher, mask = batch()
    wide = [jnp.pad(x, [(0, 0), (0, 3), (0, 0)], constant_values=5.0) for x in (student, teacher)]
    got = sdpo_loss(wide[0], wide[1], jnp.pad(mask, [(0, 0), (0, 3)]), alpha=0.5)
    want = sdpo_loss(student, teacher, mask, alpha=0.5)
    # A sum of another length may be added up in another order.
    np.testing.assert_allclose(got.mean(), want.mean(), rtol=1e-6)


def test_on_policy_weights_are_exactly_one():
    log_probs = jnp.array(random_logits(0, 3, 4))
    np.testing.assert_array_equal(truncated_importance_weights(log_probs, log_probs, cap=2.0), 1.0)


def test_weights_are_capped_from_above_only_and_log_ratios_at_twenty():
    gap = jnp.array([-100.0, -20.0, -3.0, 0.5, 1.0, 100.0])
    weights = truncated_importance_weights(gap, jnp.zeros_like(gap), cap=2.0)
    want = np.exp([-20.0, -20.0, -3.0, 0.5, np.log(2.0), np.log(2.0)])
    np.testing.assert_allclose(weights, want, rtol=1e-6)
    uncapped = truncated_importance_weights(gap, jnp.zeros_like(gap), cap=np.inf)
    np.testing.assert_allclose(uncapped[-1], np.exp(20.0), rtol=1e-6)


def test_weights_pass_no_gradient():
    def total(log_probs, old_log_probs):
        return jnp.sum(truncated_importance_weights(log_probs, old_log_probs, cap=2.0))

    gradients = jax.grad(total, argnums=(0, 1))(jnp.array([0.1, 0.2]), jnp.array([0.3, 0.1]))
    np.testing.assert_array_equal(np.stack(gradients), 0.0)


def test_the_score_function_of_the_sampled_token_averages_to_the_full_gradient(x64):
    """Σ_y π(y) sg[log π(y) - log q(y)] ∇log π(y) is the gradient of the full reverse KL."""
    student = jnp.array(random_logits(0, 6).astype(np.float64))
    teacher = jnp.array(numpy_log_softmax(random_logits(1, 6)))

    def sampled(logits, token):
        log_probs = jax.nn.log_softmax(logits)
        advantage = jax.lax.stop_gradient(log_probs - teacher)
        return advantage[token] * log_probs[token]

    average = sum(jax.nn.softmax(student)[y] * jax.grad(sampled)(student, y) for y in range(6))
    full = jax.grad(lambda x: reverse_kl(jax.nn.log_softmax(x), teacher))(student)
    np.testing.assert_allclose(full, average, atol=1e-14)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_bfloat16_logits_are_upcast(alpha):
    student, teacher, _ = batch()
    s, t = student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)
    mask = jnp.ones(s.shape[:-1])
    got = sdpo_loss(s, t, mask, alpha=alpha).per_token
    want = sdpo_loss(s.astype(jnp.float32), t.astype(jnp.float32), mask, alpha=alpha).per_token
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


def test_jit_vmap_and_scan_change_nothing():
    student, teacher, mask = batch()

    def loss(s, t, m):
        return sdpo_loss(s, t, m, alpha=0.5).total

    want = loss(student, teacher, mask)
    np.testing.assert_allclose(jax.jit(loss)(student, teacher, mask), want, rtol=1e-6)
    rows = [x[:, None] for x in (student, teacher, mask)]
    np.testing.assert_allclose(jnp.sum(jax.vmap(loss)(*rows)), want, rtol=1e-6)
    zero = jnp.zeros(())
    total, _ = jax.lax.scan(lambda c, row: (c + loss(*row), None), zero, tuple(rows))
    np.testing.assert_allclose(total, want, rtol=1e-6)


def test_shapes_are_checked():
    student, teacher, mask = batch()
    with pytest.raises(ValueError, match=r"student_logits \[3, 4, 7\], teacher_logits \[3, 4, 6\]"):
        sdpo_loss(student, teacher[..., :6], mask, alpha=0.5)
    with pytest.raises(ValueError, match=r"mask \[2, 4\]"):
        sdpo_loss(student, teacher, mask[:2], alpha=0.5)
    with pytest.raises(ValueError, match=r"weights \[4\], per_token \[3, 4\]"):
        sdpo_loss(student, teacher, mask, alpha=0.5, weights=jnp.ones(4))
    with pytest.raises(ValueError, match="cap must be positive, got 0"):
        truncated_importance_weights(jnp.ones(1), jnp.ones(1), cap=0.0)
