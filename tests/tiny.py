"""A tiny model, a tokenizer of bytes, and the decoder a second time, in numpy from its formulas."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from sdpo_jax.devices import AXES, Devices
from sdpo_models.architecture import Architecture
from sdpo_models.transformer import build_model, parameter_table

quick_jit = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
"""Compiles in half the time what runs for milliseconds."""
VOCABULARY = 61
ARCHITECTURE = Architecture(
    family="qwen3",
    vocabulary=VOCABULARY,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=8,
    mlp_width=48,
    tied_head=True,
    query_key_norm=True,
)
FAMILIES = {
    "qwen3": ARCHITECTURE,
    "qwen2": replace(
        ARCHITECTURE, family="qwen2", query_key_norm=False, attention_bias=True, tied_head=False
    ),
    "llama": replace(ARCHITECTURE, family="llama", query_key_norm=False, rope_theta=5_000.0),
}


def make_params(architecture=ARCHITECTURE, seed=0, scale=1.0):
    """Every parameter random, norms and biases too, so that none can be forgotten unnoticed."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        noise = random.normal(size=leaf.shape)
        value = 1.0 + 0.2 * noise if leaf.scale is None else (leaf.scale or 0.2) * scale * noise
        return jnp.asarray(value, jnp.float32)

    is_leaf = lambda x: hasattr(x, "axes")  # noqa: E731
    return jax.tree.map(draw, parameter_table(architecture), is_leaf=is_leaf)


@cache
def make_model(architecture=ARCHITECTURE, **settings):
    """The same object for the same settings, so that `jax.jit` of its functions compiles once."""
    return build_model(architecture, **settings)


def make_devices(data=1, fsdp=1, tensor=1):
    """A mesh over the first `data · fsdp · tensor` devices."""
    shape = (data, fsdp, tensor)
    chosen = np.asarray(jax.devices()[: data * fsdp * tensor]).reshape(shape)
    return Devices(Mesh(chosen, AXES, axis_types=(AxisType.Auto,) * 3))


def random_ids(random, length, vocabulary=VOCABULARY):
    return random.integers(0, vocabulary, size=length).tolist()


class ByteTokenizer:
    """Four control tokens, then one id per byte; implements `sdpo_jax.tokens.Tokenizer`."""

    END, ROLES = 0, {"system": 1, "user": 2, "assistant": 3}
    stop_ids = (END,)
    vocabulary = 260

    def render(self, messages):
        ids = []
        for message in messages:
            ids += [self.ROLES[message["role"]], *self.encode(message["content"]), self.END]
        return [*ids, self.ROLES["assistant"]]

    def encode(self, text):
        return [4 + byte for byte in text.encode()]

    def decode(self, ids):
        return bytes(i - 4 for i in ids if i >= 4).decode(errors="replace")


# The decoder once more, from its formulas: float64, one sequence, one head at a time.


def reference_logits(architecture, params, tokens):
    """`[S, V]` logits of one sequence."""
    a = architecture
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = params["embedding"][np.asarray(tokens)]
    for i in range(a.layers):
        layer = {name: value[i] for name, value in params["layers"].items()}
        x = x + _attention(a, layer, _rms_norm(x, layer["attention_norm"], a.norm_epsilon))
        h = _rms_norm(x, layer["mlp_norm"], a.norm_epsilon)
        gate = h @ layer["gate"]
        x = x + (gate / (1.0 + np.exp(-gate)) * (h @ layer["up"])) @ layer["down"]
    head = params["embedding"].T if a.tied_head else params["head"]
    return _rms_norm(x, params["final_norm"], a.norm_epsilon) @ head


def _rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def _attention(a, layer, h):
    q, k, v = (h @ layer[name] for name in ("query", "key", "value"))
    if a.attention_bias:
        q, k, v = q + layer["query_bias"], k + layer["key_bias"], v + layer["value_bias"]
    size, out = a.head_size, []
    for head in range(a.heads):
        mine = slice(head * size, (head + 1) * size)
        shared = head // (a.heads // a.kv_heads)
        theirs = slice(shared * size, (shared + 1) * size)
        qh, kh = q[:, mine], k[:, theirs]
        if a.query_key_norm:
            qh = _rms_norm(qh, layer["query_norm"], a.norm_epsilon)
            kh = _rms_norm(kh, layer["key_norm"], a.norm_epsilon)
        scores = _rotate(qh, a.rope_theta) @ _rotate(kh, a.rope_theta).T / np.sqrt(size)
        scores = np.where(np.tri(len(h), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out.append(weights / weights.sum(axis=-1, keepdims=True) @ v[:, theirs])
    return np.concatenate(out, axis=-1) @ layer["output"]


def _rotate(x, theta):
    """Coordinates i and i + d/2 turn as one complex number, by position · theta^(-2i/d)."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)[None]
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def log_softmax(logits):
    """Over the last axis, in numpy."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
