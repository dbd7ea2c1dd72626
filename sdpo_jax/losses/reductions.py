"""(sum, weight), divided once.

A mean of means depends on how a batch was cut; a sum and a weight do not. Every loss returns both,
they add up over micro-batches, packed rows and hosts, and `divide` is called once at the end.

With m the mask, ℓ the loss per token, |y_i| = Σ_t m_it and L a length that does not depend on the
batch:

    token mean         Σ_it m_it ℓ_it / Σ_it m_it            the paper's equations, and the default
    sequence mean      (1/B) Σ_i (1/|y_i|) Σ_t m_it ℓ_it     what the released SDPO code amounts to
    fixed-length mean  (1/(B L)) Σ_it m_it ℓ_it              Dr. GRPO; L = 1: mean of token sums

The last two count all B rows, those without any active token too: the fewer rows have a teacher,
the smaller the gradient. Rows that only fill up a batch must not be counted; leave them out of the
denominator.

A mask may hold fractions: it weighs tokens in numerator and denominator alike.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sdpo_jax.losses.arrays import check_rank, check_same_shape, loss_dtype, where_active

ReductionWeights: TypeAlias = Callable[[ArrayLike], tuple[jax.Array, jax.Array]]
"""`(mask[B, T]) -> (weights[B, T], denominator[])`: what a reduction asks of each token."""


class LossOutput(NamedTuple):
    """A loss as sum and weight. Outputs of parts of a batch add up; divide at the end."""

    total: jax.Array  # [], Σ weight · loss
    weight: jax.Array  # [], what to divide by
    per_token: jax.Array  # [B, T], loss of each token, 0 where masked

    def mean(self) -> jax.Array:
        """Return total / weight, and 0 if nothing is active."""
        return divide(self.total, self.weight)


def divide(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Return total / weight, and 0 with a zero gradient where weight is 0. Any equal shapes.

    Source: the convention of this library; no epsilon in any denominator.

    >>> print(divide(jnp.array(6.0), jnp.array(3.0)), divide(jnp.array(0.0), jnp.array(0.0)))
    2.0 0.0
    """
    empty = weight == 0
    return jnp.where(empty, 0.0, total / jnp.where(empty, 1.0, weight))


def token_mean_weights(mask: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Return the weight of each token, m [B, T], and the denominator Σ m of the token mean.

    Source: equation 1 of arXiv 2601.20802 over a batch.

    >>> token_mean_weights(jnp.array([[True, True], [False, False]]))[1]
    Array(2., dtype=float32)
    """
    weights = _as_weights(mask)
    return weights, jnp.sum(weights)


def sequence_mean_weights(mask: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Return the weights m / |y_i|, [B, T], and the denominator B of the sequence mean.

    Source: the closed form of the SDPO code (arXiv 2601.20802) with one sequence per micro-batch.

    >>> weights, rows = sequence_mean_weights(jnp.array([[1, 1], [1, 0], [0, 0]]))
    >>> weights.tolist(), float(rows)
    ([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]], 3.0)
    """
    weights = _as_weights(mask)
    lengths = jnp.sum(weights, axis=-1, keepdims=True)
    return divide(weights, lengths), jnp.asarray(weights.shape[0], weights.dtype)


def fixed_length_mean_weights(mask: ArrayLike, *, length: int) -> tuple[jax.Array, jax.Array]:
    """Return the weights m, [B, T], and the denominator B · L of the fixed-length mean.

    Bind the length with `functools.partial` where a reduction is expected.

    Source: Dr. GRPO, arXiv 2503.20783; `seq-mean-token-sum` of the SDPO code with L = 1.

    >>> print(fixed_length_mean_weights(jnp.array([[1, 1], [1, 0]]), length=4)[1])
    8.0
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    weights = _as_weights(mask)
    return weights, jnp.asarray(weights.shape[0] * length, weights.dtype)


def token_mean(per_token: ArrayLike, mask: ArrayLike) -> LossOutput:
    """Σ mask · loss over Σ mask; `per_token` and `mask` are [B, T].

    Source: equation 1 of arXiv 2601.20802 over a batch.

    >>> token_mean(jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.array([[1, 1], [1, 0]])).mean()
    Array(3., dtype=float32)
    """
    return _reduce(per_token, mask, token_mean_weights)


def sequence_mean(per_token: ArrayLike, mask: ArrayLike) -> LossOutput:
    """Sum over rows of each row's own token mean, over the number of rows; [B, T] both.

    Source: the closed form of the SDPO code (arXiv 2601.20802) with one sequence per micro-batch.

    >>> sequence_mean(jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.array([[1, 1], [1, 0]])).mean()
    Array(3.5, dtype=float32)
    """
    return _reduce(per_token, mask, sequence_mean_weights)


def fixed_length_mean(per_token: ArrayLike, mask: ArrayLike, *, length: int) -> LossOutput:
    """Σ mask · loss over B · length: long answers are not discounted; [B, T] both.

    Source: Dr. GRPO, arXiv 2503.20783; `seq-mean-token-sum` of the SDPO code with length 1.

    >>> loss, mask = jnp.array([[1.0, 3.0], [5.0, 7.0]]), jnp.array([[1, 1], [1, 0]])
    >>> fixed_length_mean(loss, mask, length=2).mean()
    Array(2.25, dtype=float32)
    """
    return _reduce(per_token, mask, partial(fixed_length_mean_weights, length=length))


def weighted(per_token: jax.Array, weights: jax.Array | None, mask: jax.Array) -> jax.Array:
    """Multiply values per token by detached weights, [B, T] or [B]; None is 1.

    Weights may hold anything where masked.

    >>> weighted(jnp.ones((1, 2)), jnp.array([0.5]), jnp.ones((1, 2))).tolist()
    [[0.5, 0.5]]
    """
    if weights is None:
        return per_token
    if weights.shape == per_token.shape[:1]:
        weights = jnp.broadcast_to(weights[:, None], per_token.shape)
    check_same_shape(weights=weights, per_token=per_token, mask=mask)
    return per_token * jax.lax.stop_gradient(where_active(mask, weights)).astype(per_token.dtype)


def _as_weights(mask: ArrayLike) -> jax.Array:
    weights = jnp.asarray(mask)  # host arrays are welcome
    check_rank(2, mask=weights)
    return weights.astype(loss_dtype(weights))


def _reduce(per_token: ArrayLike, mask: ArrayLike, weigh: ReductionWeights) -> LossOutput:
    loss, mask = jnp.asarray(per_token), jnp.asarray(mask)
    check_same_shape(per_token=loss, mask=mask)
    dtype = loss_dtype(loss)
    # In the precision of the loss: a third of an integer mask has float32 digits alone otherwise.
    weights, denominator = weigh(mask.astype(dtype))
    # `where`, not a product: a NaN or inf at a masked position must not reach the sum.
    loss = jnp.where(weights != 0.0, loss.astype(dtype), 0.0)
    return LossOutput(total=jnp.sum(weights * loss), weight=denominator, per_token=loss)
