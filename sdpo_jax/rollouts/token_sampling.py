"""The draw of one token per row from logits.

By inverse CDF on two levels: the vocabulary is cut into blocks of neighbouring tokens, one uniform
number picks a block by its probability, another picks a token inside it. Two numbers a row instead
of one per token, no sort unless a filter needs one; on a mesh that shards the vocabulary only block
sums travel.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCKS = 128


class Filters(NamedTuple):
    """How the sampling distribution follows from the logits; all traced, None costs nothing."""

    temperature: jax.Array  # [] float32, not negative; 0 is greedy
    top_p: jax.Array | None = None  # [] float32 in (0, 1], see `nucleus`
    top_k: jax.Array | None = None  # [] int32, at least 1: the likeliest, and those as likely
    min_p: jax.Array | None = None  # [] float32 in [0, 1]: at least this share of the likeliest


def sample_tokens(
    keys: jax.Array, logits: jax.Array, filters: Filters
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row; returns ids and log-probs under the sampling distribution.

    At temperature 0 it is the likeliest token, the first of equals, with the log-prob that it has
    at temperature 1.

    Args:
      keys: [N].
      logits: [N, V] float32, unscaled.
      filters: see there.

    Returns:
      [N] int32 and [N] float32.
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
    # The chosen token's share is 1 where it is greedy: it has the top logit.
    share = jnp.take_along_axis(row, place[:, None], axis=-1)[:, 0]
    log_probs = jnp.log(share) - jnp.log(jnp.sum(shares, axis=-1))
    return block * row.shape[1] + place, log_probs


def pick_index(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first of `weights: [N, K]` whose cumulative share exceeds `uniform: [N]`; [N] int32.

    Never one of weight zero, whatever the rounding of the sums.

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
    """Marks the likeliest tokens that hold `top_p` together, the one that reaches it included.

    Tokens as likely as the last one are inside, too.

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
    chances = jax.nn.softmax(ordered, axis=-1)
    reached = jnp.cumsum(chances, axis=-1) - chances < top_p  # before this token; the first always
    return jnp.min(jnp.where(reached, ordered, jnp.inf), axis=-1, keepdims=True)
