"""Bad arguments raise while tracing, and the message names the argument and both values."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import sdpo_jax as s

BT, BTV, V = jnp.zeros((2, 3)), jnp.zeros((2, 3, 5)), jnp.zeros(5)
IDS, INTS = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3, 5), jnp.int32)
HIDDEN, HEAD = jnp.zeros((2, 3, 4)), jnp.zeros((4, 5))
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
TOKENS = jnp.zeros((6, 4)), HEAD


def first(logits, aux, constants):
    del aux, constants
    return logits[:, 0], {}


# What is called, and what the message says: both values, or the range and the value.
CASES = {
    "kl shapes": (s.forward_kl, (V, V[:4]), {}, r"student_log_probs \[5\], teacher_log_probs \[4\]"),
    "kl dtype": (s.reverse_kl, (INTS, BTV), {}, "student_log_probs int32"),
    "kl rank": (s.forward_kl, (jnp.array(0.0),) * 2, {}, r"\[\.\.\., V\].*student_log_probs \[\]"),
    "alpha": (s.generalized_jsd, (V, V), {"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
    "alpha nan": (s.full_vocabulary_loss, (V, V), {"alpha": float("nan")}, "alpha .* got nan"),
    "alpha sdpo": (s.sdpo_loss, (BTV, BTV, BT), {"alpha": -0.1}, "alpha .* got -0.1"),
    "mask": (s.sdpo_loss, (BTV, BTV, BT[:1]), {"alpha": 0.5}, r"mask \[1, 3\], tokens \[2, 3\]"),
    "logits rank": (s.sdpo_loss, (BT, BT, BT), {"alpha": 0.5}, r"student_logits \[2, 3\]"),
    "teacher": (s.sdpo_loss, (BTV, BTV[:1], BT), {"alpha": 0.5}, r"teacher_logits \[1, 3, 5\]"),
    "weights": (
        s.sdpo_loss, (BTV, BTV, BT), {"alpha": 0.5, "weights": BT[:, :2]},
        r"weights \[2, 2\].*\[2, 3\]",
    ),
    "k zero": (
        s.top_k_loss, (V, V), {"alpha": 0.5, "k": 0, "add_tail": True}, r"k must lie in \[1, 5\]"
    ),
    "k large": (
        s.top_k_log_probs, (V, V), {"k": 6, "add_tail": True}, r"\[1, 5\] \(the vocabulary\), got 6"
    ),
    "indices": (s.support_log_probs, (BTV, IDS), {"add_tail": True}, r"indices \[2, 3\].*\[2, 3, 5\]"),
    "indices dtype": (s.support_log_probs, (BTV, BTV), {"add_tail": True}, "indices float32"),
    "sampled": (s.sampled_token_loss, (BT, BT[:1]), {}, r"\[2, 3\], teacher_log_probs \[1, 3\]"),
    "cap": (s.truncated_importance_weights, (BT, BT), {"cap": -2.0}, "cap must be positive, got -2"),
    "ratio": (
        s.truncated_importance_weights, (BT, V), {"cap": 2.0}, r"\[2, 3\], old_log_probs \[5\]"
    ),
    "clip": (s.distillation_advantages, (BT, BT), {"clip": 0.0}, "clip must be positive, got 0"),
    "bound": (s.clip_entries, (V, -1.0), {}, "bound must be positive, got -1"),
    "candidates": (s.candidate_loss, (V, V[:4]), {}, r"student_log_probs \[5\], advantages \[4\]"),
    "score": (s.score_function_loss, (BT, V), {}, r"log_probs \[2, 3\], advantages \[5\]"),
    "sequence": (s.sequence_advantages, (BT, BT[:1]), {}, r"advantages \[2, 3\], mask \[1, 3\]"),
    "mix": (s.mix_advantages, (BT, BT), {"coefficient": 2.0}, r"coefficient .*\[0, 1\], got 2"),
    "mix shape": (s.mix_advantages, (V, BT), {"coefficient": 0.5}, r"\[2, 3\], got \[5\]"),
    "modulate": (
        s.modulate_advantages, (BT, BT, BT), {"strength": 1.5, "bound": 0.2}, r"\[0, 1\], got 1.5"
    ),
    "beta": (
        s.teacher_entropy_weights, (BT, BT), {"beta": -1.0}, "beta must be at least 0, got -1"
    ),
    "reduction": (
        s.disagreement_weights, (BT,), {"beta": 1.0, "max_reduction": 2.0},
        r"max_reduction .*\[0, 1\], got 2",
    ),
    "floor": (s.pass_rate_weights, (V[:4], 2), {"floor": -0.1}, "floor must be at least 0, got -0.1"),
    "group": (s.pass_rate_weights, (V, 2), {}, r"passed \[5\] and group_size 2"),
    "advantages": (s.group_advantages, (V, 2), {}, r"rewards \[5\] and group_size 2"),
    "routes": (s.outcome_routing, (V, V[:4]), {}, r"passed \[5\], has_teacher \[4\]"),
    "skip": (s.skip_first_tokens, (BT, -1), {}, "count must be at least 0, got -1"),
    "skip rank": (s.skip_first_tokens, (V, 1), {}, r"expected 2 axes, got mask \[5\]"),
    "spans": (s.span_mask, (IDS, IDS[:1], 4), {}, r"starts \[2, 3\], ends \[1, 3\]"),
    "dual clip": (
        s.policy_gradient_loss, (BT, BT, BT), {**CLIPS, "dual_clip": 0.5}, "dual_clip 0.5"
    ),
    "clip low": (s.grpo_loss, (BT, BT, BT, BT), {**CLIPS, "clip_low": 1.5}, "clip_low 1.5"),
    "grpo": (s.grpo_loss, (BT, BT, V, BT), CLIPS, r"\[2, 3\], got \[5\]"),
    "grpo mask": (s.grpo_loss, (BT, BT, BT, BT[:1]), CLIPS, r"log_probs \[2, 3\].*mask \[1, 3\]"),
    "rollouts": (s.sequence_log_probs, (BT, BT[:1]), {}, r"log_probs \[2, 3\], mask \[1, 3\]"),
    "reference": (s.reference_kl, (BT, V), {}, r"log_probs \[2, 3\].*\[5\]"),
    "smoothing": (
        s.cross_entropy, (BTV, IDS), {"label_smoothing": 1.0}, r"label_smoothing .*\[0, 1\), got 1"
    ),
    "targets": (s.cross_entropy, (BTV, V), {}, "targets float32"),
    "targets shape": (s.cross_entropy, (BTV, IDS[:1]), {}, r"targets \[1, 3\].*\[2, 3, 5\]"),
    "sft": (s.sft_loss, (BTV, IDS, BT[:1]), {}, r"targets \[2, 3\], mask \[1, 3\]"),
    "length": (s.fixed_length_mean, (BT, BT), {"length": 0}, "length must be at least 1, got 0"),
    "reduce": (s.token_mean, (BT, BT[:1]), {}, r"per_token \[2, 3\], mask \[1, 3\]"),
    "reduce rank": (s.sequence_mean, (V, V), {}, r"expected 2 axes, got mask \[5\]"),
    "soft cap": (s.shape_logits, (V,), {"soft_cap": 0.0}, "soft_cap must be positive, got 0"),
    "trust region": (
        s.trust_region_logits, (V, V[:4], 0.5), {}, r"reference_logits \[5\], live_logits \[4\]"
    ),
    "chunk": (
        s.chunked_head, (first, *TOKENS, None, jnp.ones(6)), {"chunk": 0}, "chunk >= 1, got 6 and 0"
    ),
    "head": (
        s.chunked_head, (first, TOKENS[0], HEAD.T, None, jnp.ones(6)), {"chunk": 2},
        r"hidden \[6, 4\] and head \[5, 4\]",
    ),
    "head weights": (
        s.chunked_head, (first, *TOKENS, None, jnp.ones(5)), {"chunk": 2},
        r"expected weights \[6\], got \[5\]",
    ),
    "aux": (
        s.checkpointed_head, (first, *TOKENS, {"y": jnp.ones(5)}), {"chunk": 2},
        r"aux\['y'\] must lead with 6 tokens, got \[5\]",
    ),
    "hidden": (
        s.sft_from_hidden, (HIDDEN[0], HEAD, IDS, BT), {"chunk": 2},
        r"expected 3 axes, got hidden \[3, 4\]",
    ),
    "hidden mask": (
        s.sft_from_hidden, (HIDDEN, HEAD, IDS, BT[:1]), {"chunk": 2}, r"mask \[1, 3\]"
    ),
    "teacher hidden": (
        s.sdpo_from_hidden, (HIDDEN, HEAD, HIDDEN[:1], HEAD, IDS, BT), {"alpha": 0.5, "chunk": 2},
        r"teacher_hidden \[1, 3, 4\]",
    ),
    "products": (s.by_products, (BTV, BTV, IDS[:1]), {}, r"targets \[1, 3\].*\[2, 3, 5\]"),
    "ema": (s.ema_update, (BT, V, 0.5), {}, r"\[2, 3\].*\[5\]"),
    "ema rate": (s.ema, (1.5,), {}, r"rate must lie in \[0, 1\], got 1.5"),
    "region": (s.trust_region, (-0.5,), {}, r"coefficient must lie in \[0, 1\], got -0.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_the_argument_and_both_values(name):
    function, arguments, options, message = CASES[name]
    with pytest.raises((ValueError, TypeError), match=message):
        function(*arguments, **options)


@pytest.mark.parametrize("name", ["kl shapes", "k large", "mask", "grpo", "targets", "head"])
def test_it_is_raised_while_tracing(name):
    function, arguments, options, message = CASES[name]
    arrays = [x for x in arguments if isinstance(x, jax.Array)]
    others = [x for x in arguments if not isinstance(x, jax.Array)]
    bound = partial(partial(function, *others), **options)
    with pytest.raises((ValueError, TypeError), match=message):
        if name == "head":
            jax.eval_shape(lambda h, w, m: bound(h, w, None, m), *arrays)
        else:
            jax.eval_shape(bound, *arrays)


@pytest.mark.parametrize(
    ("loss", "tokens", "message"),
    [
        (
            s.sdpo_per_token(partial(s.full_vocabulary_loss, alpha=0.5), importance_cap=2.0),
            s.SdpoTokens(jnp.zeros((6, 4)), jnp.zeros(6, jnp.int32)),
            "importance_cap 2.0 needs old_log_probs",
        ),
        (
            s.sdpo_per_token(partial(s.full_vocabulary_loss, alpha=0.5)),
            s.SdpoTokens(jnp.zeros((6, 4)), jnp.zeros(6, jnp.int32), live_hidden=jnp.zeros((6, 4))),
            "live_hidden needs live_head and coefficient",
        ),
        (
            s.grpo_per_token(**CLIPS, kl_coefficient=0.1),
            s.GrpoTokens(jnp.zeros(6, jnp.int32), jnp.zeros(6), jnp.zeros(6)),
            "kl_coefficient 0.1 needs reference_log_probs",
        ),
    ],
)
def test_a_setting_without_its_array_is_an_error(loss, tokens, message):
    constants = s.SdpoConstants(HEAD, jnp.array(1.0))
    if isinstance(tokens, s.GrpoTokens):
        constants = s.GrpoConstants(jnp.array(1.0))
    with pytest.raises(ValueError, match=message):
        s.chunked_head(loss, *TOKENS, tokens, jnp.ones(6), chunk=2, constants=constants)
