"""The shape of a decoder-only transformer, from and to a Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdpo_jax.errors import UserError
from sdpo_models.families import FAMILIES, Family
from sdpo_models.rope import RopeScaling, read_scaling, write_scaling


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches. Static under jit."""

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
    norm_whole_projection: bool = False  # query-key norm over all heads at once, not head by head
    attention_bias: bool = False
    post_norm: bool = False  # norms on what attention and MLP put out, not on what they take in
    rope_scaling: RopeScaling | None = None
    sliding_window: int = 0  # tokens that a sliding layer sees, the current one included
    sliding_layers: tuple[bool, ...] = ()  # per layer; empty: none slides
    sliding_rope_scaling: RopeScaling | None = None  # of the sliding layers
    max_positions: int = 2048  # what the checkpoint promises; nothing here enforces it


def from_hugging_face(config: Mapping[str, Any], *, where: str = "config.json") -> Architecture:
    """Reads a `config.json`.

    Raises:
      UserError: unknown `model_type`, missing key, or an option that is not implemented.
    """
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        raise UserError(
            f"{where}: model_type {name!r} is not supported; expected one of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    _refuse_other_options(config, name, where)
    try:
        heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
        head_size = config.get("head_dim") or family.default_head_size or width // max(heads, 1)
        sizes = {
            "vocabulary": int(config["vocab_size"]),
            "width": width,
            "layers": int(config["num_hidden_layers"]),
            "heads": heads,
            "kv_heads": int(config.get("num_key_value_heads") or heads),
            "head_size": int(head_size),
            "mlp_width": int(config["intermediate_size"]),
            "max_positions": int(config.get("max_position_embeddings", 2048)),
        }
        _check_sizes(sizes, where)
        return Architecture(
            family=name,
            **sizes,
            norm_epsilon=float(config.get("rms_norm_eps", family.default_epsilon)),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            **family.switches,
            **_positions(config, family, sizes, where),
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing; it is needed for {name}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: a size is not a number ({error})") from error


def _refuse_other_options(config: Mapping[str, Any], family: str, where: str) -> None:
    """An option that is read by others and not by us would load well and compute wrong logits."""
    implemented: dict[str, Any] = {
        "hidden_act": "silu",
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": None,
    }
    if family != "qwen2":  # Qwen 2 has its biases whatever the key says.
        implemented["attention_bias"] = FAMILIES[family].attention_bias
    for key, value in implemented.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{where}: {key} = {config[key]!r} is not supported for {family}; "
                f"expected {value!r}"
            )
    if config.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config is not supported; expected a checkpoint in bfloat16, "
            "float16 or float32 (the unquantised original)"
        )


def _check_sizes(sizes: Mapping[str, int], where: str) -> None:
    """What would fail later, in a reshape without a name."""
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{where}: {name} comes out as {value}; expected at least 1")
    if sizes["heads"] % sizes["kv_heads"]:
        raise UserError(
            f"{where}: num_key_value_heads {sizes['kv_heads']} does not divide "
            f"num_attention_heads {sizes['heads']}"
        )
    if sizes["head_size"] % 2:
        raise UserError(f"{where}: head_dim {sizes['head_size']} is odd; rotary halves need even")


def _positions(
    config: Mapping[str, Any], family: Family, sizes: Mapping[str, int], where: str
) -> dict[str, Any]:
    """The fields about positions: rotary base and scaling, sliding layers."""
    window, sliding = _sliding_layers(config, family, sizes["layers"], where)
    full, slides = _rope_dictionaries(config, family)
    top = config.get("rope_theta", family.default_theta)
    theta = float(full.get("rope_theta") or top)
    scaling = read_scaling(full, max_positions=sizes["max_positions"], where=where)
    fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    if sliding:
        if float(slides.get("rope_theta") or theta) != theta:
            raise UserError(
                f"{where}: rope_theta {slides['rope_theta']} of sliding_attention differs from "
                f"{theta} of full_attention; expected one base for all layers"
            )
        fields["sliding_window"], fields["sliding_layers"] = window, sliding
        fields["sliding_rope_scaling"] = read_scaling(
            slides, max_positions=sizes["max_positions"], where=where
        )
    return fields


def _rope_dictionaries(
    config: Mapping[str, Any], family: Family
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Rotary parameters of full and of sliding layers.

    Three spellings: `rope_scaling` beside a top-level `rope_theta` (transformers 4), and
    `rope_parameters` (5), flat or per layer type. Of families with parameters per layer type, the
    flat spellings stretch the full layers alone.
    """
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    scaling: Mapping[str, Any] = config.get("rope_scaling") or {}
    if not family.rope_per_layer_type:
        chosen = scaling or rope
        return chosen, chosen
    if "full_attention" in rope or "sliding_attention" in rope:
        full = {**(rope.get("full_attention") or {}), **scaling}
        return full, rope.get("sliding_attention") or {}
    return scaling or rope, {}


def _sliding_layers(
    config: Mapping[str, Any], family: Family, layers: int, where: str
) -> tuple[int, tuple[bool, ...]]:
    """Window and one flag per layer; (0, ()) if no layer slides."""
    types = config.get("layer_types")
    switched_off = not family.rope_per_layer_type and not config.get("use_sliding_window")
    if types is None:
        if not family.may_slide or switched_off:
            return _no_sliding(config, family, where)
        types = _default_layer_types(config, family, layers)
    known = {"full_attention": False, "sliding_attention": True}
    if len(types) != layers or any(kind not in known for kind in types):
        raise UserError(
            f"{where}: layer_types has {len(types)} entries of {sorted(set(types))}; expected "
            f"{layers} (num_hidden_layers) of {', '.join(known)}"
        )
    flags = tuple(known[kind] for kind in types)
    if not any(flags):
        return 0, ()
    window = config.get("sliding_window", 4096)
    if not family.may_slide or switched_off or not isinstance(window, int) or window < 1:
        raise UserError(
            f"{where}: layer_types names sliding_attention, but sliding_window is {window!r} and "
            f"use_sliding_window {config.get('use_sliding_window')!r}; expected a window of at "
            "least 1 that is switched on, in a family that has one"
        )
    return window, flags


def _no_sliding(config: Mapping[str, Any], family: Family, where: str) -> tuple[int, tuple[()]]:
    if config.get("use_sliding_window") and not family.may_slide:
        raise UserError(f"{where}: use_sliding_window is not supported for this model_type")
    return 0, ()


def _default_layer_types(config: Mapping[str, Any], family: Family, layers: int) -> list[str]:
    """What the families' configs mean if they do not list their layers."""
    if family.rope_per_layer_type:  # OLMo 3: every fourth layer sees everything
        slides = [(i + 1) % 4 != 0 for i in range(layers)]
    else:  # Qwen: the first `max_window_layers` see everything
        first = int(config.get("max_window_layers", 28))
        slides = [i >= first and config.get("sliding_window", 4096) for i in range(layers)]
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
    """The keys about sliding layers, of families that have such keys."""
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
