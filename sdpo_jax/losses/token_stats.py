"""Per-token statistics of both distributions (entropies, KLs, log-probs), for metrics and weights.

All are reductions of the two arrays of log-probabilities that the loss reads, too: one softmax per
distribution serves both, and the compiler drops the statistics that nobody reads.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import check_vocabulary
from sdpo_jax.losses.divergences import as_log_probs, mixture_divergence
from sdpo_jax.losses.vocabulary import WHOLE, Vocabulary, select_targets


class TokenStats(NamedTuple):
    """Detached values per token, each `[...]` in nats."""

    student_entropy: jax.Array  # H(π)
    teacher_entropy: jax.Array  # H(q)
    forward_kl: jax.Array  # KL(q ‖ π)
    reverse_kl: jax.Array  # KL(π ‖ q)
    jsd: jax.Array  # α = 1/2, at most ln 2
    log_prob: jax.Array  # log π(y_t) of the sampled token
    teacher_log_prob: jax.Array  # log q(y_t)


def token_stats(
    student_log_probs: jax.Array,
    teacher_log_probs: jax.Array,
    targets: jax.Array,
    *,
    vocabulary: Vocabulary = WHOLE,
) -> TokenStats:
    """Entropies, divergences and the sampled token's log-probabilities, all detached.

    Args:
        student_log_probs: [..., V].
        teacher_log_probs: [..., V].
        targets: [...] integer, the sampled tokens.
        vocabulary: how V lies on the devices.

    Returns:
        TokenStats of [...] each.

    Source: the diagnostics of arXiv 2601.20802, section 4, and what the weights in `weights` read.

    >>> log_probs = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> values = token_stats(log_probs, log_probs, jnp.array([1]))
    >>> print(f"{values.student_entropy[0]:.4f} {values.jsd[0]:.4f} {values.log_prob[0]:.4f}")
    0.6931 0.0000 -0.6931
    """
    pair = jax.lax.stop_gradient((student_log_probs, teacher_log_probs))
    log_prob, teacher_log_prob = (_sampled(x, targets, vocabulary) for x in pair)
    student, teacher = as_log_probs(*pair)
    p, q, sums = jnp.exp(student), jnp.exp(teacher), vocabulary.sum
    gap = teacher - student
    return TokenStats(
        student_entropy=-sums(p * student),
        teacher_entropy=-sums(q * teacher),
        forward_kl=sums(q * gap),
        reverse_kl=-sums(p * gap),
        jsd=mixture_divergence(0.5, vocabulary, student, teacher),
        log_prob=log_prob,
        teacher_log_prob=teacher_log_prob,
    )


def _sampled(log_probs: jax.Array, targets: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """`select_targets` without a gradient; on a CPU a gather, which spares two passes over V."""
    compare = partial(select_targets, vocabulary=vocabulary)
    if vocabulary.axis is not None:
        return compare(log_probs, targets)

    def gather(log_probs: jax.Array, targets: jax.Array) -> jax.Array:
        ids = targets.astype(jnp.int32)[..., None]
        inside = (ids >= 0) & (ids < log_probs.shape[-1])
        picked = jnp.take_along_axis(log_probs, jnp.where(inside, ids, 0), axis=-1)
        return jnp.where(inside, picked, jnp.zeros((), picked.dtype))[..., 0]

    return jax.lax.platform_dependent(log_probs, targets, cpu=gather, default=compare)


def same_likeliest(
    student_logits: jax.Array, teacher_logits: jax.Array, *, vocabulary: Vocabulary = WHOLE
) -> jax.Array:
    """1 where one token is the likeliest of both, else 0; of several that tie, any one will do.

    It takes maxima alone: the softmaxes of the same logits have two of the three already, and
    XLA:CPU does not vectorise an `argmax`.

    Args:
        student_logits: [..., V], or log-probabilities.
        teacher_logits: [..., V].
        vocabulary: how V lies on the devices.

    Returns:
        [...], detached, in the dtype of the student's.

    Source: the top token of both models, arXiv 2601.20802, section 4.

    >>> student, teacher = jnp.array([[2.0, 1.0], [2.0, 1.0]]), jnp.array([[9.0, 3.0], [0.0, 3.0]])
    >>> same_likeliest(student, teacher).tolist()
    [1.0, 0.0]
    """
    check_vocabulary(student_logits=student_logits, teacher_logits=teacher_logits)
    student, teacher = jax.lax.stop_gradient((student_logits, teacher_logits))
    best = teacher >= vocabulary.max(teacher)[..., None]
    among = vocabulary.max(jnp.where(best, student, -jnp.inf))
    return (among >= vocabulary.max(student)).astype(student.dtype)
