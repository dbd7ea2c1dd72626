"""Loads and saves weights in Hugging Face layout: `config.json` and safetensors, also in shards.

Loading checks all headers before it reads any data. Each process reads the slices that its devices
hold, layer by layer; beyond the parameters themselves the host holds one piece of one parameter, at
most `PIECE_BYTES` plus a layer's slice. (If a tied checkpoint stores the head again, every host
compares all of it with the embedding, a piece at a time.) Saving writes one shard at a time.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from sdpo_jax.errors import UserError
from sdpo_jax.model import Params
from sdpo_models.architecture import Architecture, from_hugging_face
from sdpo_models.checkpoint_files import (
    FLOATS,
    PlannedTensor,
    StoredTensor,
    list_tensors,
    new_folder,
    read_json,
    read_slice,
    write_json,
    write_shards,
)
from sdpo_models.families import TOP_NAMES, is_transposed, tensor_names
from sdpo_models.tokenizer import folder_stop_ids
from sdpo_models.transformer import Leaf, is_leaf, parameter_table

PIECE_BYTES = 512 * 2**20
COMPARED_VALUES = 4 * 2**20  # values per piece when head and embedding are compared
MAX_SHARD_BYTES = 5 * 10**9  # the default of transformers
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_BUFFER = "rotary_emb.inv_freq"  # stored by old checkpoints; computed from config.json here

Shardings = Callable[[Any, Any], Any] | Any
"""A pytree of `jax.sharding.Sharding` like the parameters, or a function of logical axes and shapes
that returns one, such as `Devices.parameter_shardings`."""


class Parameter(NamedTuple):
    """A parameter and the tensors that it is read from."""

    shape: tuple[int, ...]
    layered: bool
    transposed: bool
    tensors: list[tuple[str, StoredTensor]]  # one per layer, or one


def load_architecture(folder: Path) -> Architecture:
    """Reads `config.json`."""
    path = folder / "config.json"
    return from_hugging_face(read_json(path), where=str(path))


def load_params(
    folder: Path,
    architecture: Architecture,
    *,
    shardings: Shardings | None = None,
    dtype: Any = jnp.float32,
) -> Params:
    """Parameters from the safetensors of a folder.

    Args:
      folder: with `model.safetensors`, or shards and their index.
      architecture: the result of `load_architecture(folder)`.
      shardings: of each parameter; each process reads the slices of its devices. None returns
        whole numpy arrays.
      dtype: of all parameters.

    Raises:
      UserError: a file is missing or damaged; a tensor is missing, unknown, or of another shape.
    """
    parameters = _match(folder, list_tensors(folder), architecture)
    build = partial(jax.tree.map, is_leaf=lambda x: isinstance(x, Parameter))
    if shardings is None:
        whole = lambda p: tuple(slice(0, size) for size in p.shape)  # noqa: E731
        return build(lambda p: _read(p, whole(p), dtype), parameters)
    if callable(shardings):
        each, table = partial(jax.tree.map, is_leaf=is_leaf), parameter_table(architecture)
        shapes = each(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), table)
        shardings = shardings(each(lambda leaf: leaf.axes, table), shapes)
    return build(lambda p, sharding: _place(p, sharding, jnp.dtype(dtype)), parameters, shardings)


def _match(folder: Path, found: Mapping[str, StoredTensor], a: Architecture) -> dict[str, Any]:
    """The parameter table with the tensors of each parameter; makes all checks."""
    used: set[str] = set()

    def one(parameter: str, leaf: Leaf, layers: int | None) -> Parameter:
        shape = leaf.shape if layers is None else leaf.shape[1:]
        transposed = is_transposed(parameter, len(shape))
        names = tensor_names(a.family, parameter, layers)
        used.update(names)
        stored = shape[::-1] if transposed else shape
        tensors = [(name, _checked(folder, found, name, stored)) for name in names]
        return Parameter(leaf.shape, layers is not None, transposed, tensors)

    table = parameter_table(a)
    parameters: dict[str, Any] = {
        name: one(name, leaf, None) for name, leaf in table.items() if name != "layers"
    }
    parameters["layers"] = {name: one(name, x, a.layers) for name, x in table["layers"].items()}
    _refuse_extra(found, used, a)
    return parameters


def _checked(
    folder: Path, found: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...]
) -> StoredTensor:
    if name not in found:
        paths = sorted({str(stored.path) for stored in found.values()})
        where = paths[0] if len(paths) == 1 else f"{folder} ({len(paths)} safetensors files)"
        untied = "; or set tie_word_embeddings = true there if the head is the embedding"
        raise UserError(
            f"{where}: tensor {name} is missing; config.json implies it: config.json and weights "
            "must be of the same model" + (untied if name == TOP_NAMES["head"] else "")
        )
    stored = found[name]
    if stored.shape != shape:
        raise UserError(
            f"{stored.path}: tensor {name} has shape {stored.shape}; config.json implies {shape}: "
            "config.json and weights must be of the same model"
        )
    if stored.dtype not in FLOATS:
        raise UserError(
            f"{stored.path}: tensor {name} is of type {stored.dtype}; expected one of "
            f"{', '.join(FLOATS)} (the unquantized original)"
        )
    return stored


def _refuse_extra(found: Mapping[str, StoredTensor], used: set[str], a: Architecture) -> None:
    """Refuses tensors that no parameter reads: config.json then describes another model."""
    for name in sorted(set(found) - used):
        if a.tied_head and name == TOP_NAMES["head"]:
            _refuse_untied(found[name], found[TOP_NAMES["embedding"]])
        elif not name.endswith(_BUFFER):
            raise UserError(
                f"{found[name].path}: tensor {name} has no place in {a.family} as config.json "
                "describes it; config.json and weights must be of the same model"
            )


def _refuse_untied(head: StoredTensor, embedding: StoredTensor) -> None:
    """Refuses a tied checkpoint whose stored head differs from the embedding and would be lost."""
    names = TOP_NAMES["head"], TOP_NAMES["embedding"]
    rows = max(1, COMPARED_VALUES // max(1, math.prod(head.shape[1:])))
    pieces = [(slice(i, min(i + rows, head.shape[0])),) for i in range(0, head.shape[0], rows)]
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    same = same and all(
        np.array_equal(read_slice(head, names[0], piece), read_slice(embedding, names[1], piece))
        for piece in pieces
    )
    if not same:
        raise UserError(
            f"{head.path}: tensor {names[0]} differs from {names[1]}, but "
            "config.json has tie_word_embeddings = true; set it to false to use both"
        )


def _read(p: Parameter, index: tuple[slice, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Reads a slice of a parameter; `index` has a start and a stop in every dimension."""
    out = np.empty([s.stop - s.start for s in index], dtype)
    rest = index[1:] if p.layered else index
    stored_index = rest[::-1] if p.transposed else rest
    layers = range(index[0].start, index[0].stop) if p.layered else (0,)
    for target, layer in zip(out if p.layered else (out,), layers, strict=True):
        name, stored = p.tensors[layer]
        piece = read_slice(stored, name, stored_index)
        np.copyto(target, piece.T if p.transposed else piece, casting="unsafe")
    return out


def _place(p: Parameter, sharding: Sharding, dtype: Any) -> jax.Array:
    """Puts a parameter on its devices; a slice that several devices hold is read once."""
    pieces: dict[tuple[tuple[int, int], ...], jax.Array] = {}
    arrays: list[jax.Array] = []
    for device, index in sharding.addressable_devices_indices_map(p.shape).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index or (), p.shape, strict=True))
        target = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        if bounds not in pieces:
            rectangle = tuple(slice(*b) for b in bounds)
            pieces[bounds] = _fill(p, rectangle, target, dtype)
            arrays.append(pieces[bounds])
        else:
            arrays.append(jax.device_put(pieces[bounds], target))
    return jax.make_array_from_single_device_arrays(p.shape, sharding, arrays)


def _fill(p: Parameter, index: tuple[slice, ...], target: Sharding, dtype: Any) -> jax.Array:
    """Reads a device's slice and sends it, in pieces if it is large.

    Each transfer is awaited: otherwise the host would hold all pieces that are in flight.
    """
    sizes = [s.stop - s.start for s in index]
    # Pieces are whole rows of the stored tensors, which are contiguous in the file.
    axis = 1 if p.transposed and not p.layered else 0
    step = max(1, PIECE_BYTES * sizes[axis] // max(1, math.prod(sizes) * dtype.itemsize))
    if step >= sizes[axis]:
        return jax.block_until_ready(jax.device_put(_read(p, index, dtype), target))
    array = jax.jit(partial(jnp.zeros, sizes, dtype), out_shardings=target)()
    for start in range(0, sizes[axis], step):
        first = index[axis].start + start
        rows = slice(first, min(first + step, index[axis].stop))
        piece = _read(p, (*index[:axis], rows, *index[axis + 1 :]), dtype)
        array = _write_rows(array, jax.device_put(piece, target), start, axis=axis)
        jax.block_until_ready(array)
        del piece
    return array


@partial(jax.jit, static_argnames="axis", donate_argnums=0)
def _write_rows(array: jax.Array, piece: jax.Array, start: int, *, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, piece, start, axis)


def save_weights(
    folder: Path,
    params: Params,
    architecture: Architecture,
    *,
    dtype: Any = jnp.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `model.safetensors`, or shards and their index, completely or not at all.

    Args:
      folder: must not hold weights.
      params: host or device arrays.
      architecture: determines the tensors' names.
      dtype: of all tensors.
      max_shard_bytes: a larger checkpoint is written to several files.

    Raises:
      UserError: the folder already holds weights.
      ValueError: the parameters' shapes do not fit the architecture.
    """
    _check_shapes(params, architecture)
    tensors = _plan(params, architecture, jnp.dtype(dtype))
    write_shards(folder, tensors, max_shard_bytes=max_shard_bytes)


def _check_shapes(params: Params, a: Architecture) -> None:
    """Refuses weights that do not fit config.json, before they are written beside it."""

    def one(path: Any, leaf: Leaf, value: Any) -> None:
        if value.shape != leaf.shape:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"parameter {name} has shape {value.shape}; its config.json implies {leaf.shape}"
            )

    jax.tree_util.tree_map_with_path(one, parameter_table(a), params, is_leaf=is_leaf)


def _plan(params: Params, a: Architecture, dtype: Any) -> Iterator[PlannedTensor]:
    """The tensors of a checkpoint, in order: embedding, layers one by one, the rest."""

    def planned(name: str, parameter: str, value: Any, layer: int | None) -> PlannedTensor:
        shape = value.shape if layer is None else value.shape[1:]
        flip = is_transposed(parameter, len(shape))

        def fetch() -> np.ndarray[Any, Any]:
            one = np.asarray(value if layer is None else value[layer])
            return np.ascontiguousarray((one.T if flip else one).astype(dtype))

        return PlannedTensor(name, math.prod(shape) * dtype.itemsize, fetch)

    yield planned(TOP_NAMES["embedding"], "embedding", params["embedding"], None)
    for layer in range(a.layers):
        for parameter, value in params["layers"].items():
            name = tensor_names(a.family, parameter, a.layers)[layer]
            yield planned(name, parameter, value, layer)
    for parameter in sorted(set(params) - {"embedding", "layers"}):
        yield planned(TOP_NAMES[parameter], parameter, params[parameter], None)


def save_run(
    folder: Path,
    params: Params,
    *,
    source: Path,
    dtype: Any = jnp.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model folder, completely or not at all: config and tokenizer of `source`, `params`.

    Args:
      folder: does not exist yet, or is empty.
      params: host or device arrays.
      source: a model folder.
      dtype: of the weights; config.json names it.
      max_shard_bytes: see `save_weights`.

    Raises:
      UserError: the folder exists and is not empty, or the source's config.json is not readable.
    """
    architecture = load_architecture(source)
    with new_folder(folder) as unfinished:
        for name in BESIDE_WEIGHTS:
            if (source / name).is_file():
                shutil.copyfile(source / name, unfinished / name)
        _write_configs(unfinished, source, jnp.dtype(dtype).name)
        save_weights(unfinished, params, architecture, dtype=dtype, max_shard_bytes=max_shard_bytes)


def _write_configs(folder: Path, source: Path, dtype: str) -> None:
    """Writes the dtype to config.json and the stop ids to generation_config.json.

    Without the first, readers would convert the weights; without the second, they would generate
    past the end of an answer. The stop ids are all of those in training (`ChatTokenizer`).
    """
    config = read_json(folder / "config.json")
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if config.get(key) != dtype:
        write_json(folder / "config.json", {**config, key: dtype})
    path = folder / "generation_config.json"
    generation, stops = read_json(path) if path.is_file() else {}, folder_stop_ids(source)
    if stops and generation.get("eos_token_id") not in (stops, *([] if stops[1:] else stops)):
        write_json(path, {**generation, "eos_token_id": stops if stops[1:] else stops[0]})
