"""Self-Distillation Policy Optimization in JAX.

The names here are pure functions of arrays and need jax alone; `sdpo_jax.training` has the trainer.
"""

from sdpo_jax.losses.credit import (
    candidate_loss,
    distillation_advantages,
    mix_advantages,
    modulate_advantages,
    score_function_loss,
    sequence_advantages,
)
from sdpo_jax.losses.distillation import (
    full_vocabulary_loss,
    sampled_token_loss,
    sdpo_loss,
    support_loss,
    top_k_loss,
)
from sdpo_jax.losses.divergences import (
    clip_entries,
    divergence_terms,
    entropy,
    forward_kl,
    generalized_jsd,
    reverse_kl,
)
from sdpo_jax.losses.from_hidden import grpo_from_hidden, sdpo_from_hidden, sft_from_hidden
from sdpo_jax.losses.fused_linear import checkpointed_linear_loss, fused_linear_loss
from sdpo_jax.losses.likelihood import cross_entropy, sft_loss
from sdpo_jax.losses.per_token import (
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
from sdpo_jax.losses.token_stats import TokenStats, token_stats
from sdpo_jax.losses.vocabulary import (
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
from sdpo_jax.teacher.weights import Teacher, ema, ema_update, frozen, live, trust_region

__version__ = "0.1.0"

__all__ = [
    "GrpoSharedInputs",
    "GrpoTokenInputs",
    "LossOutput",
    "MixedSharedInputs",
    "MixedTokenInputs",
    "Routes",
    "SdpoSharedInputs",
    "SdpoTokenInputs",
    "SftTokenInputs",
    "SupportLogProbs",
    "Teacher",
    "TokenStats",
    "candidate_loss",
    "checkpointed_linear_loss",
    "clip_entries",
    "cross_entropy",
    "disagreement_weights",
    "distillation_advantages",
    "divergence_terms",
    "divide",
    "ema",
    "ema_update",
    "entropy",
    "fixed_length_mean",
    "fixed_length_mean_weights",
    "forward_kl",
    "frozen",
    "full_vocabulary_loss",
    "fused_linear_loss",
    "generalized_jsd",
    "group_advantages",
    "grpo_from_hidden",
    "grpo_loss",
    "grpo_per_token",
    "live",
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
    "sampled_token_loss",
    "sampled_token_sdpo",
    "scale_logits",
    "score_function_loss",
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
    "trust_region",
    "trust_region_logits",
]
