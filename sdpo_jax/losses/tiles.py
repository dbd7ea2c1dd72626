"""Losses over the vocabulary, a few rows at a time where that is faster: on a CPU.

A divergence and its gradient read and write a dozen arrays of `[C, V]`. A TPU fuses them; XLA:CPU
sends each through memory, unless a few rows at a time stay in the processor's cache. The result is
the same: every row of a loss depends on its own logits alone.

Validated against the plain form, values and gradients (tests/test_tiles.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sdpo_jax.losses.compat import mark_varying, varying_axes
from sdpo_jax.losses.vocabulary import WHOLE, Vocabulary

Metrics: TypeAlias = dict[str, jax.Array]

RowLoss: TypeAlias = Callable[[jax.Array, Any, Any], tuple[jax.Array, Metrics]]
"""`(logits[C, V], rows of leading C, constants) -> (loss[C], metrics of [C] each)`, of each row by
itself. It closes over Python values alone."""

ENTRIES = 1 << 16
"""Of the vocabulary, in the rows that are computed together: 256 KB an array."""


def by_rows(
    loss: RowLoss, logits: jax.Array, rows: Any, constants: Any, *, vocabulary: Vocabulary = WHOLE
) -> tuple[jax.Array, Metrics]:
    """`loss(logits, rows, constants)`; differentiable in `logits` alone, in reverse mode.

    Args:
        loss: see `RowLoss`; its metrics are detached.
        logits: [C, V].
        rows: pytree of arrays with leading axis C, detached.
        constants: pytree that all rows see, detached.
        vocabulary: how V lies on the devices; where a mesh axis cuts it, all rows go at once.

    >>> square = lambda logits, rows, constants: (jnp.sum(logits**2, axis=-1), {})
    >>> by_rows(square, jnp.ones((2, 3)), None, None)[0].tolist()
    [3.0, 3.0]
    """
    if vocabulary.axis is not None:  # a collective a tile would cost more than the cache saves
        return loss(logits, rows, constants)
    return _by_rows(loss, logits, *jax.lax.stop_gradient((rows, constants)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_rows(
    loss: RowLoss, logits: jax.Array, rows: Any, constants: Any
) -> tuple[jax.Array, Metrics]:
    return loss(logits, rows, constants)


def _forward(
    loss: RowLoss, logits: jax.Array, rows: Any, constants: Any
) -> tuple[tuple[jax.Array, Metrics], jax.Array]:
    whole = partial(_with_gradient, loss)
    value, metrics, gradient = jax.lax.platform_dependent(
        logits, rows, constants, cpu=partial(_in_tiles, whole), default=whole
    )
    return (value, metrics), gradient


def _backward(
    loss: RowLoss, gradient: jax.Array, cotangents: tuple[jax.Array, Metrics]
) -> tuple[jax.Array, None, None]:
    del loss
    return cotangents[0][:, None].astype(gradient.dtype) * gradient, None, None


_by_rows.defvjp(_forward, _backward)


def _with_gradient(
    loss: RowLoss, logits: jax.Array, rows: Any, constants: Any
) -> tuple[jax.Array, Metrics, jax.Array]:
    """Loss and metrics of each row, and the gradient of each row's loss by its logits."""
    value, pull, metrics = jax.vjp(lambda z: loss(z, rows, constants), logits, has_aux=True)
    ones = mark_varying(jnp.ones_like(value), varying_axes(value))
    return value, metrics, pull(ones)[0]


def _in_tiles(function: Callable[..., Any], logits: jax.Array, rows: Any, constants: Any) -> Any:
    count, vocabulary = logits.shape
    # Two rows at least: XLA:CPU computes exponentials anew for every reduction of a single one.
    tile = math.gcd(count, 1 << max(1, (ENTRIES // vocabulary).bit_length() - 1))
    if tile in (1, count):
        return function(logits, rows, constants)
    cut = jax.tree.map(lambda x: x.reshape(-1, tile, *x.shape[1:]), (logits, rows))
    out = jax.lax.map(lambda one: function(*one, constants), cut)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)
