"""Decoding: one token for every rollout, over the shared prompts and a cache of its own tokens.

The decode loop is wrapped in `to_decode_layout` and `from_decode_layout` (see
`sdpo_jax.model.Model`): a shallow model on a CPU decodes from one array per layer, a TPU from the
stacked arrays. Validated: in both layouts decoding equals the forward pass over whole sequences
(tests/test_transformer.py, tests/test_sampling.py).
"""

from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sdpo_jax.model import Params, Prefix, SuffixCache
from sdpo_models.architecture import Architecture
from sdpo_models.attention import one_token_attention
from sdpo_models.layers import (
    Settings,
    block,
    in_window,
    rms_norm,
    rope_tables,
    stacked_layers,
)

UNROLLED_LAYERS = 8
"""Models of at most this many layers decode with unrolled layers on a CPU (`to_decode_layout`).

Unrolling four layers takes 0.74 to 0.88 of the time; unrolling thirty takes 0.92 of the time and
1.5 times the compilation."""


def suffix_cache(a: Architecture, settings: Settings, rows: int, max_tokens: int) -> SuffixCache:
    """An empty cache, head before position: the layout that a TPU decodes in write_index."""
    shape = (a.layers, rows, a.kv_heads, max_tokens, a.head_size)
    return SuffixCache(jnp.zeros(shape, settings.dtype), jnp.zeros(shape, settings.dtype))


def decode(
    a: Architecture,
    settings: Settings,
    params: Params,
    prefix: Any,
    cache: Any,
    tokens: jax.Array,
    step: jax.Array,
    write_index: jax.Array,
    *,
    prompts: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """One token for every rollout; see `sdpo_jax.model.DecodeFn`.

    Layers only read the cache: the new keys and values are attended to apart and written once,
    after the last layer, in one slice. XLA:TPU then neither copies a layer nor moves the cache.
    """
    is_per_layer = isinstance(cache, PerLayerCache)
    groups = prefix.lengths.shape[0] if prompts is None else tokens.shape[0]
    lengths = prefix.lengths if prompts is None else prefix.lengths[prompts]
    positions = jnp.repeat(lengths, tokens.shape[0] // groups) + step
    rope, capacity = rope_tables(a, positions), cache.values[0].shape[-2]
    index = jnp.arange(prefix.keys[0].shape[-2])
    real = (index[None] < lengths[:, None])[:, None]
    distance = positions.reshape(groups, -1, 1) - index[None, None]
    age = (write_index - jnp.arange(capacity))[None] % capacity
    past = (age > 0) & (age <= step[:, None])

    def layer_step(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        number, layer, *shared = xs
        shared = shared if prompts is None else [y[prompts] for y in shared]
        before = (*shared, real & in_window(a, layer.slides, distance))
        after = (*_layer_of(cache, number), past & in_window(a, layer.slides, age))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            return one_token_attention(q, before, after, (k, v), keys_last=is_per_layer), (k, v)

        return block(a, layer, x, rope, attend)

    x = params["embedding"].astype(settings.dtype)[tokens]
    if is_per_layer:
        x, cache = _unrolled_layers(layer_step, x, params, prefix, cache, write_index)
    else:
        xs = (jnp.arange(a.layers), stacked_layers(a, params), prefix.keys, prefix.values)
        x, new = jax.lax.scan(layer_step, x, xs)
        cache = _write(cache, new, write_index)
    return rms_norm(x, params["final_norm"], a.norm_epsilon), cache


def _layer_of(cache: Any, number: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one layer."""
    if isinstance(cache, PerLayerCache):
        return cache.keys[number], cache.values[number]
    # Sliced here: as inputs of the scan they would be copied out, layer by layer.
    take = partial(jax.lax.dynamic_index_in_dim, index=number, keepdims=False)
    return take(cache.keys), take(cache.values)


def _write(
    cache: SuffixCache, new: tuple[jax.Array, jax.Array], write_index: jax.Array
) -> SuffixCache:
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=write_index, axis=3)
    keys, values = (write(old, y[:, :, :, None]) for old, y in zip(cache, new, strict=True))
    return SuffixCache(keys, values)


class PerLayerCache(NamedTuple):
    """What `to_decode_layout` makes of a cache, one array to a layer."""

    keys: tuple[jax.Array, ...]  # [N, H, d, T]
    values: tuple[jax.Array, ...]  # [N, H, T, d]


def to_decode_layout(
    a: Architecture, settings: Settings, params: Params, prefix: Prefix, cache: SuffixCache
) -> tuple[Params, Any, Any]:
    """Each layer's weights, keys and values as arrays of their own; keys `[N, H, d, T]`.

    A scan over layers copies each layer's slice of every stack before XLA:CPU can multiply by it.
    TPUs read slices in write_index.
    """
    layers = stacked_layers(a, jax.tree.map(lambda x: x.astype(settings.dtype), params))
    apart = [tuple(x[i] for i in range(a.layers)) for x in (*prefix[:2], *cache)]
    by_layer = tuple(jax.tree.map(itemgetter(i), layers) for i in range(a.layers))
    keys = tuple(k.swapaxes(-1, -2) for k in apart[2])
    unstacked = Prefix(apart[0], apart[1], *prefix[2:])  # pyright: ignore[reportArgumentType]
    return {**params, "layers": by_layer}, unstacked, PerLayerCache(keys, apart[3])


def from_decode_layout(cache: PerLayerCache) -> SuffixCache:
    """Back to stacks, `[L, N, H, T, d]`."""
    return SuffixCache(jnp.stack(cache.keys).swapaxes(-1, -2), jnp.stack(cache.values))


def _unrolled_layers(
    layer_step: Any, x: jax.Array, params: Any, prefix: Any, cache: Any, write_index: jax.Array
) -> tuple[jax.Array, Any]:
    """Runs layers in the decode layout one by one; writes keys and values to `write_index`."""
    new: list[tuple[jax.Array, jax.Array]] = []
    for number, layer in enumerate(params["layers"]):
        xs = number, layer, prefix.keys[number], prefix.values[number]
        x, kept = layer_step(x, xs)
        new.append(kept)
    # XLA copies the cache unless the write waits for the last read, and it removes optimization
    # barriers before it checks: so make the index depend on the last layer (x > inf is never true).
    write_index = write_index + (x[0, 0] > jnp.inf).astype(write_index.dtype)
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=write_index)
    keys = [write(old, k[..., None], axis=3) for old, (k, _) in zip(cache.keys, new, strict=True)]
    values = [
        write(old, v[:, :, None], axis=2) for old, (_, v) in zip(cache.values, new, strict=True)
    ]
    return x, PerLayerCache(tuple(keys), tuple(values))
