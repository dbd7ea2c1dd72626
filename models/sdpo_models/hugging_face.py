"""Weights in and out of Hugging Face layout: `config.json` and `model.safetensors`.

A table per family names each parameter's tensors; matrices lie transposed there (`[out, in]`).
Tensors are read lazily, one at a time, and stacked over layers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.errors import UserError
from sdpo_jax.model import Params
from sdpo_models.architecture import Architecture, from_hugging_face
from sdpo_models.transformer import parameter_table

WEIGHTS = "model.safetensors"
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
TOP = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
LAYER = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
"""Our names to theirs; the same in qwen2, qwen3 and llama, which differ in which of them exist."""


def _transposed(name: str, ndim: int) -> bool:
    return ndim == 2 and name != "embedding"


def load_architecture(folder: Path) -> Architecture:
    """Reads `config.json`."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return from_hugging_face(config, where=str(path))


def load_params(folder: Path, architecture: Architecture) -> Params:
    """Float32 parameters from `model.safetensors`.

    Raises:
      UserError: file missing or damaged; a tensor missing or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no weights there; expected a single safetensors file")
    try:
        with safe_open(str(path), framework="flax") as file:
            names = set(file.keys())

            def read(name: str, leaf_shape: tuple[int, ...], ours: str) -> np.ndarray[Any, Any]:
                if name not in names:
                    raise UserError(f"{path}: tensor {name} is missing")
                array = np.asarray(file.get_tensor(name).astype(jnp.float32))
                array = array.T if _transposed(ours, array.ndim) else array
                if array.shape != leaf_shape:
                    raise UserError(
                        f"{path}: tensor {name} has shape {array.shape} (ours: {ours}); "
                        f"config.json implies {leaf_shape}"
                    )
                return array

            return _assemble(architecture, read)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _assemble(architecture: Architecture, read: Any) -> Params:
    table = parameter_table(architecture)
    params: dict[str, Any] = {
        ours: read(TOP[ours], leaf.shape, ours) for ours, leaf in table.items() if ours != "layers"
    }
    params["layers"] = {
        ours: np.stack(
            [
                read(f"model.layers.{i}.{LAYER[ours]}", leaf.shape[1:], ours)
                for i in range(architecture.layers)
            ]
        )
        for ours, leaf in table["layers"].items()
    }
    return params


def to_tensors(params: Params) -> dict[str, np.ndarray[Any, Any]]:
    """Their names and orientation, in our dtype."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for ours, value in params.items():
        if ours == "layers":
            continue
        tensors[TOP[ours]] = _oriented(ours, np.asarray(value))
    for ours, stacked in params["layers"].items():
        for i, value in enumerate(np.asarray(stacked)):
            tensors[f"model.layers.{i}.{LAYER[ours]}"] = _oriented(ours, value)
    return tensors


def _oriented(name: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(value.T if _transposed(name, value.ndim) else value)


def save_weights(folder: Path, params: Params, *, dtype: Any = jnp.bfloat16) -> None:
    """Writes `model.safetensors`, whole or not at all."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.astype(jnp.dtype(dtype)) for k, v in to_tensors(params).items()}
    partial = folder / f"{WEIGHTS}.partial"
    save_file(tensors, str(partial), metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors writes for its owner alone
    partial.replace(folder / WEIGHTS)


def save_run(folder: Path, params: Params, *, source: Path) -> None:
    """A complete model folder: the source's config and tokenizer, the given weights.

    Raises:
      UserError: the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: expected a new or empty folder; nothing was overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    for name in BESIDE_WEIGHTS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    save_weights(folder, jax.device_get(params))
