"""Reports from the field about losses: masked vocabulary, equal rewards, empty masks, the tail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdpo_jax import losses
from sdpo_jax.losses.distillation import top_k_loss
from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.policy_gradient import group_advantages
from sdpo_jax.losses.reductions import sequence_mean, token_mean
from sdpo_jax.losses.vocabulary import log_softmax

MINIMA = {
    "-inf": -np.inf,
    "-1e9": -1e9,
    "float16": float(np.finfo(np.float16).min),
    "bfloat16": float(jnp.finfo(jnp.bfloat16).min),
}
LOGITS = np.array([[1.0, -0.5, 0.3, 2.0], [0.2, 0.9, -1.0, 0.0]])


def divergence(student, teacher, alpha):
    """In float64: terms without mass are 0."""
    s, t = (np.exp(x) / np.exp(x).sum() for x in (student, teacher))
    finite = (s > 0) | (t > 0)
    s, t = s[finite], t[finite]
    m = {0.0: s, 1.0: t}.get(alpha, (1 - alpha) * s + alpha * t)

    def kl(p, q):
        return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    if alpha in (0.0, 1.0):
        return kl(t, s) if alpha == 0 else kl(s, t)
    return (1 - alpha) * kl(s, m) + alpha * kl(t, m)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("minimum", MINIMA)
@pytest.mark.parametrize("who", ["teacher", "both"])
def test_a_masked_vocabulary_gives_the_value_of_float64(who, minimum, alpha):
    student, teacher = LOGITS.copy()
    teacher[1] = MINIMA[minimum]
    if who == "both":
        student[1] = MINIMA[minimum]

    def loss(x, k=None):
        s, t = log_softmax(x), log_softmax(jnp.asarray(teacher, jnp.float32))
        if k is None:
            return generalized_jsd(s, t, alpha=alpha)
        return top_k_loss(s, t, alpha=alpha, k=k, add_tail=True)

    x = jnp.asarray(student, jnp.float32)
    finite = alpha < 1 or who == "both"
    if finite:  # KL(S‖T) of a token that only the teacher cannot write is as large as the floor.
        np.testing.assert_allclose(loss(x), divergence(student, teacher, alpha), rtol=2e-5)
        np.testing.assert_allclose(loss(x, 4), loss(x), rtol=1e-4, atol=1e-6)
    for k in (None, 1, 2, 3, 4):
        value, gradient = jax.value_and_grad(lambda y, k=k: jnp.sum(loss(y, k)))(x)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e6, -3.3])
@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_have_no_advantage(scale, reward):
    found = group_advantages(jnp.full(16, reward), 8, scale=scale)
    assert (found == 0).all()


@pytest.mark.parametrize("reduce", [token_mean, sequence_mean])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_what_is_masked_is_never_seen(reduce, garbage):
    values = jnp.array([[1.0, garbage], [garbage, garbage]])
    for mask in (jnp.array([[1.0, 0.0], [0.0, 0.0]]), jnp.zeros((2, 2))):
        assert jnp.isfinite(reduce(values, mask).mean())
        assert jnp.isfinite(jax.grad(lambda x, m=mask: reduce(x, m).mean())(values)).all()


def test_the_temperature_divides_before_the_softmax():
    x = jnp.asarray(LOGITS[0], jnp.float32)
    cold = np.exp(LOGITS[0] / 0.5) / np.exp(LOGITS[0] / 0.5).sum()
    np.testing.assert_allclose(
        jnp.exp(log_softmax(losses.scale_logits(x, temperature=0.5))), cold, rtol=1e-5
    )


def test_a_bucket_holds_at_least_1e_7_as_in_the_papers_code():
    """The exact rest, 10 e^-60, cannot be told from 0 in float32, where it is lost beside 1."""
    student = jnp.array([60.0] + [0.0] * 10)
    rest = 0.796  # The teacher's mass on the other tokens; the exact value is 45.42.
    teacher = jnp.log(jnp.array([1 - rest] + [rest / 10] * 10))
    value = top_k_loss(log_softmax(student), teacher, alpha=0.0, k=1, add_tail=True)
    np.testing.assert_allclose(value, 12.32, atol=0.01)
