"""The mathematics: pure functions of arrays that need jax alone.

    vocabulary       log-softmax, targets, top-k ids; the vocabulary whole or cut over a mesh axis
    divergences      forward KL, reverse KL, generalised Jensen-Shannon
    support          distributions on k tokens and a bucket for the rest
    distillation     the SDPO loss, from logits: full vocabulary, top-k, sampled token
    credit           SDPO as a policy gradient: advantages per candidate, token or rollout
    token_stats      entropies, divergences and log-probabilities of both, for metrics and weights
    weights          importance, entropy, disagreement, pass rate, routes; masks
    policy_gradient  group advantages and the clipped surrogate of GRPO, and its variants
    likelihood       cross-entropy and the SFT loss
    reductions       (sum, weight), divided once
    sequence_importance  one importance weight per response, for SDFT
    tiles            a few rows at a time
    fused_linear     any of these from hidden states, without ever holding all logits
    per_token        the losses as the `PerTokenLoss` functions that `fused_linear` takes
    kl_penalty       KL penalty to a reference policy, for any per-token loss
    from_hidden      SDPO, GRPO and SFT from hidden states
    arrays           checks of shape and dtype, precision
    compat           what differs between versions of jax

A loss returns values per token; how tokens are averaged is another function. `docs/equations.md`
maps each equation to its function and its test.
"""

from sdpo_jax.losses.credit import (
    candidate_loss,
    distillation_advantages,
    mix_advantages,
    modulate_advantages,
    score_function_loss,
    sequence_advantages,
)
from sdpo_jax.losses.distillation import sampled_token_loss, sdpo_loss, support_loss, top_k_loss
from sdpo_jax.losses.divergences import (
    clip_entries,
    divergence_terms,
    entropy,
    forward_kl,
    generalized_jsd,
    reverse_kl,
)
from sdpo_jax.losses.from_hidden import grpo_from_hidden, sdpo_from_hidden, sft_from_hidden
from sdpo_jax.losses.fused_linear import PerTokenLoss, checkpointed_linear_loss, fused_linear_loss
from sdpo_jax.losses.kl_penalty import (
    ReferenceKlSharedInputs,
    ReferenceKlTokenInputs,
    ScoreSharedInputs,
    ScoreTokenInputs,
    score_per_token,
    with_reference_kl,
)
from sdpo_jax.losses.likelihood import cross_entropy, sft_loss
from sdpo_jax.losses.per_token import (
    Divergence,
    GrpoSharedInputs,
    GrpoTokenInputs,
    MixedSharedInputs,
    MixedTokenInputs,
    SdpoSharedInputs,
    SdpoTokenInputs,
    SftTokenInputs,
    grpo_per_token,
    mixed_per_token,
    sampled_token_sdpo,
    sdpo_per_token,
    sft_per_token,
)
from sdpo_jax.losses.policy_gradient import (
    group_advantages,
    grpo_loss,
    policy_gradient_loss,
    reference_kl,
    sequence_log_probs,
)
from sdpo_jax.losses.reductions import (
    LossOutput,
    divide,
    fixed_length_mean,
    fixed_length_mean_weights,
    sequence_mean,
    sequence_mean_weights,
    token_mean,
    token_mean_weights,
)
from sdpo_jax.losses.support import SupportLogProbs, support_log_probs, top_k_log_probs
from sdpo_jax.losses.token_stats import TokenStats, same_likeliest, token_stats
from sdpo_jax.losses.vocabulary import (
    Vocabulary,
    log_softmax,
    scale_logits,
    select_targets,
    top_k_indices,
    trust_region_logits,
)
from sdpo_jax.losses.weights import (
    Routes,
    disagreement_weights,
    outcome_routing,
    pass_rate_weights,
    positive_only,
    skip_first_tokens,
    span_mask,
    teacher_entropy_weights,
    truncated_importance_weights,
)

__all__ = [
    "Divergence",
    "GrpoSharedInputs",
    "GrpoTokenInputs",
    "LossOutput",
    "MixedSharedInputs",
    "MixedTokenInputs",
    "PerTokenLoss",
    "ReferenceKlSharedInputs",
    "ReferenceKlTokenInputs",
    "Routes",
    "ScoreSharedInputs",
    "ScoreTokenInputs",
    "SdpoSharedInputs",
    "SdpoTokenInputs",
    "SftTokenInputs",
    "SupportLogProbs",
    "TokenStats",
    "Vocabulary",
    "candidate_loss",
    "checkpointed_linear_loss",
    "clip_entries",
    "cross_entropy",
    "disagreement_weights",
    "distillation_advantages",
    "divergence_terms",
    "divide",
    "entropy",
    "fixed_length_mean",
    "fixed_length_mean_weights",
    "forward_kl",
    "fused_linear_loss",
    "generalized_jsd",
    "group_advantages",
    "grpo_from_hidden",
    "grpo_loss",
    "grpo_per_token",
    "log_softmax",
    "mix_advantages",
    "mixed_per_token",
    "modulate_advantages",
    "outcome_routing",
    "pass_rate_weights",
    "policy_gradient_loss",
    "positive_only",
    "reference_kl",
    "reverse_kl",
    "same_likeliest",
    "sampled_token_loss",
    "sampled_token_sdpo",
    "scale_logits",
    "score_function_loss",
    "score_per_token",
    "sdpo_from_hidden",
    "sdpo_loss",
    "sdpo_per_token",
    "select_targets",
    "sequence_advantages",
    "sequence_log_probs",
    "sequence_mean",
    "sequence_mean_weights",
    "sft_from_hidden",
    "sft_loss",
    "sft_per_token",
    "skip_first_tokens",
    "span_mask",
    "support_log_probs",
    "support_loss",
    "teacher_entropy_weights",
    "token_mean",
    "token_mean_weights",
    "token_stats",
    "top_k_indices",
    "top_k_log_probs",
    "top_k_loss",
    "truncated_importance_weights",
    "trust_region_logits",
    "with_reference_kl",
]
