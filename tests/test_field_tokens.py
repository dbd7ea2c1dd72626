"""Reports from the field about tokens and checkpoints: stops, ordinary text, templates, scaling."""

import json
import shutil
from typing import Any

import pytest
import tiny

from sdpo_jax.errors import UserError
from sdpo_models.architecture import from_hugging_face, to_hugging_face
from sdpo_models.nano import FOLDER
from sdpo_models.rope import inverse_frequencies
from sdpo_models.tokenizer import ChatTokenizer, folder_stop_ids

FIRST = 512
"""The first id behind the embedded model's vocabulary."""


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))


def make(folder, *, template, added=(), config=None, generation=None, plain=(), **named):
    """The embedded model's tokenizer with other control tokens, template, and names for tokens."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    one = content["added_tokens"][0]
    content["added_tokens"] += [
        {**one, "id": FIRST + i, "content": token, "special": token not in plain}
        for i, token in enumerate(added)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    edit(folder / "tokenizer_config.json", chat_template=template, **named)
    edit(folder / "config.json", eos_token_id=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return ChatTokenizer.from_pretrained(folder)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}"
    "\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
DEEPSEEK = (
    "<bos>{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}<eos>{% else %}<|User|>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>"
)
TEMPLATES = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "llama 3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    "gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>"),
    "phi": (PHI, ["<|endoftext|>"], "<|end|>"),
    "deepseek": (DEEPSEEK, ["<bos>", "<eos>", "<|User|>", "<|Assistant|>", "<think>"], "<eos>"),
    "qwen 3": (QWEN3, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"], "<|im_end|>"),
    "glm": (GLM, ["[gMASK]", "<sop>"], None),
}
"""By family: a template in its form, control tokens, and the one that ends an assistant's turn."""
THOUGHT = "<think>\nhm\n</think>\n\n4"
USER, SYSTEM = {"role": "user", "content": "2 + 2?"}, {"role": "system", "content": "Be brief."}
CHATS = [
    [USER],
    [SYSTEM, USER],
    [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3 + 3?"}],
    [USER, {"role": "assistant", "content": THOUGHT}, USER],
    [USER, {"role": "user", "content": "twice"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "  blanks \n"}],
    [SYSTEM, USER, {"role": "assistant", "content": ""}, USER],
]


@pytest.mark.parametrize("family", TEMPLATES)
def test_chats_are_rendered_as_the_template_writes_them_and_end_as_it_ends_them(family, tmp_path):
    template, added, end = TEMPLATES[family]
    made = make(tmp_path, template=template, added=added, plain=["<think>", "</think>"])
    inner = made._tokenizer
    for chat in CHATS:
        text = inner.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert inner.decode(made.render(chat), skip_special_tokens=False) == text
        if "think" not in str(chat):
            assert made.render(chat) == inner.encode(text, add_special_tokens=False)
    control = {i for i, t in inner.added_tokens_decoder.items() if t.special}
    plain, hostile = (
        [i for i in made.render([{"role": "user", "content": text}]) if i in control]
        for text in ("a", "a" + "".join(added) + "<|end|>b")
    )
    assert plain == hostile
    if template.startswith(added[0]):  # The template writes the beginning of a text, once.
        assert plain.count(FIRST) == 1
    assert made.end_id == inner.convert_tokens_to_ids(end or "<|end|>")
    assert inner.convert_tokens_to_ids(end or "<|end|>") in made.stop_ids
    if end is None:  # A header that the template always adds is not the end of a turn.
        assert made.stop_ids == (0,)


@pytest.mark.parametrize(
    ("config", "generation", "eos", "stops"),
    [
        # The files of a base model name the end of a text, the tokenizer that of a turn.
        (None, 512, "<|im_end|>", (512, 514)),
        (512, None, "<|im_end|>", (512, 514)),
        (514, 512, "<|im_end|>", (512, 514)),
        # Only the template knows the turn's end.
        (512, 512, "<|endoftext|>", (512, 514)),
        (None, None, "<|endoftext|>", (512, 514)),
        (None, None, None, (514,)),
        # Lists.
        ([512, 514], [514, 512], "<|im_end|>", (514, 512)),
        ([512, 1], [514, 2], "<|endoftext|>", (514, 2, 512, 1)),
        (514, 514, "<|im_end|>", (514,)),
    ],
)
def test_every_end_that_a_file_or_the_template_names_stops(
    config, generation, eos, stops, tmp_path
):
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    named = dict(config=config, generation=generation, eos_token=eos, pad_token=None)
    made = make(tmp_path, template=CHATML, added=tokens, **named)
    assert made.stop_ids == stops and made.end_id == 514
    assert folder_stop_ids(tmp_path) == list(stops)
    edit(tmp_path / "tokenizer_config.json", chat_template=None)
    assert folder_stop_ids(tmp_path) == list(dict.fromkeys(_ends(generation) + _ends(config)))


def _ends(stop):
    return stop if isinstance(stop, list) else [] if stop is None else [stop]


def test_an_end_of_turn_that_is_not_marked_special_stops_and_is_not_shown(tmp_path):
    tokens = ["<|im_start|>", "<|im_end|>"]
    made = make(tmp_path, template=CHATML, added=tokens, plain=["<|im_end|>"])
    assert made.end_id == 513 and 513 in made.stop_ids
    assert made.decode([*made.encode("done"), 513]) == "done"
    assert 513 not in made.encode_response("a<|im_end|>")


def test_text_that_a_template_writes_after_a_turn_is_no_end(tmp_path):
    template = "{% for m in messages %}{{ m.content }}\nUser: <|user|>{% endfor %}"
    assert make(tmp_path, template=template).stop_ids == (0,)


TEXTS = ["5! = 120", "!", "a, b", "!!", " , ,", "Hello, world!\n", "5!! + the"]


@pytest.mark.parametrize("name", ["pad_token", "bos_token", "unk_token", "sep_token"])
@pytest.mark.parametrize("token", ["!", ",", "e", "4"])
def test_a_named_token_that_is_ordinary_text_does_not_vanish(name, token, tmp_path):
    made = make(tmp_path, template=CHATML, **{name: token})
    plain = ChatTokenizer.from_pretrained(FOLDER)
    for text in TEXTS:
        assert made.encode(text) == plain.encode(text)
        assert made.decode(made.encode(text)) == text
        assert made.decode(made.encode_response(text)) == text
        rendered = made.render([{"role": "user", "content": text}])
        assert made._tokenizer.decode(rendered).count(text) == 1
        assert text in made.decode(rendered)


def test_a_control_token_that_is_named_as_padding_still_vanishes(tmp_path):
    made = make(tmp_path, template=CHATML, pad_token="<|user|>", added=["<pad>"])
    assert made.decode([*made.encode("a"), 2, FIRST, *made.encode("b")]) == "ab"


# Checkpoints


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 10_000.0, "rope_parameters": {"rope_theta": 500_000.0}}, 500_000),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500_000}}, 500_000),
        ({"rope_theta": 500_000, "rope_parameters": None}, 500_000),
    ],
)
def test_the_rotary_base_is_that_of_the_newer_spelling(changes, theta):
    config = to_hugging_face(tiny.ARCHITECTURE, end_token=0) | changes
    assert from_hugging_face(config).rope_theta == theta


def test_yarn_is_read_with_and_without_its_original_length():
    config = to_hugging_face(tiny.ARCHITECTURE, end_token=0) | {"rope_theta": 10_000.0}
    config |= {"max_position_embeddings": 4096, "rope_parameters": None}
    found = []
    for original in ({"original_max_position_embeddings": 4096}, {}):
        scaling = {"rope_type": "yarn", "factor": 4.0, **original}
        found.append(from_hugging_face(config | {"rope_scaling": scaling}).rope_scaling)
    assert found[0] == found[1] and found[0].factor == 4.0
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    torch = pytest.importorskip("torch")
    theirs = Qwen3Config(**config | {"rope_scaling": scaling})
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    ours = inverse_frequencies(tiny.ARCHITECTURE.head_size, 10_000.0, found[0])
    assert abs(ours - expected.numpy()).max() < 1e-6


VARIANTS = [
    {"tie_word_embeddings": False},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": None},
    {"rms_norm_eps": 1e-5},
    {"rope_theta": 1_000_000, "rope_parameters": None},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
    {"max_position_embeddings": 131_072},
    {"head_dim": 16},
    {"intermediate_size": 100},
    {"hidden_act": "silu"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_config_means_what_it_means_to_transformers(family, changes):
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    config = {
        **{"model_type": family, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
        **{"max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        **{"head_dim": None if family == "qwen2" else 16},
        **changes,
    }
    config = {k: v for k, v in config.items() if v is not None}
    made = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[family]
    ours, theirs = from_hugging_face(config), made(**config)
    rope: Any = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    scaling = ours.rope_scaling
    assert (scaling.factor if scaling else 1.0) == rope.get("factor", 1.0)
    assert (ours.width, ours.mlp_width) == (theirs.hidden_size, theirs.intermediate_size)
    if "num_key_value_heads" in config:  # Where it is absent, only Llama has as many as heads.
        assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.tied_head == theirs.tie_word_embeddings
    assert ours.max_positions == theirs.max_position_embeddings


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"scaling.factor": 4.0}, "rope.scaling.factor = 4.0"),
        ({"scale_linear": 2.0}, "rope.scale_linear = 2.0"),
        ({"scaling.factor": 0.5}, "rope.scaling.factor = 0.5"),
        ({"scaling.factor": 4}, "rope.scaling.factor = 4"),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, "'linear'"),
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, "'yarn'"),
        ({"scaling.type": "longrope"}, "'longrope'"),
        ({"scaling.alpha": 1000.0}, "rope.scaling.alpha"),
        ({"scaling.attn_factor": 1.2}, "rope.scaling.attn_factor"),
        ({"scaling.factor": 1.0}, None),
        ({"scaling.factor": 0.0}, None),
        ({"scale_linear": 1.0}, None),
        ({"scaling.type": "none"}, None),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.original_context_length": 8192, "scaling.finetuned": False}, None),
    ],
    ids=str,
)
def test_positions_that_a_gguf_file_scales_are_refused(family, fields, named, tmp_path):
    gguf_files = pytest.importorskip("gguf_files", reason="needs the extra gguf")
    from sdpo_models.gguf.file import GgufFile
    from sdpo_models.gguf.weights import to_config

    sizes = {"block_count": 1, "embedding_length": 32, "feed_forward_length": 48}
    sizes |= {"attention.head_count": 4, "context_length": 64}
    sizes["attention.layer_norm_rms_epsilon"] = 1e-6
    sizes |= {f"rope.{key}": value for key, value in fields.items()}
    given = {f"{family}.{key}": value for key, value in sizes.items()}
    import numpy as np

    tensors = {"token_embd.weight": np.zeros((40, 32), np.float32)}
    file = GgufFile(gguf_files.write(tmp_path / "m.gguf", family, given, tensors))
    if named is None:
        assert to_config(file)["rope_parameters"]["rope_type"] == "default"
        return
    with pytest.raises(UserError, match=r"m\.gguf: rotary scaling .* Hugging Face layout") as found:
        to_config(file)
    assert named in str(found.value)
