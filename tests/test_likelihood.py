"""Cross-entropy and SFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from sdpo_jax.losses.likelihood import cross_entropy, sft_loss
from sdpo_jax.losses.vocabulary import select_targets


def numpy_cross_entropy(logits, targets):
    logits = np.asarray(logits, np.float64)
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return -np.take_along_axis(log_probs, np.asarray(targets)[..., None], axis=-1)[..., 0]


def batch():
    random = np.random.default_rng(0)
    return random.normal(size=(3, 4, 7)), random.integers(0, 7, size=(3, 4))


def test_value_is_the_formula_and_gradient_matches_finite_differences(x64):
    logits, targets = batch()
    got = cross_entropy(jnp.array(logits), jnp.array(targets))
    np.testing.assert_allclose(got, numpy_cross_entropy(logits, targets), rtol=1e-13)
    check_grads(
        lambda x: jnp.sum(cross_entropy(x, jnp.array(targets))),
        (jnp.array(logits),),
        order=1,
        modes=["rev"],
        rtol=1e-6,
    )


def test_gradient_is_probability_minus_target():
    logits, targets = batch()
    gradient = jax.grad(lambda x: jnp.sum(cross_entropy(x, jnp.array(targets))))(
        jnp.float32(logits)
    )
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, probability - np.eye(7)[targets], atol=1e-6)


def test_sft_divides_by_the_number_of_active_tokens():
    logits, targets = batch()
    mask = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    output = sft_loss(jnp.float32(logits), jnp.array(targets), jnp.array(mask))
    want = np.sum(numpy_cross_entropy(logits, targets) * mask) / 3
    np.testing.assert_allclose(output.mean(), want, rtol=1e-5)


@pytest.mark.parametrize("padding", [-1, -100, 7, 10_000])
def test_a_masked_target_may_be_any_id(padding):
    logits, targets = batch()
    mask = jnp.array([[1, 1, 1, 0]] * 3)
    padded = targets.copy()
    padded[:, 3] = padding

    def loss(logits, targets):
        return sft_loss(logits, jnp.array(targets), mask).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.float32(logits), padded)
    want, want_gradient = jax.value_and_grad(loss)(jnp.float32(logits), targets)
    assert value == want
    np.testing.assert_array_equal(gradient, want_gradient)


def test_an_impossible_token_is_minus_infinity_and_others_do_not_feel_it():
    log_probs = jnp.array([[0.0, -jnp.inf], [0.0, -jnp.inf]])
    np.testing.assert_array_equal(select_targets(log_probs, jnp.array([0, 1])), [0.0, -np.inf])
    gradient = jax.grad(lambda x: cross_entropy(x, jnp.array(0)))(jnp.array([1.0, 2.0, -jnp.inf]))
    assert np.all(np.isfinite(gradient)) and gradient[2] == 0.0


def test_bfloat16_is_upcast_and_an_empty_batch_is_a_finite_zero():
    logits, targets = batch()
    low = jnp.array(logits, jnp.bfloat16)
    got = cross_entropy(low, jnp.array(targets))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, cross_entropy(low.astype(jnp.float32), jnp.array(targets)))
    assert sft_loss(low, jnp.array(targets), jnp.zeros((3, 4))).mean() == 0.0


def test_jit_and_vmap_change_nothing():
    logits, targets = jnp.float32(batch()[0]), jnp.array(batch()[1])
    want = cross_entropy(logits, targets)
    np.testing.assert_allclose(jax.jit(cross_entropy)(logits, targets), want, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(cross_entropy)(logits, targets), want, rtol=1e-6)


def test_shapes_are_checked():
    logits, targets = jnp.zeros((3, 4, 7)), jnp.zeros((3, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"targets \[3, 3\] and log_probs \[3, 4, 7\]"):
        cross_entropy(logits, targets[:, :3])
    with pytest.raises(ValueError, match=r"targets \[3, 4\], mask \[3\]"):
        sft_loss(logits, targets, jnp.ones(3))
