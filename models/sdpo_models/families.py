"""Model families over the one decoder: what `model_type` implies, and what tensors are called.

A new family that is one of these blocks with other names or switches is one entry here. Matrices
lie transposed in the files (`[out, in]`), except the embedding.

A mixture of experts, which is not implemented, touches three places besides its keys of
config.json: names, one tensor per expert and not one per layer (`tensor_names` here, with `_read`
and `_plan` of hugging_face.py, which take one per layer); `mlp` of transformer.py, with the router
and an expert axis in `parameter_table`; and a mesh rule for that axis (`RULES` of
sdpo_jax/devices.py).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

TOP_NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
"""Our names of parameters outside the layers to theirs; the same in all families."""
_PROJECTIONS = {
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_PRE_NORM = {
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
}
# The name that is the MLP's norm elsewhere is the attention's here.
_POST_NORM = {
    "attention_norm": "post_attention_layernorm.weight",
    "mlp_norm": "post_feedforward_layernorm.weight",
}


class Family(NamedTuple):
    """One `model_type`."""

    class_name: str  # in `architectures` of config.json
    layer_names: Mapping[str, str]  # ours to theirs, after `model.layers.{i}.`
    query_key_norm: bool = False
    norm_whole_projection: bool = False
    attention_bias: bool = False
    post_norm: bool = False
    may_slide: bool = False  # has sliding-window layers if its config says so
    rope_per_layer_type: bool = False  # sliding layers have rotary parameters of their own
    # What transformers takes where config.json is silent:
    default_theta: float = 10_000.0
    default_epsilon: float = 1e-6
    default_head_size: int | None = None  # None: width / heads

    @property
    def switches(self) -> dict[str, Any]:
        """The fields of `Architecture` that the family decides."""
        return {
            "query_key_norm": self.query_key_norm,
            "norm_whole_projection": self.norm_whole_projection,
            "attention_bias": self.attention_bias,
            "post_norm": self.post_norm,
        }


FAMILIES: Mapping[str, Family] = {
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _PROJECTIONS | _PRE_NORM,
        query_key_norm=True,
        may_slide=True,
        default_head_size=128,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", _PROJECTIONS | _PRE_NORM, attention_bias=True, may_slide=True
    ),
    "llama": Family("LlamaForCausalLM", _PROJECTIONS | _PRE_NORM),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _PROJECTIONS | _POST_NORM,
        query_key_norm=True,
        norm_whole_projection=True,
        post_norm=True,
        may_slide=True,
        rope_per_layer_type=True,
        default_theta=500_000.0,
        default_epsilon=1e-5,
    ),
}


def tensor_names(family: str, ours: str, layers: int | None) -> list[str]:
    """A parameter's tensors in a checkpoint: one per layer, or one if `layers` is None."""
    if layers is None:
        return [TOP_NAMES[ours]]
    name = FAMILIES[family].layer_names[ours]
    return [f"model.layers.{i}.{name}" for i in range(layers)]


def is_transposed(ours: str, dimensions: int) -> bool:
    """Whether a checkpoint holds the transpose of a parameter of so many dimensions per layer."""
    return dimensions == 2 and ours != "embedding"
