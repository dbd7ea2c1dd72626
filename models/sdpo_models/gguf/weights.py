"""Converts weights and fields of a GGUF file to Hugging Face layout: llama, qwen2 and qwen3.

Tensors are renamed, transposed and dequantized. llama.cpp permutes the rows of the query and key
projections of the llama architecture, because it rotates neighboring coordinates where Hugging
Face rotates halves; the permutation is undone here. GGUF stores the rotary scaling of Llama 3 as a
tensor of factors, `config.json` as settings; factors that no known settings give are refused.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdpo_jax.errors import UserError
from sdpo_models.architecture import Architecture
from sdpo_models.checkpoint_files import PlannedTensor
from sdpo_models.families import FAMILIES, is_transposed, tensor_names
from sdpo_models.gguf.file import GgufFile
from sdpo_models.rope import inverse_frequencies, read_scaling
from sdpo_models.transformer import parameter_table

SUPPORTED = ("llama", "qwen2", "qwen3")
"""Supported values of `general.architecture`, which are also names of families."""
ROPE_FACTORS = "rope_freqs.weight"


def to_config(file: GgufFile) -> dict[str, Any]:
    """Makes the `config.json` of a file, without token ids.

    Raises:
      UserError: another architecture, a missing field, or an option that is not implemented.
    """
    family = file.fields.get("general.architecture")
    if family not in SUPPORTED:
        raise UserError(
            f"{file.path}: architecture {family!r} is not supported; "
            f"expected one of {', '.join(SUPPORTED)}"
        )
    if file.fields.get(f"{family}.expert_count"):
        raise UserError(f"{file.path}: a mixture of experts, which is not supported from GGUF")
    heads, width = _size(file, "attention.head_count"), _size(file, "embedding_length")
    head_size = _size(file, "attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _size(file, key, head_size) != head_size:
            raise UserError(
                f"{file.path}: {family}.{key} = {_size(file, key)} is not supported; "
                f"expected the size of a head, {head_size}"
            )
    return {
        "architectures": [FAMILIES[family].class_name],
        "model_type": family,
        "vocab_size": file.shape("token_embd.weight")[0],
        "hidden_size": width,
        "num_hidden_layers": _size(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(file, "attention.head_count_kv", heads),
        "head_dim": head_size,
        "intermediate_size": _size(file, "feed_forward_length"),
        "hidden_act": "silu",
        "max_position_embeddings": _size(file, "context_length"),
        "rms_norm_eps": _real(file, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_rope(file, head_size),
    }


def planned_tensors(
    file: GgufFile, architecture: Architecture, dtype: Any
) -> Iterator[PlannedTensor]:
    """The tensors of a checkpoint in Hugging Face layout, each read when it is written.

    Raises:
      UserError: a tensor is missing, has another shape or an unknown quantization, or is not part
        of the architecture.
    """
    a, names, table = architecture, _names(file, architecture), parameter_table(architecture)
    layered = table.pop("layers")
    for parameter, leaf in (table | layered).items():
        layers, shape = (a.layers, leaf.shape[1:]) if parameter in layered else (None, leaf.shape)
        shape = shape[::-1] if is_transposed(parameter, len(shape)) else shape
        for target in tensor_names(a.family, parameter, layers):
            size = math.prod(file.shape(names[target])) * jnp.dtype(dtype).itemsize
            fetch = partial(_tensor, file, a, parameter, names[target], shape, jnp.dtype(dtype))
            yield PlannedTensor(target, size, fetch)


def _names(file: GgufFile, a: Architecture) -> dict[str, str]:
    """Maps the tensors of a checkpoint to those of the file; refuses tensors that have no place."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    table, to_gguf = parameter_table(a), get_tensor_name_map(MODEL_ARCH[a.family.upper()], a.layers)
    targets = [name for p in table if p != "layers" for name in tensor_names(a.family, p, None)]
    targets += [name for p in table["layers"] for name in tensor_names(a.family, p, a.layers)]
    names = {t: str(to_gguf.get_name(t, try_suffixes=(".weight", ".bias"))) for t in targets}
    foreign = sorted(file.tensors - set(names.values()) - {ROPE_FACTORS})
    if foreign:
        raise UserError(
            f"{file.path}: tensor {foreign[0]} has no place in the architecture {a.family} "
            f"({len(foreign)} such); without it the model would be another one"
        )
    return names


def _tensor(
    file: GgufFile, a: Architecture, parameter: str, name: str, shape: tuple[int, ...], dtype: Any
) -> np.ndarray[Any, Any]:
    """Reads a tensor in Hugging Face orientation, with llama.cpp's permutation undone."""
    if file.shape(name) != shape:
        raise UserError(
            f"{file.path}: tensor {name} has shape {file.shape(name)} (parameter {parameter}); "
            f"the file's fields imply {shape}"
        )
    array = file.read(name)
    if a.family == "llama" and parameter in ("query", "key"):
        array = _halves_apart(array, a.heads if parameter == "query" else a.kv_heads)
    return array.astype(dtype)


def _halves_apart(array: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Orders the rows of each head as 0, 2, 4, ..., 1, 3, 5, ...: pairs become halves."""
    return array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)


def _size(file: GgufFile, key: str, default: int | None = None) -> int:
    """Reads a field that is a size; `default` is for fields that the format makes optional."""
    name = f"{file.fields['general.architecture']}.{key}"
    value = file.fields.get(name, default)
    if type(value) is not int or value < 1:
        raise UserError(f"{file.path}: field {name} is {value!r}; expected a whole number above 0")
    return value


def _real(file: GgufFile, key: str, default: float | None = None) -> float:
    name = f"{file.fields['general.architecture']}.{key}"
    value = file.fields.get(name, default)
    if type(value) is not float or not 0 < value < math.inf:
        raise UserError(f"{file.path}: field {name} is {value!r}; expected a number above 0")
    return float(str(np.float32(value)))  # writes 1e-05 to config.json, not 9.999999747378752e-06


def _rope(file: GgufFile, head_size: int) -> dict[str, Any]:
    """The rotary settings, in the spellings of transformers 4 and 5."""
    theta = _real(file, "rope.freq_base", 10_000.0)
    _refuse_scaling(file)
    if ROPE_FACTORS not in file.tensors:
        return {
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        }
    factors = file.read(ROPE_FACTORS)
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    llama3 = read_scaling(scaling, max_positions=8192, where=str(file.path))
    plain, scaled = (inverse_frequencies(head_size, theta, s) for s in (None, llama3))
    if factors.shape != plain.shape or not np.allclose(factors, plain / scaled, rtol=1e-4):
        raise UserError(
            f"{file.path}: tensor {ROPE_FACTORS} holds other rotary factors than Llama 3's; "
            "use the model's folder in Hugging Face layout"
        )
    return {"rope_theta": theta, "rope_parameters": {**scaling, "rope_theta": theta}}


_SCALINGS = ("scaling.factor", "scale_linear", "scaling.alpha", "scaling.attn_factor")


def _refuse_scaling(file: GgufFile) -> None:
    """Refuses files whose positions llama.cpp scales: without a type, a factor is linear there."""
    prefix = f"{file.fields['general.architecture']}.rope."
    kind = file.fields.get(f"{prefix}scaling.type")
    given = {key: file.fields.get(prefix + key, 1.0) for key in _SCALINGS}
    factors = [f"{prefix}{key} = {value}" for key, value in given.items() if value not in (0, 1)]
    if kind == "none" or (kind is None and not factors):
        return
    found = repr(kind) if kind is not None else factors[0]
    raise UserError(
        f"{file.path}: rotary scaling {found} is not supported from GGUF; "
        "use the model's folder in Hugging Face layout"
    )
