"""The objectives as per-token losses for `chunked_head`.

Each factory takes the hyper-parameters and returns `loss(logits[C, V], tokens, constants)`; the
arrays that it reads are named by a NamedTuple. The student's logits, and the teacher's, are divided
by the temperature that the rollouts were drawn at, so that log-probabilities are those of the
sampler.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.losses.chunked_head import Metrics, PerTokenLoss, head_logits
from sdpo_jax.losses.distillation import truncated_importance_weights
from sdpo_jax.losses.divergences import entropy, generalized_jsd
from sdpo_jax.losses.likelihood import log_softmax, select_targets
from sdpo_jax.losses.policy_gradient import clip_ratio, policy_gradient_loss, probability_ratio


class SdpoTokens(NamedTuple):
    """What SDPO knows of each token."""

    teacher_hidden: jax.Array  # [M, D], the teacher's final hidden states at the same tokens
    targets: jax.Array  # [M] integer, the sampled tokens
    old_log_probs: jax.Array  # [M], of the sampled tokens when they were drawn


class SdpoConstants(NamedTuple):
    """What SDPO knows besides."""

    teacher_head: jax.Array  # [D, V]
    temperature: jax.Array  # [] float32


class GrpoTokens(NamedTuple):
    """What GRPO knows of each token."""

    targets: jax.Array  # [M] integer
    old_log_probs: jax.Array  # [M]
    advantages: jax.Array  # [M], the rollout's advantage at each of its tokens


class GrpoConstants(NamedTuple):
    """What GRPO knows besides."""

    temperature: jax.Array  # [] float32


class SftTokens(NamedTuple):
    """What SFT knows of each token."""

    targets: jax.Array  # [M] integer


def sdpo_per_token(alpha: float, importance_cap: float) -> PerTokenLoss:
    """min(π/π_old, cap) · D_α(student, teacher) over the whole vocabulary.

    Equation 1 of arXiv 2601.20802 per token, with the importance weight of the SDPO code.

    Metrics: divergence, student_entropy, teacher_entropy, log_prob and teacher_log_prob of the
    target, ratio (of new to rollout probability, before the cap).

    >>> loss = sdpo_per_token(alpha=0.5, importance_cap=2.0)
    >>> tokens = SdpoTokens(jnp.eye(2), jnp.array([0, 1]), jnp.log(jnp.array([0.5, 0.5])))
    >>> value, metrics = loss(jnp.zeros((2, 2)), tokens, SdpoConstants(jnp.eye(2), jnp.array(1.0)))
    >>> metrics["ratio"].tolist()
    [1.0, 1.0]
    """

    def loss(
        logits: jax.Array, tokens: SdpoTokens, constants: SdpoConstants
    ) -> tuple[jax.Array, Metrics]:
        teacher_logits = head_logits(tokens.teacher_hidden, constants.teacher_head)
        student = _tempered_log_probs(logits, constants.temperature)
        teacher = _tempered_log_probs(teacher_logits, constants.temperature)
        divergence = generalized_jsd(student, teacher, alpha=alpha)
        log_prob = select_targets(student, tokens.targets)
        weights = truncated_importance_weights(log_prob, tokens.old_log_probs, cap=importance_cap)
        return weights * divergence, {
            "divergence": divergence,
            "student_entropy": entropy(student),
            "teacher_entropy": entropy(teacher),
            "log_prob": log_prob,
            "teacher_log_prob": select_targets(teacher, tokens.targets),
            "ratio": probability_ratio(log_prob, tokens.old_log_probs),
        }

    return loss


def grpo_per_token(clip_low: float, clip_high: float, dual_clip: float) -> PerTokenLoss:
    """Clipped surrogate of the sampled token, `policy_gradient_loss`.

    Metrics: log_prob of the target, student_entropy, ratio, clipped (1 where the ratio is held
    back).

    >>> loss = grpo_per_token(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    >>> tokens = GrpoTokens(jnp.array([0]), jnp.log(jnp.array([0.25])), jnp.array([1.0]))
    >>> value, metrics = loss(jnp.zeros((1, 2)), tokens, GrpoConstants(jnp.array(1.0)))
    >>> print(f"{value[0]:.2f}", metrics["clipped"].tolist())
    -1.28 [True]
    """

    def loss(
        logits: jax.Array, tokens: GrpoTokens, constants: GrpoConstants
    ) -> tuple[jax.Array, Metrics]:
        clips = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
        student = _tempered_log_probs(logits, constants.temperature)
        log_prob = select_targets(student, tokens.targets)
        ratio = probability_ratio(log_prob, tokens.old_log_probs)
        value = policy_gradient_loss(log_prob, tokens.old_log_probs, tokens.advantages, **clips)
        return value, {
            "log_prob": log_prob,
            "student_entropy": entropy(student),
            "ratio": ratio,
            "clipped": clip_ratio(ratio, tokens.advantages, **clips) != ratio,
        }

    return loss


def sft_per_token() -> PerTokenLoss:
    """Cross-entropy of the target, at temperature 1. Metrics: log_prob, student_entropy, correct.

    >>> value, metrics = sft_per_token()(jnp.zeros((1, 4)), SftTokens(jnp.array([0])), None)
    >>> print(f"{value[0]:.4f}", metrics["correct"].tolist())
    1.3863 [True]
    """

    def loss(logits: jax.Array, tokens: SftTokens, constants: None) -> tuple[jax.Array, Metrics]:
        del constants
        student = log_softmax(logits)
        log_prob = select_targets(student, tokens.targets)
        return -log_prob, {
            "log_prob": log_prob,
            "student_entropy": entropy(student),
            "correct": jnp.argmax(logits, axis=-1) == tokens.targets,
        }

    return loss


def _tempered_log_probs(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    return log_softmax(logits / jnp.asarray(temperature, logits.dtype))
