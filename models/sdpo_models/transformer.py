"""A decoder-only transformer as pure functions over a pytree with stacked layers.

Blocks of grouped-query attention with rotary positions and of a gated MLP. Switches: norms before
both or after both (OLMo 3), query-key norm per head (Qwen 3) or over the whole projection (OLMo 3),
projection biases (Qwen 2), sliding-window layers with rotary parameters of their own. One block
serves three passes that differ only in how they attend: `hidden` (whole sequences, segments),
`prefill` (prompts, keys and values kept) and `decode` (one token per rollout against the shared
prompt and its own cache). Layers run under `lax.scan`, so that compile time does not grow with
depth; whether a layer slides is scanned with its weights.

Dimension key: sdpo_jax/model.py; here also `Q` query heads, `F` MLP width, `R = Q / H`.
Validated against a second implementation in float64 numpy (tests/test_transformer.py) and against
`transformers` (tests/test_families.py, tests/live_transformers.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sdpo_jax.model import Blocks, Model, Params, Prefix, SuffixCache
from sdpo_models.architecture import Architecture
from sdpo_models.attention import (
    blocks_attention,
    masked_attention,
    one_token_attention,
)
from sdpo_models.remat import LAYER_INPUT, Remat, recomputed
from sdpo_models.rope import inverse_frequencies


class Leaf(NamedTuple):
    """A parameter's shape, logical axes, and deviation of its initial draw (None: ones)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    scale: float | None


def parameter_table(a: Architecture) -> dict[str, Any]:
    """Declares every parameter once; init, sharding and file formats derive from it."""
    d, out = a.width**-0.5, (2 * a.layers) ** -0.5
    q, kv = a.heads * a.head_size, a.kv_heads * a.head_size
    layer: dict[str, Leaf] = {
        "attention_norm": Leaf((a.width,), ("embed",), None),
        "query": Leaf((a.width, q), ("embed", "heads"), d),
        "key": Leaf((a.width, kv), ("embed", "kv_heads"), d),
        "value": Leaf((a.width, kv), ("embed", "kv_heads"), d),
        "output": Leaf((q, a.width), ("heads", "embed"), q**-0.5 * out),
        "mlp_norm": Leaf((a.width,), ("embed",), None),
        "gate": Leaf((a.width, a.mlp_width), ("embed", "mlp"), d),
        "up": Leaf((a.width, a.mlp_width), ("embed", "mlp"), d),
        "down": Leaf((a.mlp_width, a.width), ("mlp", "embed"), a.mlp_width**-0.5 * out),
    }
    if a.query_key_norm and a.norm_whole_projection:
        layer["query_norm"] = Leaf((q,), ("heads",), None)
        layer["key_norm"] = Leaf((kv,), ("kv_heads",), None)
    elif a.query_key_norm:
        layer |= {name: Leaf((a.head_size,), (None,), None) for name in ("query_norm", "key_norm")}
    if a.attention_bias:
        layer["query_bias"] = Leaf((q,), ("heads",), 0.0)
        layer["key_bias"] = Leaf((kv,), ("kv_heads",), 0.0)
        layer["value_bias"] = Leaf((kv,), ("kv_heads",), 0.0)
    table: dict[str, Any] = {
        "embedding": Leaf((a.vocabulary, a.width), ("vocab", "embed"), d),
        "layers": {
            name: Leaf((a.layers, *leaf.shape), ("layers", *leaf.axes), leaf.scale)
            for name, leaf in layer.items()
        },
        "final_norm": Leaf((a.width,), ("embed",), None),
    }
    if not a.tied_head:
        table["head"] = Leaf((a.width, a.vocabulary), ("embed", "vocab"), d)
    return table


def _is_leaf(x: object) -> bool:
    return isinstance(x, Leaf)


def init(a: Architecture, key: jax.Array) -> Params:
    """Draws float32 parameters; residual outputs are scaled down by the square root of 2·L."""
    leaves, tree = jax.tree.flatten(parameter_table(a), is_leaf=_is_leaf)
    keys = jax.random.split(key, len(leaves))
    values = [
        jnp.ones(leaf.shape)
        if leaf.scale is None
        else leaf.scale * jax.random.normal(k, leaf.shape)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, values)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (normed * _like(scale.astype(jnp.float32), x)).astype(x.dtype)


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector over the last axis of `x`, with ones for the others (rank promotion is an error)."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


class Rotations(NamedTuple):
    """Cosines and sines `[K, ..., 1, d / 2]`; `K` is 2 where sliding layers turn differently."""

    cos: jax.Array
    sin: jax.Array


def rotations(a: Architecture, positions: jax.Array) -> Rotations:
    """The angles of every position in `[...]`, once for all layers."""
    scalings = [a.rope_scaling]
    if a.sliding_layers and a.sliding_rope_scaling != a.rope_scaling:
        scalings.append(a.sliding_rope_scaling)
    shape = (len(scalings), *(1,) * (positions.ndim + 1))
    frequency = np.stack([inverse_frequencies(a.head_size, a.rope_theta, s) for s in scalings])
    factor = np.array([1.0 if s is None else s.attention_factor for s in scalings], np.float32)
    # The angle is computed in float32 whatever x is: bfloat16 cannot tell position 257 from 258.
    angle = positions[None, ..., None, None].astype(jnp.float32) * frequency.reshape(*shape, -1)
    size = factor.reshape(*shape, 1)
    return Rotations(jnp.cos(angle) * size, jnp.sin(angle) * size)


def rotate(x: jax.Array, turns: Rotations, slides: jax.Array | None) -> jax.Array:
    """Turns `x: [..., heads, d]` as the layer's kind asks; halves pair up, as in Hugging Face."""
    if slides is not None and turns.cos.shape[0] == 2:
        cos, sin = (jnp.where(slides, sliding, full) for full, sliding in turns)
    else:
        cos, sin = turns.cos[0], turns.sin[0]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Layer(NamedTuple):
    """What a scan hands to one layer."""

    weights: Params
    slides: jax.Array | None  # [] bool; None where no layer does, which costs nothing


def stacked_layers(a: Architecture, params: Params) -> Layer:
    """All layers, leading axis `L`."""
    return Layer(params["layers"], jnp.array(a.sliding_layers) if a.sliding_layers else None)


def in_window(a: Architecture, slides: jax.Array | None, distance: jax.Array) -> jax.Array:
    """Which `distance`s back from a token's position its layer sees; broadcasts against a mask."""
    if slides is None:
        return jnp.ones((1,) * distance.ndim, bool)
    return (distance < a.sliding_window) | ~slides


Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""`attend(q[..., Q, d], k[..., H, d], v[..., H, d]) -> (out[..., Q, d], kept)`."""


def block(
    a: Architecture, layer: Layer, x: jax.Array, turns: Rotations, attend: Attend
) -> tuple[jax.Array, Any]:
    """One layer on `x: [..., D]`; returns what `attend` kept, too."""
    weights = layer.weights
    norm_in = partial(_norm_if, not a.post_norm, a, weights)
    norm_out = partial(_norm_if, a.post_norm, a, weights)
    with jax.named_scope("attention"):
        h = norm_in("attention_norm", x)
        q, k, v = (_project(a, weights, h, name) for name in ("query", "key", "value"))
        out, kept = attend(rotate(q, turns, layer.slides), rotate(k, turns, layer.slides), v)
        out = out.reshape(*x.shape[:-1], -1) @ weights["output"].astype(x.dtype)
        x = x + norm_out("attention_norm", out)
    with jax.named_scope("mlp"):
        out = mlp(a, weights, norm_in("mlp_norm", x))
        return x + norm_out("mlp_norm", out), kept


def mlp(a: Architecture, weights: Params, h: jax.Array) -> jax.Array:
    """What a layer makes of each token alone, `[..., D] -> [..., D]`: a gated MLP."""
    del a  # a mixture of experts would ask it how many
    gate, up = h @ weights["gate"].astype(h.dtype), h @ weights["up"].astype(h.dtype)
    return (jax.nn.silu(gate) * up) @ weights["down"].astype(h.dtype)


def _norm_if(
    condition: bool, a: Architecture, weights: Params, name: str, x: jax.Array
) -> jax.Array:
    return rms_norm(x, weights[name], a.norm_epsilon) if condition else x


def _project(a: Architecture, weights: Params, h: jax.Array, name: str) -> jax.Array:
    """`[..., heads, d]`: query, key or value, with bias and norm where there are such."""
    out = h @ weights[name].astype(h.dtype)
    if a.attention_bias:
        out = out + _like(weights[f"{name}_bias"].astype(h.dtype), out)
    by_head = (*h.shape[:-1], -1, a.head_size)
    if a.query_key_norm and name != "value":
        out = out if a.norm_whole_projection else out.reshape(by_head)
        out = rms_norm(out, weights[f"{name}_norm"], a.norm_epsilon)
    return out.reshape(by_head)


def causal_mask(segments: jax.Array) -> jax.Array:
    """`[B, S] -> [B, S, S]`: same segment and not after."""
    order = jnp.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return same & (order[None, :, None] >= order[None, None, :])


class Settings(NamedTuple):
    """How to compute, as against what: static under jit."""

    dtype: Any
    remat: Remat
    attention: Literal["xla", "splash"]


def hidden(
    a: Architecture,
    settings: Settings,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attention: jax.Array | Blocks,
) -> jax.Array:
    """Final-norm hidden states `[B, S, D]`; see `sdpo_jax.model.HiddenFn`."""
    turns = rotations(a, positions.reshape(-1))
    attend = _whole_sequences(a, settings, positions, attention)

    def layer_step(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
        x = checkpoint_name(x, LAYER_INPUT)
        return block(a, layer, x, turns, partial(attend, layer.slides))[0], None

    # All tokens on one axis: XLA:CPU multiplies [B·S, D] a quarter faster than [B, S, D].
    x = params["embedding"].astype(settings.dtype)[tokens.reshape(-1)]
    x, _ = jax.lax.scan(recomputed(settings.remat, layer_step), x, stacked_layers(a, params))
    return rms_norm(x, params["final_norm"], a.norm_epsilon).reshape(*tokens.shape, -1)


def _whole_sequences(
    a: Architecture, settings: Settings, positions: jax.Array, attention: jax.Array | Blocks
) -> Callable[..., tuple[jax.Array, Any]]:
    """`attend(slides, q, k, v)` of tokens on one axis, `[B·S, heads, d]`; keeps keys and values."""
    form = _form(a, settings, positions, attention)

    def attend(slides: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        qkv = (x.reshape(*positions.shape, *x.shape[1:]) for x in (q, k, v))
        return form(*qkv, slides=slides).reshape(q.shape), (k, v)

    return attend


def _form(
    a: Architecture, settings: Settings, positions: jax.Array, attention: jax.Array | Blocks
) -> Callable[..., jax.Array]:
    if isinstance(attention, Blocks):
        return partial(blocks_attention, blocks=attention, window=a.sliding_window)
    if settings.attention == "splash":
        from sdpo_models.splash import splash_attention  # Pallas takes half a second to import

        return partial(splash_attention, segments=attention, window=a.sliding_window)
    mask = causal_mask(attention)
    distance = positions[:, :, None] - positions[:, None, :]

    def masked(q: jax.Array, k: jax.Array, v: jax.Array, *, slides: Any) -> jax.Array:
        return masked_attention(q, k, v, mask & in_window(a, slides, distance))

    return masked


def head(a: Architecture, settings: Settings, params: Params) -> jax.Array:
    """The matrix `[D, V]` from hidden states to logits; the embedding's transpose where tied."""
    matrix = params["embedding"].T if a.tied_head else params["head"]
    return matrix.astype(settings.dtype)


def prefill(
    a: Architecture, settings: Settings, params: Params, tokens: jax.Array, lengths: jax.Array
) -> Prefix:
    """Runs prompts `[P, S]`, padded on the right; see `sdpo_jax.model.PrefillFn`."""
    p, s = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(s)[None], (p, s))
    turns = rotations(a, positions.reshape(-1))
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    attend = _whole_sequences(a, settings, positions, segments)

    def layer_step(x: jax.Array, layer: Layer) -> tuple[jax.Array, Any]:
        return block(a, layer, x, turns, partial(attend, layer.slides))

    x = params["embedding"].astype(settings.dtype)[tokens.reshape(-1)]
    x, kept = jax.lax.scan(layer_step, x, stacked_layers(a, params))
    keys, values = (y.reshape(a.layers, p, s, *y.shape[2:]) for y in kept)
    x = x.reshape(p, s, -1)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    heads_first = partial(jnp.swapaxes, axis1=2, axis2=3)
    return Prefix(
        heads_first(keys),
        heads_first(values),
        lengths,
        rms_norm(last, params["final_norm"], a.norm_epsilon),
    )


def suffix_cache(a: Architecture, settings: Settings, rows: int, max_tokens: int) -> SuffixCache:
    """An empty cache, head before position: the layout that a TPU decodes in place."""
    shape = (a.layers, rows, a.kv_heads, max_tokens, a.head_size)
    return SuffixCache(jnp.zeros(shape, settings.dtype), jnp.zeros(shape, settings.dtype))


def decode(
    a: Architecture,
    settings: Settings,
    params: Params,
    prefix: Prefix,
    cache: SuffixCache,
    tokens: jax.Array,
    step: jax.Array,
    place: jax.Array,
    *,
    prompts: jax.Array | None = None,
) -> tuple[jax.Array, SuffixCache]:
    """One token for every rollout; see `sdpo_jax.model.DecodeFn`.

    Layers only read the cache: the new keys and values are attended to apart and written once,
    after the last layer, in one slice. XLA:TPU then neither copies a layer nor moves the cache.
    """
    groups = prefix.lengths.shape[0] if prompts is None else tokens.shape[0]
    lengths = prefix.lengths if prompts is None else prefix.lengths[prompts]
    positions = jnp.repeat(lengths, tokens.shape[0] // groups) + step
    turns, places = rotations(a, positions), cache.keys.shape[3]
    index = jnp.arange(prefix.keys.shape[3])
    real = (index[None] < lengths[:, None])[:, None]
    distance = positions.reshape(groups, -1, 1) - index[None, None]
    age = (place - jnp.arange(places))[None] % places
    past = (age > 0) & (age <= step[:, None])

    def layer_step(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        number, layer, *shared = xs
        shared = shared if prompts is None else [y[prompts] for y in shared]
        # Sliced here: as inputs of the scan they would be copied out, layer by layer.
        own = (jax.lax.dynamic_index_in_dim(y, number, keepdims=False) for y in cache)
        before = (*shared, real & in_window(a, layer.slides, distance))
        after = (*own, past & in_window(a, layer.slides, age))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            return one_token_attention(q, before, after, (k, v)), (k, v)

        return block(a, layer, x, turns, attend)

    x = params["embedding"].astype(settings.dtype)[tokens]
    xs = (jnp.arange(a.layers), stacked_layers(a, params), prefix.keys, prefix.values)
    x, new = jax.lax.scan(layer_step, x, xs)
    write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=place, axis=3)
    keys, values = (write(old, y[:, :, :, None]) for old, y in zip(cache, new, strict=True))
    return rms_norm(x, params["final_norm"], a.norm_epsilon), SuffixCache(keys, values)


def build_model(
    a: Architecture,
    *,
    dtype: Any = jnp.float32,
    remat: Remat = "dots",
    attention: Literal["xla", "splash"] = "xla",
) -> Model:
    """The pure functions of `a`, computing in `dtype` from parameters of any float type.

    Args:
      a: the architecture.
      dtype: what it computes in.
      remat: what the backward pass makes again: nothing; all but the outputs of matrix products; a
        whole layer; a whole layer, with the layers' inputs moved to the host's memory.
      attention: form over packed segments; `splash` is a TPU kernel.
    """
    settings = Settings(dtype, remat, attention)
    axes = jax.tree.map(lambda leaf: leaf.axes, parameter_table(a), is_leaf=_is_leaf)
    return Model(
        init=partial(init, a),
        logical_axes=axes,
        hidden=partial(hidden, a, settings),
        head=partial(head, a, settings),
        prefill=partial(prefill, a, settings),
        suffix_cache=partial(suffix_cache, a, settings),
        decode=partial(decode, a, settings),
        vocabulary=a.vocabulary,
    )
