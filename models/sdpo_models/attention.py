"""Attention in three implementations, one for each layout of queries and keys.

    masked_attention              rows of packed segments, any mask; plain XLA, for any device
    blocks_attention              sequences end to end that share their prompts; for CPUs
    one_token_attention           one new token per rollout, over its prompt and its own tokens

`splash.py` wraps the TPU kernel for packed segments. `blocks_attention` loops over a table of query
blocks (`sdpo_jax.model.Blocks`) and over the keys that each block sees, with an online softmax:
scores stay in the processor's cache, keys that a block cannot see are not read, and the work
depends on the actual lengths, not on the compiled shapes. Its backward pass recomputes the scores
from the saved log-sum-exp of each query.

Source: FlashAttention, arXiv 2205.14135. Validated with gradients against a float64 implementation,
and the implementations against each other (tests/test_attention.py, tests/test_transformer.py).
"""

from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sdpo_jax.model import BLOCK_TOKENS, Blocks

MASKED = -1e30
ATTENTION = "attention"
WIDE = 2 * BLOCK_TOKENS
"""Number of keys per iteration where every query of a block sees all of them."""


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention of `q: [B, S, Q, d]` over `k, v: [B, S, H, d]` where `mask[B, S, S]`.

    A query whose mask row is empty gets the mean of all values: finite, and never read.
    """
    b, s, heads, d = q.shape
    q = q.reshape(b, s, k.shape[2], -1, d)
    scores = jnp.einsum("bqhrd,bkhd->bhrqk", q, k, preferred_element_type=jnp.float32) * d**-0.5
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhrqk,bkhd->bqhrd", weights, v).reshape(b, s, heads, d)


def one_token_attention(
    q: jax.Array,
    prefix: tuple[jax.Array, jax.Array, jax.Array],
    suffix: tuple[jax.Array, jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    *,
    keys_last: bool = False,
) -> jax.Array:
    """One query per rollout over its prompt, its earlier tokens and itself, in one softmax.

    Args:
      q: `[N, Q, d]`.
      prefix: keys and values `[P, H, S, d]`, read once for all `G` rollouts of a prompt, and their
        mask `[P, G, S]` or `[P, 1, S]`.
      suffix: keys and values `[N, H, T, d]`, and their mask `[N, T]`.
      own: the new token's keys and values `[N, H, d]`.
      keys_last: the suffix keys are `[N, H, d, T]`.

    Returns:
      `[N, Q, d]`.
    """
    (pk, pv, p_mask), (sk, sv, s_mask), (k, v) = prefix, suffix, own
    n, heads, d = q.shape
    p, kv = pk.shape[:2]
    g, r = n // p, heads // kv
    q = (q * jnp.asarray(d**-0.5, q.dtype)).reshape(n, kv, r, d)
    a = _dot("pghrd,phsd->pghrs", q.reshape(p, g, kv, r, d), pk)
    a = jnp.where(p_mask[:, :, None, None], a, MASKED)
    scores = _dot("nhrd,nhdt->nhrt" if keys_last else "nhrd,nhtd->nhrt", q, sk)
    b = jnp.where(s_mask[:, None, None], scores, MASKED)
    c = _dot("nhrd,nhd->nhr", q, k)
    top = jnp.maximum(jnp.maximum(a.max(-1).reshape(n, kv, r), b.max(-1)), c)
    a, b = jnp.exp(a - top.reshape(p, g, kv, r)[..., None]), jnp.exp(b - top[..., None])
    c = jnp.exp(c - top)
    total = a.sum(-1).reshape(n, kv, r) + b.sum(-1) + c
    # In the values' dtype: XLA:CPU cannot multiply these in bfloat16 into float32.
    out = jnp.einsum("pghrs,phsd->pghrd", a.astype(pv.dtype), pv).astype(jnp.float32)
    out = out.reshape(n, kv, r, d) + _dot("nhrt,nhtd->nhrd", b.astype(sv.dtype), sv)
    out = out + c[..., None] * v[:, :, None].astype(jnp.float32)
    return (out / total[..., None]).astype(v.dtype).reshape(n, heads, d)


def blocks_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: Blocks,
    *,
    window: int | None = None,
    slides: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of sequences laid end to end in bins, described by `blocks`.

    Args:
        q: [B, S, Q, d], S at least `BLOCK_TOKENS`.
        k: [B, S, H, d].
        v: [B, S, H, d].
        blocks: see `sdpo_jax.model.Blocks`.
        window: how far back a sliding layer sees.
        slides: [] bool, whether this layer slides; None if no layer does.

    Returns:
        [B, S, Q, d]; undefined but finite at tokens in no block. Differentiable in q, k and v, in
        reverse mode.
    """
    attend = partial(_bins, window if slides is not None else None)
    slides = jnp.zeros((), bool) if slides is None else slides
    return on_shards(attend, (q, k, v), blocks, slides)


def on_shards(
    attend: Any, qkv: tuple[jax.Array, jax.Array, jax.Array], rows: Any, whole: Any
) -> jax.Array:
    """Calls `attend(q, k, v, rows, whole)` on each device, with the device's rows and heads.

    XLA cannot partition kernels or loops whose length is known at run time only. `rows` is a pytree
    sharded like the rows of q; `whole` is replicated. Outside a mesh this is a plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = set(mesh.axis_names) - set(mesh.manual_axes)
    if not {"data", "fsdp", "tensor"} <= names:
        return attend(*qkv, rows, whole)
    by_row = jax.P(("data", "fsdp"))
    divides = qkv[1].shape[2] % mesh.shape["tensor"] == 0
    by_head = jax.P(("data", "fsdp"), None, "tensor" if divides else None)
    return jax.shard_map(
        attend,
        in_specs=(by_head, by_head, by_head, by_row, jax.P()),
        out_specs=by_head,
        check_vma=False,  # the loops' carries start from constants
    )(*qkv, rows, whole)


def _bins(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, slides: jax.Array
) -> jax.Array:
    """Attention bin by bin, because the loops of each bin have their own lengths."""
    if q.shape[1] < BLOCK_TOKENS:
        raise ValueError(f"expected bins of at least {BLOCK_TOKENS} tokens, got {q.shape[1]}")

    def one(of_bin: tuple[jax.Array, jax.Array, jax.Array, Blocks]) -> jax.Array:
        return _block_attention(window, *of_bin, slides)

    if q.shape[0] == 1:
        return one(jax.tree.map(itemgetter(0), (q, k, v, blocks)))[None]
    return jax.lax.map(one, (q, k, v, blocks))


class _Block(NamedTuple):
    """One row of the table of blocks, and the indices derived from it.

    Slices have a fixed size, so a block near the end of its bin is read from an earlier token on;
    `live` excludes the tokens before its own. `T` is `BLOCK_TOKENS`, `r` query heads per key head.
    """

    offset: jax.Array  # [] int32, index in the bin of the first token that is read
    query: jax.Array  # [r·T] int32, token of each query row
    live: jax.Array  # [r·T] bool, whether that token belongs to the block
    shared: jax.Array  # [] int32, first token of the shared prompt
    shared_end: jax.Array  # [] int32, after its last token
    own: jax.Array  # [] int32, first of the sequence's own tokens
    start: jax.Array  # [] int32, first token that belongs to the block


def _block(row: jax.Array, r: int, tokens: int) -> _Block:
    start, count, shared, shared_count, own = row
    offset = jnp.minimum(start, tokens - BLOCK_TOKENS)
    query = offset + jnp.arange(r * BLOCK_TOKENS, dtype=jnp.int32) % BLOCK_TOKENS
    live = (query >= start) & (query < start + count)
    return _Block(offset, query, live, shared, shared + shared_count, own, start)


class _Keys(NamedTuple):
    """A block of keys and the mask of the query rows over them."""

    offset: jax.Array  # [] int32, index in the bin of the first key
    size: int
    mask: jax.Array | None  # [r·T, size] bool; None if every row sees all of them


def _fold_keys(
    block: _Block, tokens: int, sliding: tuple[int | None, jax.Array], visit: Any, carry: Any
) -> Any:
    """Folds `carry = visit(keys, carry)` over the blocks of keys that a block of queries sees.

    Wide blocks of keys that every query sees come first and need no mask; the rest follow.
    """
    of_prompt, of_own = jnp.zeros((2,), jnp.int32)
    if sliding[0] is None:
        of_prompt = (block.shared_end - block.shared) // WIDE
        of_own = (block.start - block.own) // WIDE

        def wide(j: jax.Array, carry: Any) -> Any:
            after = block.own + (j - of_prompt) * WIDE
            offset = jnp.where(j < of_prompt, block.shared + j * WIDE, after)
            return visit(_Keys(offset, WIDE, None), carry)

        carry = jax.lax.fori_loop(0, of_prompt + of_own, wide, carry)
    shared, own = block.shared + of_prompt * WIDE, block.own + of_own * WIDE
    first = (block.shared_end - shared + BLOCK_TOKENS - 1) // BLOCK_TOKENS

    def narrow(j: jax.Array, carry: Any) -> Any:
        after = own + (j - first) * BLOCK_TOKENS
        start = jnp.where(j < first, shared + j * BLOCK_TOKENS, after)
        return visit(_masked(block, start, j < first, tokens, *sliding), carry)

    total = first + (block.start - own) // BLOCK_TOKENS + 1
    return jax.lax.fori_loop(0, total, narrow, carry)


def _masked(
    block: _Block,
    start: jax.Array,
    of_prompt: jax.Array,
    tokens: int,
    window: int | None,
    slides: jax.Array,
) -> _Keys:
    """The keys from `start` on, masked after the prompt's end or causally."""
    offset = jnp.minimum(start, tokens - BLOCK_TOKENS)
    key = (offset + jnp.arange(BLOCK_TOKENS, dtype=jnp.int32))[None]
    last = jnp.where(of_prompt, block.shared_end - 1, block.query)[:, None]
    mask = (key >= start) & (key <= last)
    if window is not None:
        # Distances are along the sequence, where the prompt directly precedes the own tokens.
        gap = jnp.where(of_prompt, block.own - block.shared_end, 0)
        mask &= (block.query[:, None] - key - gap < window) | ~slides
    return _Keys(offset, BLOCK_TOKENS, mask)


_slice = jax.lax.dynamic_slice_in_dim


def _take(x: jax.Array, offset: jax.Array, heads: int, size: int = BLOCK_TOKENS) -> jax.Array:
    """Reads a block of `x: [S, n, ...]` as `[H, n/H·size, ...]`, query heads after each other."""
    return _slice(x, offset, size).swapaxes(0, 1).reshape(heads, -1, *x.shape[2:])


def _write(x: jax.Array, part: jax.Array, block: _Block) -> jax.Array:
    """Writes the live tokens of `part: [H, r·T, ...]` to `x: [S, Q, ...]`."""
    live = block.live[:BLOCK_TOKENS].reshape(-1, *(1,) * (x.ndim - 1))
    part = part.reshape(-1, BLOCK_TOKENS, *part.shape[2:]).swapaxes(0, 1).astype(x.dtype)
    part = jnp.where(live, part, _slice(x, block.offset, BLOCK_TOKENS))
    return jax.lax.dynamic_update_slice_in_dim(x, part, block.offset, axis=0)


def _add(x: jax.Array, part: jax.Array, keys: _Keys) -> jax.Array:
    """Adds `part: [H, size, d]` to the block `keys` of `x: [S, H, d]`."""
    part = _slice(x, keys.offset, keys.size) + part.swapaxes(0, 1)
    return jax.lax.dynamic_update_slice_in_dim(x, part, keys.offset, axis=0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_attention(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, slides: jax.Array
) -> jax.Array:
    return _forward(window, q, k, v, blocks, slides)[0]


def _forward(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, slides: jax.Array
) -> tuple[jax.Array, Any]:
    (s, heads, d), kv = q.shape, k.shape[1]

    def one(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        block = _block(blocks.table[index], heads // kv, s)
        queries = _take(q, block.offset, kv) * jnp.asarray(d**-0.5, q.dtype)

        def visit(keys: _Keys, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, out = sums
            k_block, v_block = (_take(x, keys.offset, kv, keys.size) for x in (k, v))
            scores = _dot("hqd,hkd->hqk", queries, k_block)
            if keys.mask is not None:
                scores = jnp.where(keys.mask[None], scores, MASKED)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            rescale = jnp.exp(top - new_top)
            weights = jnp.exp(scores - new_top[..., None])
            weighted = _dot("hqk,hkd->hqd", weights.astype(v.dtype), v_block)
            total = total * rescale + weights.sum(axis=-1)
            return new_top, total, out * rescale[..., None] + weighted

        empty = jnp.zeros(queries.shape[:2], jnp.float32)
        start = empty + MASKED, empty, jnp.zeros(queries.shape, jnp.float32)
        top, total, out = _fold_keys(block, s, (window, slides), visit, start)
        outs, log_sum_exps = carry
        outs = _write(outs, out / total[..., None], block)
        return outs, _write(log_sum_exps, top + jnp.log(total), block)

    start = jnp.zeros_like(q), jnp.zeros(q.shape[:2], jnp.float32)
    out, log_sum_exps = jax.lax.fori_loop(0, blocks.filled, one, start)
    # Named, so that a rematerialization policy can save them instead of attending again.
    out, log_sum_exps = (checkpoint_name(x, ATTENTION) for x in (out, log_sum_exps))
    return out, (q, k, v, blocks, slides, out, log_sum_exps)


def _backward(window: int | None, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    """Gradients of q, k and v. Scores are laid out keys first, `[H, T, r·T]`.

    Then four of the five products need no transposed operand; with queries first it is three.
    """
    q, k, v, blocks, slides, out, log_sum_exps = residuals
    (s, heads, d), kv = q.shape, k.shape[1]
    scale = jnp.asarray(d**-0.5, q.dtype)
    deltas = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)  # [S, Q]

    def one(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        block = _block(blocks.table[index], heads // kv, s)
        take = partial(_take, offset=block.offset, heads=kv)
        queries, d_out, delta = take(q) * scale, take(cotangent), take(deltas)[:, None]
        # exp(score - 1e30) is 0: rows that do not belong to the block add nothing.
        log_sum_exp = jnp.where(block.live[None], take(log_sum_exps), -MASKED)[:, None]

        def visit(keys: _Keys, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            k_block, v_block = (_take(x, keys.offset, kv, keys.size) for x in (k, v))
            weights = jnp.exp(_dot("hkd,hqd->hkq", k_block, queries) - log_sum_exp)
            if keys.mask is not None:
                weights = jnp.where(keys.mask.T[None], weights, 0.0)
            ds = weights * (_dot("hkd,hqd->hkq", v_block, d_out) - delta)
            dv = _add(dv, _dot("hkq,hqd->hkd", weights.astype(v.dtype), d_out), keys)
            ds = ds.astype(k.dtype)
            dk = _add(dk, _dot("hkq,hqd->hkd", ds, queries), keys)
            return dq + _dot("hkd,hkq->hdq", k_block, ds), dk, dv

        dq, dk, dv = carry
        zeros = jnp.zeros((kv, d, queries.shape[1]), jnp.float32)
        d_queries, dk, dv = _fold_keys(block, s, (window, slides), visit, (zeros, dk, dv))
        return _write(dq, d_queries.swapaxes(1, 2) * scale.astype(jnp.float32), block), dk, dv

    zeros32 = partial(jnp.zeros, dtype=jnp.float32)
    start = zeros32(q.shape), zeros32(k.shape), zeros32(v.shape)
    grads = jax.lax.fori_loop(0, blocks.filled, one, start)
    dq, dk, dv = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, None, None


_block_attention.defvjp(_forward, _backward)
