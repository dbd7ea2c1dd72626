"""Weights in Hugging Face layout come back bit for bit, and damage is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from sdpo_jax.errors import UserError
from sdpo_models.architecture import from_hugging_face, to_hugging_face
from sdpo_models.hugging_face import (
    WEIGHTS,
    load_architecture,
    load_params,
    save_run,
    save_weights,
)
from sdpo_models.nano import FOLDER as NANO

LAYER_NAMES = {
    "input_layernorm.weight": [32],
    "post_attention_layernorm.weight": [32],
    "self_attn.q_proj.weight": [32, 32],
    "self_attn.k_proj.weight": [16, 32],
    "self_attn.v_proj.weight": [16, 32],
    "self_attn.o_proj.weight": [32, 32],
    "mlp.gate_proj.weight": [48, 32],
    "mlp.up_proj.weight": [48, 32],
    "mlp.down_proj.weight": [32, 48],
}
EXTRA_NAMES = {
    "qwen3": {"self_attn.q_norm.weight": [8], "self_attn.k_norm.weight": [8]},
    "qwen2": {
        "self_attn.q_proj.bias": [32],
        "self_attn.k_proj.bias": [16],
        "self_attn.v_proj.bias": [16],
    },
    "llama": {},
}
"""As the families' published checkpoints have them: matrices are `[out, in]`."""


def representable(params):
    return jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32)), params)


@pytest.fixture
def folder(tmp_path):
    """A folder with the tiny Qwen 3's weights and config."""
    save_weights(tmp_path, tiny.make_params())
    config = to_hugging_face(tiny.ARCHITECTURE, end_token=0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, family):
    architecture = tiny.FAMILIES[family]
    params = representable(tiny.make_params(architecture))
    save_weights(tmp_path, params)
    loaded = load_params(tmp_path, architecture)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_float32_can_be_saved_without_rounding(tmp_path):
    params = jax.device_get(tiny.make_params())
    save_weights(tmp_path, params, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, tiny.ARCHITECTURE), params)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tensors_have_the_names_and_the_orientation_of_published_checkpoints(tmp_path, family):
    architecture = tiny.FAMILIES[family]
    save_weights(tmp_path, tiny.make_params(architecture))
    expected = {"model.embed_tokens.weight": [61, 32], "model.norm.weight": [32]}
    if not architecture.tied_head:
        expected["lm_head.weight"] = [61, 32]
    for i in range(architecture.layers):
        for name, shape in (LAYER_NAMES | EXTRA_NAMES[family]).items():
            expected[f"model.layers.{i}.{name}"] = shape
    saved = load_file(tmp_path / WEIGHTS)
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == expected


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_architecture_survives_config_json(family):
    architecture = tiny.FAMILIES[family]
    config = json.loads(json.dumps(to_hugging_face(architecture, end_token=7)))
    assert from_hugging_face(config) == architecture
    assert config["eos_token_id"] == 7


@pytest.mark.parametrize(
    "spelling", [{"rope_theta": 7.0}, {"rope_parameters": {"rope_theta": 7.0}}]
)
def test_both_spellings_of_the_rotary_base_are_read(spelling):
    config = to_hugging_face(tiny.ARCHITECTURE, end_token=0)
    del config["rope_theta"], config["rope_parameters"]
    assert from_hugging_face(config | spelling).rope_theta == 7.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, ["mamba", "qwen3"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type", "yarn"]),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, ["rope_type", "linear"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
    ],
)
def test_what_is_not_implemented_is_refused_with_its_name(change, words):
    config = to_hugging_face(tiny.ARCHITECTURE, end_token=0) | change
    with pytest.raises(UserError) as error:
        from_hugging_face(config, where="here/config.json")
    assert all(word in str(error.value) for word in ["here/config.json", *words])


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_missing_key_of_config_json_is_named(folder, key):
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json.*{key}"):
        load_architecture(folder)


@pytest.mark.parametrize("text", [None, "", "{", "\x00\x01"])
def test_a_config_json_that_cannot_be_read_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_architecture(tmp_path)


def test_a_missing_tensor_is_named(folder):
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError) as error:
        load_params(folder, tiny.ARCHITECTURE)
    assert name in str(error.value) and str(folder / WEIGHTS) in str(error.value)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    name = "model.layers.0.mlp.up_proj.weight"

    def cut(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name][:40])

    rewrite(folder, cut)
    with pytest.raises(UserError) as error:
        load_params(folder, tiny.ARCHITECTURE)
    words = [name, str(folder / WEIGHTS), "(32, 40)", "(32, 48)"]
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder, size):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_params(folder, tiny.ARCHITECTURE)


def test_absent_weights_are_named(tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_params(tmp_path, tiny.ARCHITECTURE)


def test_a_saved_run_is_a_complete_model_folder(tmp_path):
    params = representable(tiny.make_params())
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        (source / name).write_bytes((NANO / name).read_bytes())
    (source / "chat_template.jinja").write_text("{{ messages }}")  # where transformers 5 writes it
    save_run(out, params, source=source)
    assert {p.name for p in out.iterdir()} == {*names, "chat_template.jinja", WEIGHTS}
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    jax.tree.map(np.testing.assert_array_equal, load_params(out, tiny.ARCHITECTURE), params)


def test_a_folder_that_is_not_empty_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="empty"):
        save_run(tmp_path, tiny.make_params(), source=NANO)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
