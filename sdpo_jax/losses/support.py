"""Distributions on a few tokens: k entries of the vocabulary and one bucket for the rest.

Log-probabilities keep the normaliser of the whole vocabulary. What is left over is either a bucket
of its own (`add_tail`) or divided away. With the bucket a divergence is a lower bound of the one
over the whole vocabulary, never falls as nested supports grow, and is equal from k = V - 1 on while
it holds more than 1e-7. Without it a single entry is certain and its divergence 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import check_vocabulary, loss_dtype
from sdpo_jax.losses.divergences import floored
from sdpo_jax.losses.vocabulary import log_normalizer, take_entries, top_k_indices

MAX_LOG_MASS = -1e-7
"""log(1 - 1e-7): a bucket never holds less than 1e-7, whose logarithm is still finite."""


class SupportLogProbs(NamedTuple):
    """Two distributions on one support."""

    student: jax.Array  # [..., K] or, with the bucket last, [..., K + 1]
    teacher: jax.Array  # the same; receives no gradient
    indices: jax.Array  # [..., K] int32, the ids of the entries


def top_k_log_probs(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    k: int,
    add_tail: bool,
    vocabulary_axis: str | None = None,
) -> SupportLogProbs:
    """Both distributions on the student's k likeliest tokens.

    log p_j = z_j - log Σ_v e^{z_v} for the k entries; then `support_log_probs`.

    Args:
        student_logits: [..., V], unnormalised.
        teacher_logits: [..., V]; receives no gradient.
        k: in [1, V]. Of equal logits the smaller id is taken.
        add_tail: append the bucket log(1 - Σ_j p_j); otherwise divide by Σ_j p_j.
        vocabulary_axis: mesh axis that cuts V inside `shard_map`.

    Returns:
        SupportLogProbs, in float32 or wider.

    Source: the SDPO code (arXiv 2601.20802); k is 100 in section 3, 20 in sections 4 and 5.

    >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    >>> support = top_k_log_probs(logits, logits, k=1, add_tail=True)
    >>> [f"{p:.2f}" for p in jnp.exp(support.student)], support.indices.tolist()
    (['0.50', '0.50'], [0])
    """
    check_vocabulary(student_logits=student_logits, teacher_logits=teacher_logits)
    indices = top_k_indices(student_logits, k=k, vocabulary_axis=vocabulary_axis)
    student, teacher = (
        support_log_probs(x, indices, add_tail=add_tail, vocabulary_axis=vocabulary_axis)
        for x in (student_logits, jax.lax.stop_gradient(teacher_logits))
    )
    return SupportLogProbs(student, teacher, indices)


def support_log_probs(
    logits: jax.Array,
    indices: jax.Array,
    *,
    add_tail: bool,
    vocabulary_axis: str | None = None,
) -> jax.Array:
    """A distribution on any support: `log_softmax(logits)[indices]`, and what is left over.

    With s = min(log Σ_j p_j, -1e-7) the bucket is log(1 - e^s); gradient flows through it, and
    stops where the minimum cuts. Without it: log p_j - log Σ_j p_j.

    Args:
        logits: [..., V], unnormalised.
        indices: [..., K] integer, distinct along the last axis.
        add_tail: append the bucket, or renormalise.
        vocabulary_axis: mesh axis that cuts V inside `shard_map`.

    Returns:
        [..., K + 1] with the bucket last, else [..., K]; at least -1e4.

    Source: the SDPO code (arXiv 2601.20802), `distillation_add_tail`.

    >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    >>> log_probs = support_log_probs(logits, jnp.array([2, 1]), add_tail=False)
    >>> [f"{p:.2f}" for p in jnp.exp(log_probs)]
    ['0.40', '0.60']
    """
    check_vocabulary(logits=logits)
    # Wide before the paths part: their gradients cancel, and would be rounded one by one.
    logits = logits.astype(loss_dtype(logits))
    normalizer = log_normalizer(logits, vocabulary_axis=vocabulary_axis)
    entries = take_entries(logits, indices, vocabulary_axis=vocabulary_axis)
    log_probs = floored(entries - normalizer[..., None])
    mass = jax.nn.logsumexp(log_probs, axis=-1, keepdims=True)
    if not add_tail:
        return floored(log_probs - mass)
    tail = jnp.log(-jnp.expm1(jnp.minimum(mass, MAX_LOG_MASS)))
    return jnp.concatenate([log_probs, tail], axis=-1)
