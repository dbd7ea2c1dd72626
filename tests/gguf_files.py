"""Writes small GGUF files as llama.cpp's converter would: its names, its row order, its fields."""

import json
from typing import Any

import gguf
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ARCHITECTURE_FIELDS = {"context_length": 64, "attention.layer_norm_rms_epsilon": 1e-6}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOP = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output"}
LAYER = {
    "attention_norm": "attn_norm.weight",
    "query": "attn_q.weight",
    "key": "attn_k.weight",
    "value": "attn_v.weight",
    "output": "attn_output.weight",
    "query_bias": "attn_q.bias",
    "key_bias": "attn_k.bias",
    "value_bias": "attn_v.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
"""Parameter to GGUF tensor name, after `blk.LAYER.`; spelled out, to compare gguf's table with."""
CORPUS = [
    "The quick brown fox doesn't jump over 12 lazy dogs; they'll sleep   until 2024.",
    "def add(a, b):\n    return a + b  # 3.14\n\n\nfor i in range(100):\n\tprint(i)",
    "Grüße aus Zürich! 東京 🍣 naïve café  \n 7 8  99   1000",
]


def fields_of(a):
    """The architecture's fields; numbers are written as GGUF's uint32, float32, bool or string."""
    values = {
        **ARCHITECTURE_FIELDS,
        "block_count": a.layers,
        "embedding_length": a.width,
        "feed_forward_length": a.mlp_width,
        "attention.head_count": a.heads,
        "attention.head_count_kv": a.kv_heads,
        "attention.key_length": a.head_size,
        "rope.freq_base": a.rope_theta,
    }
    return {f"{a.family}.{key}": value for key, value in values.items()}


def tensors_of(a, params):
    """The parameters in their names and orientation, llama's queries and keys reordered."""
    names = {f"{TOP[ours]}.weight": v for ours, v in params.items() if ours != "layers"}
    tensors = {n: np.asarray(v).T if n == "output.weight" else v for n, v in names.items()}
    for ours, stacked in params["layers"].items():
        for i, value in enumerate(np.asarray(stacked)):
            value = value.T if value.ndim == 2 else value
            if a.family == "llama" and ours in ("query", "key"):
                heads = a.heads if ours == "query" else a.kv_heads
                value = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
                value = value.swapaxes(1, 2).reshape(-1, *value.shape[3:])
            tensors[f"blk.{i}.{LAYER[ours]}"] = value
    return {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def write(path, family, fields, tensors, kind="F32"):
    """A GGUF file; matrices in the quantization `kind`, vectors in float32, as is usual."""
    writer = gguf.GGUFWriter(path, family)
    for name, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, value in tensors.items():
        of = gguf.GGMLQuantizationType["F32" if value.ndim == 1 else kind]
        writer.add_tensor(name, gguf.quants.quantize(value, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference_tokenizer(pre, *, nfc=False, ignore_merges=False, size=400):
    """A tokenizer trained on the corpus with a pre-tokenizer, as a model's `tokenizer.json`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def split(pattern):
    """Cuts at a pattern, then bytes: how Qwen and Llama 3 do it."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def tokenizer_fields(tokenizer, pre, *, padded=0) -> dict[str, Any]:
    """The fields that describe a tokenizer, its vocabulary padded with unused rows."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda kv: kv[1])]
    types = [3 if token in CONTROL else 1 for token in tokens]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{len(tokens) + i}]" for i in range(padded))],
        "tokenizer.ggml.token_type": types + [5] * padded,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.chat_template": TEMPLATE,
    }
