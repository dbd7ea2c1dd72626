"""Laws of the losses on drawn inputs, and identities between their targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax_versions import enable_x64
from loss_table import ALPHAS, DISJOINT, PAIR, full, jit, pairs, top

from sdpo_jax.losses.distillation import sdpo_loss
from sdpo_jax.losses.divergences import generalized_jsd, reverse_kl
from sdpo_jax.losses.likelihood import sft_loss
from sdpo_jax.losses.policy_gradient import grpo_loss
from sdpo_jax.losses.reductions import divide, fixed_length_mean, sequence_mean, token_mean
from sdpo_jax.losses.vocabulary import WHOLE, log_softmax, trust_region_logits
from sdpo_jax.teacher.weights import ema_update

# Properties of drawn inputs. Every function is compiled once.

drawn = settings(max_examples=25, deadline=None, derandomize=True)
seeds, scales = st.integers(0, 2**32 - 1), st.floats(0.01, 20.0)


def draw(seed, scale, *shape):
    return np.float32(scale * np.random.default_rng(seed).normal(size=shape))


@jit
def climb(student, teacher):
    """For each alpha the divergence with tail for k = 1...V, and then the full one."""
    return jnp.stack(
        [
            jnp.stack(
                [top(k, True, alpha)(student, teacher, WHOLE) for k in range(1, 7)]
                + [full(alpha)(student, teacher, WHOLE)]
            )
            for alpha in (0.0, 0.5, 1.0)
        ]
    )


@drawn
@given(seeds, st.floats(0.01, 2.0), st.floats(0.01, 2.0))
def test_a_support_with_tail_is_a_lower_bound_that_grows_to_the_full_divergence(seed, a, b):
    """Law 9, in float64 and with tails that the clamp at 1e-7 leaves alone."""
    with enable_x64(True):
        steps = np.asarray(climb(np.float64(draw(seed, a, 6)), np.float64(draw(seed + 1, b, 6))))
    assert np.all(steps >= -1e-12)
    assert np.all(np.diff(steps[:, :6], axis=1) >= -1e-9)
    np.testing.assert_allclose(steps[:, 4:6], steps[:, [6, 6]], atol=1e-9, rtol=0)


@jit
def jensen_shannon(s, t):
    values = jnp.stack([generalized_jsd(s, t, alpha=a) for a in ALPHAS])
    return values, generalized_jsd(t, s, alpha=0.5)


@drawn
@given(seeds, scales, scales, st.permutations(range(9)), st.floats(-50.0, 50.0))
def test_order_and_origin_of_drawn_logits_change_nothing(seed, a, b, order, shift):
    s, t = draw(seed, a, 9), draw(seed + 1, b, 9)
    values, swapped = jensen_shannon(log_softmax(s), log_softmax(t))
    moved, _ = jensen_shannon(
        log_softmax(s[list(order)] + np.float32(shift)), log_softmax(t[list(order)])
    )
    # Adding 50 rounds a logit to 50 · 2^-24 = 3e-6; the sensitivity is the spread of the logits.
    np.testing.assert_allclose(moved, values, rtol=1e-4, atol=1e-5 * (1 + a + b))
    np.testing.assert_allclose(swapped, values[2], rtol=1e-5, atol=1e-6)
    assert np.all(values >= -1e-6 * (1 + a + b)) and values[2] <= np.log(2) + 1e-6


CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
B, T, V = 3, 4, 5


@jit
def three_losses(logits, teacher, targets, old, advantages, weights, mask):
    """SDPO, GRPO and SFT of one batch: totals, values per token, gradients by logits."""

    def losses(logits, log_probs):
        return (
            sdpo_loss(logits, teacher, mask, alpha=0.5, weights=weights),
            grpo_loss(log_probs, old, advantages, mask, **CLIPS, weights=weights),
            sft_loss(logits, targets, mask, weights=weights),
        )

    outputs = losses(logits, old + 0.1)
    gradients = jax.grad(lambda *x: sum(y.total for y in losses(*x)), argnums=(0, 1))
    return [(y.total, y.weight, y.per_token) for y in outputs], gradients(logits, old + 0.1)


def arguments(seed):
    random = np.random.default_rng(seed)
    logits, teacher = np.float32(random.normal(size=(2, B, T, V)))
    old, advantages, weights = np.float32(random.normal(size=(3, B, T)))
    mask = random.integers(0, 2, size=(B, T))
    return logits, teacher, random.integers(0, V, size=(B, T)), old, advantages, weights**2, mask


@drawn
@given(seeds, st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38]))
def test_masked_tokens_are_exactly_absent(seed, garbage):
    """Law 18: padding on either side, or anywhere, may hold anything; not a bit changes."""
    *arrays, mask = arguments(seed)
    spoilt = []
    for x in arrays:
        fill = -7 if x.dtype.kind == "i" else garbage
        gone = (mask == 0).reshape(mask.shape + (1,) * (x.ndim - 2))
        spoilt.append(np.where(gone, np.asarray(fill, x.dtype), x))
    got, want = three_losses(*spoilt, mask), three_losses(*arrays, mask)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for gradient in got[1]:
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(np.asarray(gradient)[mask == 0], 0.0)


@drawn
@given(seeds, st.integers(1, B - 1), st.permutations(range(B)))
def test_a_batch_may_be_cut_anywhere_and_ordered_in_any_way(seed, cut, order):
    """Law 19: sums and weights add up, whatever the rows' company."""
    arrays = [x[list(order)] for x in arguments(seed)]
    whole, whole_gradients = three_losses(*arguments(seed))
    parts = [three_losses(*(x[rows] for x in arrays)) for rows in (slice(cut), slice(cut, B))]
    gradients = jax.tree.map(lambda *x: np.concatenate(x), *(part[1] for part in parts))
    inverse = np.argsort(order)
    for got, want in zip(gradients, whole_gradients, strict=True):
        np.testing.assert_allclose(got[inverse], want, rtol=1e-5, atol=1e-6)
    for i, (total, weight, per_token) in enumerate(whole):
        mask = np.asarray(arguments(seed)[-1])
        joined = np.concatenate([part[0][i][2] for part in parts])
        np.testing.assert_allclose(joined[inverse], per_token, rtol=1e-5, atol=1e-6)
        assert sum(float(part[0][i][1]) for part in parts) == float(weight) == np.sum(mask)
        np.testing.assert_allclose(
            divide(sum(part[0][i][0] for part in parts), weight),
            divide(total, weight),
            rtol=1e-5,
            atol=1e-6,
        )


def test_all_aggregations_by_hand():
    """Law 20: the four modes of the released code, two rows of three tokens."""
    loss = jnp.array([[1.0, 2.0, 6.0], [4.0, 8.0, 16.0]])
    mask = jnp.array([[1, 1, 1], [1, 1, 0]])
    assert token_mean(loss, mask).mean() == 21.0 / 5.0
    assert sequence_mean(loss, mask).mean() == (3.0 + 6.0) / 2.0  # seq-mean-token-mean
    assert fixed_length_mean(loss, mask, length=1).mean() == 21.0 / 2.0  # seq-mean-token-sum
    assert fixed_length_mean(loss, mask, length=3).mean() == 21.0 / 6.0  # ...-norm


@pytest.mark.parametrize("alpha", ALPHAS)
def test_descent_towards_a_fixed_teacher_never_raises_the_divergence(alpha):
    """Law 45: plain gradient descent on the student's logits, step by step and to the end."""
    student, teacher = (jnp.float32(x[[PAIR, DISJOINT]]) for x in pairs())

    def loss(x):
        return jnp.sum(full(alpha)(x, teacher, WHOLE))

    def step(x, _):
        value, gradient = jax.value_and_grad(loss)(x)
        return x - 0.5 * gradient, value

    # At rest the value is rounding, 1e-7.
    _, values = jit(lambda x: jax.lax.scan(step, x, None, length=400))(student)
    assert np.all(np.diff(values) <= 1e-6)
    assert values[-1] < 0.05 * values[0]


# Identities between targets, under the reverse KL: weights and combinations instead of new losses.


def reverse_kl_gradient(student, target):
    return jax.grad(lambda x: jnp.sum(reverse_kl(log_softmax(x), log_softmax(target))))(student)


@pytest.fixture
def three(x64):
    return jnp.array(np.random.default_rng(0).normal(size=(3, 4, 50)))


def test_a_target_drawn_towards_the_student_is_a_weight(three):
    """q^(1-α_t) sg(π)^α_t, DemoPSD: 1 - α_t times the gradient, token by token; only reverse KL."""
    student, teacher, _ = three
    pull_back = jnp.array([0.0, 0.2, 0.5, 0.9])[:, None]
    target = (1 - pull_back) * log_softmax(teacher) + pull_back * log_softmax(student)
    got = reverse_kl_gradient(student, jax.lax.stop_gradient(target))
    want = (1 - pull_back) * reverse_kl_gradient(student, teacher)
    np.testing.assert_allclose(got, want, atol=1e-14)
    forward = jax.grad(lambda x, t: jnp.sum(full(0.0)(x, t, WHOLE)))
    gap = forward(student, target) - (1 - pull_back) * forward(student, teacher)
    assert np.max(np.abs(gap)) > 1e-3


@pytest.mark.parametrize("coefficient", [0.01, 0.3, -0.5], ids=["trust", "half", "contrast"])
def test_a_mixed_teacher_is_a_combination_of_two_divergences(three, coefficient):
    """q^(1-c) r^c: the trust region, and with c = -a the contrast q_c^(1+a) q_w^(-a)."""
    student, first, second = three
    got = reverse_kl_gradient(student, trust_region_logits(first, second, coefficient))
    want = (1 - coefficient) * reverse_kl_gradient(student, first)
    want = want + coefficient * reverse_kl_gradient(student, second)
    np.testing.assert_allclose(got, want, atol=1e-14)


def test_extrapolation_from_an_anchor_is_repulsion(three):
    """The target π^(1+λ) a^(-λ), detached: -λ times the gradient towards the anchor."""
    student, anchor, _ = three
    target = jax.lax.stop_gradient(student + 0.7 * (student - anchor))
    got = reverse_kl_gradient(student, target)
    np.testing.assert_allclose(got, -0.7 * reverse_kl_gradient(student, anchor), atol=1e-14)


@pytest.mark.parametrize("steps, rate, moved", [(10, 0.05, 0.401), (51, 0.01, 0.401)])
def test_ema_steps_towards_a_student_that_stands_add_up(x64, steps, rate, moved):
    teacher, student = jnp.zeros(()), jnp.ones(())
    for _ in range(steps):
        teacher = ema_update(teacher, student, rate)
    np.testing.assert_allclose(teacher, 1 - (1 - rate) ** steps, rtol=1e-14)
    np.testing.assert_allclose(teacher, moved, atol=5e-4)
