"""Reads a GGUF file: its fields at once, and its tensors as float32, one at a time.

The package `gguf` (the extra of that name) parses the file. It checks little, so whatever it raises
on a damaged file becomes one error that says what to do.
"""

from pathlib import Path
from typing import Any

import numpy as np

from sdpo_jax.errors import UserError


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
        open_file = _reader()
        try:
            reader = open_file(self.path)
            if reader.byte_order == "S":
                raise ValueError("the bytes of its numbers are swapped")
            for tensor in reader.tensors:
                if 0 in (tensor.shape.size, tensor.n_elements):
                    raise ValueError(f"tensor {tensor.name} is empty")
            self.fields: dict[str, Any] = {n: f.contents() for n, f in reader.fields.items()}
        except Exception as error:  # a damaged file makes the reader raise almost anything
            raise UserError(
                f"{self.path}: expected a little-endian GGUF file of version 2 or 3, undamaged "
                f"({error}); fetch it again, or update the package gguf, which reads it"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        parts = self.fields.get("split.count", 0)
        if parts not in (0, 1):
            raise UserError(
                f"{self.path}: one of {parts} parts of a model; merge them first, for instance "
                "with llama.cpp's `llama-gguf-split --merge`"
            )

    @property
    def tensors(self) -> set[str]:
        """The names of all tensors."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, `[out, in]` for a matrix; the file lists the row length first."""
        if name not in self._tensors:
            raise UserError(f"{self.path}: tensor {name} is missing; is this a whole model?")
        return tuple(reversed(self._tensors[name].shape.tolist()))

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Reads a tensor as float32."""
        from gguf import dequantize

        shape, tensor = self.shape(name), self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{self.path}: tensor {name} is in quantization {tensor.tensor_type.name}, which "
                "the package gguf does not dequantize; use another quantization of this model "
                "(Q8_0, Q4_K, F16, ...), or a newer gguf"
            ) from error
        return np.asarray(values, np.float32).reshape(shape)


def _reader() -> Any:
    """The reader class of the package `gguf`."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: pip install 'sdpo-jax[gguf]'") from error

    class Reader(GGUFReader):
        """Slices a plain array: those of np.memmap triple the time that a vocabulary takes."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    return Reader
