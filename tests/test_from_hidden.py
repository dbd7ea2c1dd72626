"""Losses from hidden states are the losses from logits; every option of the pass in one place."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_versions import from_logits

from sdpo_jax.losses.distillation import sampled_token_loss, sdpo_loss
from sdpo_jax.losses.divergences import clip_entries, divergence_terms, generalized_jsd
from sdpo_jax.losses.from_hidden import grpo_from_hidden, sdpo_from_hidden, sft_from_hidden
from sdpo_jax.losses.fused_linear import checkpointed_linear_loss, fused_linear_loss
from sdpo_jax.losses.likelihood import sft_loss
from sdpo_jax.losses.per_token import (
    GrpoSharedInputs,
    GrpoTokenInputs,
    MixedSharedInputs,
    MixedTokenInputs,
    SdpoSharedInputs,
    SdpoTokenInputs,
    grpo_per_token,
    mixed_per_token,
    sampled_token_sdpo,
    sdpo_per_token,
)
from sdpo_jax.losses.policy_gradient import grpo_loss, policy_gradient_loss, sequence_log_probs
from sdpo_jax.losses.reductions import (
    fixed_length_mean_weights,
    sequence_mean,
    sequence_mean_weights,
)
from sdpo_jax.losses.vocabulary import (
    log_softmax,
    scale_logits,
    select_targets,
    trust_region_logits,
)
from sdpo_jax.losses.weights import disagreement_weights

B, T, D, V = 3, 4, 5, 7
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
MASK = jnp.array([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
ROUNDING = 3e-6
keys = jax.random.split(jax.random.key(0), 8)
HIDDEN, TEACHER = (jax.random.normal(k, (B, T, D)) for k in keys[:2])
HEAD, TEACHER_HEAD = (jax.random.normal(k, (D, V)) for k in keys[2:4])
TARGETS = jax.random.randint(keys[4], (B, T), 0, V)
WEIGHTS = jax.random.uniform(keys[5], (B, T))
NOISE = 0.4 * jax.random.normal(keys[6], (B, T))


def log_prob_of(hidden, head, temperature=1.0):
    log_probs = log_softmax(scale_logits(hidden @ head, temperature=temperature))
    return select_targets(log_probs, TARGETS)


OLD = log_prob_of(HIDDEN, HEAD) + NOISE


def compare(from_hidden, from_logits):
    """Values and gradients by hidden states and head; the metrics are [B, T]."""
    got, metrics = jax.jit(from_hidden)(HIDDEN, HEAD)
    want = from_logits(HIDDEN, HEAD)
    np.testing.assert_allclose(got.mean(), want.mean(), rtol=ROUNDING)
    np.testing.assert_allclose(got.weight, want.weight)
    np.testing.assert_allclose(got.per_token, want.per_token, atol=ROUNDING)
    assert {x.shape for x in metrics.values()} == {(B, T)}
    gradients = [
        jax.grad(lambda h, w, f=f: f(h, w).mean(), argnums=(0, 1))(HIDDEN, HEAD)
        for f in (lambda h, w: from_hidden(h, w)[0], from_logits)
    ]
    for g, w in zip(*gradients, strict=True):
        np.testing.assert_allclose(g, w, atol=ROUNDING)
    return metrics


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_sdpo(chunk, alpha):
    def from_hidden(hidden, head):
        return sdpo_from_hidden(
            hidden, head, TEACHER, TEACHER_HEAD, TARGETS, MASK,
            alpha=alpha, chunk=chunk, weights=WEIGHTS, temperature=1.3,
        )  # fmt: skip

    def from_logits(hidden, head):
        student, teacher = hidden @ head / 1.3, TEACHER @ TEACHER_HEAD / 1.3
        return sdpo_loss(student, teacher, MASK, alpha=alpha, weights=WEIGHTS)

    metrics = compare(from_hidden, from_logits)
    np.testing.assert_allclose(metrics["log_prob"], log_prob_of(HIDDEN, HEAD, 1.3), atol=ROUNDING)


def test_grpo():
    advantages = jnp.array([1.0, -0.5, 0.3])

    def from_logits(hidden, head):
        return grpo_loss(log_prob_of(hidden, head), OLD, advantages, MASK, weights=WEIGHTS, **CLIPS)

    compare(
        lambda hidden, head: grpo_from_hidden(
            hidden, head, TARGETS, OLD, advantages, MASK, chunk=5, weights=WEIGHTS, **CLIPS
        ),
        from_logits,
    )


def test_sft():
    rows = jnp.array([0.5, 2.0, 1.0])
    options = {"label_smoothing": 0.1, "weights": rows}
    compare(
        lambda h, w: sft_from_hidden(h, w, TARGETS, MASK, chunk=5, **options),
        lambda h, w: sft_loss(h @ w, TARGETS, MASK, **options),
    )


@pytest.mark.parametrize(
    ("reduction", "denominator"),
    [(sequence_mean_weights, 3.0), (partial(fixed_length_mean_weights, length=5), 15.0)],
)
def test_other_reductions(reduction, denominator):
    loss, _ = sft_from_hidden(HIDDEN, HEAD, TARGETS, MASK, chunk=5, reduction=reduction)
    assert loss.weight == denominator
    plain = sft_loss(HIDDEN @ HEAD, TARGETS, MASK).per_token
    want = sequence_mean(plain, MASK).total if denominator == 3.0 else jnp.sum(plain)
    np.testing.assert_allclose(loss.total, want, rtol=ROUNDING)


def one_pass(per_token, tokens, constants, hidden=HIDDEN, head=HEAD):
    """Loss and metrics of all tokens with weight 1."""
    flat = partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[2:]))
    total, metrics = fused_linear_loss(
        per_token, flat(hidden), head, flat(tokens), jnp.ones(B * T), chunk=5, constants=constants
    )
    return total, {k: x.reshape(B, T) for k, x in metrics.items()}


def constants(temperature=1.0, **more):
    return SdpoSharedInputs(TEACHER_HEAD, jnp.float32(temperature), **more)


JSD = partial(generalized_jsd, alpha=0.5)


def test_both_logits_are_divided_by_the_temperature():
    """Law 8, and that a temperature of 1 changes nothing."""
    tokens = SdpoTokenInputs(TEACHER, TARGETS)
    _, metrics = one_pass(sdpo_per_token(JSD), tokens, constants(0.7))
    want = from_logits(JSD, HIDDEN @ HEAD / 0.7, TEACHER @ TEACHER_HEAD / 0.7)
    np.testing.assert_allclose(metrics["loss"], want, atol=ROUNDING)
    _, metrics = one_pass(sdpo_per_token(JSD), tokens, constants())
    np.testing.assert_allclose(
        metrics["loss"], from_logits(JSD, HIDDEN @ HEAD, TEACHER @ TEACHER_HEAD), atol=ROUNDING
    )


def test_a_trust_region_teacher_mixes_two_models_after_one_prompt():
    """Law 24: reference and student both read the teacher's prompt, hence two hidden states."""
    live = jax.random.normal(keys[7], (B, T, D))
    tokens = SdpoTokenInputs(TEACHER, TARGETS, live_hidden=live)
    more = {"live_head": HEAD, "coefficient": jnp.float32(0.3)}
    _, metrics = one_pass(sdpo_per_token(JSD), tokens, constants(**more))
    teacher = trust_region_logits(TEACHER @ TEACHER_HEAD, live @ HEAD, 0.3)
    np.testing.assert_allclose(
        metrics["loss"], from_logits(JSD, HIDDEN @ HEAD, teacher), atol=ROUNDING
    )
    for coefficient, hidden, head in ((0.0, TEACHER, TEACHER_HEAD), (1.0, live, HEAD)):
        more["coefficient"] = jnp.float32(coefficient)
        _, metrics = one_pass(sdpo_per_token(JSD), tokens, constants(**more))
        want = from_logits(JSD, HIDDEN @ HEAD, hidden @ head)
        np.testing.assert_allclose(metrics["loss"], want, atol=ROUNDING)


def test_the_sampled_token_form():
    loss = sampled_token_sdpo(importance_cap=1.1)
    _, metrics = one_pass(loss, SdpoTokenInputs(TEACHER, TARGETS, OLD), constants())
    plain = sampled_token_loss(log_prob_of(HIDDEN, HEAD), log_prob_of(TEACHER, TEACHER_HEAD))
    np.testing.assert_allclose(metrics["divergence"], plain, rtol=ROUNDING, atol=ROUNDING)
    weights = jnp.minimum(jnp.exp(log_prob_of(HIDDEN, HEAD) - OLD), 1.1)
    np.testing.assert_allclose(metrics["loss"], weights * plain, rtol=5e-6, atol=5e-6)


def test_weights_from_what_the_pass_sees_are_detached_and_reported():
    def weigh(products):
        return disagreement_weights(products.jsd, beta=8.0, max_reduction=0.5)

    tokens = SdpoTokenInputs(TEACHER, TARGETS)
    total, metrics = one_pass(sdpo_per_token(JSD, weigh=weigh), tokens, constants())
    want = disagreement_weights(metrics["jsd"], beta=8.0, max_reduction=0.5)
    np.testing.assert_allclose(metrics["weight"], want, atol=ROUNDING)
    assert float(metrics["weight"].min()) < 0.95
    np.testing.assert_allclose(total, jnp.sum(want * metrics["divergence"]), rtol=ROUNDING)

    def weighted(hidden):
        plain = from_logits(JSD, hidden @ HEAD, TEACHER @ TEACHER_HEAD)
        return jnp.sum(jax.lax.stop_gradient(want) * plain)

    got = jax.grad(lambda h: one_pass(sdpo_per_token(JSD, weigh=weigh), tokens, constants(), h)[0])
    np.testing.assert_allclose(got(HIDDEN), jax.grad(weighted)(HIDDEN), atol=ROUNDING)


def test_vocabulary_entries_can_be_clipped_inside_the_pass():
    clipped = partial(JSD, transform_terms=partial(clip_entries, bound=0.02))
    _, metrics = one_pass(sdpo_per_token(clipped), SdpoTokenInputs(TEACHER, TARGETS), constants())
    pair = log_softmax(HIDDEN @ HEAD), log_softmax(TEACHER @ TEACHER_HEAD)
    want = jnp.sum(jnp.minimum(divergence_terms(*pair, alpha=0.5), 0.02), axis=-1)
    np.testing.assert_allclose(metrics["loss"], want, atol=ROUNDING)
    assert float(jnp.mean(metrics["loss"])) < 0.5 * float(jnp.mean(metrics["jsd"]))


def test_a_mixture_is_the_weighted_sum_of_both():
    advantages = jnp.broadcast_to(jnp.array([[1.0], [-0.5], [0.3]]), (B, T))
    first, second = SdpoTokenInputs(TEACHER, TARGETS), GrpoTokenInputs(TARGETS, OLD, advantages)
    loss = mixed_per_token(sdpo_per_token(JSD), grpo_per_token(**CLIPS))
    both = MixedSharedInputs(constants(), GrpoSharedInputs(jnp.float32(1.0)))
    tokens = MixedTokenInputs(first, second, WEIGHTS, 1.0 - WEIGHTS)
    _, metrics = one_pass(loss, tokens, both)
    sdpo = from_logits(JSD, HIDDEN @ HEAD, TEACHER @ TEACHER_HEAD)
    grpo = policy_gradient_loss(log_prob_of(HIDDEN, HEAD), OLD, advantages, **CLIPS)
    want = WEIGHTS * sdpo + (1.0 - WEIGHTS) * grpo
    np.testing.assert_allclose(metrics["loss"], want, atol=ROUNDING)


def test_a_ratio_of_rollouts_goes_through_the_checkpointed_linear_loss():
    """GSPO is no sum over tokens: the log-probs have to be differentiable one by one."""
    advantages = jnp.array([1.0, -0.5, 0.3])

    def gspo(log_probs):
        rows, old = (sequence_log_probs(x, MASK) for x in (log_probs, OLD))
        return jnp.mean(policy_gradient_loss(rows, old, advantages, **CLIPS))

    def score(logits, targets, constants):
        del constants
        return select_targets(log_softmax(logits), targets), {}

    def from_hidden(hidden, head):
        log_probs, _ = checkpointed_linear_loss(
            score, hidden.reshape(-1, D), head, TARGETS.reshape(-1), chunk=5
        )
        return gspo(log_probs.reshape(B, T))

    got = jax.value_and_grad(from_hidden, argnums=(0, 1))(HIDDEN, HEAD)
    want = jax.value_and_grad(lambda h, w: gspo(log_prob_of(h, w)), argnums=(0, 1))(HIDDEN, HEAD)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=ROUNDING)


def test_the_head_gradient_of_the_checkpointed_linear_loss_adds_up_in_float32():
    """256 chunks of one token, each adding 1: a bfloat16 sum stands still at 256."""
    hidden, head = jnp.ones((512, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16)

    def total(head):
        return jnp.sum(
            checkpointed_linear_loss(lambda z, aux, c: (z[:, 0], {}), hidden, head, None, chunk=1)[
                0
            ]
        )

    np.testing.assert_array_equal(np.float32(jax.grad(total)(head)), [[512.0, 0.0]])
