"""The sizes and switches of a transformer, read from and written to a Hugging Face config.json."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sdpo_jax.errors import UserError
from sdpo_models.families import FAMILIES, Family
from sdpo_models.rope import RopeScaling, read_scaling, write_scaling


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of a decoder-only transformer. Static under jit."""

    family: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tied_head: bool = True
    query_key_norm: bool = False
    norm_whole_projection: bool = False  # query-key norm over all heads together, not per head
    attention_bias: bool = False
    post_norm: bool = False  # norms on the outputs of attention and MLP, not on their inputs
    rope_scaling: RopeScaling | None = None
    sliding_window: int = 0  # tokens that a sliding layer sees, including the current one
    sliding_layers: tuple[bool, ...] = ()  # per layer; empty: no layer slides
    sliding_rope_scaling: RopeScaling | None = None  # of the sliding layers
    max_positions: int = 2048  # context length of the checkpoint; not enforced here


class _Kind(NamedTuple):
    """A check of a value of config.json. Types are exact, because in Python `True` is an `int`."""

    words: str
    accepts: Callable[[Any], bool]


_COUNT = _Kind("a whole number of at least 1", lambda v: type(v) is int and v >= 1)
_INDEX = _Kind("a whole number of at least 0", lambda v: type(v) is int and v >= 0)
_POSITIVE = _Kind("a positive number", lambda v: type(v) in (int, float) and 0 < v < math.inf)
_SWITCH = _Kind("true or false", lambda v: type(v) is bool)
_NAME = _Kind("a name", lambda v: type(v) is str)
_NAMES = _Kind("a list of names", lambda v: type(v) is list and all(type(x) is str for x in v))
_OBJECT = _Kind("an object", lambda v: isinstance(v, Mapping))
_REQUIRED: Any = object()
_LAYER_TYPES: Mapping[str, bool] = {"full_attention": False, "sliding_attention": True}
"""Kinds of layers in config.json, and whether they slide."""


def _read(
    config: Mapping[str, Any], key: str, kind: _Kind, where: str, default: Any = _REQUIRED
) -> Any:
    """Returns `config[key]`, checked. Null is allowed only if the default is None."""
    value = config.get(key, default)
    if value is _REQUIRED:
        raise UserError(f"{where}: key {key!r} is missing; expected {kind.words}")
    if value is not default and not kind.accepts(value):
        raise UserError(f"{where}: {key} = {value!r}; expected {kind.words}")
    return value


def from_hugging_face(config: Mapping[str, Any], *, where: str = "config.json") -> Architecture:
    """Reads a `config.json`.

    Raises:
      UserError: unknown `model_type`, a key that is missing or has an impossible value, or an
        option that is not implemented.
    """
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        raise UserError(
            f"{where}: model_type {name!r} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    _refuse_other_options(config, name, where)
    width = _read(config, "hidden_size", _COUNT, where)
    heads = _read(config, "num_attention_heads", _COUNT, where)
    head_size = _read(config, "head_dim", _COUNT, where, None)
    sizes: dict[str, int] = {
        "vocabulary": _read(config, "vocab_size", _COUNT, where),
        "width": width,
        "layers": _read(config, "num_hidden_layers", _COUNT, where),
        "heads": heads,
        "kv_heads": _read(config, "num_key_value_heads", _COUNT, where, None) or heads,
        "head_size": head_size or family.default_head_size or width // heads,
        "mlp_width": _read(config, "intermediate_size", _COUNT, where),
        "max_positions": _read(config, "max_position_embeddings", _COUNT, where, 2048),
    }
    _check_sizes(sizes, where)
    epsilon = _read(config, "rms_norm_eps", _POSITIVE, where, family.default_epsilon)
    return Architecture(
        family=name,
        **sizes,
        norm_epsilon=float(epsilon),
        tied_head=_read(config, "tie_word_embeddings", _SWITCH, where, False),
        **family.switches,
        **_positions(config, family, sizes, where),
    )


def _refuse_other_options(config: Mapping[str, Any], family: str, where: str) -> None:
    """Refuses options that are not implemented: they would load and compute wrong logits."""
    implemented: dict[str, Any] = {
        "hidden_act": "silu",
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": None,
    }
    if family != "qwen2":  # Qwen 2 has biases whatever the value of this key.
        implemented["attention_bias"] = FAMILIES[family].switches.get("attention_bias", False)
    for key, value in implemented.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{where}: {key} = {config[key]!r} is not supported for {family}; "
                f"expected {value!r}"
            )
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config is not supported; expected a checkpoint in bfloat16, "
            "float16 or float32 (the unquantized original)"
        )


def _check_sizes(sizes: Mapping[str, int], where: str) -> None:
    """Refuses sizes that would fail later, in a reshape that does not name the key."""
    if sizes["heads"] % sizes["kv_heads"]:
        raise UserError(
            f"{where}: num_key_value_heads {sizes['kv_heads']} does not divide "
            f"num_attention_heads {sizes['heads']}"
        )
    if sizes["head_size"] % 2 or sizes["head_size"] < 2:
        raise UserError(
            f"{where}: head_dim {sizes['head_size']} has no rotary halves; expected an even number"
        )


def _positions(
    config: Mapping[str, Any], family: Family, sizes: Mapping[str, int], where: str
) -> dict[str, Any]:
    """The fields of `Architecture` about positions: rotary base and scaling, sliding layers."""
    window, sliding = _sliding_layers(config, family, sizes["layers"], where)
    full, slides = _rope_dictionaries(config, family, where)
    for rope in (full, slides):
        _read(rope, "rope_type", _NAME, where, None)
        _read(rope, "type", _NAME, where, None)
    theta = float(_read(full, "rope_theta", _POSITIVE, where))
    scaling = read_scaling(full, max_positions=sizes["max_positions"], where=where)
    fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    if sliding:
        if _read(slides, "rope_theta", _POSITIVE, where) != theta:
            raise UserError(
                f"{where}: rope_theta {slides['rope_theta']} of sliding_attention differs from "
                f"{theta} of full_attention; expected one base for all layers, written under both "
                f"in rope_parameters where it is not {family.default_theta}"
            )
        fields["sliding_window"], fields["sliding_layers"] = window, sliding
        fields["sliding_rope_scaling"] = read_scaling(
            slides, max_positions=sizes["max_positions"], where=where
        )
    return fields


def _rope_dictionaries(
    config: Mapping[str, Any], family: Family, where: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Rotary parameters and base of full and of sliding layers, as transformers 5 reads them.

    There are three spellings: `rope_scaling` with a top-level `rope_theta` (transformers 4), and
    `rope_parameters` (transformers 5), flat or per layer type. In families with parameters per
    layer type, top-level keys apply to full layers only, sliding layers default to the family's
    base, and transformers ignores flat `rope_parameters`; those that would matter are refused here.
    """
    rope: Mapping[str, Any] = _read(config, "rope_parameters", _OBJECT, where, None) or {}
    scaling: Mapping[str, Any] = _read(config, "rope_scaling", _OBJECT, where, None) or {}
    top = {"rope_theta": config.get("rope_theta", family.default_theta)}
    if not family.rope_per_layer_type:
        chosen = {**top, **(scaling or rope)}
        return chosen, chosen
    harmless = {"rope_type": "default", "type": "default", "rope_theta": family.default_theta}
    for key, value in rope.items():
        if key not in _LAYER_TYPES and value != harmless.get(key):
            raise UserError(
                f"{where}: {key} = {value!r} in rope_parameters is for no kind of layer; "
                f"write it under {' and '.join(_LAYER_TYPES)}"
            )
    full, slides = (_read(rope, kind, _OBJECT, where, None) for kind in _LAYER_TYPES)
    return (
        {**top, **(full or {"rope_type": "default"}), **scaling},
        {"rope_theta": family.default_theta, **(slides or {})},
    )


def _sliding_layers(
    config: Mapping[str, Any], family: Family, layers: int, where: str
) -> tuple[int, tuple[bool, ...]]:
    """The window and one flag per layer; `(0, ())` if no layer slides."""
    types = _read(config, "layer_types", _NAMES, where, None)
    switch = _read(config, "use_sliding_window", _SWITCH, where, None)
    switched_off = not family.rope_per_layer_type and not switch
    if types is None:
        if switch and not family.may_slide:
            raise UserError(f"{where}: use_sliding_window is not supported for this model_type")
        if not family.may_slide or switched_off:
            return 0, ()
        types = _default_layer_types(config, family, layers, where)
    if len(types) != layers or any(kind not in _LAYER_TYPES for kind in types):
        raise UserError(
            f"{where}: layer_types has {len(types)} entries of {sorted(set(types))}; expected "
            f"{layers} (num_hidden_layers) of {', '.join(_LAYER_TYPES)}"
        )
    flags = tuple(_LAYER_TYPES[kind] for kind in types)
    if not any(flags):
        return 0, ()
    if not family.may_slide or switched_off:
        raise UserError(
            f"{where}: layer_types names sliding_attention, but use_sliding_window is {switch!r}; "
            "expected a window that is switched on, in a family that has one"
        )
    return _read(config, "sliding_window", _COUNT, where, 4096), flags


def _default_layer_types(
    config: Mapping[str, Any], family: Family, layers: int, where: str
) -> list[str]:
    """The families' defaults for a config.json without `layer_types`."""
    if family.rope_per_layer_type:  # OLMo 3: every fourth layer sees everything
        slides = [(i + 1) % 4 != 0 for i in range(layers)]
    else:  # Qwen: the first `max_window_layers` see everything
        first = _read(config, "max_window_layers", _INDEX, where, 28)
        windowed = config.get("sliding_window", 4096) is not None
        slides = [windowed and i >= first for i in range(layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def to_hugging_face(
    a: Architecture, *, end_token: int | list[int] | None = None, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """The `config.json` of this architecture, readable by transformers 4 and 5."""
    family = FAMILIES[a.family]
    config = {
        "architectures": [family.class_name],
        "model_type": a.family,
        "vocab_size": a.vocabulary,
        "hidden_size": a.width,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_size,
        "intermediate_size": a.mlp_width,
        "hidden_act": "silu",
        "rope_theta": a.rope_theta,
        "rope_parameters": write_scaling(a.rope_theta, a.rope_scaling),
        "rms_norm_eps": a.norm_epsilon,
        "tie_word_embeddings": a.tied_head,
        "attention_bias": a.attention_bias,
        "max_position_embeddings": a.max_positions,
        "eos_token_id": end_token,
        "dtype": dtype,
    }
    if a.rope_scaling is not None:  # transformers 4 reads it here
        config["rope_scaling"] = write_scaling(a.rope_theta, a.rope_scaling)
    return config | _write_sliding(a, family)


def _write_sliding(a: Architecture, family: Family) -> dict[str, Any]:
    """The keys about sliding layers, for families that have them."""
    if not a.sliding_layers and not family.rope_per_layer_type:
        return {}
    flags = a.sliding_layers or (False,) * a.layers
    keys: dict[str, Any] = {
        "layer_types": ["sliding_attention" if s else "full_attention" for s in flags],
        # OLMo 3 in transformers builds the sliding mask even where no layer uses it.
        "sliding_window": a.sliding_window or 4096,
    }
    if family.rope_per_layer_type:
        keys["rope_parameters"] = {
            "full_attention": write_scaling(a.rope_theta, a.rope_scaling),
            "sliding_attention": write_scaling(a.rope_theta, a.sliding_rope_scaling),
        }
    else:
        keys |= {"use_sliding_window": True, "max_window_layers": flags.index(True)}
    return keys
