"""A KL to a reference, scores, and a mix whose silent half may hold anything."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.fused_linear import fused_linear_loss
from sdpo_jax.losses.kl_penalty import (
    ReferenceKlSharedInputs,
    ReferenceKlTokenInputs,
    ScoreSharedInputs,
    ScoreTokenInputs,
    score_per_token,
    with_reference_kl,
)
from sdpo_jax.losses.per_token import (
    GrpoSharedInputs,
    GrpoTokenInputs,
    MixedSharedInputs,
    MixedTokenInputs,
    SdpoSharedInputs,
    SdpoTokenInputs,
    grpo_per_token,
    mixed_per_token,
    sdpo_per_token,
)

RANDOM = np.random.default_rng(0)
TOKENS, WIDTH, VOCABULARY, TEMPERATURE, BETA = 6, 5, 11, 0.7, 0.3
HIDDEN, TEACHER, LIVE = (RANDOM.normal(size=(TOKENS, WIDTH)).astype(np.float32) for _ in range(3))
HEAD = RANDOM.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
TARGETS = RANDOM.integers(0, VOCABULARY, TOKENS)
OLD, REFERENCE = (RANDOM.normal(-2.0, 0.5, TOKENS).astype(np.float32) for _ in range(2))
ADVANTAGES = RANDOM.normal(size=TOKENS).astype(np.float32)
GRPO = grpo_per_token(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
SDPO = sdpo_per_token(partial(generalized_jsd, alpha=0.5), importance_cap=2.0)
HEAT = jnp.float32(TEMPERATURE)


def grpo_tokens():
    return GrpoTokenInputs(jnp.asarray(TARGETS), jnp.asarray(OLD), jnp.asarray(ADVANTAGES))


def log_probs(hidden):
    return reference.log_softmax(hidden.astype(np.float64) @ HEAD.astype(np.float64) / TEMPERATURE)


def summed(loss, tokens, constants, hidden, chunk=4):
    weights = jnp.ones(TOKENS)
    return fused_linear_loss(
        loss, hidden, jnp.asarray(HEAD), tokens, weights, chunk=chunk, constants=constants
    )


def test_a_reference_kl_adds_the_estimate_and_its_gradient():
    tokens = ReferenceKlTokenInputs(grpo_tokens(), jnp.asarray(TARGETS), jnp.asarray(REFERENCE))
    constants = ReferenceKlSharedInputs(GrpoSharedInputs(HEAT), HEAT)
    anchored = with_reference_kl(GRPO, coefficient=BETA)
    value = lambda h: summed(anchored, tokens, constants, h)  # noqa: E731
    alone = lambda h: summed(GRPO, tokens.objective, constants.objective, h)  # noqa: E731
    (total, metrics), gradient = jax.value_and_grad(value, has_aux=True)(jnp.asarray(HIDDEN))
    (rest, _), rest_gradient = jax.value_and_grad(alone, has_aux=True)(jnp.asarray(HIDDEN))
    logp = log_probs(HIDDEN)
    chosen = logp[np.arange(TOKENS), TARGETS]
    gap = REFERENCE - chosen
    kl = np.exp(gap) - gap - 1.0
    np.testing.assert_allclose(metrics["reference_kl"], kl, rtol=1e-4, atol=1e-6)
    assert float(total - rest) == pytest.approx(BETA * kl.sum(), rel=1e-4)
    # d kl / d logits = (1 - e^gap) (onehot - p) / temperature
    slope = (1.0 - np.exp(gap))[:, None] * (np.eye(VOCABULARY)[TARGETS] - np.exp(logp))
    expected = BETA * slope / TEMPERATURE @ HEAD.T
    np.testing.assert_allclose(gradient - rest_gradient, expected, atol=2e-5)


def test_a_negative_coefficient_is_refused():
    with pytest.raises(ValueError, match="coefficient must be at least 0, got -1"):
        with_reference_kl(GRPO, coefficient=-1.0)


@pytest.mark.parametrize("share", [None, 0.0, 0.4, 1.0])
def test_scores_are_the_log_probabilities_of_one_model_or_of_a_mixture(share):
    tokens = ScoreTokenInputs(jnp.asarray(TARGETS), None if share is None else jnp.asarray(LIVE))
    rest = () if share is None else (jnp.asarray(HEAD), jnp.float32(share))
    _, found = summed(
        score_per_token(), tokens, ScoreSharedInputs(HEAT, *rest), jnp.asarray(TEACHER)
    )
    c = share or 0.0
    expected = reference.log_softmax((1 - c) * log_probs(TEACHER) + c * log_probs(LIVE))
    chosen = expected[np.arange(TOKENS), TARGETS]
    np.testing.assert_allclose(found["log_prob"], chosen, atol=2e-6)
    entropy = -np.sum(np.exp(expected) * expected, axis=-1)
    np.testing.assert_allclose(found["entropy"], entropy, atol=2e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_what_a_mix_gives_no_weight_is_not_read(garbage):
    distilled = np.array([1, 1, 0, 0, 1, 0], np.float32)
    loss = mixed_per_token(SDPO, GRPO)
    constants = MixedSharedInputs(SdpoSharedInputs(jnp.asarray(HEAD), HEAT), GrpoSharedInputs(HEAT))

    def run(teacher, advantages):
        sdpo = SdpoTokenInputs(jnp.asarray(teacher), jnp.asarray(TARGETS), jnp.asarray(OLD))
        grpo = grpo_tokens()._replace(advantages=jnp.asarray(advantages))
        weights = jnp.asarray(distilled)
        tokens = MixedTokenInputs(sdpo, grpo, weights, 1.0 - weights)
        value = lambda h: summed(loss, tokens, constants, h)  # noqa: E731
        return jax.value_and_grad(value, has_aux=True)(jnp.asarray(HIDDEN))

    clean = run(TEACHER, ADVANTAGES)
    teacher = np.where(distilled[:, None] > 0, TEACHER, garbage)
    dirty = run(teacher, np.where(distilled > 0, garbage, ADVANTAGES))
    jax.tree.map(np.testing.assert_array_equal, *(x[1] for x in (clean, dirty)))
    assert float(clean[0][0]) == float(dirty[0][0]) and np.isfinite(float(dirty[0][0]))
    assert (np.asarray(dirty[0][1]["divergence"]) == 0).tolist() == (distilled == 0).tolist()
    np.testing.assert_array_equal(dirty[0][1]["first_active"], distilled)
