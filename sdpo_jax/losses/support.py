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
from sdpo_jax.losses.vocabulary import WHOLE, Vocabulary, take_entries, top_k_indices

MAX_LOG_MASS = -1e-7
"""log(1 - 1e-7): a bucket never holds less than 1e-7, whose logarithm is still finite."""


class SupportLogProbs(NamedTuple):
    """Two distributions on one support."""

    student: jax.Array  # [..., K] or, with the bucket last, [..., K + 1]
    teacher: jax.Array  # the same; receives no gradient
    indices: jax.Array  # [..., K] int32, the ids of the entries


def top_k_log_probs(
    student_log_probs: jax.Array,
    teacher_log_probs: jax.Array,
    *,
    k: int,
    add_tail: bool,
    vocabulary: Vocabulary = WHOLE,
) -> SupportLogProbs:
    """Both distributions on the student's k likeliest tokens.

    Args:
        student_log_probs: [..., V], from `log_softmax`.
        teacher_log_probs: [..., V]; receives no gradient.
        k: in [1, V]. Of equal log-probabilities the smaller id is taken.
        add_tail: append the bucket log(1 - Σ_j p_j); otherwise divide by Σ_j p_j.
        vocabulary: how V lies on the devices.

    Returns:
        SupportLogProbs, in float32 or wider.

    Source: the SDPO code (arXiv 2601.20802); k is 100 in section 3, 20 in sections 4 and 5.

    >>> log_probs = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    >>> support = top_k_log_probs(log_probs, log_probs, k=1, add_tail=True)
    >>> [f"{p:.2f}" for p in jnp.exp(support.student)], support.indices.tolist()
    (['0.50', '0.50'], [0])
    """
    check_vocabulary(student_log_probs=student_log_probs, teacher_log_probs=teacher_log_probs)
    indices = top_k_indices(student_log_probs, k=k, vocabulary=vocabulary)
    student, teacher = (
        support_log_probs(x, indices, add_tail=add_tail, vocabulary=vocabulary)
        for x in (student_log_probs, jax.lax.stop_gradient(teacher_log_probs))
    )
    return SupportLogProbs(student, teacher, indices)


def support_log_probs(
    log_probs: jax.Array, indices: jax.Array, *, add_tail: bool, vocabulary: Vocabulary = WHOLE
) -> jax.Array:
    """A distribution on any support: `log_probs[indices]`, and the mass that is left over.

    With s = min(log Σ_j p_j, -1e-7) the bucket is log(1 - e^s); gradient flows through it, and
    stops where the minimum cuts. Without it: log p_j - log Σ_j p_j.

    Args:
        log_probs: [..., V], from `log_softmax`.
        indices: [..., K] integer, distinct along the last axis.
        add_tail: append the bucket, or renormalise.
        vocabulary: how V lies on the devices.

    Returns:
        [..., K + 1] with the bucket last, else [..., K]; at least -1e4.

    Source: the SDPO code (arXiv 2601.20802), `distillation_add_tail`.

    >>> log_probs = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    >>> few = support_log_probs(log_probs, jnp.array([2, 1]), add_tail=False)
    >>> [f"{p:.2f}" for p in jnp.exp(few)]
    ['0.40', '0.60']
    """
    check_vocabulary(log_probs=log_probs)
    entries = take_entries(log_probs, indices, vocabulary=vocabulary)
    entries = floored(entries.astype(loss_dtype(entries)))
    mass = jax.nn.logsumexp(entries, axis=-1, keepdims=True)
    if not add_tail:
        return floored(entries - mass)
    tail = jnp.log(-jnp.expm1(jnp.minimum(mass, MAX_LOG_MASS)))
    return jnp.concatenate([entries, tail], axis=-1)
