"""The laws of the losses, by the numbers of the specification, and which test holds each.

`outcome` computes every estimator once per transform and dtype: called plainly, jitted, mapped row
by row, with rows cut over eight devices, and with the vocabulary cut too. All laws read its table.
"""

import ast
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sdpo_jax.losses.credit import candidate_loss, distillation_advantages
from sdpo_jax.losses.distillation import (
    full_vocabulary_loss,
    sampled_token_loss,
    sdpo_loss,
    top_k_loss,
)
from sdpo_jax.losses.divergences import generalized_jsd, reverse_kl
from sdpo_jax.losses.likelihood import sft_loss
from sdpo_jax.losses.policy_gradient import grpo_loss
from sdpo_jax.losses.reductions import divide, fixed_length_mean, sequence_mean, token_mean
from sdpo_jax.losses.vocabulary import log_softmax, trust_region_logits, vocabulary_sum
from sdpo_jax.teacher.weights import ema_update

# fmt: off
LAWS = {
    1: ["test_laws::test_equal_distributions_have_loss_zero_and_gradient_zero"],
    2: ["test_laws::test_values_and_gradients_are_the_formulas",
        "test_laws::test_the_two_kls_differ",
        "test_divergences::test_the_ends_are_the_two_kls_and_differ"],
    3: ["test_laws::test_jensen_shannon_is_symmetric_and_at_most_log_two",
        "test_divergences::test_the_middle_vanishes_at_the_ends_at_the_rate_of_the_kls"],
    4: ["test_laws::test_values_and_gradients_are_the_formulas",
        "test_divergences::test_gradient_is_that_of_the_full_formula_mixture_included"],
    5: ["test_laws::test_reverse_kl_gradient_is_its_closed_form"],
    6: ["test_laws::test_the_sampled_token_averages_to_the_reverse_kl"],
    7: ["test_laws::test_the_teacher_gets_no_gradient",
        "test_distillation::test_no_gradient_to_teacher_or_weights",
        "test_distillation::test_weights_pass_no_gradient"],
    8: ["test_from_hidden::test_both_logits_are_divided_by_the_temperature",
        "test_fused_linear::"
        "test_sdpo_per_token_is_sdpo_loss_with_both_logits_divided_by_the_temperature"],
    9: ["test_laws::test_a_support_with_tail_is_a_lower_bound_that_grows_to_the_full_divergence",
        "test_laws::test_a_tail_of_one_token_or_none_is_the_full_vocabulary"],
    10: ["test_laws::test_one_renormalised_token_has_loss_zero_and_gradient_zero"],
    11: ["test_laws::test_the_support_is_the_students",
         "test_support::test_the_ids_are_the_students_where_tops_are_disjoint"],
    12: ["test_support::test_certain_tokens_give_finite_values_and_gradients"],
    13: ["test_support::test_entries_keep_the_normaliser_of_the_whole_vocabulary"],
    14: ["test_distillation::test_on_policy_weights_are_exactly_one"],
    15: ["test_distillation::test_weights_are_capped_from_above_only_and_log_ratios_at_twenty"],
    16: ["test_weights::test_both_corrections_multiply_and_padding_has_none"],
    17: ["test_distillation::test_a_row_without_a_teacher_has_no_gradient",
         "test_distillation::test_an_empty_batch_is_a_finite_zero"],
    18: ["test_laws::test_masked_tokens_are_exactly_absent",
         "test_distillation::test_padding_on_the_right_changes_nothing"],
    19: ["test_laws::test_a_batch_may_be_cut_anywhere_and_ordered_in_any_way",
         "test_reductions::test_the_result_does_not_depend_on_the_micro_batch_size",
         "test_step::test_the_update_does_not_depend_on_micro_batches_shared_prompts_or_chunks",
         "test_step::test_the_update_does_not_depend_on_padding"],
    20: ["test_laws::test_all_aggregations_by_hand"],
    21: ["test_teacher_weights::test_ema_is_the_formula_and_exact_at_both_ends",
         "test_teacher_weights::test_ema_converges_geometrically",
         "test_teacher_weights::test_ema_is_float32_whatever_the_student_is"],
    22: ["test_loop::test_mini_batches_make_that_many_updates_and_the_teacher_follows_once",
         "test_training::"
         "test_an_empty_mini_batch_makes_no_update_and_the_teacher_follows_at_most_once"],
    23: ["test_teacher_weights::test_trust_region_is_the_normalised_geometric_mixture",
         "test_teacher_weights::test_trust_region_ends_are_reference_and_student"],
    24: ["test_from_hidden::test_a_trust_region_teacher_mixes_two_models_after_one_prompt"],
    25: ["test_batch::test_each_taken_place_predicts_its_target",
         "test_data::"
         "test_each_response_token_is_predicted_from_its_prompt_and_the_response_before_it"],
    33: ["test_policy_gradient::test_equal_rewards_have_advantage_exactly_zero",
         "test_policy_gradient::test_advantage_is_reward_minus_group_mean"],
    34: ["test_policy_gradient::test_clip_higher",
         "test_policy_gradient::test_dual_clip_bounds_the_loss_of_a_bad_token"],
    35: ["test_credit::test_the_mix_is_grpo_at_one_and_sdpo_at_zero"],
    45: ["test_laws::test_descent_towards_a_fixed_teacher_never_raises_the_divergence",
         "test_step::test_the_divergence_to_a_fixed_teacher_falls"],
    46: ["test_training::test_the_divergence_to_a_frozen_teacher_that_was_told_falls"],
}
# fmt: on


def test_every_test_that_the_table_names_exists():
    defined = {
        f"{path.stem}::{node.name}"
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {test for tests in LAWS.values() for test in tests} <= defined
    assert {*range(1, 26), 33, 34, 35, 45, 46} == set(LAWS)


# The table: eight pairs of logits that bfloat16 holds exactly, without ties.

ALPHAS = [0.0, 0.3, 0.5, 1.0]
LADDER = np.array([-2.5, -1.75, -1.125, -0.5, 0.25, 0.875, 1.5, 2.25])
PERMUTATION = np.random.default_rng(2).permutation(8)
PAIR, SWAPPED, SAME, SAME_SHIFTED, PERMUTED, SHIFTED, DISJOINT, FAR = range(8)


def pairs():
    random = np.random.default_rng(1)
    s, t = random.permutation(LADDER), random.permutation(1.5 * LADDER)
    far = np.repeat([8.0, -8.0], 4) + LADDER
    rows = {
        PAIR: (s, t),
        SWAPPED: (t, s),
        SAME: (s, s),
        SAME_SHIFTED: (s, s + 5.0),
        PERMUTED: (s[PERMUTATION], t[PERMUTATION]),
        SHIFTED: (s + 3.0, t - 2.0),
        DISJOINT: (LADDER, LADDER[::-1]),
        FAR: (far, far[::-1]),
    }
    student, teacher = zip(*(rows[i] for i in range(8)), strict=True)
    return np.array(student), np.array(teacher)


def full(alpha):
    def loss(s, t, axis):
        return full_vocabulary_loss(s, t, alpha=alpha, vocabulary_axis=axis)

    return loss


def top(k, add_tail, alpha):
    def loss(s, t, axis):
        return top_k_loss(s, t, alpha=alpha, k=k, add_tail=add_tail, vocabulary_axis=axis)

    return loss


def sampled_average(s, t, axis):
    """Σ_y sg π(y) · sampled_token_loss(y): the expectation over the sampled token."""
    s, t = (log_softmax(x, vocabulary_axis=axis) for x in (s, t))
    return vocabulary_sum(jax.lax.stop_gradient(jnp.exp(s)) * sampled_token_loss(s, t), axis)


def candidates(s, t, axis):
    s, t = (log_softmax(x, vocabulary_axis=axis) for x in (s, t))
    return candidate_loss(s, distillation_advantages(s, t), vocabulary_axis=axis)


DIVERGENCES = {
    **{f"full {a}": (full(a), {"alpha": a}) for a in ALPHAS},
    **{
        f"top 3 {kind} {a}": (top(3, tail, a), {"alpha": a, "k": 3, "add_tail": tail})
        for kind, tail in [("tail", True), ("renormalised", False)]
        for a in ALPHAS
    },
    "top 1 renormalised": (top(1, False, 0.5), {"alpha": 0.5, "k": 1, "add_tail": False}),
    "top 7 tail": (top(7, True, 0.5), {"alpha": 0.5, "k": 7}),
    "top 8 tail": (top(8, True, 1.0), {"alpha": 1.0, "k": 8}),
}
LOSSES = {
    **{name: loss for name, (loss, _) in DIVERGENCES.items()},
    "sampled": sampled_average,
    "candidates": candidates,
}


class Outcome(NamedTuple):
    values: dict[str, np.ndarray]  # [8]
    gradients: dict[str, np.ndarray]  # [8, V], by the student's logits
    teacher_gradients: dict[str, np.ndarray]
    tolerance: float
    gradient_tolerance: float


def pull(loss, s, t):
    values, back = jax.vjp(loss, s, t)
    return values, *back(jnp.ones_like(values))


def sharded(axes, specs, axis, loss):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    return jax.shard_map(
        partial(loss, axis=axis), mesh=mesh, in_specs=(specs, specs), out_specs=P("data")
    )


jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TRANSFORMS = {
    "plain": lambda pulls: pulls(lambda loss: partial(loss, axis=None)),
    "jit": lambda pulls: jit(pulls(lambda loss: partial(loss, axis=None))),
    "vmap": lambda pulls: jit(jax.vmap(pulls(lambda loss: partial(loss, axis=None)))),
    "rows": lambda pulls: jit(pulls(partial(sharded, {"data": 8}, P("data"), None))),
    "vocabulary": lambda pulls: jit(
        pulls(partial(sharded, {"data": 2, "tensor": 4}, P("data", "tensor"), "tensor"))
    ),
}


@cache
def compute_outcome(transform, dtype):
    def pulls(place):
        return lambda s, t: {name: pull(place(loss), s, t) for name, loss in LOSSES.items()}

    with jax.enable_x64(dtype == "float64"):
        s, t = (jnp.array(x, dtype) for x in pairs())
        table = jax.tree.map(np.float64, TRANSFORMS[transform](pulls)(s, t))
    columns = [{name: row[i] for name, row in table.items()} for i in range(3)]
    # bfloat16 rounds gradients once, when they leave: half of 2^-8.
    # Log-ratios of up to 20 round to 2e-6, and far from it such gaps cancel.
    tolerance = 1e-13 if dtype == "float64" else 5e-6
    return Outcome(*columns, tolerance, 2.0**-8 if dtype == "bfloat16" else tolerance)


CONFORMANCE = [
    *((name, "float32") for name in TRANSFORMS),
    *(("jit", dtype) for dtype in ("bfloat16", "float64")),
    ("vocabulary", "float64"),
]


@pytest.fixture(scope="module", params=CONFORMANCE, ids="-".join)
def outcome(request):
    return compute_outcome(*request.param)


def near(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_equal_distributions_have_loss_zero_and_gradient_zero(outcome):
    """Law 1; a shift of all logits is no difference."""
    for name in LOSSES:
        rows = [SAME, SAME_SHIFTED]
        near(outcome.values[name][rows], 0.0, outcome.tolerance)
        near(outcome.gradients[name][rows], 0.0, outcome.tolerance)


def test_values_and_gradients_are_the_formulas(outcome):
    """Laws 2, 4 and 13, and the estimators of 9 to 11."""
    student, teacher = pairs()
    for name, (_, arguments) in DIVERGENCES.items():
        want = reference.distillation(student, teacher, **arguments)
        near(outcome.values[name], want, outcome.tolerance)
        gradient = reference.gradient(
            lambda x: np.sum(reference.distillation(x, teacher, **arguments)),  # noqa: B023
            student,
        )
        near(outcome.gradients[name], gradient, outcome.gradient_tolerance)


def test_the_two_kls_differ(outcome):
    """Law 2."""
    gap = outcome.values["full 0.0"][PAIR] - outcome.values["full 1.0"][PAIR]
    assert abs(gap) > 0.01


def test_no_divergence_is_negative(outcome):
    for name in DIVERGENCES:
        assert np.all(outcome.values[name] >= -outcome.tolerance)
        if name != "top 1 renormalised":
            assert np.all(outcome.values[name][[PAIR, SWAPPED, DISJOINT]] > 0.01)


def test_jensen_shannon_is_symmetric_and_at_most_log_two(outcome):
    """Law 3, and nearly reached by distributions that nearly exclude each other."""
    values = outcome.values["full 0.5"]
    near(values[PAIR], values[SWAPPED], outcome.tolerance)
    assert 0.99 * np.log(2) < values[FAR] <= np.log(2) + outcome.tolerance


def test_reverse_kl_gradient_is_its_closed_form(outcome):
    """Law 5: π_j (r_j - Σ_k π_k r_k) with r = log π - log q."""
    s, t = (reference.log_softmax(x) for x in pairs())
    ratio, probability = s - t, np.exp(s)
    want = probability * (ratio - np.sum(probability * ratio, axis=-1, keepdims=True))
    near(outcome.gradients["full 1.0"], want, outcome.gradient_tolerance)


def test_the_sampled_token_averages_to_the_reverse_kl(outcome):
    """Law 6, and credit per candidate is the same gradient and the same value."""
    near(outcome.values["candidates"], outcome.values["full 1.0"], outcome.tolerance)
    for name in ("sampled", "candidates"):
        near(outcome.gradients[name], outcome.gradients["full 1.0"], outcome.gradient_tolerance)


def test_the_teacher_gets_no_gradient(outcome):
    """Law 7."""
    for name in LOSSES:
        np.testing.assert_array_equal(outcome.teacher_gradients[name], 0.0)


def test_a_tail_of_one_token_or_none_is_the_full_vocabulary(outcome):
    """Law 9: k = V - 1 and k = V. Without a tail its clamp adds 1e-7 on both sides."""
    near(outcome.values["top 7 tail"], outcome.values["full 0.5"], outcome.tolerance)
    near(outcome.values["top 8 tail"], outcome.values["full 1.0"], 1e-6)


def test_one_renormalised_token_has_loss_zero_and_gradient_zero(outcome):
    """Law 10."""
    near(outcome.values["top 1 renormalised"], 0.0, outcome.tolerance)
    near(outcome.gradients["top 1 renormalised"], 0.0, outcome.tolerance)


def test_the_support_is_the_students(outcome):
    """Law 11: on the three tokens that the student holds likeliest and the teacher least likely."""
    s, t = (reference.log_softmax(x[DISJOINT]) for x in pairs())
    ids = np.array([7, 6, 5])
    s, t = (np.append(x[ids], np.log(1 - np.sum(np.exp(x[ids])))) for x in (s, t))
    near(outcome.values["top 3 tail 1.0"][DISJOINT], reference.kl(s, t), outcome.tolerance)


def test_the_vocabulary_has_no_order_and_logits_no_origin(outcome):
    for name in LOSSES:
        values, gradients = outcome.values[name], outcome.gradients[name]
        near(values[[PERMUTED, SHIFTED]], values[PAIR], outcome.tolerance)
        near(gradients[PERMUTED], gradients[PAIR][PERMUTATION], outcome.gradient_tolerance)
        near(gradients[SHIFTED], gradients[PAIR], outcome.gradient_tolerance)
        near(np.sum(gradients, axis=-1), 0.0, 8 * outcome.gradient_tolerance)


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
                [top(k, True, alpha)(student, teacher, None) for k in range(1, 7)]
                + [full(alpha)(student, teacher, None)]
            )
            for alpha in (0.0, 0.5, 1.0)
        ]
    )


@drawn
@given(seeds, st.floats(0.01, 2.0), st.floats(0.01, 2.0))
def test_a_support_with_tail_is_a_lower_bound_that_grows_to_the_full_divergence(seed, a, b):
    """Law 9, in float64 and with tails that the clamp at 1e-7 leaves alone."""
    with jax.enable_x64(True):
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
        return jnp.sum(full(alpha)(x, teacher, None))

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
    forward = jax.grad(lambda x, t: jnp.sum(full(0.0)(x, t, None)))
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
