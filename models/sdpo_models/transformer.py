"""A decoder-only transformer as pure functions over a pytree with stacked layers.

Each layer has grouped-query attention with rotary positions and a gated MLP. The switches are:
norms before or after both (after: OLMo 3), query-key norm per head (Qwen 3) or over the whole
projection (OLMo 3), projection biases (Qwen 2), and sliding-window layers with rotary parameters of
their own (OLMo 3). Three passes share one layer function (`layers.py`) and differ only in their
attention: `hidden` (whole sequences), `prefill` (prompts, whose keys and values are kept) and
`decode` (`decoding.py`: one token per rollout, which attends to the shared prompt and to its own
cache). Layers run under `lax.scan`, so that compile time does not grow with depth; whether a layer
slides is scanned together with its weights.

Dimension key: sdpo_jax/model.py; here also `Q` query heads.
Validated against a second implementation in float64 numpy (tests/test_transformer.py) and against
`transformers` (tests/test_families.py, tests/live_transformers.py).
"""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sdpo_jax.model import Blocks, Model, Params, Prefix
from sdpo_models.architecture import Architecture
from sdpo_models.attention import blocks_attention, masked_attention
from sdpo_models.decoding import (
    UNROLLED_LAYERS,
    decode,
    from_decode_layout,
    suffix_cache,
    to_decode_layout,
)
from sdpo_models.layers import (
    Layer,
    Settings,
    block,
    in_window,
    rms_norm,
    rope_tables,
    stacked_layers,
)
from sdpo_models.remat import LAYER_INPUT, Remat, recomputed


class Leaf(NamedTuple):
    """A parameter's shape, logical axes and initial standard deviation (None: filled with ones)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    scale: float | None


def parameter_table(a: Architecture) -> dict[str, Any]:
    """Declares every parameter; init, sharding and file formats are derived from this table."""
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


def is_leaf(x: object) -> bool:
    """Whether an object is an entry of the parameter table, for `jax.tree` over it."""
    return isinstance(x, Leaf)


def init(a: Architecture, key: jax.Array) -> Params:
    """Draws float32 parameters; outputs to the residual stream are scaled by `(2·L) ** -0.5`."""
    leaves, tree = jax.tree.flatten(parameter_table(a), is_leaf=is_leaf)
    keys = jax.random.split(key, len(leaves))
    values = [
        jnp.ones(leaf.shape)
        if leaf.scale is None
        else leaf.scale * jax.random.normal(k, leaf.shape)
        for leaf, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, values)


def causal_mask(segments: jax.Array) -> jax.Array:
    """`[B, S] -> [B, S, S]`: whether the key has the query's segment and is not after it."""
    order = jnp.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return same & (order[None, :, None] >= order[None, None, :])


def hidden(
    a: Architecture,
    settings: Settings,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attention: jax.Array | Blocks,
    *,
    target_positions: jax.Array | None = None,
) -> jax.Array:
    """Final-norm hidden states of all or of the target positions; see `sdpo_jax.model.HiddenFn`."""
    rope = rope_tables(a, positions.reshape(-1))
    attend = _sequence_attention(a, settings, positions, attention)

    def layer_step(x: jax.Array, layer: Layer, select: Any = None) -> tuple[jax.Array, None]:
        x = checkpoint_name(x, LAYER_INPUT)
        return block(a, layer, x, rope, partial(attend, layer.slides), select)[0], None

    # All tokens are on one axis: XLA:CPU multiplies [B·S, D] a quarter faster than [B, S, D].
    x = params["embedding"].astype(settings.dtype)[tokens.reshape(-1)]
    layers, step = stacked_layers(a, params), partial(recomputed, settings.remat)
    split_last = _splits_last_layer(a, attention)
    if split_last and target_positions is not None and target_positions.size < tokens.size:
        layers, last = (jax.tree.map(itemgetter(i), layers) for i in (slice(-1), -1))
        x, _ = jax.lax.scan(step(layer_step), x, layers)
        x, _ = step(partial(layer_step, select=partial(_at_targets, target_positions)))(x, last)
    else:
        x, _ = jax.lax.scan(step(layer_step), x, layers)
        x = x if target_positions is None else _at_targets(target_positions, x)
    shape = tokens.shape if target_positions is None else target_positions.shape
    return rms_norm(x, params["final_norm"], a.norm_epsilon).reshape(*shape, -1)


def _splits_last_layer(a: Architecture, attention: jax.Array | Blocks) -> bool:
    """Whether the last layer runs outside the scan, with its MLP on the target positions alone.

    Only in the CPU layout and for shallow models: slicing off the last layer copies the other
    layers' weights, and in a deep model skipping part of one layer saves little.
    """
    return isinstance(attention, Blocks) and a.layers <= UNROLLED_LAYERS


def _at_targets(target_positions: jax.Array, x: jax.Array) -> jax.Array:
    """Selects from `x: [B·S, D]` the tokens at `target_positions: [R, m]`; returns `[R·m, D]`."""
    parts = x.reshape(target_positions.shape[0], -1, x.shape[-1])
    return jnp.take_along_axis(parts, target_positions[..., None], axis=1).reshape(-1, x.shape[-1])


def _sequence_attention(
    a: Architecture, settings: Settings, positions: jax.Array, attention: jax.Array | Blocks
) -> Callable[..., tuple[jax.Array, Any]]:
    """Makes `attend(slides, q, k, v)` for `[B·S, heads, d]`; it keeps keys and values."""
    attention_fn = _attention_fn(a, settings, positions, attention)

    def attend(slides: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        qkv = (x.reshape(*positions.shape, *x.shape[1:]) for x in (q, k, v))
        return attention_fn(*qkv, slides=slides).reshape(q.shape), (k, v)

    return attend


def _attention_fn(
    a: Architecture, settings: Settings, positions: jax.Array, attention: jax.Array | Blocks
) -> Callable[..., jax.Array]:
    if isinstance(attention, Blocks):
        return partial(blocks_attention, blocks=attention, window=a.sliding_window)
    if settings.attention == "splash":
        from sdpo_models.splash import splash_attention  # importing Pallas takes half a second

        return partial(splash_attention, segments=attention, window=a.sliding_window)
    mask = causal_mask(attention)
    distance = positions[:, :, None] - positions[:, None, :]

    def masked(q: jax.Array, k: jax.Array, v: jax.Array, *, slides: Any) -> jax.Array:
        return masked_attention(q, k, v, mask & in_window(a, slides, distance))

    return masked


def head(a: Architecture, settings: Settings, params: Params) -> jax.Array:
    """The matrix `[D, V]` from hidden states to logits; the transposed embedding if tied."""
    matrix = params["embedding"].T if a.tied_head else params["head"]
    return matrix.astype(settings.dtype)


def prefill(
    a: Architecture, settings: Settings, params: Params, tokens: jax.Array, lengths: jax.Array
) -> Prefix:
    """Keys, values and last hidden states of prompts `[P, S]`; see `sdpo_jax.model.PrefillFn`."""
    p, s = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(s)[None], (p, s))
    rope = rope_tables(a, positions.reshape(-1))
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    attend = _sequence_attention(a, settings, positions, segments)

    def layer_step(x: jax.Array, layer: Layer) -> tuple[jax.Array, Any]:
        return block(a, layer, x, rope, partial(attend, layer.slides))

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


def build_model(
    a: Architecture,
    *,
    dtype: Any = jnp.float32,
    remat: Remat = "dots",
    attention: Literal["xla", "splash"] = "xla",
) -> Model:
    """The pure functions of an architecture; parameters may have any float dtype.

    Args:
      a: the architecture.
      dtype: of the computation.
      remat: what the backward pass recomputes; see `sdpo_models.remat.recomputed`.
      attention: the implementation for packed segments; `splash` is a TPU kernel.
    """
    settings = Settings(dtype, remat, attention)
    axes = jax.tree.map(lambda leaf: leaf.axes, parameter_table(a), is_leaf=is_leaf)
    model = Model(
        init=partial(init, a),
        logical_axes=axes,
        hidden=partial(hidden, a, settings),
        head=partial(head, a, settings),
        prefill=partial(prefill, a, settings),
        suffix_cache=partial(suffix_cache, a, settings),
        decode=partial(decode, a, settings),
        vocabulary=a.vocabulary,
    )
    if a.layers > UNROLLED_LAYERS or attention == "splash":
        return model
    return model._replace(
        to_decode_layout=partial(to_decode_layout, a, settings),
        from_decode_layout=from_decode_layout,
    )
