"""The vocabulary head, a chunk of tokens at a time: all logits `[M, V]` never exist.

Forward and gradient of a chunk are computed together, while its logits are there. What is kept is
the gradient of the hidden states `[M, D]` and one accumulated gradient of the head `[D, V]`; the
backward pass multiplies both by the incoming scalar. Student and teacher then cost four head
matmuls, where recomputation (`checkpointed_linear_loss`) costs six.

Chunks are strided: of the tokens in blocks of b, chunk i of n holds the blocks i, i + n, i + 2n and
so on. A token axis that is sharded over a mesh stays sharded inside each chunk, so no token moves,
as long as the shards divide the blocks of a chunk. b is 8, a row of tiles in a TPU's memory, where
that divides the chunk: chunks are then read where they lie, and no array of [M, D] is copied. A
chunk's hidden states are overwritten with their gradient, in place where the caller is done with
them.

A sharded vocabulary needs nothing under `jit`. Inside a `shard_map` over its axis (and over the
token axes), with the `check_vma` that is on by default, the per-token loss reduces over the axis
of its `Vocabulary`; the head's gradient stays local to its shard, that of the hidden states is
summed over the axis once, after the last chunk.

The gradient is exact for any per-token loss and any scale of the result. Reverse mode only: forward
mode (`jvp`) and second derivatives are not defined. Validated against `checkpointed_linear_loss`,
plain autodiff over all logits and finite differences (tests/test_fused_linear.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from sdpo_jax.losses.arrays import check_floating, loss_dtype
from sdpo_jax.losses.compat import axes_of, mark_varying, output_types, varying_axes
from sdpo_jax.losses.vocabulary import trust_region_logits

BLOCK = 8

Metrics: TypeAlias = dict[str, jax.Array]

PerTokenLoss: TypeAlias = Callable[[jax.Array, Any, Any], tuple[jax.Array, Metrics]]
"""`(logits[C, V], aux, constants) -> (loss[C], metrics of [C] each)`, of one chunk of C tokens.

It may close over Python values, not over arrays: those come as `aux` (leading axis C) or
`constants` (whole).
"""


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Multiply [M, D] by [D, V] in the precision of `hidden`, accumulated in float32.

    >>> head_logits(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4))).dtype
    dtype('float32')
    """
    return _product("md,dv->mv", hidden, head)


def with_live_model(
    logits: jax.Array,
    live_hidden: jax.Array | None,
    live_head: jax.Array | None,
    coefficient: jax.Array | None,
) -> jax.Array:
    """`trust_region_logits` of [M, V] and of a live model's [M, D] · [D, V]; without one, [M, V].

    >>> one = jnp.ones((1, 1))
    >>> with_live_model(one, 3 * one, one, 0.5).tolist(), with_live_model(one, None, None, None)
    ([[2.0]], Array([[1.]], dtype=float32))
    """
    if live_hidden is None:
        return logits
    if live_head is None or coefficient is None:
        raise ValueError("live_hidden needs live_head and coefficient, got None")
    return trust_region_logits(logits, head_logits(live_hidden, live_head), coefficient)


def fused_linear_loss(
    per_token_loss: PerTokenLoss,
    hidden: jax.Array,
    head: jax.Array,
    aux: Any,
    weights: jax.Array,
    *,
    chunk: int,
    constants: Any = None,
    filled: jax.Array | None = None,
    block: int = BLOCK,
) -> tuple[jax.Array, Metrics]:
    """Σ_m weights[m] · per_token_loss(hidden[m] · head)[m], and the metrics of each token.

    Args:
        per_token_loss: see `PerTokenLoss`.
        hidden: [M, D], final hidden states at the positions that predict a token.
        head: [D, V]; cast to the dtype of `hidden`; its gradient accumulates in float32.
        aux: pytree of arrays with leading axis M.
        weights: [M]; a token of weight 0 adds nothing, whatever its rows hold.
        chunk: how many tokens may have logits at a time; M is cut evenly.
        constants: pytree that every chunk sees whole, such as the teacher's head.
        filled: [] int32, chunks to compute; the rest has weight 0, and gets metrics of 0.
        block: tokens of a chunk that lie together: on a sharded axis, a shard's share.

    Returns:
        The weighted sum, float32, and detached metrics of [M], `loss` (unweighted) among them.

    Source: equation 1 of arXiv 2601.20802.

    >>> square = lambda logits, aux, constants: (jnp.sum(logits**2, axis=-1), {})
    >>> hidden, head = jnp.ones((3, 2)), jnp.ones((2, 4))
    >>> print(fused_linear_loss(square, hidden, head, None, jnp.ones(3), chunk=2)[0])
    48.0
    """
    _check(hidden, head, aux, weights, chunk)
    detached = jax.lax.stop_gradient((aux, weights, constants))
    hidden, head = _vary_alike((hidden, head), detached[:2])
    cut = _Cut(-(-len(hidden) // chunk), block)
    return _chunked(per_token_loss, cut, hidden, head, *detached, filled)


def checkpointed_linear_loss(
    per_token_loss: PerTokenLoss,
    hidden: jax.Array,
    head: jax.Array,
    aux: Any,
    *,
    chunk: int,
    constants: Any = None,
) -> tuple[jax.Array, Metrics]:
    """The loss of each token, [M], recomputing a chunk's logits in the backward pass.

    Six head matmuls where `fused_linear_loss` has four, plain autodiff otherwise: differentiable in
    whatever the loss is, token by token. For losses that are no sum over tokens, such as a ratio
    of whole rollouts (GSPO), and as the reference of `fused_linear_loss`. Arguments as there.

    Returns:
        Unweighted losses [M], and metrics of [M] each.

    Source: the checkpointed scan of arXiv 1604.06174, over tokens.

    >>> def first(logits, aux, constants):
    ...     return logits[:, 0], {}
    >>> hidden, head = jnp.ones((3, 2)), jnp.ones((2, 4))
    >>> checkpointed_linear_loss(first, hidden, head, None, chunk=2)[0].tolist()
    [2.0, 2.0, 2.0]
    """
    _check(hidden, head, aux, jnp.zeros(hidden.shape[:1]), chunk)
    # Wide outside the scan, so that the chunks' gradients of the head add up in float32.
    wide = head.astype(loss_dtype(head))

    @jax.checkpoint
    def step(wide: jax.Array, tokens: Any, constants: Any) -> tuple[jax.Array, Metrics]:
        hidden, aux = _merge(tokens)
        return per_token_loss(head_logits(hidden, wide.astype(head.dtype)), aux, constants)

    # A copy, unlike `_pick`, whose gradient would be an array of [M, D] for each chunk.
    tokens = _cut((hidden, aux), _Cut(-(-hidden.shape[0] // chunk), BLOCK))
    chunks = jax.tree.map(lambda x: x.swapaxes(0, 1), tokens)
    _, out = jax.lax.scan(lambda _, tokens: (None, step(wide, tokens, constants)), None, chunks)
    return _join(out, hidden.shape[0], BLOCK)


class _Cut(NamedTuple):
    """Into how many chunks, of pieces of how many tokens."""

    chunks: int
    block: int


def _check(hidden: jax.Array, head: jax.Array, aux: Any, weights: jax.Array, chunk: int) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0]:
        raise ValueError(
            f"expected hidden [M, D] and head [D, V], got hidden {list(hidden.shape)} and head "
            f"{list(head.shape)}"
        )
    check_floating(hidden=hidden, head=head)
    tokens = hidden.shape[0]
    if chunk < 1 or tokens < 1:
        raise ValueError(f"expected at least one token and chunk >= 1, got {tokens} and {chunk}")
    if weights.shape != (tokens,):
        raise ValueError(f"expected weights [{tokens}], got {list(weights.shape)}")
    for path, leaf in jax.tree.leaves_with_path(aux):
        if leaf.shape[:1] != (tokens,):
            name = jax.tree_util.keystr(path)
            raise ValueError(f"aux{name} must lead with {tokens} tokens, got {list(leaf.shape)}")


def _weighted_loss(
    logits: jax.Array, per_token_loss: PerTokenLoss, aux: Any, weights: jax.Array, constants: Any
) -> tuple[jax.Array, Metrics]:
    loss, metrics = per_token_loss(logits, aux, constants)
    # `where`, not a product alone: 0 · NaN is NaN.
    total = jnp.sum(jnp.where(weights != 0, weights.astype(loss.dtype) * loss, 0.0))
    metrics = {"loss": loss, **metrics}
    return total, {k: jax.lax.stop_gradient(v).astype(logits.dtype) for k, v in metrics.items()}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    per_token_loss: PerTokenLoss,
    cut: _Cut,
    hidden: jax.Array,
    head: jax.Array,
    aux: Any,
    weights: jax.Array,
    constants: Any,
    filled: jax.Array | None,
) -> tuple[jax.Array, Metrics]:
    """Value only, for whoever does not differentiate."""
    tokens = _cut((hidden, aux, weights), cut)

    def step(_: None, index: jax.Array) -> tuple[None, Any]:
        hidden, aux, weights = _pick(tokens, index)
        logits = head_logits(hidden, head)
        return None, _weighted_loss(logits, per_token_loss, aux, weights, constants)

    _, (totals, metrics) = _each_chunk(step, None, cut.chunks, filled)
    return jnp.sum(totals), _join(metrics, hidden.shape[0], cut.block)


def _forward(
    per_token_loss: PerTokenLoss,
    cut: _Cut,
    hidden: jax.Array,
    head: jax.Array,
    aux: Any,
    weights: jax.Array,
    constants: Any,
    filled: jax.Array | None,
) -> tuple[tuple[jax.Array, Metrics], tuple[jax.Array, jax.Array]]:
    """Value, and the gradients by hidden and head: each chunk's while its logits exist."""
    value_and_grad = jax.value_and_grad(_weighted_loss, has_aux=True)
    tokens, turned = _cut((aux, weights), cut), _turned(head)

    def step(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[Any, Any]:
        rows, head_grad = carry  # rows: hidden states of chunks to come, gradients of the others
        hidden, (aux, weights) = _pick(rows, index), _pick(tokens, index)
        logits = head_logits(hidden, head)
        (value, metrics), grad = value_and_grad(logits, per_token_loss, aux, weights, constants)
        active = (weights != 0)[:, None]
        # Both products read the working precision (bfloat16 on an accelerator) and accumulate wide.
        grad = jnp.where(active, grad, 0.0).astype(hidden.dtype)  # [C, V]
        rows = _put(rows, _by_hidden(grad, head, turned).astype(hidden.dtype), index)
        head_grad = head_grad + _product("md,mv->dv", jnp.where(active, hidden, 0.0), grad)
        # The value leaves as an output: whether it differs between devices is the loss's affair.
        return (rows, head_grad), (value, metrics)

    zeros = mark_varying(jnp.zeros(head.shape, loss_dtype(hidden)), varying_axes(hidden))
    carry, out = _each_chunk(step, (_cut(hidden, cut), zeros), cut.chunks, filled)
    (rows, head_grad), (totals, metrics) = carry, out
    if filled is not None:  # what was not computed holds hidden states, not their gradient
        done = jnp.arange(cut.chunks) < filled
        rows = jnp.where(done.reshape(1, -1, *(1,) * (rows.ndim - 2)), rows, 0)
    hidden_grad = rows.reshape(-1, *hidden.shape[1:])[: hidden.shape[0]]
    metrics = _join(metrics, hidden.shape[0], cut.block)
    return (jnp.sum(totals), metrics), (hidden_grad, head_grad.astype(head.dtype))


def _backward(
    per_token_loss: PerTokenLoss,
    cut: _Cut,
    residuals: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, Metrics],
) -> tuple[jax.Array | None, ...]:
    del per_token_loss, cut
    scale = cotangents[0]  # the metrics are detached
    hidden_grad, head_grad = ((scale * x.astype(scale.dtype)).astype(x.dtype) for x in residuals)
    return hidden_grad, head_grad, None, None, None, None


_chunked.defvjp(_forward, _backward)


def _each_chunk(step: Any, carry: Any, count: int, filled: jax.Array | None) -> tuple[Any, Any]:
    """`lax.scan` over chunk indices; with `filled`, over the first of them, the rest left 0."""
    if filled is None:
        return jax.lax.scan(step, carry, jnp.arange(count))
    _, types = output_types(step, carry, jnp.zeros((), jnp.int32))
    out = jax.tree.map(partial(_empty, count), types)

    def body(index: jax.Array, both: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, out = both
        carry, new = step(carry, index)
        return carry, jax.tree.map(lambda o, n: o.at[index].set(n), out, new)

    return jax.lax.fori_loop(0, filled, body, (carry, out))


def _empty(count: int, like: Any) -> jax.Array:
    return mark_varying(jnp.zeros((count, *like.shape), like.dtype), axes_of(like))


def _vary_alike(tree: Any, others: Any) -> Any:
    """Inside shard_map: mark each array as varying over every axis that any of them varies over.

    A replicated head's gradient then stays local while chunks accumulate and is summed over the
    devices once, by the transpose of this mark. So is that of hidden states that are the same on
    all shards of the vocabulary. `others` count for the axes and keep their own marks.
    """
    axes = frozenset[str]().union(*(varying_axes(x) for x in jax.tree.leaves((tree, others))))
    return jax.tree.map(lambda x: mark_varying(x, axes), tree)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    wide = loss_dtype(a)
    return jnp.einsum(equation, a, b.astype(a.dtype), preferred_element_type=wide)


def _turned(head: jax.Array) -> jax.Array:
    """`[V, D]`; on a CPU in memory, too, where a tied head has it already."""
    # Without the barrier XLA:CPU reads [D, V] by columns, which takes 1.6 times as long.
    in_memory = lambda x: jax.lax.optimization_barrier(x.T)  # noqa: E731
    return jax.lax.platform_dependent(head, cpu=in_memory, default=jnp.transpose)


def _by_hidden(grad: jax.Array, head: jax.Array, turned: jax.Array) -> jax.Array:
    """Gradient by the hidden states, `[C, V]` times the head's transpose."""
    # Elsewhere than on a CPU the turned head would be a copy of it, kept through the loop.
    return jax.lax.platform_dependent(
        (grad, head, turned),
        cpu=lambda x: _product("mv,vd->md", x[0], x[2]),
        default=lambda x: _product("mv,dv->md", x[0], x[1]),
    )


def _cut(tree: Any, into: _Cut) -> Any:
    """View the leading axis M of each leaf as strided chunks, [C / b, count, b, ...].

    Fewer than `count` rows of zeros fill up the last places; their weight is 0.
    """

    def cut(x: jax.Array) -> jax.Array:
        missing = -x.shape[0] % into.chunks
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x
        block = math.gcd(x.shape[0] // into.chunks, into.block)
        return x.reshape(-1, into.chunks, block, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _pick(tree: Any, index: jax.Array) -> Any:
    """Chunk `index` of what `_cut` returned, [C, ...]."""
    return _merge(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 1, False), tree))


def _put(rows: jax.Array, chunk: jax.Array, index: jax.Array) -> jax.Array:
    """Overwrite chunk `index` of what `_cut` returned with [C, ...]."""
    chunk = chunk.reshape(rows.shape[0], 1, *rows.shape[2:])
    return jax.lax.dynamic_update_index_in_dim(rows, chunk, index, 1)


def _merge(tree: Any) -> Any:
    """Turn [C / b, b, ...] into [C, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _join(tree: Any, tokens: int, block: int) -> Any:
    """Put stacked chunks [count, C, ...] back into the order of the tokens, [M, ...]."""

    def join(x: jax.Array) -> jax.Array:
        piece = math.gcd(x.shape[1], block)
        x = x.reshape(x.shape[0], -1, piece, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(-1, *x.shape[3:])[:tokens]

    return jax.tree.map(join, tree)
