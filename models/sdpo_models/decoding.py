"""Decoding: one token per rollout, which attends to its prompt and to a cache of its own tokens.

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
from sdpo_models.layers import Settings, block, in_window, rms_norm, rope_tables, stacked_layers

UNROLLED_LAYERS = 8
"""Models of at most this many layers decode with unrolled layers on a CPU (`to_decode_layout`).

Unrolling four layers takes 0.74 to 0.88 of the time; unrolling thirty takes 0.92 of the time and
1.5 times the compilation."""


def suffix_cache(a: Architecture, settings: Settings, rows: int, max_tokens: int) -> SuffixCache:
    """An empty cache with heads before positions, the layout that a TPU updates in place."""
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
    """Decodes one token per rollout; see `sdpo_jax.model.DecodeFn`.

    Layers only read the cache. Attention takes the new keys and values as separate operands; they
    are written to the cache once, after the last layer, in one slice. XLA:TPU then copies no layer
    of the cache and updates it in place.
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
    """Cached keys and values of one layer."""
    if isinstance(cache, PerLayerCache):
        return cache.keys[number], cache.values[number]
    # Sliced here and not scanned over: a scan copies each layer of its inputs.
    take = partial(jax.lax.dynamic_index_in_dim, index=number, keepdims=False)
    return take(cache.keys), take(cache.values)


def _write(
    cache: SuffixCache, new: tuple[jax.Array, jax.Array], write_index: jax.Array
) -> SuffixCache:
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=write_index, axis=3)
    keys, values = (write(old, y[:, :, :, None]) for old, y in zip(cache, new, strict=True))
    return SuffixCache(keys, values)


class PerLayerCache(NamedTuple):
    """The cache in the decode layout of a CPU: one array per layer."""

    keys: tuple[jax.Array, ...]  # [N, H, d, T]
    values: tuple[jax.Array, ...]  # [N, H, T, d]


def to_decode_layout(
    a: Architecture, settings: Settings, params: Params, prefix: Prefix, cache: SuffixCache
) -> tuple[Params, Any, Any]:
    """Unstacks weights, prefix and cache into one array per layer; keys become `[N, H, d, T]`.

    For CPUs: XLA:CPU copies a layer's slice of every stacked array before it multiplies by it. TPUs
    read slices in place and keep the stacked layout.
    """
    layers = stacked_layers(a, jax.tree.map(lambda x: x.astype(settings.dtype), params))
    unstacked = [tuple(x[i] for i in range(a.layers)) for x in (*prefix[:2], *cache)]
    by_layer = tuple(jax.tree.map(itemgetter(i), layers) for i in range(a.layers))
    keys = tuple(k.swapaxes(-1, -2) for k in unstacked[2])
    by_layer_prefix = Prefix(unstacked[0], unstacked[1], *prefix[2:])  # pyright: ignore[reportArgumentType]
    return {**params, "layers": by_layer}, by_layer_prefix, PerLayerCache(keys, unstacked[3])


def from_decode_layout(cache: PerLayerCache) -> SuffixCache:
    """Stacks the cache of `to_decode_layout` again, `[L, N, H, T, d]`."""
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
