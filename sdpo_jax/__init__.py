"""Self-Distillation Policy Optimization in JAX.

These names are pure functions of arrays and need jax alone; `sdpo_jax.losses` has the other losses
and their types. `load` and `train`, which train from Python, need the extra `train` and are
imported when they are used: see `sdpo_jax.api`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sdpo_jax.losses import (
    LossOutput,
    TokenStats,
    Vocabulary,
    checkpointed_linear_loss,
    distillation_advantages,
    fixed_length_mean,
    forward_kl,
    fused_linear_loss,
    generalized_jsd,
    group_advantages,
    grpo_from_hidden,
    grpo_loss,
    grpo_per_token,
    log_softmax,
    mix_advantages,
    mixed_per_token,
    reference_kl,
    reverse_kl,
    sampled_token_loss,
    scale_logits,
    sdpo_from_hidden,
    sdpo_loss,
    sdpo_per_token,
    sequence_mean,
    sft_from_hidden,
    sft_loss,
    sft_per_token,
    token_mean,
    token_stats,
    top_k_loss,
    truncated_importance_weights,
)
from sdpo_jax.teacher.weights import Teacher, ema, ema_update, frozen, live, trust_region

if TYPE_CHECKING:
    from sdpo_jax.api import load as load
    from sdpo_jax.api import train as train

__version__ = "0.1.0"

__all__ = [
    "LossOutput",
    "Teacher",
    "TokenStats",
    "Vocabulary",
    "checkpointed_linear_loss",
    "distillation_advantages",
    "ema",
    "ema_update",
    "fixed_length_mean",
    "forward_kl",
    "frozen",
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
    "reference_kl",
    "reverse_kl",
    "sampled_token_loss",
    "scale_logits",
    "sdpo_from_hidden",
    "sdpo_loss",
    "sdpo_per_token",
    "sequence_mean",
    "sft_from_hidden",
    "sft_loss",
    "sft_per_token",
    "token_mean",
    "token_stats",
    "top_k_loss",
    "truncated_importance_weights",
    "trust_region",
]


def __getattr__(name: str) -> Any:
    """Resolves `load` and `train`, which need more than jax, on first use."""
    if name in ("load", "train"):
        return getattr(import_module("sdpo_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
