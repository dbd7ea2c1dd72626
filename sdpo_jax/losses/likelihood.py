"""Likelihood of given tokens: SFT, and the log-probabilities that the other losses need."""

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import check_same_shape, loss_dtype
from sdpo_jax.losses.reductions import LossOutput, token_mean


def log_softmax(logits: jax.Array) -> jax.Array:
    """Log-probabilities over the last axis, in float32 (float64 stays). `[..., V] -> [..., V]`.

    >>> log_softmax(jnp.zeros(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    return jax.nn.log_softmax(logits.astype(loss_dtype(logits)), axis=-1)


def select_targets(log_probs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return `log_probs[..., targets]`; [..., V] and integer [...] to [...].

    A comparison with a counter instead of a gather: it fuses into the softmax, and it stays local
    where the vocabulary is sharded. A target outside the vocabulary gives 0, so padding may hold
    any id.

    >>> select_targets(jnp.array([[-1.0, -2.0], [-3.0, -4.0]]), jnp.array([1, 0])).tolist()
    [-2.0, -3.0]
    """
    if log_probs.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have the shape of log_probs without its last axis, got targets "
            f"{list(targets.shape)} and log_probs {list(log_probs.shape)}"
        )
    counter = jax.lax.broadcasted_iota(targets.dtype, log_probs.shape, log_probs.ndim - 1)
    return jnp.sum(jnp.where(counter == targets[..., None], log_probs, 0.0), axis=-1)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], in float32.

    Args:
        logits: [..., V], unnormalised.
        targets: [...], integer.

    Returns:
        [...].

    >>> print(f"{cross_entropy(jnp.zeros(4), jnp.array(2)):.4f}")
    1.3863
    """
    return -select_targets(log_softmax(logits), targets)


def sft_loss(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> LossOutput:
    """Negative log-likelihood of demonstrations, Σ mask · cross-entropy and Σ mask.

    Args:
        logits: [B, T, V], unnormalised.
        targets: [B, T], integer; anything where masked.
        mask: [B, T], nonzero where a token counts.

    Returns:
        LossOutput; the baseline of SDFT (arXiv 2601.19897).

    >>> targets, mask = jnp.array([[2, 9]]), jnp.array([[1, 0]])
    >>> print(f"{sft_loss(jnp.zeros((1, 2, 4)), targets, mask).mean():.4f}")
    1.3863
    """
    check_same_shape(targets=targets, mask=mask)
    return token_mean(cross_entropy(logits, targets), mask)
