"""Attention, in the forms that the passes of the transformer need.

    masked_attention              rows of packed segments, any mask; plain XLA, for any device
    blocks_attention              sequences that share their prompts, laid end to end; for CPUs
    one_token_attention           one new token per rollout, over its prompt and its own tokens

`splash.py` has the TPU kernel for packed segments. `blocks_attention` walks a table of query blocks
(`sdpo_jax.model.Blocks`) and, for each, the keys that it may see, with a softmax that is corrected
as it goes: scores never leave the processor's cache, no key that a block cannot see is read, and
the work follows the lengths at hand, whatever shapes were compiled. Its gradient recomputes the
scores from the saved normalisers.

Source: arXiv 2205.14135 (attention in blocks). Validated against a float64 implementation, and each
form against the others, with gradients (tests/test_attention.py, tests/test_transformer.py).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sdpo_jax.model import BLOCK_TOKENS, Blocks

NEVER = -1e30
ATTENTION = "attention"


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention of `q: [B, S, Q, d]` over `k, v: [B, S, H, d]` where `mask[B, S, S]`.

    A row that may attend to nothing attends to everything evenly: finite, and never read.
    """
    b, s, heads, d = q.shape
    q = q.reshape(b, s, k.shape[2], -1, d)
    scores = jnp.einsum("bqhrd,bkhd->bhrqk", q, k, preferred_element_type=jnp.float32) * d**-0.5
    scores = jnp.where(mask[:, None, None], scores, NEVER)
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
    """One query per rollout over its prompt, its past tokens and itself, in one softmax.

    `q: [N, Q, d]`; prefix keys and values `[P, H, S, d]`, read once for all `G` rollouts of a
    prompt, with a mask `[P, G, S]` (or `[P, 1, S]`); suffix keys and values `[N, H, T, d]` with a
    mask `[N, T]`, where `keys_last` keys are `[N, H, d, T]`; the tokens' own keys and values
    `[N, H, d]`. Returns `[N, Q, d]`.
    """
    (pk, pv, p_mask), (sk, sv, s_mask), (k, v) = prefix, suffix, own
    n, heads, d = q.shape
    p, kv = pk.shape[:2]
    g, r = n // p, heads // kv
    q = (q * jnp.asarray(d**-0.5, q.dtype)).reshape(n, kv, r, d)
    a = _dot("pghrd,phsd->pghrs", q.reshape(p, g, kv, r, d), pk)
    a = jnp.where(p_mask[:, :, None, None], a, NEVER)
    scores = _dot("nhrd,nhdt->nhrt" if keys_last else "nhrd,nhtd->nhrt", q, sk)
    b = jnp.where(s_mask[:, None, None], scores, NEVER)
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
    """Causal attention of sequences laid end to end in bins, as `blocks` says.

    Args:
        q: [B, S, Q, d].
        k: [B, S, H, d].
        v: [B, S, H, d].
        blocks: see `sdpo_jax.model.Blocks`.
        window: how far back a sliding layer sees.
        slides: [] bool, whether this layer slides; None where none does.

    Returns:
        [B, S, Q, d]; undefined but finite where no block is. Differentiable in q, k and v, in
        reverse mode.
    """
    attend = partial(_bins, window if slides is not None else None)
    slides = jnp.zeros((), bool) if slides is None else slides
    return on_shards(attend, (q, k, v), blocks, slides)


def on_shards(
    attend: Any, qkv: tuple[jax.Array, jax.Array, jax.Array], rows: Any, whole: Any
) -> jax.Array:
    """Calls `attend(q, k, v, rows, whole)` on each device's rows and heads alone.

    For forms that XLA cannot partition: loops of a length known at run time, kernels. `rows` is a
    pytree cut like the rows of q; `whole` goes to every device. Outside a mesh it is a plain call.
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
    """One bin after the other: each has loops of its own length."""
    if q.shape[0] == 1:
        only: Blocks = jax.tree.map(lambda x: x[0], blocks)
        return _bin(window, slides, q[0], k[0], v[0], only)[None]
    return jax.lax.map(lambda one: _bin(window, slides, *one), (q, k, v, blocks))


def _bin(
    window: int | None, slides: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks
) -> jax.Array:
    """`[S, Q, d]` to head-major arrays with room for a whole block after the last token."""
    s, heads, d = q.shape
    kv = k.shape[1]
    room = ((0, 0), (0, BLOCK_TOKENS), (0, 0))
    k, v = jnp.pad(k.swapaxes(0, 1), room), jnp.pad(v.swapaxes(0, 1), room)
    q = (q * jnp.asarray(d**-0.5, q.dtype)).reshape(s, kv, -1, d).swapaxes(0, 1)
    q = jnp.pad(q, ((0, 0), (0, BLOCK_TOKENS), (0, 0), (0, 0))).reshape(kv, -1, d)
    out: jax.Array = _walk(window, q, k, v, blocks, slides)  # pyright: ignore[reportAssignmentType]
    out = out.reshape(kv, s + BLOCK_TOKENS, -1, d)[:, :s]
    return out.swapaxes(0, 1).reshape(s, heads, d)


class _Block(NamedTuple):
    """One row of the table, with what follows from it."""

    row: jax.Array  # [] int32, of the first query among the `r` rows of each token
    query: jax.Array  # [T·r] int32, token of each query row
    live: jax.Array  # [T·r, 1] bool, False behind the sequence's end
    shared: jax.Array  # [] int32, where the prompt begins
    shared_end: jax.Array
    own: jax.Array  # [] int32, where the sequence's own tokens begin
    first: jax.Array  # [] int32, number of key blocks over the prompt
    total: jax.Array  # [] int32, number of key blocks


def _block(row: jax.Array, r: int) -> _Block:
    start, count, shared, shared_count, own = row
    query = start + jnp.arange(BLOCK_TOKENS * r, dtype=jnp.int32) // r
    first = (shared_count + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    mine = (start + count - own + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    live = (query < start + count)[:, None]
    end = shared + shared_count
    return _Block(start * r, query, live, shared, end, own, first, first + mine)


def _seen(
    block: _Block, index: jax.Array, window: int | None, slides: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Where key block `index` starts, and which of its keys each query row sees `[T·r, T]`."""
    of_prompt = index < block.first
    offset = jnp.where(of_prompt, index, index - block.first) * BLOCK_TOKENS
    start = jnp.where(of_prompt, block.shared, block.own) + offset
    key = (start + jnp.arange(BLOCK_TOKENS, dtype=jnp.int32))[None]
    query = block.query[:, None]
    seen = jnp.where(of_prompt, key < block.shared_end, key <= query)
    if window is not None:
        # Counted along the sequence: the prompt ends where the own tokens begin.
        gap = jnp.where(of_prompt, block.own - block.shared_end, 0)
        seen &= (query - key - gap < window) | ~slides
    return start, seen


def _take(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Columns `[H, size, ...]` from `start` on."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _put(x: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, slides: jax.Array
) -> jax.Array:
    return _forward(window, q, k, v, blocks, slides)[0]


def _forward(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, slides: jax.Array
) -> tuple[jax.Array, Any]:
    r = q.shape[1] // k.shape[1]
    rows = BLOCK_TOKENS * r

    def one(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        block = _block(blocks.table[index], r)
        queries = _take(q, block.row, rows)

        def keys(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            most, total, out = sums
            start, seen = _seen(block, j, window, slides)
            scores = _dot("hqd,hkd->hqk", queries, _take(k, start, BLOCK_TOKENS))
            scores = jnp.where(seen[None], scores, NEVER)
            new_most = jnp.maximum(most, scores.max(axis=-1))
            kept = jnp.exp(most - new_most)
            weights = jnp.exp(scores - new_most[..., None])
            mixed = _dot("hqk,hkd->hqd", weights.astype(v.dtype), _take(v, start, BLOCK_TOKENS))
            total = total * kept + weights.sum(axis=-1)
            return new_most, total, out * kept[..., None] + mixed

        empty = jnp.zeros(queries.shape[:2], jnp.float32)
        start = empty + NEVER, empty, jnp.zeros(queries.shape, jnp.float32)
        most, total, out = jax.lax.fori_loop(0, block.total, keys, start)
        # In order: what a block writes behind its sequence's end is overwritten by the next one.
        whole, normalisers = carry
        whole = _put(whole, out / total[..., None], block.row)
        return whole, _put(normalisers, most + jnp.log(total), block.row)

    start = jnp.zeros_like(q), jnp.zeros(q.shape[:2], jnp.float32)
    out, normalisers = jax.lax.fori_loop(0, blocks.filled, one, start)
    # Named, so that a policy of recomputation can keep them and spare the walk.
    out, normalisers = (checkpoint_name(x, ATTENTION) for x in (out, normalisers))
    return out, (q, k, v, blocks, slides, out, normalisers)


def _backward(window: int | None, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    q, k, v, blocks, slides, out, normalisers = residuals
    r = q.shape[1] // k.shape[1]
    rows = BLOCK_TOKENS * r
    kept = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)  # [H, S·r]

    def one(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        block = _block(blocks.table[index], r)
        take = partial(_take, start=block.row, size=rows)
        queries, slopes = take(q), take(cotangent)
        normaliser, mean = take(normalisers)[..., None], take(kept)[..., None]

        def keys(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            start, seen = _seen(block, j, window, slides)
            theirs, values = _take(k, start, BLOCK_TOKENS), _take(v, start, BLOCK_TOKENS)
            scores = _dot("hqd,hkd->hqk", queries, theirs)
            weights = jnp.where((seen & block.live)[None], jnp.exp(scores - normaliser), 0.0)
            ds = weights * (_dot("hqd,hkd->hqk", slopes, values) - mean)
            more = _dot("hqk,hqd->hkd", weights.astype(v.dtype), slopes)
            dv = _put(dv, _take(dv, start, BLOCK_TOKENS) + more, start)
            ds = ds.astype(k.dtype)
            more = _dot("hqk,hqd->hkd", ds, queries)
            dk = _put(dk, _take(dk, start, BLOCK_TOKENS) + more, start)
            return dq + _dot("hqk,hkd->hqd", ds, theirs), dk, dv

        dq, dk, dv = carry
        zeros = jnp.zeros(queries.shape, jnp.float32)
        mine, dk, dv = jax.lax.fori_loop(0, block.total, keys, (zeros, dk, dv))
        return _put(dq, mine, block.row), dk, dv

    wide = partial(jnp.zeros, dtype=jnp.float32)
    start = wide(q.shape), wide(k.shape), wide(v.shape)
    grads = jax.lax.fori_loop(0, blocks.filled, one, start)
    dq, dk, dv = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, None, None


_walk.defvjp(_forward, _backward)
