"""The per-token loss of a recipe's objective, and which of its by-products are reported."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from sdpo_jax.config.objectives import GrpoConfig, SdftConfig, SdpoConfig
from sdpo_jax.losses.distillation import full_vocabulary_loss, top_k_loss
from sdpo_jax.losses.fused_linear import PerTokenLoss
from sdpo_jax.losses.per_token import (
    Divergence,
    grpo_per_token,
    mixed_per_token,
    sampled_token_sdpo,
    sdpo_per_token,
)
from sdpo_jax.losses.reference_kl import with_reference_kl
from sdpo_jax.losses.token_stats import TokenStats
from sdpo_jax.losses.weights import disagreement_weights
from sdpo_jax.objectives.loss_weights import reinforces, weighs
from sdpo_jax.training.token_metrics import AGREEMENT, BY_TOKEN, HISTOGRAM

SAMPLED = ("log_prob", "student_entropy")
PAIRS = ("teacher_entropy", "forward_kl", "reverse_kl", "jsd", "teacher_log_prob", "same_token")
SPREAD = (HISTOGRAM, BY_TOKEN)
"""Of a divergence, which is nowhere negative; the sampled token's estimate may be."""
BY_ADVANTAGE = ("sequence", "modulated", "fixed_negative")
"""Credits that are known before the loss: they run through GRPO's surrogate."""

_DISTILLED: tuple[str, ...] = ("divergence", "weight", *PAIRS)
_REINFORCED: tuple[str, ...] = ("clipped",)

Loss = tuple[PerTokenLoss, tuple[str, ...]]
"""The loss, and the by-products that are reported; others are not computed."""


def is_mixed(objective: SdpoConfig) -> bool:
    """Whether tokens carry weights of their own for both terms.

    So they must beside a KL, too: it counts in full where the distillation does not.
    """
    if objective.credit in BY_ADVANTAGE:
        return False
    return reinforces(objective) or (objective.reference_kl > 0 and weighs(objective))


def sdpo_loss_of(objective: SdpoConfig) -> Loss:
    """The loss with every switch of an `sdpo` recipe."""
    surrogate = _surrogate(GrpoConfig())
    if objective.credit in BY_ADVANTAGE:
        return _anchored(objective, surrogate, (*SAMPLED, "ratio", "clipped"))
    settings: dict[str, Any] = {"importance_cap": objective.importance_cap}
    names = ("divergence", *SAMPLED, *PAIRS, "ratio", AGREEMENT)
    if objective.token_weights == "disagreement":
        settings["weigh"], names = _disagreement(objective), (*names, "weight")
    if objective.credit == "token":
        loss = sampled_token_sdpo(**settings)
    else:
        loss, names = sdpo_per_token(divergence_of(objective), **settings), (*names, *SPREAD)
    if is_mixed(objective):
        loss = mixed_per_token(loss, surrogate)
        names = (*names, "clipped", "first_active", "second_active")
    return _anchored(objective, loss, names)


def sdft_loss_of(objective: SdftConfig) -> Loss:
    """The loss of an `sdft` recipe; a response's weight is `sequence_weighted_head`'s."""
    names = ("divergence", *SAMPLED, *PAIRS, *SPREAD, "importance")
    return sdpo_per_token(divergence_of(objective)), names


def grpo_loss_of(objective: GrpoConfig) -> Loss:
    """The loss of a `grpo` recipe."""
    return _anchored(objective, _surrogate(objective), (*SAMPLED, "ratio", "clipped"))


def divergence_of(objective: SdpoConfig | SdftConfig) -> Divergence:
    """The divergence over the vocabulary, or over the student's likeliest tokens."""
    if objective.top_k:
        return partial(top_k_loss, alpha=objective.alpha, k=objective.top_k, add_tail=True)
    return partial(full_vocabulary_loss, alpha=objective.alpha)


def _surrogate(objective: GrpoConfig) -> PerTokenLoss:
    return grpo_per_token(
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
    )


def _disagreement(objective: SdpoConfig) -> Callable[[TokenStats], jax.Array]:
    def weigh(products: TokenStats) -> jax.Array:
        return disagreement_weights(
            products.jsd,
            beta=objective.token_weight_beta,
            max_reduction=objective.disagreement_reduction,
        )

    return weigh


def _anchored(
    objective: SdpoConfig | GrpoConfig, loss: PerTokenLoss, names: tuple[str, ...]
) -> Loss:
    if objective.reference_kl == 0:
        return loss, names
    return with_reference_kl(loss, coefficient=objective.reference_kl), (*names, "reference_kl")


def means(sums: Mapping[str, float], tokens: float) -> dict[str, float]:
    """Means over the tokens at which each by-product is defined; of a mix, its two shares, too."""
    if "first_active" not in sums:
        return {name: total / tokens for name, total in sums.items()}
    counts: dict[str, float] = dict.fromkeys(_DISTILLED, max(1.0, sums["first_active"]))
    counts |= dict.fromkeys(_REINFORCED, max(1.0, sums["second_active"]))
    row = {name: total / counts.get(name, tokens) for name, total in sums.items()}
    row["distilled"], row["reinforced"] = row.pop("first_active"), row.pop("second_active")
    return row
