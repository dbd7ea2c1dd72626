"""The fused linear loss is the plain loss of all logits, for any chunk, padding and dtype."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from jax_versions import quick_jit
from linear_problem import (
    CLIPS,
    FLOAT32,
    OBJECTIVES,
    V,
    all_logits_at_once,
    assert_close,
    in_first_chunks,
    problem,
    run,
)

from sdpo_jax.losses.distillation import sdpo_loss
from sdpo_jax.losses.fused_linear import fused_linear_loss
from sdpo_jax.losses.likelihood import sft_loss
from sdpo_jax.losses.per_token import SftTokenInputs
from sdpo_jax.losses.policy_gradient import grpo_loss
from sdpo_jax.losses.reductions import sequence_mean_weights, token_mean_weights
from sdpo_jax.losses.vocabulary import log_softmax, select_targets
from sdpo_jax.losses.weights import truncated_importance_weights


@pytest.mark.parametrize("name", ["sdpo_jsd", "grpo", "sft"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 48, 1000])
def test_equals_plain_autodiff_for_any_chunk_size(name, chunk):
    arrays = problem(name)
    got = run(fused_linear_loss, name, *arrays, chunk=chunk)
    assert_close(got, run(all_logits_at_once, name, *arrays, chunk=chunk), FLOAT32)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_plain_autodiff_to_the_last_digits_in_float64(x64, name):
    arrays = problem(name, dtype=np.float64)
    got = run(fused_linear_loss, name, *arrays, chunk=7)
    assert_close(got, run(all_logits_at_once, name, *arrays, chunk=7), 1e-12)


@pytest.mark.parametrize("name", ["sdpo_jsd", "sft"])
def test_gradient_matches_finite_differences(x64, name):
    hidden, head, aux, weights, constants = problem(name, tokens=5, dtype=np.float64)
    if name == "sdpo_jsd":  # on the plateau of the detached importance weight
        aux = aux._replace(old_log_probs=jnp.full(5, -30.0))

    def loss(hidden, head):
        return fused_linear_loss(
            OBJECTIVES[name], hidden, head, aux, weights, chunk=2, constants=constants
        )[0]

    check_grads(loss, (hidden, head), order=1, modes=["rev"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["sdpo_jsd", "sft"])
@pytest.mark.parametrize("tokens, chunk", [(1, 4), (17, 16), (47, 8)])
def test_a_ragged_last_chunk_changes_nothing(name, tokens, chunk):
    arrays = problem(name, tokens=tokens)
    got = run(fused_linear_loss, name, *arrays, chunk=chunk)
    assert_close(got, run(all_logits_at_once, name, *arrays, chunk=chunk), FLOAT32)


@pytest.mark.parametrize("name", ["sdpo_jsd", "grpo", "sft"])
def test_value_without_gradient_is_the_same(name):
    hidden, head, aux, weights, constants = problem(name)
    (want, metrics), _ = run(
        fused_linear_loss, name, hidden, head, aux, weights, constants, chunk=7, scale=1.0
    )
    got = fused_linear_loss(
        OBJECTIVES[name], hidden, head, aux, weights, chunk=7, constants=constants
    )
    assert_close(got, (want, metrics), 1e-6)


@pytest.mark.parametrize("name", ["sdpo_jsd", "grpo", "sft"])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_a_token_of_weight_zero_is_exactly_absent(name, garbage):
    hidden, head, aux, weights, constants = problem(name)
    weights = weights.at[3].set(0.0).at[40].set(0.0)
    rows = jnp.array([3, 40])
    spoilt = jax.tree.map(
        lambda x: x.at[rows].set(-1 if x.dtype == jnp.int32 else garbage), (hidden, aux)
    )
    (value, _), gradients = run(
        fused_linear_loss, name, spoilt[0], head, spoilt[1], weights, constants, chunk=16
    )
    (want, _), want_gradients = run(
        fused_linear_loss, name, hidden, head, aux, weights, constants, chunk=16
    )
    assert_close((value, gradients), (want, want_gradients), 1e-7)
    np.testing.assert_array_equal(gradients[0][rows], 0.0)


def test_all_weights_zero_is_a_finite_zero():
    hidden, head, aux, weights, constants = problem("sdpo_jsd")
    (value, _), gradients = run(
        fused_linear_loss,
        "sdpo_jsd",
        hidden,
        head,
        aux,
        jnp.zeros_like(weights),
        constants,
        chunk=16,
    )
    assert value == 0.0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", ["sdpo_jsd", "grpo", "sft"])
def test_everything_but_hidden_and_head_is_detached(name):
    hidden, head, aux, weights, constants = problem(name)

    def loss(arrays):
        hidden, head, aux, weights, constants = arrays
        total, metrics = fused_linear_loss(
            OBJECTIVES[name], hidden, head, aux, weights, chunk=16, constants=constants
        )
        return 0.0 * total + sum(jnp.sum(x) for x in metrics.values())

    metrics_only = jax.grad(loss, allow_int=True)((hidden, head, aux, weights, constants))

    def total(aux, weights, constants):
        return fused_linear_loss(
            OBJECTIVES[name], hidden, head, aux, weights, chunk=16, constants=constants
        )[0]

    detached = jax.grad(total, argnums=(0, 1, 2), allow_int=True)(aux, weights, constants)
    for gradient in jax.tree.leaves((metrics_only, detached)):
        if gradient.dtype != jax.dtypes.float0:
            np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", ["sdpo_jsd", "grpo", "sft"])
def test_bfloat16_hidden_and_float32_head(name):
    hidden, head, aux, weights, constants = problem(name)
    low = hidden.astype(jnp.bfloat16)
    (value, metrics), (hidden_grad, head_grad) = run(
        fused_linear_loss, name, low, head, aux, weights, constants, chunk=16
    )
    assert value.dtype == jnp.float32 and hidden_grad.dtype == jnp.bfloat16
    assert head_grad.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in metrics.values())
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    (want, _), (_, want_head) = run(
        fused_linear_loss, name, low.astype(jnp.float32), rounded, aux, weights, constants, chunk=16
    )
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-5)
    # The logits' gradient is rounded to bfloat16 once, 2^-9, before an exact sum over tokens.
    np.testing.assert_allclose(head_grad, want_head, rtol=0.01, atol=0.01 * np.abs(want_head).max())


def test_head_gradient_accumulates_in_float32():
    """Many small terms in bfloat16 would stop adding up: 1 + 2^-9 is 1."""
    tokens = 4096

    def first_logit(logits, aux, constants):
        return logits[:, 0], {}

    def total(head):
        hidden = jnp.ones((tokens, 1), jnp.bfloat16)
        return fused_linear_loss(first_logit, hidden, head, (), jnp.ones(tokens), chunk=1)[0]

    assert jax.grad(total)(jnp.ones((1, 2)))[0, 0] == tokens


def test_sdpo_per_token_is_sdpo_loss_with_both_logits_divided_by_the_temperature():
    hidden, head, aux, _, constants = problem("sdpo_jsd")
    mask = jnp.array(np.random.default_rng(1).integers(0, 2, size=(4, 12)))
    weights, denominator = token_mean_weights(mask)
    total, metrics = fused_linear_loss(
        OBJECTIVES["sdpo_jsd"],
        hidden,
        head,
        aux,
        weights.reshape(-1),
        chunk=16,
        constants=constants,
    )
    student = (hidden @ head / constants.temperature).reshape(4, 12, V)
    teacher = (aux.teacher_hidden @ constants.teacher_head / constants.temperature).reshape(
        4, 12, V
    )
    targets, old = aux.targets.reshape(4, 12), aux.old_log_probs.reshape(4, 12)
    log_probs = select_targets(log_softmax(student), targets)
    importance = truncated_importance_weights(log_probs, old, cap=2.0)
    want = sdpo_loss(student, teacher, mask, alpha=0.5, weights=importance)
    np.testing.assert_allclose(total / denominator, want.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["log_prob"], log_probs.reshape(-1), rtol=1e-5, atol=1e-6)
    unweighted = sdpo_loss(student, teacher, jnp.ones_like(mask), alpha=0.5).per_token
    np.testing.assert_allclose(metrics["divergence"], unweighted.reshape(-1), rtol=1e-4, atol=1e-6)


def test_grpo_per_token_is_grpo_loss():
    hidden, head, aux, _, constants = problem("grpo")
    advantages, mask = jnp.array([1.0, -1.0, 0.5, 0.0]), jnp.ones((4, 12))
    aux = aux._replace(advantages=jnp.repeat(advantages, 12))
    weights, denominator = token_mean_weights(mask)
    total, metrics = fused_linear_loss(
        OBJECTIVES["grpo"], hidden, head, aux, weights.reshape(-1), chunk=16, constants=constants
    )
    log_probs = select_targets(log_softmax(hidden @ head / constants.temperature), aux.targets)
    old = aux.old_log_probs
    want = grpo_loss(log_probs.reshape(4, 12), old.reshape(4, 12), advantages, mask, **CLIPS)
    np.testing.assert_allclose(total / denominator, want.mean(), rtol=1e-4, atol=1e-6)
    ratio, repeated = np.exp(log_probs - old), np.repeat(advantages, 12)
    clipped = (repeated >= 0) & (ratio > 1.28) | (repeated < 0) & ((ratio < 0.8) | (ratio > 3.0))
    np.testing.assert_array_equal(metrics["clipped"], clipped)


def test_sft_per_token_is_sft_loss_under_either_reduction():
    hidden, head, aux, _, _ = problem("sft")
    mask = jnp.array([[1] * 12, [1] * 5 + [0] * 7, [0] * 12, [1] + [0] * 11])
    logits, targets = (hidden @ head).reshape(4, 12, V), aux.targets.reshape(4, 12)
    plain = sft_loss(logits, targets, mask)
    for weights, denominator, want in [
        (*token_mean_weights(mask), plain.mean()),
        (
            *sequence_mean_weights(mask),
            jnp.sum(
                jnp.mean(plain.per_token[0])
                + jnp.mean(plain.per_token[1, :5])
                + plain.per_token[3, 0]
            )
            / 4,
        ),
    ]:
        total, metrics = fused_linear_loss(
            OBJECTIVES["sft"], hidden, head, aux, weights.reshape(-1), chunk=16
        )
        np.testing.assert_allclose(total / denominator, want, rtol=1e-5)
    np.testing.assert_array_equal(metrics["correct"], np.argmax(hidden @ head, -1) == aux.targets)


def test_vmap_and_scan_change_nothing():
    hidden, head, aux, weights, _ = problem("sft")
    parts = jax.tree.map(lambda x: x.reshape(4, 12, *x.shape[1:]), (hidden, aux, weights))

    def one(head, part):
        hidden, aux, weights = part
        return fused_linear_loss(OBJECTIVES["sft"], hidden, head, aux, weights, chunk=4)[0]

    def by_scan(head):
        return jax.lax.scan(lambda c, x: (c + one(head, x), None), jnp.zeros(()), parts)[0]

    def by_vmap(head):
        return jnp.sum(jax.vmap(one, in_axes=(None, 0))(head, parts))

    want = jax.value_and_grad(one)(head, (hidden, aux, weights))
    assert_close(jax.value_and_grad(by_scan)(head), want, 1e-6)
    assert_close(jax.value_and_grad(by_vmap)(head), want, 1e-6)


# Chunks that hold no tokens, and pieces of chunks


@pytest.mark.parametrize("name, block", [("sdpo_jsd", 8), ("sft", 4)])
def test_chunks_that_are_not_filled_are_not_read_and_the_rest_is_as_it_was(name, block):
    """One program for any number; what is left out may hold anything, and counts as nothing."""
    hidden, head, aux, weights, constants = problem(name)
    chunk = 16  # three chunks

    def compute(function, hidden, aux, weights, **filled):
        return run(function, name, hidden, head, aux, weights, constants, chunk=chunk, **filled)

    chunked = quick_jit(partial(compute, fused_linear_loss, block=block))
    plain = quick_jit(partial(compute, all_logits_at_once))
    for filled in range(4):
        read = jnp.asarray(in_first_chunks(filled, chunk=chunk, block=block))
        assert read.sum() == filled * chunk

        def spoil(x, read=read):
            garbage = jnp.asarray(-1 if x.dtype == jnp.int32 else np.nan, x.dtype)
            return jnp.where(read.reshape(-1, *(1,) * (x.ndim - 1)), x, garbage)

        kept = jnp.where(read, weights, 0.0)
        spoilt = jax.tree.map(spoil, (hidden, aux))
        (value, metrics), gradients = chunked(*spoilt, kept, filled=jnp.int32(filled))
        (want, want_metrics), want_gradients = plain(hidden, aux, kept)
        assert_close((value, gradients), (want, want_gradients), FLOAT32)
        assert_close(metrics, {k: jnp.where(read, v, 0) for k, v in want_metrics.items()}, FLOAT32)
        for x in (gradients[0], *metrics.values()):
            np.testing.assert_array_equal(np.asarray(x)[~read], 0.0)


def test_filled_chunks_have_the_same_value_without_gradient():
    hidden, head, aux, weights, _ = problem("sft")
    kept = jnp.where(in_first_chunks(2, chunk=16, block=8), weights, 0.0)
    how: Any = {"chunk": 16, "filled": jnp.int32(2)}
    got = jax.jit(partial(fused_linear_loss, OBJECTIVES["sft"], **how))(hidden, head, aux, kept)
    want, _ = run(fused_linear_loss, "sft", hidden, head, aux, kept, None, scale=1.0, **how)
    assert_close(got, want, 1e-6)


def test_the_size_of_blocks_changes_nothing():
    arrays = problem("sft", tokens=47)
    want = run(all_logits_at_once, "sft", *arrays, chunk=12)
    for block in (12, 5, 1):  # a whole chunk; what does not divide it; none at all
        assert_close(run(fused_linear_loss, "sft", *arrays, chunk=12, block=block), want, FLOAT32)


def test_shapes_are_checked():
    hidden, head, aux, weights, _ = problem("sft")
    loss = OBJECTIVES["sft"]
    with pytest.raises(ValueError, match=r"hidden \[48, 6\] and head \[5, 23\]"):
        fused_linear_loss(loss, hidden, head[:5], aux, weights, chunk=8)
    with pytest.raises(ValueError, match=r"expected weights \[48\], got \[47\]"):
        fused_linear_loss(loss, hidden, head, aux, weights[:47], chunk=8)
    with pytest.raises(ValueError, match=r"aux\.targets must lead with 48 tokens, got \[7\]"):
        fused_linear_loss(loss, hidden, head, SftTokenInputs(aux.targets[:7]), weights, chunk=8)
    with pytest.raises(ValueError, match="48 and 0"):
        fused_linear_loss(loss, hidden, head, aux, weights, chunk=0)
