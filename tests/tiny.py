"""A tiny model, a tokenizer of bytes, and the decoder a second time, in numpy from its formulas."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from sdpo_jax.devices import AXES, Devices
from sdpo_models.architecture import Architecture
from sdpo_models.rope import RopeScaling
from sdpo_models.transformer import build_model, parameter_table

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_jit = jax.jit  # for tests that put `quick_jit` in its place


def quick_jit(function, *, compiler_options=None, **options):
    """Compiles in half the time what runs for milliseconds."""
    return _jit(function, compiler_options={**QUICK, **(compiler_options or {})}, **options)


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
    "llama": replace(
        ARCHITECTURE,
        family="llama",
        query_key_norm=False,
        rope_theta=5_000.0,
        # One pair of coordinates each stays, is stretched, and lies between.
        rope_scaling=RopeScaling("llama3", 4.0, original_positions=128),
    ),
    "olmo3": replace(
        ARCHITECTURE,
        family="olmo3",
        layers=3,
        tied_head=False,
        norm_whole_projection=True,
        post_norm=True,
        rope_theta=5_000.0,
        rope_scaling=RopeScaling("yarn", 8.0, original_positions=128, attention_factor=1.2),
        sliding_window=3,  # shorter than every prompt, response and row of the tests
        sliding_layers=(True, False, True),
    ),
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
    end_id = END
    vocabulary = 260

    def render(self, messages):
        ids = []
        for message in messages:
            ids += [self.ROLES[message["role"]], *self.encode(message["content"]), self.END]
        return [*ids, self.ROLES["assistant"]]

    def encode(self, text):
        return [4 + byte for byte in text.encode()]

    encode_response = encode

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
        slides = bool(a.sliding_layers) and a.sliding_layers[i]
        for scale, inner in (
            (layer["attention_norm"], lambda h: _attention(a, layer, h, slides)),  # noqa: B023
            (layer["mlp_norm"], lambda h: _mlp(layer, h)),  # noqa: B023
        ):
            if a.post_norm:
                x = x + _rms_norm(inner(x), scale, a.norm_epsilon)
            else:
                x = x + inner(_rms_norm(x, scale, a.norm_epsilon))
    head = params["embedding"].T if a.tied_head else params["head"]
    return _rms_norm(x, params["final_norm"], a.norm_epsilon) @ head


def _rms_norm(x, scale, epsilon):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def _mlp(layer, h):
    gate = h @ layer["gate"]
    return (gate / (1.0 + np.exp(-gate)) * (h @ layer["up"])) @ layer["down"]


def _attention(a, layer, h, slides):
    q, k, v = (h @ layer[name] for name in ("query", "key", "value"))
    if a.attention_bias:
        q, k, v = q + layer["query_bias"], k + layer["key_bias"], v + layer["value_bias"]
    norm = {"query_norm": lambda x: x, "key_norm": lambda x: x}
    if a.query_key_norm:
        norm = {
            name: partial(_rms_norm, scale=layer[name], epsilon=a.norm_epsilon) for name in norm
        }
    if a.norm_whole_projection:
        q, k = norm["query_norm"](q), norm["key_norm"](k)
        norm = {"query_norm": lambda x: x, "key_norm": lambda x: x}
    size, out, visible = a.head_size, [], np.tri(len(h), dtype=bool)
    if slides:
        visible &= ~np.tri(len(h), k=-a.sliding_window, dtype=bool)
    turn = partial(_rotate, a.rope_theta, a.sliding_rope_scaling if slides else a.rope_scaling)
    for head in range(a.heads):
        mine = slice(head * size, (head + 1) * size)
        shared = head // (a.heads // a.kv_heads)
        theirs = slice(shared * size, (shared + 1) * size)
        qh, kh = turn(norm["query_norm"](q[:, mine])), turn(norm["key_norm"](k[:, theirs]))
        scores = np.where(visible, qh @ kh.T / np.sqrt(size), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out.append(weights / weights.sum(axis=-1, keepdims=True) @ v[:, theirs])
    return np.concatenate(out, axis=-1) @ layer["output"]


def _rotate(theta, scaling, x):
    """Coordinates i and i + d/2 turn as one complex number, by position · frequency(i)."""
    half = x.shape[1] // 2
    frequency = np.array([_frequency(i, half, theta, scaling) for i in range(half)])
    angle = np.arange(len(x))[:, None] * frequency[None]
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    stretched = 1.0 if scaling is None else scaling.attention_factor
    return stretched * np.concatenate([turned.real, turned.imag], axis=-1)


def _frequency(i, half, theta, scaling):
    """Radians per position of pair `i`, case by case."""
    plain = theta ** (-i / half)
    if scaling is None:
        return plain
    if scaling.kind == "llama3":
        wavelength = 2 * np.pi / plain
        longest = scaling.original_positions / scaling.low_factor
        shortest = scaling.original_positions / scaling.high_factor
        if wavelength < shortest:
            return plain
        if wavelength > longest:
            return plain / scaling.factor
        ratio = scaling.original_positions / wavelength
        share = (ratio - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
        return share * plain + (1 - share) * plain / scaling.factor
    if scaling.kind == "yarn":
        # Pair x turns original · theta^(-x / half) / 2π times: solved for x.
        original, per_pair = np.log(scaling.original_positions / (2 * np.pi)), np.log(theta) / half
        low = max(0, np.floor((original - np.log(scaling.beta_fast)) / per_pair))
        high = min(2 * half - 1, np.ceil((original - np.log(scaling.beta_slow)) / per_pair))
        stretch = 0.0 if i <= low else 1.0 if i >= high else (i - low) / (high - low)
        return stretch * plain / scaling.factor + (1 - stretch) * plain
    assert scaling.kind == "linear"
    return plain / scaling.factor


def log_softmax(logits):
    """Over the last axis, in numpy."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
