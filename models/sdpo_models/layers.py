"""One layer of the transformer, shared by all passes: norms, rotary positions, attention, MLP.

`transformer.py` applies it to whole sequences and prompts, `decoding.py` to one token at a time.
Dimension key: sdpo_jax/model.py; here also `Q` query heads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.model import Params
from sdpo_models.architecture import Architecture
from sdpo_models.remat import Remat
from sdpo_models.rope import inverse_frequencies


class Settings(NamedTuple):
    """How the architecture is computed: dtype, rematerialization, attention. Static under jit."""

    dtype: Any
    remat: Remat
    attention: Literal["xla", "splash"]


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (normed * _like(scale.astype(jnp.float32), x)).astype(x.dtype)


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Adds leading axes of size 1, up to the rank of `x` (implicit rank promotion is an error)."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


class RopeTables(NamedTuple):
    """Cosines and sines, `[K, ..., 1, d / 2]`.

    `K` is 2 if sliding layers have a rotary scaling of their own, else 1.
    """

    cos: jax.Array
    sin: jax.Array


def rope_tables(a: Architecture, positions: jax.Array) -> RopeTables:
    """Rotary tables for `positions: [...]`, computed once for all layers."""
    scalings = [a.rope_scaling]
    if a.sliding_layers and a.sliding_rope_scaling != a.rope_scaling:
        scalings.append(a.sliding_rope_scaling)
    shape = (len(scalings), *(1,) * (positions.ndim + 1))
    frequency = np.stack([inverse_frequencies(a.head_size, a.rope_theta, s) for s in scalings])
    factor = np.array([1.0 if s is None else s.attention_factor for s in scalings], np.float32)
    # Angles must be float32: bfloat16 rounds positions 257 and 258 to the same number.
    angle = positions[None, ..., None, None].astype(jnp.float32) * frequency.reshape(*shape, -1)
    size = factor.reshape(*shape, 1)
    return RopeTables(jnp.cos(angle) * size, jnp.sin(angle) * size)


def apply_rope(x: jax.Array, rope: RopeTables, slides: jax.Array | None) -> jax.Array:
    """Rotates `x: [..., heads, d]`; coordinate `i` pairs with `i + d / 2`, as in Hugging Face."""
    if slides is not None and rope.cos.shape[0] == 2:
        cos, sin = (jnp.where(slides, sliding, full) for full, sliding in rope)
    else:
        cos, sin = rope.cos[0], rope.sin[0]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Layer(NamedTuple):
    """The inputs of one layer of the scan: its weights and whether it is a sliding layer."""

    weights: Params
    slides: jax.Array | None  # [] bool; None if no layer of the model slides


def stacked_layers(a: Architecture, params: Params) -> Layer:
    """All layers stacked, with leading axis `L`."""
    return Layer(params["layers"], jnp.array(a.sliding_layers) if a.sliding_layers else None)


def in_window(a: Architecture, slides: jax.Array | None, distance: jax.Array) -> jax.Array:
    """Whether a key `distance` positions back is visible; broadcasts against an attention mask."""
    if slides is None:
        return jnp.ones((1,) * distance.ndim, bool)
    return (distance < a.sliding_window) | ~slides


Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""`attend(q[..., Q, d], k[..., H, d], v[..., H, d]) -> (out[..., Q, d], kept)`.

`kept` is whatever the pass collects per layer, such as keys and values."""


def block(
    a: Architecture,
    layer: Layer,
    x: jax.Array,
    rope: RopeTables,
    attend: Attend,
    select: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Any]:
    """One layer on `x: [..., D]`; returns its output and what `attend` kept.

    `select` picks the tokens that are read later: the output projection and the MLP are computed
    for them alone.
    """
    weights = layer.weights
    norm_in = partial(_norm_if, not a.post_norm, a, weights)
    norm_out = partial(_norm_if, a.post_norm, a, weights)
    with jax.named_scope("attention"):
        h = norm_in("attention_norm", x)
        q, k, v = (_project(a, weights, h, name) for name in ("query", "key", "value"))
        out, kept = attend(apply_rope(q, rope, layer.slides), apply_rope(k, rope, layer.slides), v)
        out = out.reshape(*x.shape[:-1], -1)
        if select is not None:
            x, out = select(x), select(out)
        x = x + norm_out("attention_norm", out @ weights["output"].astype(x.dtype))
    with jax.named_scope("mlp"):
        out = mlp(weights, norm_in("mlp_norm", x))
        return x + norm_out("mlp_norm", out), kept


def mlp(weights: Params, h: jax.Array) -> jax.Array:
    """The gated MLP, applied to each token: `[..., D] -> [..., D]`."""
    gate, up = h @ weights["gate"].astype(h.dtype), h @ weights["up"].astype(h.dtype)
    return (jax.nn.silu(gate) * up) @ weights["down"].astype(h.dtype)


def _norm_if(
    condition: bool, a: Architecture, weights: Params, name: str, x: jax.Array
) -> jax.Array:
    return rms_norm(x, weights[name], a.norm_epsilon) if condition else x


def _project(a: Architecture, weights: Params, h: jax.Array, name: str) -> jax.Array:
    """Projects to query, key or value, `[..., heads, d]`, with the family's bias and norm."""
    out = h @ weights[name].astype(h.dtype)
    if a.attention_bias:
        out = out + _like(weights[f"{name}_bias"].astype(h.dtype), out)
    by_head = (*h.shape[:-1], -1, a.head_size)
    if a.query_key_norm and name != "value":
        out = out if a.norm_whole_projection else out.reshape(by_head)
        out = rms_norm(out, weights[f"{name}_norm"], a.norm_epsilon)
    return out.reshape(by_head)
