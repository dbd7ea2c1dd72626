"""Self-Distillation Policy Optimization in JAX.

The names here are pure functions of arrays and need jax alone; `sdpo_jax.training` has the trainer.
"""

from sdpo_jax.losses.chunked_head import chunked_head
from sdpo_jax.losses.distillation import (
    full_vocabulary_loss,
    sdpo_loss,
    truncated_importance_weights,
)
from sdpo_jax.losses.divergences import entropy, forward_kl, generalized_jsd, reverse_kl
from sdpo_jax.losses.likelihood import cross_entropy, sft_loss
from sdpo_jax.losses.objectives import (
    GrpoConstants,
    GrpoTokens,
    SdpoConstants,
    SdpoTokens,
    SftTokens,
    grpo_per_token,
    sdpo_per_token,
    sft_per_token,
)
from sdpo_jax.losses.policy_gradient import group_advantages, grpo_loss, policy_gradient_loss
from sdpo_jax.losses.reductions import (
    LossOutput,
    divide,
    sequence_mean,
    sequence_mean_weights,
    token_mean,
    token_mean_weights,
)
from sdpo_jax.teacher.weights import ema_update, trust_region_logits

__version__ = "0.1.0"

__all__ = [
    "GrpoConstants",
    "GrpoTokens",
    "LossOutput",
    "SdpoConstants",
    "SdpoTokens",
    "SftTokens",
    "chunked_head",
    "cross_entropy",
    "divide",
    "ema_update",
    "entropy",
    "forward_kl",
    "full_vocabulary_loss",
    "generalized_jsd",
    "group_advantages",
    "grpo_loss",
    "grpo_per_token",
    "policy_gradient_loss",
    "reverse_kl",
    "sdpo_loss",
    "sdpo_per_token",
    "sequence_mean",
    "sequence_mean_weights",
    "sft_loss",
    "sft_per_token",
    "token_mean",
    "token_mean_weights",
    "truncated_importance_weights",
    "trust_region_logits",
]
