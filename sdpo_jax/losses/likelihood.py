"""Likelihood of given tokens: SFT, the baseline of SDFT (arXiv 2601.19897).

SDFT itself is `sdpo_loss` with a demonstration in the teacher's context and `skip_first_tokens`.
"""

import jax

from sdpo_jax.losses.arrays import check_rank, check_same_shape, check_vocabulary, where_active
from sdpo_jax.losses.divergences import floored
from sdpo_jax.losses.reductions import LossOutput, token_mean, weighted
from sdpo_jax.losses.vocabulary import WHOLE, Vocabulary, log_softmax, select_targets


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    *,
    label_smoothing: float = 0.0,
    vocabulary: Vocabulary = WHOLE,
) -> jax.Array:
    """-(1 - ε) log p(y) - (ε / V) Σ_v log p(v), with log p = log softmax(logits), in float32.

    Args:
        logits: [..., V], unnormalised.
        targets: [...], integer.
        label_smoothing: ε in [0, 1).
        vocabulary: how V lies on the devices.

    Returns:
        [...].

    Source: maximum likelihood; smoothing as in section 7 of arXiv 1512.00567.

    >>> print(f"{cross_entropy(jnp.zeros(4), jnp.array(2)):.4f}")
    1.3863
    """
    log_probs = log_softmax(logits, vocabulary=vocabulary)
    return cross_entropy_of(
        log_probs, targets, label_smoothing=label_smoothing, vocabulary=vocabulary
    )


def cross_entropy_of(
    log_probs: jax.Array, targets: jax.Array, *, label_smoothing: float, vocabulary: Vocabulary
) -> jax.Array:
    """`cross_entropy` from log-probabilities [..., V], for callers that have them.

    >>> log_probs, y = jnp.log(jnp.array([0.25, 0.75])), jnp.array(0)
    >>> loss = cross_entropy_of(log_probs, y, label_smoothing=0.0, vocabulary=WHOLE)
    >>> print(f"{loss:.4f}")
    1.3863
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    log_probs = floored(log_probs)
    loss = -select_targets(log_probs, targets, vocabulary=vocabulary)
    if label_smoothing == 0.0:
        return loss
    size = log_probs.shape[-1] * vocabulary.shards
    uniform = -vocabulary.sum(log_probs) / size
    return (1.0 - label_smoothing) * loss + label_smoothing * uniform


def sft_loss(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    label_smoothing: float = 0.0,
    weights: jax.Array | None = None,
) -> LossOutput:
    """Σ mask · weight · cross-entropy and Σ mask: the likelihood of demonstrations.

    Args:
        logits: [B, T, V], unnormalised.
        targets: [B, T], integer; anything where masked.
        mask: [B, T], nonzero where a token counts.
        label_smoothing: in [0, 1), off by default.
        weights: [B] per sequence or [B, T] per token; detached.

    Returns:
        LossOutput.

    Source: the SFT baseline of SDFT, arXiv 2601.19897.

    >>> targets, mask = jnp.array([[2, 9]]), jnp.array([[1, 0]])
    >>> print(f"{sft_loss(jnp.zeros((1, 2, 4)), targets, mask).mean():.4f}")
    1.3863
    """
    check_vocabulary(logits=logits)
    check_rank(3, logits=logits)
    check_same_shape(targets=targets, mask=mask, tokens=logits[..., 0])
    logits = where_active(mask, logits)
    loss = cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return token_mean(weighted(loss, weights, mask), mask)
