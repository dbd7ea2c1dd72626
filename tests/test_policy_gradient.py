"""GRPO: advantages, and the clipped surrogate against its textbook form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdpo_jax.losses.policy_gradient import group_advantages, grpo_loss, policy_gradient_loss
from sdpo_jax.losses.weights import probability_ratio

CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


def surrogate(ratio, advantage):
    ratio = jnp.array([ratio], jnp.float32)
    zero = jnp.zeros(1)
    return policy_gradient_loss(jnp.log(ratio), zero, jnp.array([advantage], jnp.float32), **CLIPS)


def slope(ratio, advantage):
    """Derivative of the surrogate by the log-probability."""
    return jax.grad(
        lambda x: policy_gradient_loss(x, jnp.zeros(()), jnp.float32(advantage), **CLIPS)
    )(jnp.log(jnp.float32(ratio)))


def test_advantage_is_reward_minus_group_mean():
    rewards = np.random.default_rng(0).normal(size=12).astype(np.float32)
    want = rewards.reshape(3, 4) - rewards.reshape(3, 4).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(group_advantages(jnp.array(rewards), 4), want.ravel(), atol=1e-6)


def test_scale_divides_by_the_standard_deviation():
    rewards = np.random.default_rng(0).normal(size=12).astype(np.float32)
    groups = rewards.reshape(3, 4)
    want = (groups - groups.mean(1, keepdims=True)) / groups.std(1, ddof=1, keepdims=True)
    got = group_advantages(jnp.array(rewards), 4, scale=True)
    np.testing.assert_allclose(got, want.ravel(), rtol=1e-5)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_equal_rewards_have_advantage_exactly_zero(scale, reward, size):
    rewards = jnp.full(2 * size, reward)
    np.testing.assert_array_equal(group_advantages(rewards, size, scale=scale), 0.0)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 20.0), st.floats(-3.0, 3.0))
def test_surrogate_is_the_textbook_form(ratio, advantage):
    plain, clipped = -advantage * ratio, -advantage * np.clip(ratio, 0.8, 1.28)
    want = max(plain, clipped)
    if advantage < 0:
        want = min(want, -advantage * 3.0)
    np.testing.assert_allclose(surrogate(ratio, advantage)[0], want, rtol=1e-5, atol=1e-6)


def test_clip_higher():
    assert slope(1.25, 1.0) != 0.0  # inside 1.28
    assert slope(1.30, 1.0) == 0.0
    assert slope(0.10, 1.0) != 0.0  # a good token may always come back
    assert slope(0.75, -1.0) == 0.0  # below 0.8
    assert slope(0.85, -1.0) != 0.0
    assert slope(1.30, -1.0) != 0.0


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    np.testing.assert_allclose(surrogate(9.0, -2.0), 6.0)
    assert slope(9.0, -2.0) == 0.0 and slope(2.9, -2.0) != 0.0
    np.testing.assert_allclose(surrogate(9.0, 2.0), -2.56, rtol=1e-6)


def test_on_policy_gradient_is_minus_advantage():
    np.testing.assert_allclose(slope(1.0, 0.7), -0.7, rtol=1e-6)
    np.testing.assert_allclose(slope(1.0, -0.7), 0.7, rtol=1e-6)


def test_ratio_is_one_on_policy_and_limited_at_twenty():
    x = jnp.array([-0.3, -7.0])
    np.testing.assert_array_equal(probability_ratio(x, x), 1.0)
    far = probability_ratio(jnp.array([100.0, -100.0]), jnp.zeros(2))
    np.testing.assert_allclose(far, np.exp([20.0, -20.0]), rtol=1e-6)


def test_old_log_probs_and_advantages_get_no_gradient():
    def total(old, advantages):
        log_probs = jnp.zeros((2, 3))
        return grpo_loss(log_probs, old, advantages, jnp.ones((2, 3)), **CLIPS).total

    gradients = jax.grad(total, argnums=(0, 1))(jnp.full((2, 3), 0.1), jnp.array([1.0, -1.0]))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


def test_grpo_spreads_an_advantage_over_its_tokens():
    old, mask = jnp.zeros((2, 3)), jnp.array([[1, 1, 0], [1, 1, 1]])
    output = grpo_loss(old, old, jnp.array([2.0, -1.0]), mask, **CLIPS)
    np.testing.assert_allclose(output.per_token, [[-2, -2, 0], [1, 1, 1]])
    np.testing.assert_allclose(output.mean(), -1 / 5, rtol=1e-6)


def test_an_empty_batch_is_a_finite_zero():
    old = jnp.zeros((2, 3))
    output = grpo_loss(old, old, jnp.ones(2), jnp.zeros((2, 3)), **CLIPS)
    assert output.mean() == 0.0


def test_bfloat16_is_computed_in_float32_and_jit_and_vmap_change_nothing():
    random = np.random.default_rng(0)
    new, old = (jnp.array(random.normal(size=(4, 5)), jnp.bfloat16) for _ in range(2))
    advantages = jnp.array(random.normal(size=(4, 5)), jnp.bfloat16)

    def loss(new, old, advantages):
        return policy_gradient_loss(new, old, advantages, **CLIPS)

    want = loss(*(x.astype(jnp.float32) for x in (new, old, advantages)))
    got = loss(new, old, advantages)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(jax.jit(loss)(new, old, advantages), want, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(loss)(new, old, advantages), want, rtol=1e-6)


def test_bad_arguments_name_what_came():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"rewards \[5\] and group_size 2"):
        group_advantages(jnp.zeros(5), 2)
    with pytest.raises(ValueError, match=r"\[B, T\] = \[2, 3\], got \[3\]"):
        grpo_loss(x, x, jnp.zeros(3), x, **CLIPS)
    with pytest.raises(ValueError, match=r"log_probs \[2, 3\], old_log_probs \[2, 2\]"):
        grpo_loss(x, x[:, :2], jnp.zeros(2), x, **CLIPS)
    with pytest.raises(ValueError, match=r"dual_clip 0\.5"):
        grpo_loss(x, x, jnp.zeros(2), x, clip_low=0.2, clip_high=0.28, dual_clip=0.5)
