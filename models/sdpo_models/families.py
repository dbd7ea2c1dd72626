"""Model families: the switches that a `model_type` implies, and the names of its tensors.

A new family whose block differs only in switches and names is one entry of `FAMILIES`. Checkpoints
store matrices transposed, `[out, in]`, except for the embedding.

Mixtures of experts are not implemented. Besides reading its keys of config.json, one would change:

* names: one tensor per expert instead of one per layer, in `sdpo_models.families.tensor_names`,
  `sdpo_models.hugging_face._read` and `sdpo_models.hugging_face._plan`;
* computation: the router and the experts in `sdpo_models.layers.mlp`, with their parameters and an
  expert axis in `sdpo_models.transformer.parameter_table`;
* sharding: a rule for that axis in `sdpo_jax.devices.RULES`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

TOP_NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
"""Parameter to tensor name, outside the layers; the same in all families."""
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
# `post_attention_layernorm` is the norm of attention's output here, not of the MLP's input.
_POST_NORM = {
    "attention_norm": "post_attention_layernorm.weight",
    "mlp_norm": "post_feedforward_layernorm.weight",
}


class Family(NamedTuple):
    """The switches and tensor names of one `model_type`."""

    class_name: str  # written to `architectures` of config.json
    layer_names: Mapping[str, str]  # parameter to tensor name, after `model.layers.{i}.`
    switches: Mapping[str, Any]  # the fields of `Architecture` that the family determines
    may_slide: bool = False  # config.json may declare sliding-window layers
    rope_per_layer_type: bool = False  # sliding layers have rotary parameters of their own
    # The defaults of transformers for keys that config.json leaves out:
    default_theta: float = 10_000.0
    default_epsilon: float = 1e-6
    default_head_size: int | None = None  # None: width / heads


FAMILIES: Mapping[str, Family] = {
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _PROJECTIONS | _PRE_NORM,
        {"query_key_norm": True},
        may_slide=True,
        default_head_size=128,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", _PROJECTIONS | _PRE_NORM, {"attention_bias": True}, may_slide=True
    ),
    "llama": Family("LlamaForCausalLM", _PROJECTIONS | _PRE_NORM, {}),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _PROJECTIONS | _POST_NORM,
        {"query_key_norm": True, "norm_whole_projection": True, "post_norm": True},
        may_slide=True,
        rope_per_layer_type=True,
        default_theta=500_000.0,
        default_epsilon=1e-5,
    ),
}


def tensor_names(family: str, parameter: str, layers: int | None) -> list[str]:
    """Names of a parameter's tensors in a checkpoint: one per layer, or one if `layers` is None."""
    if layers is None:
        return [TOP_NAMES[parameter]]
    name = FAMILIES[family].layer_names[parameter]
    return [f"model.layers.{i}.{name}" for i in range(layers)]


def is_transposed(parameter: str, dimensions: int) -> bool:
    """Whether checkpoints store a parameter transposed; `dimensions` are those of one layer."""
    return dimensions == 2 and parameter != "embedding"
