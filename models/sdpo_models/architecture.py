"""The shape of a decoder-only transformer, from and to a Hugging Face `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdpo_jax.errors import UserError


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
    attention_bias: bool = False


FAMILIES: dict[str, dict[str, bool]] = {
    "qwen3": {"query_key_norm": True, "attention_bias": False},
    "qwen2": {"query_key_norm": False, "attention_bias": True},
    "llama": {"query_key_norm": False, "attention_bias": False},
}
"""What `model_type` implies beyond the sizes in `config.json`."""


def from_hugging_face(config: Mapping[str, Any], *, where: str = "config.json") -> Architecture:
    """Reads a `config.json`.

    Raises:
      UserError: unknown `model_type`, missing key, or an option that is not implemented.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{where}: model_type {family!r} is not supported; "
            f"expected one of {', '.join(FAMILIES)}"
        )
    _refuse_other_options(config, family, where)
    try:
        heads = int(config["num_attention_heads"])
        width = int(config["hidden_size"])
        return Architecture(
            family=family,
            vocabulary=int(config["vocab_size"]),
            width=width,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or width // heads),
            mlp_width=int(config["intermediate_size"]),
            rope_theta=_rope_theta(config, where),
            norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            **FAMILIES[family],
        )
    except KeyError as error:
        raise UserError(f"{where}: key {error} is missing; it is needed for {family}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: a size is not a number ({error})") from error


def _refuse_other_options(config: Mapping[str, Any], family: str, where: str) -> None:
    """An option that is read by others and not by us would load well and compute wrong logits."""
    implemented: dict[str, Any] = {"hidden_act": "silu", "mlp_bias": False}
    if family != "qwen2":  # Qwen 2 has its biases whatever the key says.
        implemented["attention_bias"] = FAMILIES[family]["attention_bias"]
    for key, value in implemented.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{where}: {key} = {config[key]!r} is not supported for {family}; "
                f"expected {value!r}"
            )


def _rope_theta(config: Mapping[str, Any], where: str) -> float:
    """Both spellings: a top-level `rope_theta` (transformers 4) and `rope_parameters` (5)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"{where}: rope_type {kind!r} is not supported; expected 'default'")
    if config.get("use_sliding_window"):
        raise UserError(f"{where}: use_sliding_window is not supported; expected false")
    return float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))


def to_hugging_face(a: Architecture, *, end_token: int) -> dict[str, Any]:
    """The `config.json` of this architecture, readable by transformers 4 and 5."""
    names = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
    return {
        "architectures": [names[a.family]],
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
        "rope_parameters": {"rope_type": "default", "rope_theta": a.rope_theta},
        "rms_norm_eps": a.norm_epsilon,
        "tie_word_embeddings": a.tied_head,
        "attention_bias": a.attention_bias,
        "max_position_embeddings": 2048,
        "eos_token_id": end_token,
        "dtype": "bfloat16",
    }
