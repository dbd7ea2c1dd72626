"""Samples one token per row from logits, with temperature, top-p, top-k and min-p.

Sampling inverts the cumulative distribution on two levels: the vocabulary is divided into blocks of
neighboring tokens, one uniform number selects a block by its probability, and another selects a
token inside it. This needs two random numbers per row instead of one per token, and no sort unless
a filter needs one. On a mesh that shards the vocabulary only block sums are communicated.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCKS = 128


class Filters(NamedTuple):
    """Settings of the sampling distribution; all are traced, and None skips a filter."""

    temperature: jax.Array  # [] float32, not negative; 0 is greedy
    top_p: jax.Array | None = None  # [] float32 in (0, 1], see `nucleus`
    top_k: jax.Array | None = None  # [] int32, at least 1; ties with the k-th are kept, too
    min_p: jax.Array | None = None  # [] float32 in [0, 1]: minimum share of the top probability


def sample_tokens(
    keys: jax.Array, logits: jax.Array, filters: Filters
) -> tuple[jax.Array, jax.Array]:
    """Samples one token per row; returns ids and log-probs under the sampling distribution.

    At temperature 0 the token is the likeliest one (the first of equals), and its log-prob is that
    at temperature 1.

    Args:
      keys: [N], random keys.
      logits: [N, V] float32, unscaled.
      filters: temperature and filters.

    Returns:
      [N] int32 ids and [N] float32 log-probs.
    """
    warm = filters.temperature > 0
    scaled = logits / jnp.where(warm, filters.temperature, 1.0)
    scaled = jnp.where(_allowed(scaled, filters), scaled, -jnp.inf)
    top = jnp.max(scaled, axis=-1, keepdims=True)
    shares = jnp.exp(scaled - top)
    weights = jnp.where(warm, shares, (scaled == top).astype(shares.dtype))
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), jnp.float32))(keys)
    uniform = jnp.where(warm, uniform, 0.0)
    blocks = weights.reshape(len(weights), math.gcd(weights.shape[1], BLOCKS), -1)
    block = pick_index(jnp.sum(blocks, axis=-1), uniform[:, 0])
    row = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = pick_index(row, uniform[:, 1])
    # `row` holds `weights`, so a greedy token's share is 1, which equals exp(top - top).
    share = jnp.take_along_axis(row, place[:, None], axis=-1)[:, 0]
    log_probs = jnp.log(share) - jnp.log(jnp.sum(shares, axis=-1))
    return block * row.shape[1] + place, log_probs


def pick_index(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Samples an index with probability proportional to `weights: [N, K]`; returns [N] int32.

    It is the first index whose cumulative share exceeds `uniform: [N]`, in [0, 1). An index of
    weight zero is never returned, however the sums are rounded.

    >>> pick_index(jnp.array([[0.0, 1.0, 0.0, 3.0]] * 3), jnp.array([0.0, 0.24, 0.26])).tolist()
    [1, 1, 3]
    """
    sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    target = uniform * jnp.max(sums, axis=-1)
    return jnp.argmax(sums > target[:, None], axis=-1).astype(jnp.int32)


def _allowed(scaled: jax.Array, filters: Filters) -> jax.Array:
    allowed = jnp.ones((1, 1), bool)
    if filters.min_p is not None:
        least = jnp.max(scaled, axis=-1, keepdims=True) + jnp.log(filters.min_p)
        allowed &= scaled >= least
    if filters.top_p is None and filters.top_k is None:
        return allowed
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    if filters.top_k is not None:
        last = jnp.minimum(filters.top_k, scaled.shape[-1]) - 1
        allowed &= scaled >= jax.lax.dynamic_index_in_dim(ordered, last, axis=-1)
    if filters.top_p is not None:
        allowed &= scaled >= _last_of_nucleus(ordered, filters.top_p)
    return allowed


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Marks the likeliest tokens whose total probability first reaches `top_p`.

    Tokens as likely as the last of them are included.

    Args:
      logits: [N, V] float32, at the sampling temperature.
      top_p: [] float32, in (0, 1].

    Returns:
      [N, V] bool.

    Source: Holtzman et al., arXiv 1904.09751.

    >>> nucleus(jnp.log(jnp.array([[0.2, 0.5, 0.3]])), jnp.float32(0.6)).tolist()
    [[False, True, True]]
    """
    return logits >= _last_of_nucleus(jnp.sort(logits, axis=-1, descending=True), top_p)


def _last_of_nucleus(ordered: jax.Array, top_p: jax.Array) -> jax.Array:
    probabilities = jax.nn.softmax(ordered, axis=-1)
    reached = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    return jnp.min(jnp.where(reached, ordered, jnp.inf), axis=-1, keepdims=True)
