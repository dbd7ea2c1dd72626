"""Files of a model folder: JSON objects, and tensors in safetensors, read by slices.

A file of tensors is opened for each slice that is read and closed again. While it is open its pages
are memory-mapped, so everything that was read from it would count towards the host's memory.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdpo_jax.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16", "F64")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: the file cannot be read, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON ({error}); copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object; copy or download it again")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented as transformers does."""
    path.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to that gets its name `folder` in the end: completely or not at all.

    Raises:
      UserError: `folder` exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: expected a new or empty folder; nothing was overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        unfinished = Path(beside) / "unfinished"
        unfinished.mkdir()  # by the user's umask: `beside` itself is open to its owner alone
        yield unfinished
        unfinished.replace(folder)


class StoredTensor(NamedTuple):
    """A tensor in a file: where it is, its shape and its type."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it, such as F32


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Lists every tensor of a folder; reads only the headers of its files.

    Raises:
      UserError: no weights, a shard missing or damaged, or an index that does not fit its shards.
    """
    if (folder / WEIGHTS).is_file():
        return _headers(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        advice = (
            "; the folder has .bin files: load it with transformers and save_pretrained() it again"
        )
        raise UserError(
            f"{folder / WEIGHTS}: no weights there, nor {INDEX}; expected safetensors"
            + (advice if any(folder.glob("*.bin")) else "")
        )
    weight_map, found = _read_index(folder / INDEX), dict[str, StoredTensor]()
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / INDEX}: names shard {name}, which is not in the folder; "
                "download the missing file"
            )
        found |= _headers(folder / name)
    for tensor, name in weight_map.items():
        if tensor not in found or found[tensor].path.name != name:
            raise UserError(
                f"{folder / INDEX}: says that tensor {tensor} is in {name}, where it is not; "
                "index and shards are of different checkpoints: download the folder again"
            )
    return found


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no readable index with a weight_map ({error!r})") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: expected weight_map to name at least one tensor")
    for name in weight_map.values():
        # A path could name files outside the folder.
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{path}: shard {name!r} is not the name of a file in the folder")
    return weight_map


def _headers(path: Path) -> dict[str, StoredTensor]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {
            name: StoredTensor(path, tuple(tensor.get_shape()), tensor.get_dtype())
            for name, tensor in slices.items()
        }


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file ({error}); cut off or damaged: "
            "download or write it again"
        ) from error


def read_slice(stored: StoredTensor, name: str, index: tuple[slice, ...]) -> np.ndarray[Any, Any]:
    """Reads a slice of a tensor in the file's dtype, and copies nothing else."""
    with _opened(stored.path) as file:
        return np.asarray(file.get_slice(name)[index])


class PlannedTensor(NamedTuple):
    """A tensor to be written, whose value is fetched when its shard is written."""

    name: str
    bytes: int
    fetch: Callable[[], np.ndarray[Any, Any]]


def write_shards(folder: Path, tensors: Iterable[PlannedTensor], *, max_shard_bytes: int) -> None:
    """Writes `model.safetensors`, or several shards and their index.

    Files are renamed to their final names after all are written, so that a reader sees either no
    checkpoint or a complete one. A tensor larger than `max_shard_bytes` gets a shard to itself.

    Raises:
      UserError: the folder already holds weights; two checkpoints must never mix.
    """
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(p.name for p in folder.glob("model*.safetensors*") if p.suffix != ".partial")
    if present:
        raise UserError(f"{folder}: already holds {present[0]}; expected a folder without weights")
    shards = _divide(tensors, max_shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [WEIGHTS]
    files = names + ([INDEX] if len(shards) > 1 else [])
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_one(folder / f"{name}.partial", shard)
        if len(shards) > 1:
            write_json(folder / f"{INDEX}.partial", _index(names, shards))
        for name in files:
            (folder / f"{name}.partial").replace(folder / name)
    finally:
        for name in files:
            (folder / f"{name}.partial").unlink(missing_ok=True)


def _divide(tensors: Iterable[PlannedTensor], max_shard_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    return shards


def _write_one(path: Path, shard: list[PlannedTensor]) -> None:
    from safetensors.numpy import save_file

    save_file({t.name: t.fetch() for t in shard}, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def _index(names: list[str], shards: list[list[PlannedTensor]]) -> dict[str, Any]:
    weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    total = sum(t.bytes for shard in shards for t in shard)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
