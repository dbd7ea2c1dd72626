"""Supports: ties, the student's and the teacher's ids, the tail, and distributions on one token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax_versions import enable_x64, from_logits
from jax_versions import quick_jit as compiled

from sdpo_jax.losses.credit import candidate_loss, distillation_advantages
from sdpo_jax.losses.distillation import sampled_token_loss, support_loss, top_k_loss
from sdpo_jax.losses.divergences import generalized_jsd, reverse_kl
from sdpo_jax.losses.from_hidden import sdpo_from_hidden
from sdpo_jax.losses.fused_linear import checkpointed_linear_loss, fused_linear_loss
from sdpo_jax.losses.likelihood import cross_entropy
from sdpo_jax.losses.per_token import (
    SdpoSharedInputs,
    SdpoTokenInputs,
    sampled_token_sdpo,
    sdpo_per_token,
)
from sdpo_jax.losses.support import support_log_probs, top_k_log_probs
from sdpo_jax.losses.vocabulary import (
    log_softmax,
    select_targets,
    top_k_indices,
    trust_region_logits,
)

DTYPES = ["float32", "bfloat16", "float64"]
ALPHAS = [0.0, 0.5, 1.0]


@pytest.fixture(params=DTYPES)
def dtype(request):
    with enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-2, 2), min_size=7, max_size=7), st.sampled_from(["float32", "bfloat16"])
)
def test_ties_go_to_the_smaller_id(values, dtype):
    """Five values among seven entries: every draw has ties."""
    got = top_k_indices(jnp.array(values, dtype), k=7)
    np.testing.assert_array_equal(got, reference.top_ids(np.float64(values), 7))


def test_ties_that_bfloat16_makes_go_to_the_smaller_id_and_zeros_have_no_sign():
    logits = jnp.array([1.0, 1.001, 1.002, 0.5])
    assert top_k_indices(logits, k=2).tolist() == [2, 1]
    assert top_k_indices(logits.astype(jnp.bfloat16), k=2).tolist() == [0, 1]
    for dtype in (jnp.float32, jnp.bfloat16):
        assert top_k_indices(jnp.array([-1.0, -0.0, 0.0], dtype), k=2).tolist() == [1, 2]


def test_the_ids_are_the_students_where_tops_are_disjoint(dtype):
    """Law 11."""
    student = jnp.array([5.0, 4.0, 3.0, 0.0, 0.5, 0.25], dtype)
    teacher = student[::-1]
    support = from_logits(top_k_log_probs, student, teacher, k=2, add_tail=False)
    assert support.indices.tolist() == [0, 1]
    want = reference.log_softmax(np.array([0.25, 0.5]))
    np.testing.assert_allclose(support.teacher, want, atol=1e-6)


def test_entries_keep_the_normaliser_of_the_whole_vocabulary(dtype):
    """Law 13, and with the tail the support is a distribution."""
    logits = jnp.array(np.random.default_rng(0).normal(size=(3, 9)), dtype)
    support = from_logits(top_k_log_probs, logits, logits, k=4, add_tail=True)
    whole = np.take_along_axis(np.asarray(log_softmax(logits)), support.indices, axis=-1)
    np.testing.assert_allclose(support.student[:, :4], whole, atol=1e-6)
    np.testing.assert_allclose(np.sum(np.exp(support.student), axis=-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("add_tail", [True, False])
def test_the_teachers_support_is_another_choice_of_ids(x64, add_tail):
    student, teacher = jnp.array(np.random.default_rng(0).normal(size=(2, 3, 9)))
    ids = top_k_indices(teacher, k=4)
    assert not np.array_equal(ids, top_k_indices(student, k=4))

    def loss(x):
        return jnp.sum(
            support_loss(log_softmax(x), log_softmax(teacher), ids, alpha=0.0, add_tail=add_tail)
        )

    def expected(x):
        arguments = {"alpha": 0.0, "ids": np.asarray(ids), "add_tail": add_tail}
        return np.sum(reference.distillation(x, np.asarray(teacher), **arguments))

    np.testing.assert_allclose(loss(student), expected(np.asarray(student)), rtol=1e-13)
    want = reference.gradient(expected, np.asarray(student))
    np.testing.assert_allclose(jax.grad(loss)(student), want, atol=1e-14)


def test_bfloat16_gradients_are_rounded_once():
    """Through entries and normaliser, whose gradients nearly cancel."""
    student, teacher = jnp.array(np.random.default_rng(0).normal(size=(2, 4, 9)), jnp.bfloat16)

    @compiled
    @jax.grad
    def gradient(x):
        return jnp.sum(from_logits(top_k_loss, x, teacher, alpha=0.5, k=3, add_tail=True))

    wide = gradient(student.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gradient(student), wide)


@pytest.mark.parametrize("gap", [10.0, 17.0, 40.0, 1e4])
def test_the_tail_is_finite_and_never_below_its_clamp(dtype, gap):
    """Law 12: the mass of the top rounds to 1, or above it."""
    logits = jnp.array([[gap, 0.0, 0.0, 0.0]], dtype)

    def tail(x):
        return support_log_probs(log_softmax(x), jnp.array([[0]]), add_tail=True)[0, 1]

    value, gradient = jax.value_and_grad(tail)(logits)
    exact = np.log(3.0) - gap - np.log1p(3.0 * np.exp(-gap))
    # 1 - e^s has the digits of the mass, 2^-24: none are left at 1e-7.
    precision = 1e-6 if dtype == jnp.float64 else 2.0**-22 / np.exp(max(exact, np.log(1e-7)))
    np.testing.assert_allclose(value, max(exact, np.log(1e-7)), atol=max(precision, 1e-6))
    assert np.all(np.isfinite(np.float64(gradient)))
    if exact < np.log(1e-7) - 1.0:
        np.testing.assert_array_equal(gradient, 0.0)


INF = np.inf
CERTAIN = {
    "one token": ([0.0], [0.0]),
    "impossible for both": ([0.0, 1.0, -INF], [1.0, 0.0, -INF]),
    "impossible for the student": ([0.0, 1.0, -INF], [1.0, 0.0, 2.0]),
    "impossible for the teacher": ([0.0, 1.0, 2.0], [1.0, 0.0, -INF]),
    "certain and equal": ([0.0, -INF, -INF], [0.0, -INF, -INF]),
    "certain and disjoint": ([0.0, -INF, -INF], [-INF, 0.0, -INF]),
    "certain by far": ([0.0, -1e4, -1e4], [-1e4, 0.0, 3e4]),
    "top of the student impossible": ([2.0, 1.0, 0.0], [-INF, -INF, 0.0]),
}


def estimators(size):
    """Name to loss of logits [V] and targets; every estimator and credit."""

    def of_target(function):
        def loss(s, t):
            targets = jnp.zeros(s.shape[:-1], jnp.int32)
            return function(*(select_targets(log_softmax(x), targets) for x in (s, t)))

        return loss

    def candidates(s, t):
        s, t = log_softmax(s), log_softmax(t)
        return candidate_loss(s, distillation_advantages(s, t))

    def smoothed(s, t):
        del t
        return cross_entropy(s, jnp.zeros(s.shape[:-1], jnp.int32), label_smoothing=0.1)

    tops = {
        f"top {k} {tail} {alpha}": partial(from_logits, top_k_loss, alpha=alpha, k=k, add_tail=tail)
        for k in {1, size}
        for tail in (True, False)
        for alpha in ALPHAS
    }
    full = {f"full {a}": partial(from_logits, generalized_jsd, alpha=a) for a in ALPHAS}
    other = {"sampled": of_target(sampled_token_loss), "candidates": candidates, "sft": smoothed}
    return {**full, **tops, **other}


@pytest.mark.parametrize("size", [1, 3])
def test_certain_tokens_give_finite_values_and_gradients(dtype, size):
    """Law 12 and more: every estimator on every pair of the table, in one batch."""
    rows = [pair for pair in CERTAIN.values() if len(pair[0]) == size]
    student, teacher = (jnp.array(np.array(x), dtype) for x in zip(*rows, strict=True))

    @compiled
    def compute(s, t):
        def pull(loss):
            values, back = jax.vjp(lambda x: loss(x, t), s)
            return values, back(jnp.ones_like(values))[0]

        return {name: pull(loss) for name, loss in estimators(size).items()}

    for name, (values, gradients) in compute(student, teacher).items():
        assert np.all(np.isfinite(np.float64(values))), name
        assert np.all(np.isfinite(np.float64(gradients))), name
        if "full" in name or "top" in name:
            assert np.all(values >= -1e-6), name
        if size == 1:
            np.testing.assert_allclose(values, 0.0, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(gradients, 0.0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["full", "top", "sampled"])
def test_certain_tokens_are_finite_through_the_head(name):
    """The head is the identity, so that hidden states are logits."""
    rows = [(np.maximum(s, -1e9), np.maximum(t, -1e9)) for s, t in CERTAIN.values() if len(s) == 3]
    hidden, teacher = (jnp.float32(np.array(x)) for x in zip(*rows, strict=True))
    loss = {
        "full": sdpo_per_token(partial(generalized_jsd, alpha=0.5)),
        "top": sdpo_per_token(partial(top_k_loss, alpha=1.0, k=2, add_tail=True)),
        "sampled": sampled_token_sdpo(),
    }[name]
    tokens = SdpoTokenInputs(teacher, jnp.zeros(len(rows), jnp.int32))
    constants = SdpoSharedInputs(jnp.eye(3), jnp.float32(1.0))
    weights = jnp.ones(len(rows))

    def chunked(hidden):
        arguments = {"chunk": 2, "constants": constants}
        return fused_linear_loss(loss, hidden, jnp.eye(3), tokens, weights, **arguments)

    def checkpointed(hidden):
        values, metrics = checkpointed_linear_loss(
            loss, hidden, jnp.eye(3), tokens, chunk=2, constants=constants
        )
        return jnp.sum(values), metrics

    got = compiled(jax.value_and_grad(chunked, has_aux=True))(hidden)
    for leaf in jax.tree.leaves(got):
        assert np.all(np.isfinite(leaf))
    for a, b in zip(
        jax.tree.leaves(got[1]),
        jax.tree.leaves(compiled(jax.grad(checkpointed, has_aux=True))(hidden)[0]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_vocabulary_of_one_is_finite_from_hidden_states():
    hidden = jnp.ones((1, 3, 2))
    targets, mask = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3))

    def loss(hidden):
        arguments = {"alpha": 0.5, "chunk": 2}
        return sdpo_from_hidden(
            hidden, jnp.ones((2, 1)), -hidden, jnp.ones((2, 1)), targets, mask, **arguments
        )[0].mean()

    value, gradient = jax.value_and_grad(loss)(hidden)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_an_impossible_token_stays_impossible_in_a_mixed_teacher():
    """The contrastive factor is negative, and inf - inf would be NaN for the whole row."""
    logits = jnp.array([1.0, 0.0, -jnp.inf])
    for coefficient in (-0.5, 0.0, 0.3, 1.0, 1.5):
        mixed = trust_region_logits(logits, logits, coefficient)
        np.testing.assert_allclose(mixed, logits, rtol=1e-6)
        np.testing.assert_allclose(from_logits(reverse_kl, logits, mixed), 0.0, atol=1e-6)
