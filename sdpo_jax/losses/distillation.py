"""Self-distillation: the student follows the re-prompted teacher over the student's own tokens.

SDPO, arXiv 2601.20802, equation 1: Σ_t D(π_θ(· | x, y_<t), sg q(· | x, f, y_<t)), both
distributions over the whole vocabulary and after the same prefix of the student's sample. The
prefix is taken as given: the loss is differentiated through the next-token distributions alone.
SDFT (arXiv 2601.19897) is the same loss with a demonstration as context.

Divide both logits by the rollout temperature before they come here.
"""

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import check_same_shape
from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.likelihood import log_softmax
from sdpo_jax.losses.policy_gradient import probability_ratio
from sdpo_jax.losses.reductions import LossOutput, token_mean


def full_vocabulary_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, *, alpha: float
) -> jax.Array:
    """Divergence of the next-token distributions, per token.

    Args:
        student_logits: [..., V], unnormalised.
        teacher_logits: [..., V], unnormalised; receives no gradient.
        alpha: 0: KL(teacher ‖ student); 1: KL(student ‖ teacher); between: `generalized_jsd`.

    Returns:
        [...].

    >>> same = jnp.array([[1.0, 2.0, 3.0]])
    >>> full_vocabulary_loss(same, same + 5.0, alpha=0.5).tolist()
    [0.0]
    """
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    return generalized_jsd(log_softmax(student_logits), log_softmax(teacher_logits), alpha=alpha)


def truncated_importance_weights(
    log_probs: jax.Array, old_log_probs: jax.Array, *, cap: float
) -> jax.Array:
    """min(exp(log π - log π_old), cap), detached; the log-ratio is limited to ±20.

    Corrects the loss of a token for the policy that drew it. Capped from above only (2 in the SDPO
    code), and exactly 1 on-policy. Arrays have any equal shape and receive no gradient.

    >>> log_probs, old_log_probs = jnp.log(jnp.array([0.5, 0.9])), jnp.log(jnp.array([0.5, 0.1]))
    >>> truncated_importance_weights(log_probs, old_log_probs, cap=2.0).tolist()
    [1.0, 2.0]
    """
    if not cap > 0.0:
        raise ValueError(f"cap must be positive, got {cap}")
    return jax.lax.stop_gradient(jnp.minimum(probability_ratio(log_probs, old_log_probs), cap))


def sdpo_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    mask: jax.Array,
    *,
    alpha: float,
    weights: jax.Array | None = None,
) -> LossOutput:
    """Σ mask · weight · divergence and Σ mask: the SDPO loss from logits.

    `LossOutput.mean()` is the paper's token mean; `sequence_mean(output.per_token, mask)` is the
    other reduction. Where logits do not fit in memory, `chunked_head` with `sdpo_per_token` is the
    same loss.

    Args:
        student_logits: [B, T, V], unnormalised, at the positions that predict the response tokens.
        teacher_logits: [B, T, V], of the same tokens after the teacher's prompt; receives no
            gradient.
        mask: [B, T], nonzero on response tokens (EOS included) of rows that have a teacher.
        alpha: which divergence, see `full_vocabulary_loss`.
        weights: [B, T], for instance `truncated_importance_weights`, or a product of such;
            detached.

    Returns:
        LossOutput.

    >>> student, teacher = jnp.array([[[0.0, 0.0]]]), jnp.log(jnp.array([[[0.9, 0.1]]]))
    >>> print(f"{sdpo_loss(student, teacher, jnp.ones((1, 1)), alpha=1.0).mean():.4f}")
    0.5108
    """
    per_token = full_vocabulary_loss(student_logits, teacher_logits, alpha=alpha)
    if weights is not None:
        check_same_shape(weights=weights, per_token=per_token)
        per_token = per_token * jax.lax.stop_gradient(weights).astype(per_token.dtype)
    return token_mean(per_token, mask)
