"""Credit per candidate, token and rollout; the mix with rewards; the variants of GRPO."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from sdpo_jax.losses.credit import (
    candidate_loss,
    distillation_advantages,
    mix_advantages,
    modulate_advantages,
    score_function_loss,
    sequence_advantages,
)
from sdpo_jax.losses.distillation import sampled_token_loss
from sdpo_jax.losses.divergences import reverse_kl
from sdpo_jax.losses.policy_gradient import (
    group_advantages,
    grpo_loss,
    policy_gradient_loss,
    reference_kl,
    sequence_log_probs,
)
from sdpo_jax.losses.reductions import fixed_length_mean, sequence_mean
from sdpo_jax.losses.vocabulary import log_softmax, select_targets
from sdpo_jax.losses.weights import truncated_importance_weights

B, T, V = 4, 3, 5
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
# float64 throughout: what is left is rounding, 1e-15.
EXACT = 1e-13


@pytest.fixture(autouse=True)
def float64(x64):
    pass


def two_log_probs():
    return jnp.array(reference.log_softmax(np.random.default_rng(0).normal(size=(2, B, T, V))))


def sampled():
    """log π, log π_old and log q of sampled tokens; ratios on both sides of every clip."""
    random = np.random.default_rng(1)
    new = -random.exponential(size=(B, T))
    return new, new - np.linspace(-1.5, 1.5, B * T).reshape(B, T), -random.exponential(size=(B, T))


def test_credit_per_candidate_is_the_reverse_kl_in_value_and_gradient():
    student, teacher = two_log_probs()

    def by_credit(x):
        return candidate_loss(x, distillation_advantages(x, teacher))

    def total(loss):
        return jax.grad(lambda z: jnp.sum(loss(log_softmax(z))))(student)

    np.testing.assert_allclose(by_credit(student), reverse_kl(student, teacher), rtol=EXACT)
    got, want = total(by_credit), total(lambda x: reverse_kl(x, teacher))
    np.testing.assert_allclose(got, want, atol=EXACT)


def test_credit_of_the_sampled_token_averages_to_credit_per_candidate():
    """Any advantage, clipped ones too; in the gradient, not in the value."""
    logits, teacher = two_log_probs()
    advantages = distillation_advantages(logits, teacher, clip=0.7)
    assert jnp.any(jnp.abs(advantages) == 0.7) and jnp.any(jnp.abs(advantages) < 0.7)

    def one(z, y):
        targets = jnp.full((B, T), y)
        log_probs = select_targets(log_softmax(z), targets)
        loss = score_function_loss(log_probs, select_targets(advantages, targets))
        return jnp.sum(jnp.exp(jax.lax.stop_gradient(log_probs)) * loss)

    average = sum(jax.grad(one)(logits, y) for y in range(V))
    want = jax.grad(lambda z: jnp.sum(candidate_loss(log_softmax(z), advantages)))(logits)
    np.testing.assert_allclose(average, want, atol=EXACT)


def test_advantages_are_the_log_ratio_clipped_detached_and_finite():
    student, teacher = two_log_probs()
    np.testing.assert_allclose(distillation_advantages(student, teacher), teacher - student)
    clipped = distillation_advantages(student, teacher, clip=0.5)
    np.testing.assert_allclose(clipped, np.clip(teacher - student, -0.5, 0.5))
    gradients = jax.grad(lambda *x: jnp.sum(distillation_advantages(*x) ** 2), argnums=(0, 1))(
        student, teacher
    )
    np.testing.assert_array_equal(np.stack(gradients), 0.0)
    impossible = jnp.array([0.0, -jnp.inf])
    assert np.all(np.isfinite(distillation_advantages(impossible, impossible[::-1])))
    np.testing.assert_array_equal(distillation_advantages(impossible, impossible), 0.0)


def test_a_rollouts_credit_is_the_mean_of_its_tokens():
    advantages = jnp.array(np.where(MASK, np.random.default_rng(0).normal(size=(B, T)), np.nan))
    want = [np.nanmean(row) if np.any(m) else 0.0 for row, m in zip(advantages, MASK, strict=True)]
    got = sequence_advantages(advantages, jnp.array(MASK))
    np.testing.assert_allclose(got, np.repeat(want, T).reshape(B, T), rtol=EXACT)
    gradient = jax.grad(lambda x: jnp.sum(sequence_advantages(x, jnp.array(MASK))))(advantages)
    np.testing.assert_array_equal(gradient, 0.0)


def test_the_mix_is_grpo_at_one_and_sdpo_at_zero():
    """Law 35, on-policy: the gradient of the surrogate is -A."""
    new, _, teacher = map(jnp.array, sampled())
    rewards, mask = jnp.array([0.5, -0.5, 1.0, -1.0]), jnp.array(MASK)
    distillation = distillation_advantages(new, teacher)

    def mixed(coefficient):
        advantages = mix_advantages(rewards, distillation, coefficient=coefficient)
        return jax.grad(lambda x: grpo_loss(x, new, advantages, mask, **CLIPS).mean())(new)

    grpo = jax.grad(lambda x: grpo_loss(x, new, rewards, mask, **CLIPS).mean())(new)
    sdpo = jax.grad(lambda x: jnp.sum(jnp.float64(mask) * sampled_token_loss(x, teacher)) / 6)(new)
    np.testing.assert_allclose(mixed(1.0), grpo, atol=EXACT)
    np.testing.assert_allclose(mixed(0.0), sdpo, atol=EXACT)
    np.testing.assert_allclose(mixed(0.9), 0.9 * grpo + 0.1 * sdpo, atol=EXACT)
    assert np.max(np.abs(grpo - sdpo)) > 0.01
    both = jax.grad(lambda *x: jnp.sum(mix_advantages(*x, coefficient=0.5)), argnums=(0, 1))(
        rewards, distillation
    )
    for gradient in both:
        np.testing.assert_array_equal(gradient, 0.0)


def test_modulation_is_the_formula_and_never_turns_a_sign():
    new, _, teacher = sampled()
    for advantages in (
        np.array([1.0, -2.0, 0.0, 0.5]),
        np.random.default_rng(2).normal(size=(B, T)),
    ):
        spread = advantages if advantages.ndim == 2 else np.repeat(advantages, T).reshape(B, T)
        for strength, bound in [(0.0, 0.2), (0.5, 0.2), (1.0, 1.0)]:
            got = modulate_advantages(
                *map(jnp.array, (advantages, new, teacher)), strength=strength, bound=bound
            )
            weight = np.exp(np.sign(spread) * (teacher - new)).clip(1 - bound, 1 + bound)
            np.testing.assert_allclose(got, spread * (1 - strength + strength * weight), rtol=EXACT)
            assert np.all(got * spread >= 0.0)
            if strength == 0.0:
                np.testing.assert_array_equal(got, spread)
            else:
                assert np.any(got != spread)


def test_modulation_is_detached_and_bounded_for_tokens_that_one_side_excludes():
    new = jnp.array([[-jnp.inf, -1.0, -jnp.inf]])
    teacher = jnp.array([[-1.0, -jnp.inf, -jnp.inf]])

    def modulated(*x):
        return modulate_advantages(*x, strength=1.0, bound=0.2)

    np.testing.assert_allclose(modulated(jnp.array([1.0]), new, teacher), [[1.2, 0.8, 1.0]])
    arrays = jnp.array([1.0]), jnp.maximum(new, -5.0), jnp.maximum(teacher, -5.0)
    for gradient in jax.grad(lambda *x: jnp.sum(modulated(*x)), argnums=(0, 1, 2))(*arrays):
        np.testing.assert_array_equal(gradient, 0.0)


# Variants of GRPO: the compositions that the head of policy_gradient.py promises, against numpy.


def assert_variant(loss, expected, new):
    np.testing.assert_allclose(loss(jnp.array(new)), expected(new), rtol=EXACT)
    want = reference.gradient(expected, new)
    np.testing.assert_allclose(jax.grad(loss)(jnp.array(new)), want, atol=EXACT)
    assert np.any(want != 0.0)


REWARDS = np.array([1.0, 0.0, 0.25, 1.0])


def advantages(scale=False):
    got = group_advantages(jnp.array(REWARDS), 2, scale=scale)
    want = reference.group_advantages(REWARDS, 2, scale)
    np.testing.assert_allclose(got, want, rtol=EXACT)
    return got, want[:, None] * np.ones((1, T))


def test_first_grpo_is_scaled_averaged_per_row_and_held_near_a_reference():
    new, old, other = sampled()
    got, want = advantages(scale=True)

    def loss(x):
        surrogate = grpo_loss(x, jnp.array(old), got, jnp.array(MASK), **CLIPS).per_token
        kl = reference_kl(x, jnp.array(other))
        return sequence_mean(surrogate + 0.04 * kl, jnp.array(MASK)).mean()

    def expected(x):
        surrogate = reference.surrogate(x, old, want)
        return reference.sequence_mean(surrogate + 0.04 * reference.k3(x, other), MASK)

    assert_variant(loss, expected, new)


def test_dr_grpo_divides_by_a_fixed_length():
    new, old, _ = sampled()
    got, want = advantages()

    def loss(x):
        output = grpo_loss(x, jnp.array(old), got, jnp.array(MASK), **CLIPS)
        return fixed_length_mean(output.per_token, jnp.array(MASK), length=16).mean()

    def expected(x):
        return reference.fixed_length_mean(reference.surrogate(x, old, want), MASK, 16)

    assert_variant(loss, expected, new)


def test_dapo_is_the_token_mean_with_clip_higher():
    new, old, _ = sampled()
    got, want = advantages()
    clips = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": math.inf}

    def loss(x):
        return grpo_loss(x, jnp.array(old), got, jnp.array(MASK), **clips).mean()

    def expected(x):
        return reference.token_mean(reference.surrogate(x, old, want, dual=1e300), MASK)

    assert_variant(loss, expected, new)


def test_gspo_is_the_ratio_of_rollouts():
    """Clips wide enough that some ratios of rollouts lie within, and some beyond."""
    new, old, _ = sampled()
    got, want = advantages()
    clips = {"clip_low": 0.9, "clip_high": 0.9, "dual_clip": 3.0}

    def loss(x):
        rows, old_rows = (sequence_log_probs(y, jnp.array(MASK)) for y in (x, jnp.array(old)))
        return jnp.mean(policy_gradient_loss(rows, old_rows, got, **clips))

    def expected(x):
        lengths = np.maximum(MASK.sum(axis=1), 1)
        rows, old_rows = (np.sum(MASK * y, axis=1) / lengths for y in (x, old))
        loss = reference.surrogate(rows, old_rows, want[:, 0], low=0.9, high=0.9)
        return np.mean(loss)

    assert_variant(loss, expected, new)


def test_cispo_weighs_the_score_by_a_capped_ratio():
    new, old, _ = sampled()
    got, want = advantages()
    rows = jnp.broadcast_to(got[:, None], (B, T))

    def loss(x):
        weights = truncated_importance_weights(x, jnp.array(old), cap=1.28)
        return jnp.sum(jnp.array(MASK, float) * score_function_loss(x, rows * weights)) / 6

    def expected(x):
        return -np.sum(MASK * reference.importance(x, old, 1.28) * want * x) / 6

    assert_variant(loss, expected, new)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rollout_log_probs_add_up_in_float32(dtype):
    """In bfloat16 a mean of 1000 tokens has two digits."""
    log_probs = jnp.full((1, 1000), -1.2, dtype)
    got = sequence_log_probs(log_probs, jnp.ones((1, 1000), bool))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.float32(log_probs[0, 0]), rtol=1e-5)


def test_a_masked_log_prob_may_be_anything_in_a_rollouts_mean():
    log_probs = jnp.array([[-1.0, jnp.nan], [-2.0, -jnp.inf]])
    mask = jnp.array([[1, 0], [1, 0]])
    value, back = jax.vjp(lambda x: sequence_log_probs(x, mask), log_probs)
    np.testing.assert_array_equal(value, [-1.0, -2.0])
    np.testing.assert_array_equal(back(jnp.ones(2))[0], [[1.0, 0.0], [1.0, 0.0]])
