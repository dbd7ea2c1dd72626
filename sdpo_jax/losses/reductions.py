"""(sum, weight), divided once.

A mean of means depends on how a batch was cut; a sum and a weight do not. Every loss returns both,
they add up over micro-batches, packed rows and hosts, and `divide` is called once at the end.

With m the mask, ℓ the loss per token and |y_i| = Σ_t m_it:

    token mean      Σ_it m_it ℓ_it / Σ_it m_it               the paper's equations, and the default
    sequence mean   (1/B) Σ_i (1/|y_i|) Σ_t m_it ℓ_it        what the released SDPO code amounts to

The sequence mean counts all B rows, those without any active token too: the fewer rows have a
teacher, the smaller the gradient. Rows that only fill up a batch must not be counted; leave them
out of the denominator.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdpo_jax.losses.arrays import check_same_shape, loss_dtype


class LossOutput(NamedTuple):
    """A loss as sum and weight. Outputs of parts of a batch add up; divide at the end."""

    total: jax.Array  # [], Σ weight · loss
    weight: jax.Array  # [], what to divide by
    per_token: jax.Array  # [B, T], loss of each token, 0 where masked

    def mean(self) -> jax.Array:
        """Return total / weight, and 0 if nothing is active."""
        return divide(self.total, self.weight)


def divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Return total / weight, and 0 with a zero gradient where weight is 0.

    >>> print(divide(jnp.array(6.0), jnp.array(3.0)), divide(jnp.array(0.0), jnp.array(0.0)))
    2.0 0.0
    """
    empty = weight == 0
    return jnp.where(empty, 0.0, total / jnp.where(empty, 1.0, weight))


def token_mean_weights(mask: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Return the weight of each token, [B, T], and the denominator Σ mask of the token mean.

    >>> token_mean_weights(jnp.array([[True, True], [False, False]]))[1]
    Array(2., dtype=float32)
    """
    weights = _as_weights(mask)
    return weights, jnp.sum(weights)


def sequence_mean_weights(mask: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Return the weights mask / |y_i|, [B, T], and the denominator B of the sequence mean.

    >>> weights, rows = sequence_mean_weights(jnp.array([[1, 1], [1, 0], [0, 0]]))
    >>> weights.tolist(), float(rows)
    ([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]], 3.0)
    """
    weights = _as_weights(mask)
    lengths = jnp.sum(weights, axis=-1, keepdims=True)
    return divide(weights, lengths), jnp.asarray(weights.shape[0], weights.dtype)


def token_mean(per_token: ArrayLike, mask: ArrayLike) -> LossOutput:
    """Σ mask · loss over Σ mask; `per_token` and `mask` are [B, T].

    >>> token_mean(jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.array([[1, 1], [1, 0]])).mean()
    Array(3., dtype=float32)
    """
    return _reduce(per_token, *token_mean_weights(mask))


def sequence_mean(per_token: ArrayLike, mask: ArrayLike) -> LossOutput:
    """Sum over rows of each row's own token mean, over the number of rows; [B, T] both.

    >>> sequence_mean(jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.array([[1, 1], [1, 0]])).mean()
    Array(3.5, dtype=float32)
    """
    return _reduce(per_token, *sequence_mean_weights(mask))


def _as_weights(mask: ArrayLike) -> jax.Array:
    weights = jnp.asarray(mask)  # host arrays are welcome
    return weights.astype(loss_dtype(weights))


def _reduce(per_token: ArrayLike, weights: jax.Array, denominator: jax.Array) -> LossOutput:
    loss = jnp.asarray(per_token)
    check_same_shape(per_token=loss, mask=weights)
    dtype = loss_dtype(loss)
    # `where`, not a product: a NaN or inf at a masked position must not reach the sum.
    loss = jnp.where(weights != 0.0, loss.astype(dtype), 0.0)
    return LossOutput(
        total=jnp.sum(weights.astype(dtype) * loss),
        weight=denominator.astype(dtype),
        per_token=loss,
    )
