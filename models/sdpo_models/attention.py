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
WIDE = 2 * BLOCK_TOKENS
"""Keys looked at in one go where every query of a block sees them all."""


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
        q: [B, S, Q, d], S at least `BLOCK_TOKENS`.
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
    """One bin, `[S, Q, d]`. Arrays stay as they are; each block is turned heads first by itself."""
    if q.shape[0] < BLOCK_TOKENS:
        raise ValueError(f"expected bins of at least {BLOCK_TOKENS} tokens, got {q.shape[0]}")
    return _walk(window, q, k, v, blocks, slides)


class _Block(NamedTuple):
    """One row of the table, with what follows from it.

    A block that would reach over the end of the bin begins earlier, and has tokens before its own.
    """

    place: jax.Array  # [] int32, of its first token in the bin
    query: jax.Array  # [r·T] int32, token of each query row
    live: jax.Array  # [r·T] bool, whether that token is one of the block's
    shared: jax.Array  # [] int32, where the prompt begins
    shared_end: jax.Array
    own: jax.Array  # [] int32, where the sequence's own tokens begin
    start: jax.Array  # [] int32, the block's own first token


def _block(row: jax.Array, r: int, tokens: int) -> _Block:
    start, count, shared, shared_count, own = row
    place = jnp.minimum(start, tokens - BLOCK_TOKENS)
    query = place + jnp.arange(r * BLOCK_TOKENS, dtype=jnp.int32) % BLOCK_TOKENS
    live = (query >= start) & (query < start + count)
    return _Block(place, query, live, shared, shared + shared_count, own, start)


class _Keys(NamedTuple):
    """A block of keys, and which of them each query row sees."""

    place: jax.Array  # [] int32, of the first one in the bin
    size: int
    seen: jax.Array | None  # [r·T, size] bool; None where every row sees all


def _over_keys(
    block: _Block, tokens: int, sliding: tuple[int | None, jax.Array], visit: Any, carry: Any
) -> Any:
    """`carry = visit(keys, carry)` for all keys that a block of queries sees, some at a time.

    First the wide blocks in which every query sees every key, without a mask; then the rest.
    """
    of_prompt, of_own = jnp.zeros((2,), jnp.int32)
    if sliding[0] is None:
        of_prompt = (block.shared_end - block.shared) // WIDE
        of_own = (block.start - block.own) // WIDE

        def wide(j: jax.Array, carry: Any) -> Any:
            after = block.own + (j - of_prompt) * WIDE
            place = jnp.where(j < of_prompt, block.shared + j * WIDE, after)
            return visit(_Keys(place, WIDE, None), carry)

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
    """Keys from `start` on, up to the end of the prompt or to each query."""
    place = jnp.minimum(start, tokens - BLOCK_TOKENS)
    key = (place + jnp.arange(BLOCK_TOKENS, dtype=jnp.int32))[None]
    last = jnp.where(of_prompt, block.shared_end - 1, block.query)[:, None]
    seen = (key >= start) & (key <= last)
    if window is not None:
        # Counted along the sequence: the prompt ends where the own tokens begin.
        gap = jnp.where(of_prompt, block.own - block.shared_end, 0)
        seen &= (block.query[:, None] - key - gap < window) | ~slides
    return _Keys(place, BLOCK_TOKENS, seen)


_slice = jax.lax.dynamic_slice_in_dim


def _take(x: jax.Array, place: jax.Array, heads: int, size: int = BLOCK_TOKENS) -> jax.Array:
    """A block of `x: [S, n, ...]`, `[H, n/H·size, ...]`: query heads of a head one by one."""
    return _slice(x, place, size).swapaxes(0, 1).reshape(heads, -1, *x.shape[2:])


def _write(x: jax.Array, part: jax.Array, block: _Block) -> jax.Array:
    """Puts `part: [H, r·T, ...]` where the block's own tokens stand in `x: [S, Q, ...]`."""
    live = block.live[:BLOCK_TOKENS].reshape(-1, *(1,) * (x.ndim - 1))
    part = part.reshape(-1, BLOCK_TOKENS, *part.shape[2:]).swapaxes(0, 1).astype(x.dtype)
    part = jnp.where(live, part, _slice(x, block.place, BLOCK_TOKENS))
    return jax.lax.dynamic_update_slice_in_dim(x, part, block.place, axis=0)


def _add(x: jax.Array, part: jax.Array, keys: _Keys) -> jax.Array:
    """Adds `part: [H, size, d]` to a block of `x: [S, H, d]`."""
    part = _slice(x, keys.place, keys.size) + part.swapaxes(0, 1)
    return jax.lax.dynamic_update_slice_in_dim(x, part, keys.place, axis=0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, slides: jax.Array
) -> jax.Array:
    return _forward(window, q, k, v, blocks, slides)[0]


def _forward(
    window: int | None, q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, slides: jax.Array
) -> tuple[jax.Array, Any]:
    (s, heads, d), kv = q.shape, k.shape[1]

    def one(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        block = _block(blocks.table[index], heads // kv, s)
        queries = _take(q, block.place, kv) * jnp.asarray(d**-0.5, q.dtype)

        def visit(keys: _Keys, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            most, total, out = sums
            theirs, values = (_take(x, keys.place, kv, keys.size) for x in (k, v))
            scores = _dot("hqd,hkd->hqk", queries, theirs)
            if keys.seen is not None:
                scores = jnp.where(keys.seen[None], scores, NEVER)
            new_most = jnp.maximum(most, scores.max(axis=-1))
            kept = jnp.exp(most - new_most)
            weights = jnp.exp(scores - new_most[..., None])
            mixed = _dot("hqk,hkd->hqd", weights.astype(v.dtype), values)
            total = total * kept + weights.sum(axis=-1)
            return new_most, total, out * kept[..., None] + mixed

        empty = jnp.zeros(queries.shape[:2], jnp.float32)
        start = empty + NEVER, empty, jnp.zeros(queries.shape, jnp.float32)
        most, total, out = _over_keys(block, s, (window, slides), visit, start)
        whole, normalisers = carry
        whole = _write(whole, out / total[..., None], block)
        return whole, _write(normalisers, most + jnp.log(total), block)

    start = jnp.zeros_like(q), jnp.zeros(q.shape[:2], jnp.float32)
    out, normalisers = jax.lax.fori_loop(0, blocks.filled, one, start)
    # Named, so that a policy of recomputation can keep them and spare the walk.
    out, normalisers = (checkpoint_name(x, ATTENTION) for x in (out, normalisers))
    return out, (q, k, v, blocks, slides, out, normalisers)


def _backward(window: int | None, residuals: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    """Scores lie keys first here, `[H, T, r·T]`.

    Four of the five products then have no operand to turn; queries first, it would be three.
    """
    q, k, v, blocks, slides, out, normalisers = residuals
    (s, heads, d), kv = q.shape, k.shape[1]
    scale = jnp.asarray(d**-0.5, q.dtype)
    kept = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)  # [S, Q]

    def one(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        block = _block(blocks.table[index], heads // kv, s)
        take = partial(_take, place=block.place, heads=kv)
        queries, slopes, mean = take(q) * scale, take(cotangent), take(kept)[:, None]
        # Rows that are not the block's own weigh nothing.
        normaliser = jnp.where(block.live[None], take(normalisers), -NEVER)[:, None]

        def visit(keys: _Keys, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            theirs, values = (_take(x, keys.place, kv, keys.size) for x in (k, v))
            weights = jnp.exp(_dot("hkd,hqd->hkq", theirs, queries) - normaliser)
            if keys.seen is not None:
                weights = jnp.where(keys.seen.T[None], weights, 0.0)
            ds = weights * (_dot("hkd,hqd->hkq", values, slopes) - mean)
            dv = _add(dv, _dot("hkq,hqd->hkd", weights.astype(v.dtype), slopes), keys)
            ds = ds.astype(k.dtype)
            dk = _add(dk, _dot("hkq,hqd->hkd", ds, queries), keys)
            return dq + _dot("hkd,hkq->hdq", theirs, ds), dk, dv

        dq, dk, dv = carry
        zeros = jnp.zeros((kv, d, queries.shape[1]), jnp.float32)
        mine, dk, dv = _over_keys(block, s, (window, slides), visit, (zeros, dk, dv))
        return _write(dq, mine.swapaxes(1, 2) * scale.astype(jnp.float32), block), dk, dv

    wide = partial(jnp.zeros, dtype=jnp.float32)
    start = wide(q.shape), wide(k.shape), wide(v.shape)
    grads = jax.lax.fori_loop(0, blocks.filled, one, start)
    dq, dk, dv = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, None, None


_walk.defvjp(_forward, _backward)
