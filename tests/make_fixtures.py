"""Tiny random checkpoints of every family, written and run by transformers' PyTorch models.

    python tests/make_fixtures.py

rewrites their folders in tests/fixtures/; it needs torch and transformers, the tests that read them
do not. Every parameter is random, norms and biases too, so that none can be forgotten unnoticed.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "fixtures"
VOCABULARY = 53
LONG = 160  # beyond every sliding window and every length before stretching below
KEPT = slice(3, None, 4)  # positions of the long rows whose logits are kept
PROMPT, NEW = 20, 24
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
_OLMO3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
# Bases and lengths are such that some frequencies stay, some stretch and some lie between.
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "rope_theta": 3_000.0},
    "qwen2_sliding": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rms_norm_eps": 0.01,
    },
    "qwen3_yarn": {"model_type": "qwen3", "head_dim": 16, "rope_scaling": _YARN},
    "llama": {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 2_000.0},
    "llama3": {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": _LLAMA3},
    "llama_linear": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_scaling": {"type": "linear", "factor": 2.5},
    },
    "olmo3": {
        "model_type": "olmo3",
        "head_dim": 16,
        "num_key_value_heads": 4,
        "sliding_window": 9,
        "layer_types": _OLMO3_LAYERS,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 1.2,
            "beta_fast": 2.0,
            "beta_slow": 0.25,
        },
    },
    "olmo3_tied": {
        "model_type": "olmo3",
        "num_hidden_layers": 4,  # layer_types by default: every fourth is full
        "tie_word_embeddings": True,
        "sliding_window": 5,
        "rope_parameters": {
            "full_attention": {**_YARN, "rope_theta": 100.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}
"""Keys of config.json, in the spellings of transformers 4 and 5."""
STORED = {"qwen3_yarn": "bfloat16"}  # float32 where not named
SHARDED = {"qwen2": "30KB", "olmo3_tied": "30KB"}


def write_checkpoint(folder, name, seed):
    """A random model of the case, saved by transformers into the folder."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig, AutoModelForCausalLM

    case = dict(CASES[name])
    config = AutoConfig.for_model(case.pop("model_type"), **{**_SIZES, **case})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 2:
                value.copy_(noise if "embed" in key else 1.5 * noise * value.shape[1] ** -0.5)
            else:
                value.copy_(0.5 * noise if key.endswith("bias") else 1.0 + 0.3 * noise)
    model = model.to(getattr(torch, STORED.get(name, "float32")))
    model.save_pretrained(str(folder), max_shard_size=SHARDED.get(name, "5GB"))


def load(folder):
    """transformers' model of a folder, float32."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def run(model, tokens, mask=None):
    """Logits `[B, S, V]` of ids `[B, S]`."""
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        tokens = torch.as_tensor(np.asarray(tokens, np.int64))
        mask = None if mask is None else torch.as_tensor(np.asarray(mask, np.int64))
        return model(tokens, attention_mask=mask).logits.numpy()


def greedy(model, tokens, new):
    """The `new` tokens that greedy decoding appends to ids `[B, S]`."""
    import torch  # pyright: ignore[reportMissingImports]

    tokens = torch.as_tensor(np.asarray(tokens, np.int64))
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False
    )
    return out[:, tokens.shape[1] :].numpy()


def expected(model, seed):
    """Inputs and what transformers makes of them."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.integers(0, VOCABULARY, size=shape)  # noqa: E731
    padded, lengths = draw(3, 14), np.array([14, 9, 3])
    mask = np.arange(14)[None] < lengths[:, None]
    long = draw(2, LONG)
    segments = [draw(size) for size in (13, 4, 22)]
    arrays = {
        "padded_tokens": padded,
        "padded_lengths": lengths,
        "padded_logits": run(model, padded, mask),
        "long_tokens": long,
        "long_logits": run(model, long)[:, KEPT],
        "greedy_tokens": greedy(model, long[:, :PROMPT], NEW),
    }
    for i, segment in enumerate(segments):
        arrays[f"segment_{i}_tokens"] = segment
        arrays[f"segment_{i}_logits"] = run(model, segment[None])[0]
    return {k: v.astype(np.float32 if "logits" in k else np.int32) for k, v in arrays.items()}


def main():
    for seed, name in enumerate(CASES):
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(folder, name, seed)
        arrays: dict[str, Any] = expected(load(folder), seed)
        np.savez(folder / "expected.npz", **arrays)
        (folder / "generation_config.json").unlink(missing_ok=True)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{name}: {size / 1e3:.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
