"""config.json is read and written; options that are not implemented are refused by name."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from sdpo_jax.errors import UserError
from sdpo_models.architecture import from_hugging_face, to_hugging_face
from sdpo_models.rope import RopeScaling, read_scaling
from sdpo_models.transformer import parameter_table
from sdpo_models.variants import VARIANTS

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
COUNTS = {
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "olmo3_7b": 7_298_011_136,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_3b": 3_085_938_688,
    "qwen2.5_7b": 7_615_616_512,
    "llama3.2_1b": 1_235_814_400,
    "llama3.1_8b": 8_030_261_248,
    "smollm2_135m": 134_515_008,
}
"""As the repositories' safetensors metadata count them."""
PUBLISHED = {
    "qwen3_8b": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "olmo3_7b": {
        "model_type": "olmo3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
        "max_position_embeddings": 65536,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 100278,
    },
    "qwen2.5_1.5b": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "llama3.1_8b": {
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "smollm2_135m": {
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
}
"""The config.json that these repositories publish, in the spelling of transformers 4."""


def tiny_config(family="qwen3"):
    return to_hugging_face(tiny.FAMILIES[family], end_token=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_variant(name):
    assert from_hugging_face(PUBLISHED[name]) == VARIANTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_a_variant_has_as_many_parameters_as_its_repository_counts(name):
    leaves = jax.tree.leaves(parameter_table(VARIANTS[name]), is_leaf=lambda x: hasattr(x, "axes"))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == COUNTS[name]


@pytest.mark.parametrize("name", [*VARIANTS, *tiny.FAMILIES])
def test_an_architecture_survives_config_json(name):
    architecture = {**VARIANTS, **tiny.FAMILIES}[name]
    config = json.loads(json.dumps(to_hugging_face(architecture, end_token=7)))
    assert from_hugging_face(config) == architecture
    assert config["eos_token_id"] == 7


@pytest.mark.parametrize(
    "spelling", [{"rope_theta": 7.0}, {"rope_parameters": {"rope_theta": 7.0}}]
)
def test_both_spellings_of_the_rotary_base_are_read(spelling):
    config = tiny_config()
    del config["rope_theta"], config["rope_parameters"]
    assert from_hugging_face(config | spelling).rope_theta == 7.0


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_scaling_are_read(key):
    config = tiny_config() | {"rope_parameters": None, key: LLAMA3}
    scaling = RopeScaling("llama3", 8.0, original_positions=8192)
    assert from_hugging_face(config).rope_scaling == scaling


def test_yarn_without_an_attention_factor_has_the_one_of_the_paper():
    config = tiny_config() | {"rope_scaling": YARN}
    scaling = from_hugging_face(config).rope_scaling
    assert scaling is not None
    assert scaling.attention_factor == pytest.approx(0.1 * np.log(4.0) + 1.0)
    assert (scaling.beta_fast, scaling.beta_slow) == (32.0, 1.0)


def test_qwen_s_sliding_layers_follow_the_first_full_ones_if_switched_on():
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    config = tiny_config("qwen2") | window
    architecture = from_hugging_face(config | {"rope_scaling": YARN})
    assert architecture.sliding_layers == (False, True) and architecture.sliding_window == 5
    assert architecture.sliding_rope_scaling == architecture.rope_scaling is not None
    off = from_hugging_face(config | {"use_sliding_window": False})
    assert off == tiny.FAMILIES["qwen2"]


def test_olmo_3_slides_in_all_but_every_fourth_layer_and_stretches_only_those():
    config = tiny_config("olmo3") | {"num_hidden_layers": 5, "rope_scaling": YARN}
    del config["layer_types"], config["rope_parameters"], config["rope_theta"]
    architecture = from_hugging_face(config)
    assert architecture.sliding_layers == (True, True, True, False, True)
    assert architecture.rope_scaling is not None and architecture.sliding_rope_scaling is None


def test_what_config_json_leaves_out_is_what_transformers_takes():
    def without(family):
        config = tiny_config(family) | {"rope_parameters": None, "rope_scaling": None}
        left_out = ("head_dim", "rms_norm_eps", "rope_theta", "num_key_value_heads")
        return from_hugging_face({k: v for k, v in config.items() if k not in left_out})

    qwen, llama, olmo = without("qwen3"), without("llama"), without("olmo3")
    assert [a.head_size for a in (qwen, llama, olmo)] == [128, 8, 8]
    assert [a.norm_epsilon for a in (qwen, llama, olmo)] == [1e-6, 1e-6, 1e-5]
    assert [a.rope_theta for a in (qwen, llama, olmo)] == [1e4, 1e4, 5e5]
    assert llama.kv_heads == llama.heads


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen3", {"model_type": "mamba"}, ["mamba", "qwen3"]),
        ("qwen3", {"model_type": None}, ["model_type", "qwen3"]),
        ("qwen3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type", "dynamic"]),
        ("qwen3", {"rope_scaling": {"rope_type": "longrope"}}, ["rope_type", "longrope"]),
        ("qwen3", {"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ("qwen3", {"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor", "0.5"]),
        ("qwen3", {"rope_scaling": {**YARN, "factor": "4"}}, ["factor", "'4'"]),
        ("qwen3", {"rope_scaling": {**YARN, "truncate": False}}, ["truncate", "yarn"]),
        ("qwen3", {"rope_scaling": {**YARN, "mscale": 1.0}}, ["mscale", "yarn"]),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, ["low_freq_factor"]),
        ("llama", {"use_sliding_window": True}, ["use_sliding_window"]),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, ["sliding_attention"]),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, ["use_sliding_window"]),
        ("olmo3", {"layer_types": ["full_attention"]}, ["layer_types", "3"]),
        ("olmo3", {"layer_types": ["linear_attention"] * 3}, ["layer_types", "linear_attention"]),
        ("olmo3", {"sliding_window": None}, ["sliding_window", "None"]),
        ("qwen3", {"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ("llama", {"mlp_bias": True}, ["mlp_bias"]),
        ("llama", {"attention_bias": True}, ["attention_bias"]),
        ("qwen3", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config"]),
        ("qwen3", {"num_attention_heads": 0}, ["heads", "0"]),
        ("qwen3", {"num_key_value_heads": 3}, ["num_key_value_heads 3", "4"]),
        ("qwen3", {"head_dim": 7}, ["head_dim 7"]),
        ("olmo3", {"rope_parameters": YARN}, ["rope_type = 'yarn'", "full_attention"]),
        ("olmo3", {"rope_parameters": {"rope_theta": 7.0}}, ["rope_theta = 7.0", "full_attention"]),
        ("olmo3", {"rope_parameters": {"full_attention": [1]}}, ["full_attention = [1]", "object"]),
    ],
)
def test_what_is_not_implemented_is_refused_with_its_name(family, change, words):
    with pytest.raises(UserError) as error:
        from_hugging_face(tiny_config(family) | change, where="here/config.json")
    assert all(word in str(error.value) for word in ["here/config.json", *words])


@pytest.mark.parametrize(
    ("family", "key", "value", "expected"),
    [
        ("qwen3", "rope_scaling", "yarn", "an object"),
        ("qwen3", "rope_scaling", [1], "an object"),
        ("qwen3", "rope_parameters", [1], "an object"),
        ("olmo3", "rope_parameters", [1], "an object"),
        ("qwen3", "rope_theta", None, "a positive number"),
        ("qwen3", "rope_theta", -5, "a positive number"),
        ("olmo3", "rope_theta", float("nan"), "a positive number"),
        ("qwen3", "rms_norm_eps", None, "a positive number"),
        ("qwen3", "rms_norm_eps", -1, "a positive number"),
        ("qwen3", "rms_norm_eps", "1e-6", "a positive number"),
        ("qwen3", "max_position_embeddings", None, "a whole number of at least 1"),
        ("qwen3", "vocab_size", True, "a whole number of at least 1"),
        ("qwen3", "hidden_size", 32.7, "a whole number of at least 1"),
        ("qwen3", "hidden_size", "wide", "a whole number of at least 1"),
        ("llama", "head_dim", 0, "a whole number of at least 1"),
        ("llama", "num_key_value_heads", 0, "a whole number of at least 1"),
        ("qwen3", "tie_word_embeddings", "false", "true or false"),
        ("qwen3", "tie_word_embeddings", None, "true or false"),
        ("qwen2", "use_sliding_window", "false", "true or false"),
        ("qwen2", "sliding_window", 0, "a whole number of at least 1"),
        ("qwen2", "max_window_layers", None, "a whole number of at least 0"),
        ("olmo3", "sliding_window", True, "a whole number of at least 1"),
        ("olmo3", "layer_types", 3, "a list of names"),
        ("olmo3", "layer_types", [[1], [2], [3]], "a list of names"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_file_key_and_expectation(
    family, key, value, expected
):
    config = tiny_config(family)
    if key == "rope_theta":
        config |= {"rope_parameters": None, "rope_scaling": None}  # they would stand in for it
    if family == "qwen2":
        config |= {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 4}
    with pytest.raises(UserError) as error:
        from_hugging_face(config | {key: value}, where="here/config.json")
    assert str(error.value) == f"here/config.json: {key} = {value!r}; expected {expected}"


def test_a_rope_type_that_is_no_name_is_refused():
    with pytest.raises(UserError, match=r"here: rope_type = \[1\]; expected a name"):
        from_hugging_face(tiny_config() | {"rope_scaling": {"rope_type": [1]}}, where="here")


def test_null_is_absent_where_transformers_says_so():
    config = tiny_config("llama")
    for key in ("head_dim", "num_key_value_heads", "layer_types", "rope_scaling"):
        absent = {k: v for k, v in config.items() if k != key}
        assert from_hugging_face(config | {key: None}) == from_hugging_face(absent)


THETA, OTHER = {"rope_theta": 500_000.0}, {"rope_theta": 10_000.0}


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        THETA,
        OTHER,
        THETA | {"rope_scaling": YARN},
        OTHER | {"rope_scaling": YARN},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": YARN},
        {"rope_parameters": {"rope_type": "default", **THETA}},
        {"rope_parameters": {"rope_type": "default", **OTHER}},
        {"rope_parameters": {"full_attention": {**YARN, **THETA}}},
        {"rope_parameters": {"full_attention": {**YARN, **OTHER}}} | OTHER,
        {"rope_parameters": {"full_attention": {**YARN, **OTHER}, "sliding_attention": OTHER}},
        {"rope_parameters": {"sliding_attention": OTHER}} | OTHER,
        {"rope_parameters": {"full_attention": {}, "sliding_attention": YARN}},
    ],
    ids=str,
)
def test_every_spelling_of_olmo_3_s_rotary_parameters_means_what_transformers_makes_of_it(spelling):
    """Or is refused: where the layers' bases differ, or where transformers passes a key over."""
    from transformers import AutoConfig

    config = tiny_config("olmo3") | {"max_position_embeddings": 4096}
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        del config[key]
    theirs = AutoConfig.for_model(**json.loads(json.dumps(config | spelling))).rope_parameters
    kinds = [theirs[kind] for kind in ("full_attention", "sliding_attention")]
    passed_over = set(theirs) - {"full_attention", "sliding_attention"}
    stray = passed_over and spelling["rope_parameters"] != {"rope_type": "default", **THETA}
    unread = any(kind["rope_type"] == "default" and "factor" in kind for kind in kinds)
    if stray or unread or kinds[0]["rope_theta"] != kinds[1]["rope_theta"]:
        with pytest.raises(UserError, match=r"rope_|factor"):
            from_hugging_face(config | spelling)
        return
    ours = from_hugging_face(config | spelling)
    assert ours.rope_theta == kinds[0]["rope_theta"]
    assert [ours.rope_scaling, ours.sliding_rope_scaling] == [
        read_scaling(kind, max_positions=4096, where="") for kind in kinds
    ]


def test_a_second_rotary_base_is_refused():
    config = tiny_config("olmo3")
    config["rope_parameters"]["sliding_attention"]["rope_theta"] = 17.0
    with pytest.raises(UserError, match=r"rope_theta 17\.0"):
        from_hugging_face(config)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_missing_key_is_named(key):
    config = tiny_config()
    del config[key]
    with pytest.raises(UserError, match=rf"here.*{key}"):
        from_hugging_face(config, where="here")


def test_a_family_s_config_names_its_class_in_transformers():
    classes = {a.family: to_hugging_face(a)["architectures"] for a in VARIANTS.values()}
    assert classes == {
        "qwen2": ["Qwen2ForCausalLM"],
        "qwen3": ["Qwen3ForCausalLM"],
        "llama": ["LlamaForCausalLM"],
        "olmo3": ["Olmo3ForCausalLM"],
    }


def test_linear_scaling_survives_config_json():
    a = replace(tiny.FAMILIES["llama"], rope_scaling=RopeScaling("linear", 2.5))
    assert from_hugging_face(to_hugging_face(a)) == a
