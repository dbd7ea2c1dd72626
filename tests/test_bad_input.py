"""Bad arguments raise while tracing, name the argument and say what came and what is allowed."""

import inspect
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import sdpo_jax
import sdpo_jax.losses
from sdpo_jax.losses import (
    GrpoSharedInputs,
    GrpoTokenInputs,
    MixedSharedInputs,
    MixedTokenInputs,
    SdpoSharedInputs,
    SdpoTokenInputs,
    SftTokenInputs,
)

NAN = math.nan
f = partial(jnp.full, fill_value=0.5)
i = partial(jnp.zeros, dtype=jnp.int32)
CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
ADVICE = {"strength": 0.5, "bound": 0.2}
HEADS = {"chunk": 2}


def head(function, hidden, weights_head, aux, *weights, **arguments):
    """A head with `sft_per_token`; `fused_linear_loss` takes weights besides."""
    return function(S.sft_per_token(), hidden, weights_head, aux, *weights, **arguments)


def one_token(factory, logits=(2, 3), **tokens):
    """A distillation of two tokens from hidden states of width 4."""
    given = {"teacher_hidden": f((2, 4)), "targets": i((2,)), **tokens}
    return factory(
        f(logits), SdpoTokenInputs(**given), SdpoSharedInputs(f((4, 3)), jnp.float32(1.0))
    )


def grpo(logits=(2, 3), old=(2,), advantages=(2,), **arguments):
    loss = S.grpo_per_token(**{**CLIPS, **arguments})
    tokens = GrpoTokenInputs(i((2,)), f(old), f(advantages))
    return loss(f(logits), tokens, GrpoSharedInputs(jnp.float32(1.0)))


def mixed(first, second):
    tokens = MixedTokenInputs(SftTokenInputs(i((2,))), SftTokenInputs(i((2,))), f(first), f(second))
    loss = S.mixed_per_token(S.sft_per_token(), S.sft_per_token())
    return loss(f((2, 3)), tokens, MixedSharedInputs(None, None))


def score(**tokens):
    inputs = S.ScoreTokenInputs(**{"targets": i((2,)), **tokens})
    return S.score_per_token()(f((2, 3)), inputs, S.ScoreSharedInputs(jnp.float32(1.0)))


def sdpo_hidden(**arguments):
    given = {
        "hidden": f((1, 2, 4)),
        "head": f((4, 3)),
        "teacher_hidden": f((1, 2, 4)),
        "teacher_head": f((4, 3)),
        "targets": i((1, 2)),
        "mask": i((1, 2)),
        "alpha": 0.5,
        "chunk": 1,
    }
    return S.sdpo_from_hidden(**{**given, **arguments})


def grpo_hidden(**arguments):
    given = {
        "hidden": f((1, 2, 4)),
        "head": f((4, 3)),
        "targets": i((1, 2)),
        "old_log_probs": f((1, 2)),
        "advantages": f((1,)),
        "mask": i((1, 2)),
        "chunk": 1,
        **CLIPS,
    }
    return S.grpo_from_hidden(**{**given, **arguments})


def sft_hidden(**arguments):
    given = {
        "hidden": f((1, 2, 4)),
        "head": f((4, 3)),
        "targets": i((1, 2)),
        "mask": i((1, 2)),
        "chunk": 1,
    }
    return S.sft_from_hidden(**{**given, **arguments})


def pairs(name, call, first="student_log_probs", second="teacher_log_probs"):
    """What every function of two distributions refuses."""
    return [
        (name, lambda: call(f((2, 3)), f((2, 4))), f"{first} [2, 3], {second} [2, 4]"),
        (name, lambda: call(i((2, 3)), f((2, 3))), f"floating dtype, got {first} int32"),
        (name, lambda: call(f(()), f(())), f"[..., V] with V >= 1, got {first} []"),
        (name, lambda: call(f((2, 0)), f((2, 0))), f"[..., V] with V >= 1, got {first} [2, 0]"),
    ]


def alphas(name, call):
    return [
        (name, partial(call, alpha=alpha), f"alpha must lie in [0, 1], got {alpha}")
        for alpha in (-0.1, 1.1, NAN)
    ]


def ks(name, call):
    return [
        (name, partial(call, k=k), f"k must lie in [1, 3] (the vocabulary), got {k}")
        for k in (-1, 0, 4)
    ]


def clips(name, call):
    return [
        (name, partial(call, **{**CLIPS, argument: value}), f"{argument} {value}")
        for argument, value in [
            ("clip_low", -0.1),
            ("clip_low", 1.5),
            ("clip_high", -0.1),
            ("clip_high", NAN),
            ("dual_clip", 1.0),
            ("dual_clip", 0.5),
        ]
    ]


def chunks(name, call):
    return [(name, partial(call, chunk=n), f"chunk >= 1, got 2 and {n}") for n in (0, -1)]


def smoothings(name, call):
    return [
        (name, partial(call, label_smoothing=x), f"label_smoothing must lie in [0, 1), got {x}")
        for x in (-0.1, 1.0, NAN)
    ]


def two(name, call):
    """What every function of two equal shapes refuses."""
    argument, other = tuple(inspect.signature(vars(S)[name]).parameters)[:2]
    return [(name, lambda: call(f((2, 3)), f((2, 4))), f"{argument} [2, 3], {other} [2, 4]")]


PUBLIC = {name: vars(room)[name] for room in (sdpo_jax, sdpo_jax.losses) for name in room.__all__}
S = SimpleNamespace(**PUBLIC)

JSD = partial(S.generalized_jsd, alpha=0.5)
TOP = {"alpha": 0.5, "add_tail": True}

CASES = [
    # Divergences and supports
    *pairs("forward_kl", S.forward_kl),
    *pairs("reverse_kl", S.reverse_kl),
    *pairs("generalized_jsd", partial(S.generalized_jsd, alpha=0.5)),
    *alphas("generalized_jsd", lambda **x: S.generalized_jsd(f((3,)), f((3,)), **x)),
    *pairs("divergence_terms", partial(S.divergence_terms, alpha=1.0)),
    *alphas("divergence_terms", lambda **x: S.divergence_terms(f((3,)), f((3,)), **x)),
    *pairs("top_k_loss", partial(S.top_k_loss, k=1, **TOP)),
    *ks("top_k_loss", lambda **x: S.top_k_loss(f((2, 3)), f((2, 3)), **x, **TOP)),
    *alphas("top_k_loss", lambda **x: S.top_k_loss(f((3,)), f((3,)), k=1, add_tail=True, **x)),
    *pairs("top_k_log_probs", partial(S.top_k_log_probs, k=1, add_tail=True)),
    *ks("top_k_log_probs", lambda **x: S.top_k_log_probs(f((3,)), f((3,)), add_tail=True, **x)),
    *ks("top_k_indices", lambda **x: S.top_k_indices(f((3,)), **x)),
    ("top_k_indices", lambda: S.top_k_indices(i((3,)), k=1), "floating dtype, got logits int32"),
    ("support_loss", lambda: S.support_loss(f((2, 3)), f((2, 4)), i((2, 1)), **TOP), "[2, 4]"),
    ("support_loss", lambda: S.support_loss(f((2, 3)), f((2, 3)), f((2, 1)), **TOP),
     "integer dtype, got indices float32"),
    ("support_loss", lambda: S.support_loss(f((2, 3)), f((2, 3)), i((1,)), **TOP),
     "got indices [1] and logits [2, 3]"),
    ("support_log_probs", lambda: S.support_log_probs(f((2, 3)), i((3, 1)), add_tail=True),
     "got indices [3, 1] and logits [2, 3]"),
    ("support_log_probs", lambda: S.support_log_probs(i((2, 3)), i((2, 1)), add_tail=True),
     "floating dtype, got log_probs int32"),
    ("clip_entries", lambda: S.clip_entries(f((3,)), 0.0), "bound must be positive, got 0.0"),
    ("clip_entries", lambda: S.clip_entries(f((3,)), NAN), "bound must be positive, got nan"),
    ("entropy", lambda: S.entropy(i((3,))), "floating dtype, got log_probs int32"),
    ("entropy", lambda: S.entropy(f(())), "[..., V] with V >= 1, got log_probs []"),
    ("token_stats", lambda: S.token_stats(f((2, 3)), f((2, 4)), i((2,))), "[2, 3], teacher_log"),
    ("token_stats", lambda: S.token_stats(f((2, 3)), f((2, 3)), i((3,))), "got targets [3]"),
    *pairs("same_likeliest", S.same_likeliest, "student_logits", "teacher_logits"),
    # Vocabulary
    ("log_softmax", lambda: S.log_softmax(i((3,))), "floating dtype, got logits int32"),
    ("log_softmax", lambda: S.log_softmax(f(())), "[..., V] with V >= 1, got logits []"),
    ("select_targets", lambda: S.select_targets(f((2, 3)), f((2,))), "got targets float32"),
    ("select_targets", lambda: S.select_targets(f((2, 3)), i((3,))),
     "got targets [3] and log_probs [2, 3]"),
    ("scale_logits", lambda: S.scale_logits(i((3,)), temperature=1.0),
     "floating dtype, got logits int32"),
    *pairs("trust_region_logits", lambda x, y: S.trust_region_logits(x, y, 0.5),
           "reference_logits", "live_logits"),
    # Credit
    *two("candidate_loss", S.candidate_loss),
    ("candidate_loss", lambda: S.candidate_loss(f((3,)), i((3,))), "got advantages int32"),
    *two("distillation_advantages", S.distillation_advantages),
    ("distillation_advantages", lambda: S.distillation_advantages(f((3,)), f((3,)), clip=0.0),
     "clip must be positive, got 0.0"),
    *two("score_function_loss", S.score_function_loss),
    ("score_function_loss", lambda: S.score_function_loss(i((3,)), f((3,))), "log_probs int32"),
    *two("sampled_token_loss", S.sampled_token_loss),
    *two("sequence_advantages", S.sequence_advantages),
    ("sequence_advantages", lambda: S.sequence_advantages(f((3,)), f((3,))), "2 axes, got mask"),
    ("mix_advantages", lambda: S.mix_advantages(f((2,)), f((2, 3)), coefficient=1.5),
     "coefficient must lie in [0, 1], got 1.5"),
    ("mix_advantages", lambda: S.mix_advantages(f((3,)), f((2, 3)), coefficient=0.5),
     "[B, T] = [2, 3], got [3]"),
    ("mix_advantages", lambda: S.mix_advantages(f((3,)), f((3,)), coefficient=0.5),
     "2 axes, got distillation_advantages [3]"),
    ("modulate_advantages",
     lambda: S.modulate_advantages(f((2,)), f((2, 3)), f((2, 4)), **ADVICE),
     "log_probs [2, 3], teacher_log_probs [2, 4]"),
    ("modulate_advantages",
     lambda: S.modulate_advantages(f((3,)), f((2, 3)), f((2, 3)), **ADVICE), "got [3]"),
    ("modulate_advantages", lambda: S.modulate_advantages(f((3,)), f((3,)), f((3,)), **ADVICE),
     "2 axes, got log_probs [3]"),
    ("modulate_advantages",
     lambda: S.modulate_advantages(f((2,)), f((2, 3)), f((2, 3)), strength=2.0, bound=0.2),
     "strength and bound must lie in [0, 1], got 2.0 and 0.2"),
    ("modulate_advantages",
     lambda: S.modulate_advantages(f((2,)), f((2, 3)), f((2, 3)), strength=0.5, bound=-1.0),
     "strength and bound must lie in [0, 1], got 0.5 and -1.0"),
    # Policy gradient
    *[("group_advantages", partial(S.group_advantages, f((4,)), n), f"[4] and group_size {n}")
      for n in (-1, 0, 3)],
    ("group_advantages", lambda: S.group_advantages(f((2, 2)), 2), "rewards [2, 2]"),
    *two("policy_gradient_loss", lambda x, y: S.policy_gradient_loss(x, y, x, **CLIPS)),
    ("policy_gradient_loss", lambda: S.policy_gradient_loss(f((3,)), f((3,)), f((2,)), **CLIPS),
     "ratio [3], advantages [2]"),
    ("policy_gradient_loss", lambda: S.policy_gradient_loss(i((3,)), f((3,)), f((3,)), **CLIPS),
     "got log_probs int32"),
    *clips("policy_gradient_loss",
           lambda **x: S.policy_gradient_loss(f((3,)), f((3,)), f((3,)), **x)),
    *two("reference_kl", S.reference_kl),
    *two("sequence_log_probs", S.sequence_log_probs),
    ("sequence_log_probs", lambda: S.sequence_log_probs(f((3,)), f((3,))), "2 axes, got mask [3]"),
    ("sequence_log_probs", lambda: S.sequence_log_probs(i((1, 3)), f((1, 3))), "log_probs int32"),
    *two("grpo_loss", lambda x, y: S.grpo_loss(x, y, f((2,)), x, **CLIPS)),
    ("grpo_loss", lambda: S.grpo_loss(f((2, 3)), f((2, 3)), f((3,)), i((2, 3)), **CLIPS),
     "[B, T] = [2, 3], got [3]"),
    ("grpo_loss", lambda: S.grpo_loss(f((3,)), f((3,)), f((3,)), i((3,)), **CLIPS),
     "2 axes, got log_probs [3]"),
    ("grpo_loss", lambda: S.grpo_loss(
        f((2, 3)), f((2, 3)), f((2,)), i((2, 3)), weights=f((3,)), **CLIPS), "weights [3]"),
    *clips("grpo_loss", lambda **x: S.grpo_loss(f((1, 3)), f((1, 3)), f((1,)), i((1, 3)), **x)),
    # Likelihood and SDPO from logits
    ("cross_entropy", lambda: S.cross_entropy(f((2, 3)), i((3,))), "got targets [3] and"),
    ("cross_entropy", lambda: S.cross_entropy(f((2, 3)), f((2,))), "got targets float32"),
    ("cross_entropy", lambda: S.cross_entropy(i((2, 3)), i((2,))), "got logits int32"),
    *smoothings("cross_entropy", lambda **x: S.cross_entropy(f((3,)), i(()), **x)),
    ("sft_loss", lambda: S.sft_loss(f((2, 3)), i((2,)), i((2,))), "3 axes, got logits [2, 3]"),
    ("sft_loss", lambda: S.sft_loss(f((1, 2, 3)), i((1, 3)), i((1, 2))),
     "targets [1, 3], mask [1, 2]"),
    *smoothings("sft_loss", lambda **x: S.sft_loss(f((1, 1, 3)), i((1, 1)), i((1, 1)), **x)),
    ("sdpo_loss", lambda: S.sdpo_loss(f((2, 3)), f((2, 3)), i((2,)), alpha=0.5),
     "3 axes, got student_logits [2, 3]"),
    ("sdpo_loss", lambda: S.sdpo_loss(f((1, 2, 3)), f((1, 2, 3)), i((2, 2)), alpha=0.5),
     "mask [2, 2], tokens [1, 2]"),
    *alphas("sdpo_loss", lambda **x: S.sdpo_loss(f((1, 2, 3)), f((1, 2, 3)), i((1, 2)), **x)),
    # Reductions
    *two("token_mean", S.token_mean),
    *two("sequence_mean", S.sequence_mean),
    *two("fixed_length_mean", partial(S.fixed_length_mean, length=3)),
    ("token_mean_weights", lambda: S.token_mean_weights(f((3,))), "2 axes, got mask [3]"),
    ("sequence_mean_weights", lambda: S.sequence_mean_weights(f((3,))), "2 axes, got mask [3]"),
    ("fixed_length_mean_weights", lambda: S.fixed_length_mean_weights(f((3,)), length=3),
     "2 axes, got mask [3]"),
    *[(name, partial(call, length=n), f"length must be at least 1, got {n}")
      for n in (0, -2)
      for name, call in [
          ("fixed_length_mean", lambda **x: S.fixed_length_mean(f((1, 3)), f((1, 3)), **x)),
          ("fixed_length_mean_weights", lambda **x: S.fixed_length_mean_weights(f((1, 3)), **x)),
      ]],
    # Weights
    *two("truncated_importance_weights", partial(S.truncated_importance_weights, cap=2.0)),
    *[("truncated_importance_weights",
       lambda cap=cap: S.truncated_importance_weights(f((3,)), f((3,)), cap=cap),
       f"cap must be positive, got {cap}") for cap in (0.0, -1.0, NAN)],
    *two("teacher_entropy_weights", partial(S.teacher_entropy_weights, beta=1.0)),
    ("teacher_entropy_weights",
     lambda: S.teacher_entropy_weights(f((1, 3)), f((1, 3)), beta=-1.0),
     "beta must be at least 0, got -1.0"),
    ("disagreement_weights", lambda: S.disagreement_weights(f(3), beta=NAN, max_reduction=0.5),
     "beta must be at least 0, got nan"),
    ("disagreement_weights", lambda: S.disagreement_weights(f(3), beta=1.0, max_reduction=1.5),
     "max_reduction must lie in [0, 1], got 1.5"),
    ("disagreement_weights", lambda: S.disagreement_weights(i(3), beta=1.0, max_reduction=0.5),
     "floating dtype, got jsd int32"),
    ("pass_rate_weights", lambda: S.pass_rate_weights(f((4,)), 3), "passed [4] and group_size 3"),
    ("pass_rate_weights", lambda: S.pass_rate_weights(f((4,)), 2, floor=-0.1),
     "floor must be at least 0, got -0.1"),
    *two("outcome_routing", S.outcome_routing),
    ("positive_only", lambda: S.positive_only(i((3,))), "floating dtype, got advantages int32"),
    ("skip_first_tokens", lambda: S.skip_first_tokens(f((1, 3)), -1), "count must be at least 0"),
    ("skip_first_tokens", lambda: S.skip_first_tokens(f((3,)), 1), "2 axes, got mask [3]"),
    ("span_mask", lambda: S.span_mask(i((1, 1)), i((1, 1)), -1), "length must be at least 0"),
    ("span_mask", lambda: S.span_mask(f((1, 1)), i((1, 1)), 3), "integer dtype, got starts"),
    ("span_mask", lambda: S.span_mask(i((1, 1)), i((1, 2)), 3), "starts [1, 1], ends [1, 2]"),
    ("span_mask", lambda: S.span_mask(i((1,)), i((1,)), 3), "2 axes, got starts [1]"),
    # Heads, and objectives as they take them
    *[case for name, weights in [("fused_linear_loss", [(2,)]), ("checkpointed_linear_loss", [])]
      for call in [lambda *x, name=name, weights=weights, **y: head(
          vars(S)[name], *x, *map(f, weights), **{**HEADS, **y})]
      for case in [
          (name, partial(call, f((2, 4)), f((5, 3)), SftTokenInputs(i((2,)))),
           "got hidden [2, 4] and head [5, 3]"),
          (name, partial(call, f((1, 2, 4)), f((4, 3)), SftTokenInputs(i((2,)))),
           "hidden [1, 2, 4]"),
          (name, partial(call, i((2, 4)), f((4, 3)), SftTokenInputs(i((2,)))), "got hidden int32"),
          (name, partial(call, f((2, 4)), f((4, 3)), SftTokenInputs(i((3,)))),
           "aux.targets must lead with 2 tokens, got [3]"),
          (name, partial(call, f((0, 4)), f((4, 3)), SftTokenInputs(i((0,)))),
           "at least one token"),
          *chunks(name, partial(call, f((2, 4)), f((4, 3)), SftTokenInputs(i((2,))))),
      ]],
    ("fused_linear_loss",
     lambda: head(
         S.fused_linear_loss, f((2, 4)), f((4, 3)), SftTokenInputs(i((2,))), f((3,)), chunk=1),
     "expected weights [2], got [3]"),
    ("sdpo_per_token", lambda: one_token(S.sdpo_per_token(JSD), logits=(2, 5)),
     "student_log_probs [2, 5], teacher_log_probs [2, 3]"),
    ("sdpo_per_token", lambda: one_token(S.sdpo_per_token(JSD), targets=i((3,))), "targets [3]"),
    ("sdpo_per_token", lambda: one_token(S.sdpo_per_token(JSD, importance_cap=2.0)),
     "importance_cap 2.0 needs old_log_probs, got None"),
    ("sdpo_per_token",
     lambda: one_token(S.sdpo_per_token(JSD, importance_cap=0.0), old_log_probs=f((2,))),
     "cap must be positive, got 0.0"),
    ("sdpo_per_token", lambda: one_token(S.sdpo_per_token(JSD), live_hidden=f((2, 4))),
     "live_hidden needs live_head and coefficient, got None"),
    ("sampled_token_sdpo",
     lambda: one_token(S.sampled_token_sdpo(importance_cap=2.0)),
     "importance_cap 2.0 needs old_log_probs, got None"),
    ("sampled_token_sdpo", lambda: one_token(S.sampled_token_sdpo(), targets=f((2,))),
     "got targets float32"),
    *clips("grpo_per_token", grpo),
    ("grpo_per_token", lambda: grpo(old=(3,)), "log_probs [2], old_log_probs [3]"),
    ("grpo_per_token", lambda: grpo(advantages=(3,)), "advantages [3]"),
    ("grpo_per_token", lambda: grpo(kl_coefficient=0.1),
     "kl_coefficient 0.1 needs reference_log_probs, got None"),
    *smoothings("sft_per_token",
                lambda **x: S.sft_per_token(**x)(f((2, 3)), SftTokenInputs(i((2,))), None)),
    ("mixed_per_token", lambda: mixed((1,), (2,)), "first_weights [1], second_weights [2]"),
    ("mixed_per_token", lambda: mixed((1,), (1,)), "second_weights [1], tokens [2]"),
    ("with_reference_kl", lambda: S.with_reference_kl(S.sft_per_token(), coefficient=-1.0),
     "coefficient must be at least 0, got -1.0"),
    ("score_per_token", lambda: score(live_hidden=f((2, 4))),
     "live_hidden needs live_head and coefficient, got None"),
    ("score_per_token", lambda: score(targets=f((2,))), "got targets float32"),
    # From hidden states
    *alphas("sdpo_from_hidden", sdpo_hidden),
    *chunks("sdpo_from_hidden", sdpo_hidden),
    ("sdpo_from_hidden", lambda: sdpo_hidden(hidden=f((2, 4))), "3 axes, got hidden [2, 4]"),
    ("sdpo_from_hidden", lambda: sdpo_hidden(mask=i((1, 3))), "mask [1, 3], tokens [1, 2]"),
    ("sdpo_from_hidden", lambda: sdpo_hidden(targets=i((1, 3))), "targets [1, 3], mask [1, 2]"),
    ("sdpo_from_hidden", lambda: sdpo_hidden(targets=f((1, 2))), "got targets float32"),
    ("sdpo_from_hidden", lambda: sdpo_hidden(weights=f((3,))), "weights [3]"),
    ("sdpo_from_hidden", lambda: sdpo_hidden(head=f((5, 3)), teacher_head=f((5, 3))),
     "got hidden [2, 4] and head [5, 3]"),
    ("sdpo_from_hidden", lambda: sdpo_hidden(teacher_head=f((4, 5))),
     "head [4, 3], teacher_head [4, 5]"),
    ("sdpo_from_hidden", lambda: sdpo_hidden(teacher_hidden=f((1, 3, 4))),
     "teacher_hidden [1, 3, 4], hidden [1, 2, 4]"),
    *clips("grpo_from_hidden", grpo_hidden),
    *chunks("grpo_from_hidden", grpo_hidden),
    ("grpo_from_hidden", lambda: grpo_hidden(mask=i((2,))), "2 axes, got mask [2]"),
    ("grpo_from_hidden", lambda: grpo_hidden(advantages=f((3,))), "[B, T] = [1, 2], got [3]"),
    ("grpo_from_hidden", lambda: grpo_hidden(old_log_probs=f((1, 3))), "old_log_probs [1, 3]"),
    *smoothings("sft_from_hidden", sft_hidden),
    *chunks("sft_from_hidden", sft_hidden),
    ("sft_from_hidden", lambda: sft_hidden(hidden=i((1, 2, 4))), "got hidden int32"),
    # Teachers
    *[(name, partial(vars(S)[name], x), f"{argument} must lie in [0, 1], got {x}")
      for name, argument in [("ema", "rate"), ("trust_region", "coefficient")]
      for x in (-0.1, 1.5, NAN)],
    ("ema_update", lambda: S.ema_update({"w": f((3,))}, {"w": f((1,))}, 0.1), "[3] and [1]"),
]  # fmt: skip
UNCHECKED = {
    "divide": "broadcasts by intention: weights over the length of their row",
    "frozen": "takes no argument",
    "live": "takes no argument",
}


@pytest.mark.parametrize(
    "name, call, message", CASES, ids=[f"{name}: {message}" for name, _, message in CASES]
)
def test_bad_input_raises_while_tracing_and_is_named(name, call, message):
    """`eval_shape` only traces: no array has a value."""
    for trace in (jax.eval_shape, lambda call: call()):
        with pytest.raises((ValueError, TypeError)) as error:
            trace(call)
        assert message in str(error.value), name


def test_every_public_function_is_in_the_table():
    functions = {name for name, x in PUBLIC.items() if inspect.isfunction(x)}
    assert functions == {name for name, _, _ in CASES} | set(UNCHECKED)
