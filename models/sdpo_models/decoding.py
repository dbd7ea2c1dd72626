"""Decoding: one token for every rollout, over the shared prompts and a cache of its own tokens.

`enter` and `leave` stand around the loop (`sdpo_jax.model.Model`): a small model on a CPU reads
arrays of each layer, a TPU the stacks as they are. Validated: decoding equals the forward pass over
whole sequences, in both forms (tests/test_transformer.py, tests/test_sampling.py).
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
    rotations,
    stacked_layers,
)

UNROLLED_LAYERS = 8
"""Up to so many layers are unrolled in the decode loop of a CPU (see `enter`). With four, decoding
took 0.74 to 0.88 of the time; with thirty 0.92, for one and a half times the compilation."""


def suffix_cache(a: Architecture, settings: Settings, rows: int, max_tokens: int) -> SuffixCache:
    """An empty cache, head before position: the layout that a TPU decodes in place."""
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
    place: jax.Array,
    *,
    prompts: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """One token for every rollout; see `sdpo_jax.model.DecodeFn`.

    Layers only read the cache: the new keys and values are attended to apart and written once,
    after the last layer, in one slice. XLA:TPU then neither copies a layer nor moves the cache.
    """
    is_entered = isinstance(cache, Entered)
    groups = prefix.lengths.shape[0] if prompts is None else tokens.shape[0]
    lengths = prefix.lengths if prompts is None else prefix.lengths[prompts]
    positions = jnp.repeat(lengths, tokens.shape[0] // groups) + step
    turns, places = rotations(a, positions), cache.values[0].shape[-2]
    index = jnp.arange(prefix.keys[0].shape[-2])
    real = (index[None] < lengths[:, None])[:, None]
    distance = positions.reshape(groups, -1, 1) - index[None, None]
    age = (place - jnp.arange(places))[None] % places
    past = (age > 0) & (age <= step[:, None])

    def layer_step(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        number, layer, *shared = xs
        shared = shared if prompts is None else [y[prompts] for y in shared]
        before = (*shared, real & in_window(a, layer.slides, distance))
        after = (*_layer_of(cache, number), past & in_window(a, layer.slides, age))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            return one_token_attention(q, before, after, (k, v), keys_last=is_entered), (k, v)

        return block(a, layer, x, turns, attend)

    x = params["embedding"].astype(settings.dtype)[tokens]
    if is_entered:
        x, cache = _one_by_one(layer_step, x, params, prefix, cache, place)
    else:
        xs = (jnp.arange(a.layers), stacked_layers(a, params), prefix.keys, prefix.values)
        x, new = jax.lax.scan(layer_step, x, xs)
        cache = _write(cache, new, place)
    return rms_norm(x, params["final_norm"], a.norm_epsilon), cache


def _layer_of(cache: Any, number: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one layer."""
    if isinstance(cache, Entered):
        return cache.keys[number], cache.values[number]
    # Sliced here: as inputs of the scan they would be copied out, layer by layer.
    take = partial(jax.lax.dynamic_index_in_dim, index=number, keepdims=False)
    return take(cache.keys), take(cache.values)


def _write(cache: SuffixCache, new: tuple[jax.Array, jax.Array], place: jax.Array) -> SuffixCache:
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=place, axis=3)
    keys, values = (write(old, y[:, :, :, None]) for old, y in zip(cache, new, strict=True))
    return SuffixCache(keys, values)


class Entered(NamedTuple):
    """What `enter` makes of a cache, one array to a layer."""

    keys: tuple[jax.Array, ...]  # [N, H, d, T]
    values: tuple[jax.Array, ...]  # [N, H, T, d]


def enter(
    a: Architecture, settings: Settings, params: Params, prefix: Prefix, cache: SuffixCache
) -> tuple[Params, Any, Any]:
    """Each layer's weights, keys and values as arrays of their own; keys `[N, H, d, T]`.

    A scan over layers copies each layer's slice of every stack before XLA:CPU can multiply by it.
    TPUs read slices in place.
    """
    layers = stacked_layers(a, jax.tree.map(lambda x: x.astype(settings.dtype), params))
    apart = [tuple(x[i] for i in range(a.layers)) for x in (*prefix[:2], *cache)]
    by_layer = tuple(jax.tree.map(itemgetter(i), layers) for i in range(a.layers))
    keys = tuple(k.swapaxes(-1, -2) for k in apart[2])
    entered = Prefix(apart[0], apart[1], *prefix[2:])  # pyright: ignore[reportArgumentType]
    return {**params, "layers": by_layer}, entered, Entered(keys, apart[3])


def leave(cache: Entered) -> SuffixCache:
    """Back to stacks, `[L, N, H, T, d]`."""
    return SuffixCache(jnp.stack(cache.keys).swapaxes(-1, -2), jnp.stack(cache.values))


def _one_by_one(
    layer_step: Any, x: jax.Array, params: Any, prefix: Any, cache: Any, place: jax.Array
) -> tuple[jax.Array, Any]:
    """Layer after layer over what `enter` made; new keys and values are written to `place`."""
    new: list[tuple[jax.Array, jax.Array]] = []
    for number, layer in enumerate(params["layers"]):
        xs = number, layer, prefix.keys[number], prefix.values[number]
        x, kept = layer_step(x, xs)
        new.append(kept)
    # A write that does not wait for the last read makes XLA copy the cache, and it takes the
    # barriers out before it looks: so the place depends on the last layer. Nothing is above inf.
    place = place + (x[0, 0] > jnp.inf).astype(place.dtype)
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=place)
    keys = [write(old, k[..., None], axis=3) for old, (k, _) in zip(cache.keys, new, strict=True)]
    values = [
        write(old, v[:, :, None], axis=2) for old, (_, v) in zip(cache.values, new, strict=True)
    ]
    return x, Entered(tuple(keys), tuple(values))
