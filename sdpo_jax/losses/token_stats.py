"""What one look at both distributions tells, besides the loss: for metrics and for weights.

All are reductions of the same two arrays of log-probabilities, so that next to a loss they cost no
second pass over the vocabulary, and those that nobody reads are dropped by the compiler.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.losses.divergences import entropy, forward_kl, generalized_jsd, reverse_kl
from sdpo_jax.losses.vocabulary import select_targets, vocabulary_max


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
    vocabulary_axis: str | None = None,
) -> TokenStats:
    """Entropies, divergences and the sampled token's log-probabilities, all detached.

    Args:
        student_log_probs: [..., V].
        teacher_log_probs: [..., V].
        targets: [...] integer, the sampled tokens.
        vocabulary_axis: mesh axis that cuts V inside `shard_map`.

    Returns:
        TokenStats of [...] each.

    Source: the diagnostics of arXiv 2601.20802, section 4, and what the weights in `weights` read.

    >>> log_probs = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> values = token_stats(log_probs, log_probs, jnp.array([1]))
    >>> print(f"{values.student_entropy[0]:.4f} {values.jsd[0]:.4f} {values.log_prob[0]:.4f}")
    0.6931 0.0000 -0.6931
    """
    pair = jax.lax.stop_gradient((student_log_probs, teacher_log_probs))
    student, teacher = pair
    axis = vocabulary_axis
    return TokenStats(
        student_entropy=entropy(student, vocabulary_axis=axis),
        teacher_entropy=entropy(teacher, vocabulary_axis=axis),
        forward_kl=forward_kl(*pair, vocabulary_axis=axis),
        reverse_kl=reverse_kl(*pair, vocabulary_axis=axis),
        jsd=generalized_jsd(*pair, alpha=0.5, vocabulary_axis=axis),
        log_prob=select_targets(student, targets, vocabulary_axis=axis),
        teacher_log_prob=select_targets(teacher, targets, vocabulary_axis=axis),
    )


def same_likeliest(
    student_logits: jax.Array, teacher_logits: jax.Array, *, vocabulary_axis: str | None = None
) -> jax.Array:
    """1 where one token is the likeliest to both, else 0; of several that tie, any one will do.

    Maxima of the logits alone: the softmaxes beside it have two of the three already, and XLA:CPU
    does not vectorise an `argmax`.

    Args:
        student_logits: [..., V], or log-probabilities.
        teacher_logits: [..., V].
        vocabulary_axis: mesh axis that cuts V inside `shard_map`.

    Returns:
        [...], detached, in the dtype of the student's.

    >>> student, teacher = jnp.array([[2.0, 1.0], [2.0, 1.0]]), jnp.array([[9.0, 3.0], [0.0, 3.0]])
    >>> same_likeliest(student, teacher).tolist()
    [1.0, 0.0]
    """
    student, teacher = jax.lax.stop_gradient((student_logits, teacher_logits))
    best = teacher >= vocabulary_max(teacher, vocabulary_axis)[..., None]
    among = vocabulary_max(jnp.where(best, student, -jnp.inf), vocabulary_axis)
    return (among >= vocabulary_max(student, vocabulary_axis)).astype(student.dtype)
