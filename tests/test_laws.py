"""The laws of the losses, by the numbers of the specification, and which test holds each."""

import ast
from pathlib import Path

import numpy as np
import pytest
import reference
from loss_table import (
    CONFORMANCE,
    DISJOINT,
    DIVERGENCES,
    FAR,
    LOSSES,
    PAIR,
    PERMUTATION,
    PERMUTED,
    SAME,
    SAME_SHIFTED,
    SHIFTED,
    SWAPPED,
    compute_outcome,
    pairs,
)

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
    9: ["test_loss_properties::"
        "test_a_support_with_tail_is_a_lower_bound_that_grows_to_the_full_divergence",
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
    18: ["test_loss_properties::test_masked_tokens_are_exactly_absent",
         "test_distillation::test_padding_on_the_right_changes_nothing"],
    19: ["test_loss_properties::test_a_batch_may_be_cut_anywhere_and_ordered_in_any_way",
         "test_reductions::test_the_result_does_not_depend_on_the_micro_batch_size",
         "test_step::test_the_update_does_not_depend_on_micro_batches_shared_prompts_or_chunks",
         "test_step::test_the_update_does_not_depend_on_padding"],
    20: ["test_loss_properties::test_all_aggregations_by_hand"],
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
         "test_packing::"
         "test_each_response_token_is_predicted_from_its_prompt_and_the_response_before_it"],
    33: ["test_policy_gradient::test_equal_rewards_have_advantage_exactly_zero",
         "test_policy_gradient::test_advantage_is_reward_minus_group_mean"],
    34: ["test_policy_gradient::test_clip_higher",
         "test_policy_gradient::test_dual_clip_bounds_the_loss_of_a_bad_token"],
    35: ["test_credit::test_the_mix_is_grpo_at_one_and_sdpo_at_zero"],
    45: ["test_loss_properties::test_descent_towards_a_fixed_teacher_never_raises_the_divergence",
         "test_step_teacher::test_the_divergence_to_a_fixed_teacher_falls"],
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
