"""Memory-efficient attention on TPUs: a wrapper of jax's splash attention kernels.

It computes `sdpo_models.attention.masked_attention` with a causal mask per segment, in memory
linear in the row's length: the forward pass keeps the output and one log-sum-exp per query and
head, and the backward pass recomputes the scores block by block. Blocks entirely after the
diagonal, or entirely before a sliding layer's window, are skipped.

Differences from `masked_attention`:

* The queries are scaled by `d ** -0.5` before the product, and rounded to their dtype.
* A sliding layer's window counts columns of the row, not positions. The two agree if the positions
  of a segment are consecutive.

XLA cannot partition a kernel: under a mesh (`jax.set_mesh`) each device runs it on its own rows and
heads. Compilation for TPUs must set the mesh, because the kernel also reads the TPU's generation
from it.

Dimension key: sdpo_jax/model.py; here also `Q` query heads.
Validated against a dense softmax, values and gradients (tests/test_splash.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from sdpo_jax.devices import ROWS
from sdpo_jax.errors import UserError
from sdpo_models.attention import ATTENTION

HEADS = "tensor"
"""The mesh axis of heads."""
LANES = 128
"""Sizes of blocks and lengths of padded rows are multiples of this."""

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
"""`attend(q[B, S, Q, d], k[B, S, H, d], v[B, S, H, d], segments[B, S], slides[])`."""


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    window: int | None,
    slides: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal softmax attention within segments, `[B, S, Q, d]` in the dtype of `q`; differentiable.

    Args:
      q: `[B, S, Q, d]`, rotated and not yet scaled.
      k: `[B, S, H, d]`; `H` divides `Q`.
      v: `[B, S, H, d]`.
      segments: `[B, S]` int32; 0 is padding, whose outputs are finite and meaningless.
      window: columns that a sliding layer sees, including the current one.
      slides: `[]` bool, may be traced: whether this layer slides; None if no layer does.
      interpret: runs the kernel in interpret mode, slowly, on any device.

    Raises:
      UserError: the context mesh does not divide the rows or the heads.
      ValueError: `slides` without `window`.
    """
    if slides is None:
        window = None
    elif window is None:
        raise ValueError("slides is given and window is None; expected the sliding layers' window")
    elif window >= q.shape[1]:
        window, slides = None, None  # the window masks nothing: one kernel instead of two
    attend = partial(_attend, window, interpret)
    with jax.named_scope("splash_attention"):
        return _by_device(attend, q, k, v, segments, slides)


def _by_device(
    attend: Attend,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    slides: jax.Array | None,
) -> jax.Array:
    """Calls `attend` on each device of the context mesh, with the device's rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {name: n for name, n in mesh.shape.items() if name not in mesh.manual_axes}
    if not free:
        return attend(q, k, v, segments, slides)
    rows = tuple(name for name in ROWS[0] if name in free)
    heads = HEADS if HEADS in free else None
    k, v = _divisible(q, k, v, math.prod(free[name] for name in rows), free.get(HEADS, 1))
    spec = P(rows, None, heads)
    return jax.shard_map(
        attend,
        in_specs=(spec, spec, spec, P(rows), P()),
        out_specs=spec,
        axis_names=set(free),
        check_vma=False,  # a kernel's outputs carry no varying axes
    )(q, k, v, segments, slides)


def _divisible(
    q: jax.Array, k: jax.Array, v: jax.Array, row_shards: int, head_shards: int
) -> tuple[jax.Array, jax.Array]:
    """Repeats key-value heads as few times as give every device heads of its own.

    Raises:
      UserError: the context mesh does not divide the rows or the heads.
    """
    b, _, heads, _ = q.shape
    copies = head_shards // math.gcd(k.shape[2], head_shards)
    if b % row_shards:
        raise UserError(
            f"mesh.data x mesh.fsdp = {row_shards} does not divide {b} rows; expected a number of "
            f"rows that is a multiple of {row_shards}"
        )
    if heads % (copies * k.shape[2]):
        raise UserError(
            f"mesh.{HEADS} = {head_shards} does not divide {heads} query heads of {k.shape[2]} "
            f"key-value heads; expected a divisor of {heads} that is a multiple or a divisor of "
            f"{k.shape[2]}"
        )
    if copies == 1:
        return k, v
    return jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)


def _attend(
    window: int | None,
    interpret: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    slides: jax.Array | None,
) -> jax.Array:
    """Attention on one device; see `Attend`."""
    s, heads, d = q.shape[1:]
    padded, block = row_and_block(s)
    scaled = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype)
    q, k, v = (_heads_first(x, padded) for x in (scaled, k, v))
    q = q.reshape(q.shape[0], k.shape[1], -1, padded, d)
    segments = _padded(segments, 1, padded)
    full = _kernel(padded, q.shape[2], block, None, interpret)
    if slides is None:
        out = full(q, k, v, segments)
    else:
        sliding = _kernel(padded, q.shape[2], block, window, interpret)
        out = jax.lax.cond(slides, sliding, full, q, k, v, segments)
    return jnp.swapaxes(out.reshape(-1, heads, padded, d), 1, 2)[:, :s]


def row_and_block(s: int) -> tuple[int, int]:
    """The length to which a row of `s` columns is padded, and the size of its square blocks.

    Large blocks use the matrix unit well. A row of up to 512 columns is one block. A longer row has
    blocks of 512, 384 or 256, whichever pads least, and gets at most 255 columns of padding.
    """
    lanes = -(-s // LANES)
    if lanes <= 4:
        return lanes * LANES, lanes * LANES
    size = min((4, 3, 2), key=lambda n: -lanes % n)
    return -(-lanes // size) * size * LANES, size * LANES


def _padded(x: jax.Array, axis: int, length: int) -> jax.Array:
    widths = [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)


def _heads_first(x: jax.Array, length: int) -> jax.Array:
    """`[B, S, heads, d] -> [B, heads, length, d]`, padded with zeros."""
    return _padded(jnp.swapaxes(x, 1, 2), 2, length)


def _kernel(
    s: int, group: int, block: int, window: int | None, interpret: bool
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """The kernel for rows of `s`: `(q[B, H, R, S, d], k[B, H, S, d], v, segments[B, S]) -> like q`.

    `group` is `R`, the number of query heads per key-value head. There are two backward kernels,
    one for the gradient of queries and one for that of keys and values. The fused kernel would
    write the former once per block of keys: `S / block` times the size of the queries.
    """
    mask = (
        splash.CausalMask((s, s))
        if window is None
        else splash.LocalMask((s, s), (window - 1, 0), offset=0)
    )
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    # A kernel for one key-value head, vmapped over rows and heads: a chip's two cores split vmapped
    # axes. The multi-head kernel leaves one core idle in the backward pass of a single row.
    one_head = splash.make_splash_mqa_single_device(
        splash.MultiHeadMask([mask] * group),
        block_sizes=blocks,
        interpret=interpret,
        residual_checkpoint_name=ATTENTION,
    )
    one_row = jax.vmap(one_head, in_axes=(0, 0, 0, None))

    def rows(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        out = jax.vmap(one_row)(q, k, v, splash.SegmentIds(segments, segments))
        return cast(jax.Array, out)  # no residuals are returned unless requested

    return rows
