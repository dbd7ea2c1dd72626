"""Self-distillation: the student follows the re-prompted teacher over the student's own tokens.

SDPO, arXiv 2601.20802, equation 1: Σ_t D(π_θ(· | x, y_<t), sg q(· | x, f, y_<t)), both
distributions after the same prefix of the student's sample. The prefix is taken as given: the loss
is differentiated through the next-token distributions alone. SDFT (arXiv 2601.19897) is the same
loss with a demonstration as context.

One function per estimator, from log-probabilities to values per token:

    generalized_jsd        over the whole vocabulary; the default (`divergences`)
    top_k_loss             on the student's k likeliest tokens; `support_loss` on any support
    sampled_token_loss     on the sampled token alone; its gradient is that of the reverse KL

`sdpo_loss` takes logits. Divide both by the rollout temperature first (`scale_logits`).
"""

import jax

from sdpo_jax.losses.arrays import check_rank, check_same_shape, check_vocabulary, where_active
from sdpo_jax.losses.credit import distillation_advantages, score_function_loss
from sdpo_jax.losses.divergences import generalized_jsd
from sdpo_jax.losses.reductions import LossOutput, token_mean, weighted
from sdpo_jax.losses.support import support_log_probs, top_k_log_probs
from sdpo_jax.losses.vocabulary import WHOLE, Vocabulary, log_softmax


def top_k_loss(
    student_log_probs: jax.Array,
    teacher_log_probs: jax.Array,
    *,
    alpha: float,
    k: int,
    add_tail: bool,
    vocabulary: Vocabulary = WHOLE,
) -> jax.Array:
    """D_α on the student's k likeliest tokens and, with `add_tail`, one bucket for the rest.

    Args:
        student_log_probs: [..., V], from `log_softmax`.
        teacher_log_probs: [..., V]; receives no gradient.
        alpha: which divergence, see `generalized_jsd`.
        k: in [1, V]; 100 or 20 in the paper.
        add_tail: keep the remaining mass as a bucket (a lower bound of the full divergence), or
            renormalise without it.
        vocabulary: how V lies on the devices.

    Returns:
        [...].

    Source: `distillation_topk` of the SDPO code (arXiv 2601.20802); see `top_k_log_probs`.

    >>> student, teacher = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]]))
    >>> print(f"{top_k_loss(student, teacher, alpha=1.0, k=1, add_tail=True)[0]:.4f}")
    0.5108
    """
    support = top_k_log_probs(
        student_log_probs, teacher_log_probs, k=k, add_tail=add_tail, vocabulary=vocabulary
    )
    return generalized_jsd(support.student, support.teacher, alpha=alpha)


def support_loss(
    student_log_probs: jax.Array,
    teacher_log_probs: jax.Array,
    indices: jax.Array,
    *,
    alpha: float,
    add_tail: bool,
    vocabulary: Vocabulary = WHOLE,
) -> jax.Array:
    """D_α on a given support, such as the teacher's: `top_k_indices(teacher_log_probs, k=20)`.

    Args:
        student_log_probs: [..., V], from `log_softmax`.
        teacher_log_probs: [..., V]; receives no gradient.
        indices: [..., K] integer, distinct along the last axis.
        alpha: which divergence, see `generalized_jsd`.
        add_tail: keep the remaining mass as a bucket, or renormalise without it.
        vocabulary: how V lies on the devices.

    Returns:
        [...].

    Source: on the teacher's support, OPSD (arXiv 2601.18734).

    >>> from sdpo_jax.losses import log_softmax, top_k_indices
    >>> logits = jnp.array([[0.0, 1.0, 2.0]])
    >>> student, teacher = log_softmax(logits), log_softmax(-logits)
    >>> indices = top_k_indices(teacher, k=2)
    >>> print(f"{support_loss(student, teacher, indices, alpha=0.0, add_tail=False)[0]:.4f}")
    0.4621
    """
    check_vocabulary(student_log_probs=student_log_probs, teacher_log_probs=teacher_log_probs)
    student, teacher = (
        support_log_probs(x, indices, add_tail=add_tail, vocabulary=vocabulary)
        for x in (student_log_probs, teacher_log_probs)
    )
    return generalized_jsd(student, teacher, alpha=alpha)


def sampled_token_loss(log_probs: jax.Array, teacher_log_probs: jax.Array) -> jax.Array:
    """sg[log π(y_t) - log q(y_t)] · log π(y_t): the reverse KL by its score function.

    The value is no divergence and may be negative; the gradient, averaged over y_t ~ π, is that of
    `reverse_kl`. No other divergence has this form.

    Args:
        log_probs: [...], of the sampled tokens under the student.
        teacher_log_probs: [...], under the teacher; receives no gradient.

    Returns:
        [...].

    Source: the SDPO code with `full_logit_distillation: False`; equation 2 of arXiv 2601.20802.

    >>> sampled_token_loss(jnp.array([-1.0]), jnp.array([-3.0])).tolist()
    [-2.0]
    """
    check_same_shape(log_probs=log_probs, teacher_log_probs=teacher_log_probs)
    advantages = distillation_advantages(log_probs, teacher_log_probs)
    return score_function_loss(log_probs, advantages)


def sdpo_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    mask: jax.Array,
    *,
    alpha: float,
    weights: jax.Array | None = None,
) -> LossOutput:
    """Σ mask · weight · D_α and Σ mask: the SDPO loss from logits, over the whole vocabulary.

    `LossOutput.mean()` is the paper's token mean; `sequence_mean(output.per_token, mask)` is the
    other reduction. `sdpo_from_hidden` is the same loss where logits do not fit in memory.

    Args:
        student_logits: [B, T, V], unnormalised, at the positions that predict the response tokens.
        teacher_logits: [B, T, V], of the same tokens after the teacher's prompt; no gradient.
        mask: [B, T], nonzero on response tokens (EOS included) of rows that have a teacher.
        alpha: which divergence, see `generalized_jsd`.
        weights: [B, T], for instance `truncated_importance_weights`; detached.

    Returns:
        LossOutput.

    Source: equation 1 of arXiv 2601.20802.

    >>> student, teacher = jnp.array([[[0.0, 0.0]]]), jnp.log(jnp.array([[[0.9, 0.1]]]))
    >>> print(f"{sdpo_loss(student, teacher, jnp.ones((1, 1)), alpha=1.0).mean():.4f}")
    0.5108
    """
    check_vocabulary(student_logits=student_logits, teacher_logits=teacher_logits)
    check_rank(3, student_logits=student_logits)
    check_same_shape(mask=mask, tokens=student_logits[..., 0])
    student, teacher = (where_active(mask, x) for x in (student_logits, teacher_logits))
    per_token = generalized_jsd(log_softmax(student), log_softmax(teacher), alpha=alpha)
    return token_mean(weighted(per_token, weights, mask), mask)
