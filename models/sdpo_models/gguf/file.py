"""Reads a GGUF file: its fields at once, and its tensors as float32, one at a time.

The container format is parsed here, so that errors about a damaged file name the tensor at which it
ends. The blocks of a quantization are decoded by the package `gguf` (the extra of that name).
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdpo_jax.errors import UserError

_SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
"""GGUF's type numbers of fields to numpy types; strings (8) and arrays (9) are read apart."""
_STRING, _ARRAY = 8, 9
_AGAIN = "the file is truncated or damaged; fetch it again"


class _TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    """`[out, in]`, as in Hugging Face; the file lists the row length first."""
    kind: int
    offset: int
    """From the start of the file."""


class GgufFile:
    """A GGUF file; the constructor reads the fields, `read` a tensor.

    Raises:
      UserError: the file is missing, not GGUF, damaged, or one part of a split model, or a tensor
        has a quantization that is not supported.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file; expected a model in GGUF format")
        try:
            self._data = np.memmap(self.path, mode="r", dtype=np.uint8)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise UserError(f"{self.path}: cannot be read ({error}); {_AGAIN}") from error
        self.fields: dict[str, Any] = {}
        self._tensors: dict[str, _TensorInfo] = {}
        self._read_head(_Cursor(self.path, self._data.data))
        parts = self.fields.get("split.count", 0)
        if parts not in (0, 1):
            raise UserError(
                f"{self.path}: one of {parts} parts of a model; merge them first, for instance "
                "with llama.cpp's `llama-gguf-split --merge`"
            )

    def _read_head(self, cursor: "_Cursor") -> None:
        magic, version, tensors, fields = cursor.unpack("<4sIQQ", "header")
        if magic != b"GGUF" or version not in (2, 3):
            raise UserError(
                f"{self.path}: expected a little-endian GGUF file of version 2 or 3, "
                f"got magic {magic!r}, version {version}"
            )
        for _ in range(fields):
            name = cursor.string("the name of a field")
            (kind,) = cursor.unpack("<I", name)
            self.fields[name] = cursor.value(kind, name)
        infos = list(_tensor_infos(cursor, tensors))
        alignment = self.fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise UserError(f"{self.path}: general.alignment is {alignment!r}; {_AGAIN}")
        begin = -(-cursor.at // alignment) * alignment
        for name, info in infos:
            if name in self._tensors:
                raise UserError(f"{self.path}: tensor {name} stands there twice; {_AGAIN}")
            self._tensors[name] = info._replace(offset=begin + info.offset)
            self._block_rows(name)

    @property
    def tensors(self) -> set[str]:
        """The names of all tensors."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, `[out, in]` for a matrix."""
        return self._info(name).shape

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Reads a tensor as float32."""
        info, (dequantize, kinds, _) = self._info(name), _gguf()
        try:
            values = dequantize(self._block_rows(name), kinds(info.kind))
        except NotImplementedError as error:
            raise self._unsupported(name, kinds(info.kind).name) from error
        return np.asarray(values, np.float32).reshape(info.shape)

    def _info(self, name: str) -> _TensorInfo:
        if name not in self._tensors:
            raise UserError(f"{self.path}: tensor {name} is missing; is this a whole model?")
        return self._tensors[name]

    def _block_rows(self, name: str) -> np.ndarray[Any, Any]:
        """The bytes of a tensor, `[rows, bytes per row]`."""
        info, (_, kinds, sizes) = self._tensors[name], _gguf()
        try:
            block, width = sizes[kinds(info.kind)]
        except (KeyError, ValueError) as error:
            raise self._unsupported(name, f"number {info.kind}") from error
        rows, length = math.prod(info.shape[:-1]), info.shape[-1]
        if length % block:
            raise UserError(
                f"{self.path}: tensor {name} has rows of {length} values, expected a multiple of "
                f"the quantization's block of {block}; {_AGAIN}"
            )
        end = info.offset + rows * (length // block) * width
        if end > len(self._data):
            raise UserError(
                f"{self.path}: tensor {name} ends at byte {end}, the file at byte "
                f"{len(self._data)}; {_AGAIN}"
            )
        return self._data[info.offset : end].reshape(rows, -1)

    def _unsupported(self, name: str, kind: str) -> UserError:
        return UserError(
            f"{self.path}: tensor {name} is in quantization {kind}, which the package gguf does "
            "not dequantize; use another quantization of this model (Q8_0, Q4_K, F16, ...), or a "
            "newer gguf"
        )


def _gguf() -> tuple[Any, Any, Any]:
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: pip install 'sdpo-jax[gguf]'") from error
    return dequantize, GGMLQuantizationType, GGML_QUANT_SIZES


def _tensor_infos(cursor: "_Cursor", count: int) -> Iterator[tuple[str, _TensorInfo]]:
    for _ in range(count):
        name = cursor.string("the name of a tensor")
        (dimensions,) = cursor.unpack("<I", name)
        shape = cursor.unpack(f"<{dimensions}Q", name) if dimensions <= 4 else ()
        if not math.prod(shape) or not shape:
            raise UserError(f"{cursor.path}: tensor {name} has no valid shape; {_AGAIN}")
        kind, offset = cursor.unpack("<IQ", name)
        yield name, _TensorInfo(tuple(reversed(shape)), kind, offset)


class _Cursor:
    """A read position in the file; if the file ends too early, the error names what was read."""

    def __init__(self, path: Path, data: memoryview):
        self.path = path
        self.at = 0
        self._data = data

    def take(self, count: int, what: str) -> memoryview:
        if count > len(self._data) - self.at:
            raise UserError(
                f"{self.path}: the file ends inside {what}, at byte {len(self._data)}; {_AGAIN}"
            )
        self.at += count
        return self._data[self.at - count : self.at]

    def unpack(self, layout: str, what: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))

    def string(self, what: str) -> str:
        (length,) = self.unpack("<Q", what)
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: {what} is not UTF-8; {_AGAIN}") from error

    def value(self, kind: int, what: str) -> Any:
        """Reads a field's value: a Python scalar, a string, or a list of either."""
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            of, count = self.unpack("<IQ", what)
            if of == _STRING:
                return [self.string(what) for _ in range(count)]
            return self._numbers(of, count, what).tolist()
        return self._numbers(kind, 1, what)[0].item()

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray[Any, Any]:
        if kind not in _SCALARS:
            raise UserError(f"{self.path}: field {what} has unknown type {kind}; {_AGAIN}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
