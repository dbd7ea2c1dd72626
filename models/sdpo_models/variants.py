"""Architectures of published models, and a toy size `mu` of each family for tests.

Each entry equals what `from_hugging_face` reads from the `config.json` of the repository in its
comment. Tests compare parameter counts with the published ones. Loading a checkpoint does not use
this table: it reads the checkpoint's own `config.json`.
"""

from collections.abc import Mapping
from dataclasses import replace

from sdpo_models.architecture import Architecture
from sdpo_models.families import FAMILIES
from sdpo_models.rope import RopeScaling


def _qwen3(width: int, layers: int, heads: int, mlp_width: int, *, tied: bool) -> Architecture:
    return Architecture(
        family="qwen3",
        vocabulary=151_936,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_size=128,
        mlp_width=mlp_width,
        rope_theta=1_000_000.0,
        norm_epsilon=1e-6,
        tied_head=tied,
        max_positions=40_960,
        **FAMILIES["qwen3"].switches,
    )


def _qwen25(
    width: int, layers: int, heads: int, kv_heads: int, mlp_width: int, *, vocabulary: int = 151_936
) -> Architecture:
    return Architecture(
        family="qwen2",
        vocabulary=vocabulary,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=128,
        mlp_width=mlp_width,
        rope_theta=1_000_000.0,
        norm_epsilon=1e-6,
        tied_head=vocabulary == 151_936,
        max_positions=32_768,
        **FAMILIES["qwen2"].switches,
    )


def _llama3(
    width: int, layers: int, head_size: int, mlp_width: int, *, factor: float, tied: bool
) -> Architecture:
    return Architecture(
        family="llama",
        vocabulary=128_256,
        width=width,
        layers=layers,
        heads=32,
        kv_heads=8,
        head_size=head_size,
        mlp_width=mlp_width,
        rope_theta=500_000.0,
        norm_epsilon=1e-5,
        tied_head=tied,
        rope_scaling=RopeScaling("llama3", factor, original_positions=8192),
        max_positions=131_072,
        **FAMILIES["llama"].switches,
    )


_SMOLLM2_135M = Architecture(
    family="llama",
    vocabulary=49_152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_size=64,
    mlp_width=1536,
    rope_theta=100_000.0,
    norm_epsilon=1e-5,
    tied_head=True,
    max_positions=8192,
    **FAMILIES["llama"].switches,
)
_OLMO3_7B = Architecture(
    family="olmo3",
    vocabulary=100_278,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    head_size=128,
    mlp_width=11_008,
    rope_theta=500_000.0,
    norm_epsilon=1e-6,
    tied_head=False,
    rope_scaling=RopeScaling(
        "yarn", 8.0, original_positions=8192, attention_factor=1.2079441541679836
    ),
    sliding_window=4096,
    sliding_layers=(True, True, True, False) * 8,
    max_positions=65_536,
    **FAMILIES["olmo3"].switches,
)


def _mu(a: Architecture) -> Architecture:
    """A much smaller architecture with the same switches."""
    return replace(
        a,
        vocabulary=64,
        width=32,
        layers=4,
        heads=4,
        kv_heads=4 if a.kv_heads == a.heads else 2,
        head_size=8,
        mlp_width=48,
        sliding_window=min(a.sliding_window, 8),
        sliding_layers=a.sliding_layers[:4],
    )


_PUBLISHED: Mapping[str, Architecture] = {
    "qwen3_0.6b": _qwen3(1024, 28, 16, 3072, tied=True),  # Qwen/Qwen3-0.6B
    "qwen3_1.7b": _qwen3(2048, 28, 16, 6144, tied=True),  # Qwen/Qwen3-1.7B
    "qwen3_4b": _qwen3(2560, 36, 32, 9728, tied=True),  # Qwen/Qwen3-4B
    "qwen3_8b": _qwen3(4096, 36, 32, 12_288, tied=False),  # Qwen/Qwen3-8B
    "olmo3_7b": _OLMO3_7B,  # allenai/Olmo-3-7B-Instruct, allenai/Olmo-3-7B-Think
    "qwen2.5_1.5b": _qwen25(1536, 28, 12, 2, 8960),  # Qwen/Qwen2.5-1.5B-Instruct
    "qwen2.5_3b": _qwen25(2048, 36, 16, 2, 11_008),  # Qwen/Qwen2.5-3B-Instruct
    # Qwen/Qwen2.5-7B-Instruct
    "qwen2.5_7b": _qwen25(3584, 28, 28, 4, 18_944, vocabulary=152_064),
    # meta-llama/Llama-3.2-1B-Instruct
    "llama3.2_1b": _llama3(2048, 16, 64, 8192, factor=32.0, tied=True),
    # meta-llama/Llama-3.1-8B-Instruct
    "llama3.1_8b": _llama3(4096, 32, 128, 14_336, factor=8.0, tied=False),
    "smollm2_135m": _SMOLLM2_135M,  # HuggingFaceTB/SmolLM2-135M-Instruct
}
VARIANTS: Mapping[str, Architecture] = {
    **_PUBLISHED,
    "qwen3_mu": _mu(_PUBLISHED["qwen3_8b"]),
    "qwen2_mu": _mu(_PUBLISHED["qwen2.5_1.5b"]),
    "llama_mu": _mu(_PUBLISHED["llama3.2_1b"]),
    "olmo3_mu": _mu(_PUBLISHED["olmo3_7b"]),
}
