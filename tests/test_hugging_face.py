"""Weights in Hugging Face layout come back bit for bit, and damage is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from make_fixtures import CASES
from make_fixtures import FOLDER as FIXTURES
from safetensors.numpy import load_file, save_file

from sdpo_jax.errors import UserError
from sdpo_models import checkpoint_files, hugging_face
from sdpo_models.architecture import to_hugging_face
from sdpo_models.checkpoint_files import INDEX, WEIGHTS, list_tensors, read_slice
from sdpo_models.hugging_face import load_architecture, load_params, save_run, save_weights
from sdpo_models.nano import FOLDER as NANO
from sdpo_models.tokenizer import ChatTokenizer

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
    "olmo3": {
        "self_attn.q_norm.weight": [32],
        "self_attn.k_norm.weight": [16],
        "post_feedforward_layernorm.weight": [32],
    },
}
"""As the families' published checkpoints have them: matrices are `[out, in]`."""


def representable(params):
    return jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32)), params)


def write_folder(folder, architecture=tiny.ARCHITECTURE, params=None, **options):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hugging_face(architecture, end_token=0)))
    params = tiny.make_params(architecture) if params is None else params
    save_weights(folder, params, architecture, **options)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A folder with the tiny Qwen 3's weights and config."""
    return write_folder(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    """The same in shards."""
    folder = write_folder(tmp_path / "sharded", max_shard_bytes=8_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder, architecture=tiny.ARCHITECTURE):
    with pytest.raises(UserError) as error:
        load_params(folder, architecture)
    return str(error.value)


def all_bytes(folder):
    """Every tensor of a folder with its dtype and shape."""
    whole = {n: read_slice(stored, n, (slice(None),)) for n, stored in list_tensors(folder).items()}
    return {name: (value.dtype, value.shape, value.tobytes()) for name, value in whole.items()}


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, family):
    architecture = tiny.FAMILIES[family]
    params = representable(tiny.make_params(architecture))
    save_weights(tmp_path, params, architecture)
    loaded = load_params(tmp_path, architecture)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_float32_can_be_saved_without_rounding(tmp_path):
    params = jax.device_get(tiny.make_params())
    save_weights(tmp_path, params, tiny.ARCHITECTURE, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, tiny.ARCHITECTURE), params)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tensors_have_the_names_and_the_orientation_of_published_checkpoints(tmp_path, family):
    architecture = tiny.FAMILIES[family]
    save_weights(tmp_path, tiny.make_params(architecture), architecture)
    expected = {"model.embed_tokens.weight": [61, 32], "model.norm.weight": [32]}
    if not architecture.tied_head:
        expected["lm_head.weight"] = [61, 32]
    for i in range(architecture.layers):
        for name, shape in (LAYER_NAMES | EXTRA_NAMES[family]).items():
            expected[f"model.layers.{i}.{name}"] = shape
        if architecture.post_norm:
            del expected[f"model.layers.{i}.input_layernorm.weight"]
    saved = load_file(tmp_path / WEIGHTS)
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == expected


@pytest.mark.parametrize("text", [None, "", "{", "\x00\x01"])
def test_a_config_json_that_cannot_be_read_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_architecture(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_transformers_goes_in_and_out_bit_for_bit(tmp_path, name):
    source = FIXTURES / name
    stored = next(iter(all_bytes(source).values()))[0]
    params = load_params(source, load_architecture(source), dtype=stored)
    save_run(tmp_path / "out", params, source=source, dtype=stored)
    assert all_bytes(tmp_path / "out") == all_bytes(source)
    assert load_architecture(tmp_path / "out") == load_architecture(source)


def test_shards_hold_no_more_than_asked_and_the_index_names_every_tensor(tmp_path):
    params = tiny.make_params()
    whole = write_folder(tmp_path / "whole", params=params)
    shards = write_folder(tmp_path / "shards", params=params, max_shard_bytes=8_000)
    assert {path.name for path in whole.iterdir()} == {"config.json", WEIGHTS}
    assert all_bytes(shards) == all_bytes(whole)
    index, files = json.loads((shards / INDEX).read_text()), sorted(shards.glob("*.safetensors"))
    count = len(files)
    assert [f.name for f in files] == [
        f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
    ]
    held = {f.name: load_file(f) for f in files}
    assert index["weight_map"] == {
        tensor: name for name, tensors in held.items() for tensor in tensors
    }
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in held.values()]
    assert max(sizes) <= 8_000 and index["metadata"]["total_size"] == sum(sizes)
    assert_equal_trees(
        load_params(shards, tiny.ARCHITECTURE), load_params(whole, tiny.ARCHITECTURE)
    )


@pytest.mark.parametrize("failing", [0, 1, 3, "index"])
def test_shards_of_which_only_some_got_their_names_are_no_checkpoint(
    sharded, tmp_path, monkeypatch, failing
):
    """As if the process had died there: the index, without which none is read, comes last."""
    count, named, replace = len(list(sharded.glob("*.safetensors"))), [], Path.replace
    failing = count if failing == "index" else failing

    def fail(path, target):
        if len(named) == failing:
            raise OSError("No space left on device")
        named.append(Path(target).name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_folder(tmp_path / "model", max_shard_bytes=8_000)
    present = {path.name for path in (tmp_path / "model").iterdir()}
    assert present == {"config.json", *named} and INDEX not in present
    assert len(named) == failing and "no weights there" in refused(tmp_path / "model")


@pytest.mark.parametrize("failing", range(4))
def test_an_export_that_fails_leaves_nothing_that_looks_like_weights(
    tmp_path, monkeypatch, failing
):
    calls, write = [], checkpoint_files._write_one

    def fail(path, shard):
        calls.append(path)
        if len(calls) > failing:
            raise OSError("No space left on device")
        write(path, shard)

    monkeypatch.setattr(checkpoint_files, "_write_one", fail)
    with pytest.raises(OSError, match="No space"):
        write_folder(tmp_path / "model", max_shard_bytes=8_000)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    calls.clear()
    with pytest.raises(OSError, match="No space"):
        save_run(
            tmp_path / "run", tiny.make_params(), source=tmp_path / "model", max_shard_bytes=8_000
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_checkpoints_never_mix_in_one_folder(folder):
    before = all_bytes(folder)
    with pytest.raises(UserError, match=rf"{folder}.*model\.safetensors.*without weights"):
        save_weights(folder, tiny.make_params(seed=1), tiny.ARCHITECTURE, max_shard_bytes=8_000)
    assert all_bytes(folder) == before


SHARDINGS = {
    "one axis": {"fsdp": 4},
    "all axes": {"data": 2, "fsdp": 2, "tensor": 2},
    "replicas": {"data": 8},
}


@pytest.mark.parametrize("piece_bytes", [10**9, 3_000])
@pytest.mark.parametrize("mesh", SHARDINGS)
@pytest.mark.parametrize("family", ["qwen2", "olmo3"])
def test_each_device_gets_its_slices_and_each_slice_is_read_once(
    tmp_path, monkeypatch, family, mesh, piece_bytes
):
    architecture = replace(tiny.FAMILIES[family], vocabulary=64)
    params = representable(tiny.make_params(architecture))
    folder = write_folder(tmp_path / "model", architecture, params, max_shard_bytes=9_000)
    read = []

    def counting(stored, name, index):
        array = read_slice(stored, name, index)
        read.append(array.size)
        return array

    monkeypatch.setattr(hugging_face, "read_slice", counting)
    monkeypatch.setattr(hugging_face, "PIECE_BYTES", piece_bytes)
    devices = tiny.make_devices(**SHARDINGS[mesh])
    loaded = load_params(folder, architecture, shardings=devices.parameter_shardings)
    model = tiny.make_model(architecture)
    wanted = devices.parameter_shardings(model.logical_axes, jax.eval_shape(lambda: params))
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(), loaded, wanted
    )
    assert_equal_trees(loaded, params)
    assert sum(read) == sum(x.size for x in jax.tree.leaves(params))
    again = load_params(folder, architecture, shardings=wanted)
    assert_equal_trees(again, params)


def test_parameters_come_in_the_dtype_that_is_asked_for(folder):
    plain = load_params(folder, tiny.ARCHITECTURE)
    shardings = tiny.make_devices(fsdp=2).parameter_shardings
    for dtype in (jnp.bfloat16, jnp.float32):
        for options in ({}, {"shardings": shardings}):
            loaded = load_params(folder, tiny.ARCHITECTURE, dtype=dtype, **options)
            assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}
            assert_equal_trees(jax.tree.map(lambda x: np.asarray(x, np.float32), loaded), plain)


def test_a_missing_tensor_is_named(folder):
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: tensors.pop(name))
    message = refused(folder)
    assert name in message and str(folder / WEIGHTS) in message


def test_a_missing_head_is_named_with_the_key_that_ties_it(tmp_path):
    folder = write_folder(tmp_path / "model")  # tied
    message = refused(folder, replace(tiny.ARCHITECTURE, tied_head=False))
    assert "lm_head.weight" in message and "set tie_word_embeddings = true" in message
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    assert "tie_word_embeddings" not in refused(folder)


def test_an_extra_tensor_is_named(folder):
    name = "model.layers.1.self_attn.k_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({name: np.zeros(16, np.float32)}))
    message = refused(folder)
    assert name in message and str(folder / WEIGHTS) in message and "config.json" in message


def test_rotary_buffers_of_old_checkpoints_are_no_extra_tensors(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: np.zeros(4, np.float32)}))
    load_params(folder, tiny.ARCHITECTURE)


def test_a_stored_head_of_a_tied_checkpoint_must_be_the_embedding(folder, monkeypatch):
    monkeypatch.setattr(hugging_face, "COMPARED_VALUES", 10 * 32 + 5)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors.update({head: tensors[embedding].copy()}))
    load_params(folder, tiny.ARCHITECTURE)

    def change_last(tensors):
        tensors[head][-1, -1] += 1

    rewrite(folder, change_last)
    message = refused(folder)
    assert head in message and "tie_word_embeddings" in message and str(folder) in message


@pytest.mark.parametrize("different", [None, 0, 34, 60])
def test_a_stored_head_is_compared_by_small_slices_up_to_the_first_difference(
    folder, monkeypatch, different
):
    read = []

    def counting(stored, name, index):
        array = read_slice(stored, name, index)
        read.append((name, len(array)))
        return array

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        if different is not None:
            tensors["lm_head.weight"][different, 0] += 1

    rewrite(folder, change)
    monkeypatch.setattr(hugging_face, "COMPARED_VALUES", 10 * 32 + 5)
    monkeypatch.setattr(hugging_face, "read_slice", counting)
    if different is None:
        load_params(folder, tiny.ARCHITECTURE)
    else:
        refused(folder)
    rows = [size for name, size in read if name == "lm_head.weight"]
    sizes = [10] * 6 + [1]  # 61 rows of 32
    assert rows == (sizes if different is None else sizes[: different // 10 + 1])


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    name = "model.layers.0.mlp.up_proj.weight"

    def cut(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name][:40])

    rewrite(folder, cut)
    message = refused(folder)
    words = [name, str(folder / WEIGHTS), "(40, 32)", "(48, 32)"]
    assert all(word in message for word in words)


def test_a_quantized_tensor_is_named_with_its_type(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: np.zeros((48, 32), np.int8)}))
    message = refused(folder)
    assert name in message and "I8" in message and "BF16" in message


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder, size):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in refused(folder)


def test_a_truncated_shard_is_named(sharded):
    path = sorted(sharded.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in refused(sharded)


def test_a_shard_that_the_index_names_and_the_folder_lacks_is_named(sharded):
    path = sorted(sharded.glob("*.safetensors"))[2]
    path.unlink()
    message = refused(sharded)
    assert path.name in message and str(sharded / INDEX) in message


def test_a_shard_of_another_checkpoint_is_noticed(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[1:3]
    shutil.copyfile(first, second)
    message = refused(sharded)
    assert str(sharded / INDEX) in message and "different checkpoints" in message


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}', '{"weight_map": 3}'],
)
def test_an_index_that_cannot_be_used_is_named(sharded, text):
    (sharded / INDEX).write_text(text)
    assert str(sharded / INDEX) in refused(sharded)


def test_absent_weights_are_named(tmp_path):
    assert str(tmp_path / WEIGHTS) in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "save_pretrained" in refused(tmp_path)


def test_a_saved_run_is_a_complete_model_folder(tmp_path):
    params = representable(tiny.make_params())
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names[1:]:
        (source / name).write_bytes((NANO / name).read_bytes())
    (source / "config.json").write_text(json.dumps(to_hugging_face(tiny.ARCHITECTURE)))
    (source / "chat_template.jinja").write_text("{{ messages }}")  # where transformers 5 writes it
    save_run(out, params, source=source)
    assert {p.name for p in out.iterdir()} == {*names, "chat_template.jinja", WEIGHTS}
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    jax.tree.map(np.testing.assert_array_equal, load_params(out, tiny.ARCHITECTURE), params)


def test_a_saved_run_says_its_dtype_and_where_it_stops(tmp_path):
    source, params = write_folder(tmp_path / "source"), tiny.make_params()
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")  # transformers 4
    (source / "config.json").write_text(json.dumps(config))
    save_run(tmp_path / "out", params, source=source, dtype=jnp.float32)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == config | {"torch_dtype": "float32"}
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"eos_token_id": 0}
    assert_equal_trees(load_params(tmp_path / "out", tiny.ARCHITECTURE), jax.device_get(params))


@pytest.mark.parametrize("generation", [None, {}, {"temperature": 0.6, "eos_token_id": None}])
@pytest.mark.parametrize(
    ("in_config", "in_tokenizer", "stop"),
    [
        (None, None, None),
        (None, "<|end|>", 0),
        ([], {"__type": "AddedToken", "content": "<|end|>"}, 0),
        (0, "<|end|>", 0),
        (5, "<|end|>", [5, 0]),
        ([5, 6], None, [5, 6]),
    ],
)
def test_a_saved_run_stops_where_config_json_and_the_tokenizer_say(
    tmp_path, in_config, in_tokenizer, stop, generation
):
    source, out = write_folder(tmp_path / "source"), tmp_path / "out"
    config = to_hugging_face(tiny.ARCHITECTURE, end_token=in_config)
    (source / "config.json").write_text(json.dumps(config))
    shutil.copyfile(NANO / "tokenizer.json", source / "tokenizer.json")
    tokenizer = json.loads((NANO / "tokenizer_config.json").read_text())
    tokenizer["eos_token"] = in_tokenizer
    tokenizer["chat_template"] = "{{ messages[-1].content }}"
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    save_run(out, tiny.make_params(), source=source)
    path = out / "generation_config.json"
    if stop is None:
        assert path.is_file() == (generation is not None)
        return
    assert json.loads(path.read_text()) == (generation or {}) | {"eos_token_id": stop}
    if in_tokenizer is not None:
        ends = stop if isinstance(stop, list) else [stop]
        for folder in (source, out):
            assert list(ChatTokenizer.from_pretrained(folder).stop_ids) == ends


def test_a_saved_run_keeps_its_generation_config_and_adds_the_stops_of_training(tmp_path):
    source = write_folder(tmp_path / "source")
    for stops, same in (([7], False), ([7, 0], True), (0, True), ([0], True)):
        text = json.dumps({"eos_token_id": stops, "temperature": 0.6})
        (source / "generation_config.json").write_text(text)
        save_run(tmp_path / f"out{stops}", tiny.make_params(), source=source)
        written = (tmp_path / f"out{stops}/generation_config.json").read_text()
        assert (written == text) == same
        assert same or json.loads(written) == {"eos_token_id": [7, 0], "temperature": 0.6}


def test_weights_of_another_architecture_than_the_source_s_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"embedding.*\(61, 32\).*\(512, 128\)"):
        save_run(tmp_path / "out", tiny.make_params(), source=NANO)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="empty"):
        save_run(tmp_path, tiny.make_params(), source=NANO)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
