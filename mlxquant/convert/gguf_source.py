"""A .gguf file seen as a Hugging Face folder: decoded rows in Hugging Face order, config and tokenizer rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.codecs.ggml import decode_rows
from mlxquant.convert.sources import header_hash
from mlxquant.families.gguf import ROPE_FREQS, Origin, hf_config, hf_tensors
from mlxquant.files.gguf_file import GGUFFile
from mlxquant.tensors import TensorSpec

Array = np.ndarray[Any, Any]

# The dtype of what stays float. Block scales in GGUF are float16, and bfloat16 would round them as coarsely as an
# 8-bit format does; values that do not fit are refused by name when they come.
DTYPE = "float16"


class GGUFSource:
    """Every tensor is handed out as float32, whatever its blocks are: decoded once, rounded once by the codec."""

    def __init__(self, path: Path, origin: dict[str, Any] | None = None) -> None:
        self.path = path
        self.weight_files: tuple[Path, ...] = (path,)
        self._file = GGUFFile(path)
        shapes = {name: tensor.shape for name, tensor in self._file.tensors.items()}
        self._origins = hf_tensors(self._file.metadata, shapes)
        self.config: dict[str, Any] = hf_config(self._file.metadata, shapes, self._rope_freqs())
        self.config["torch_dtype"] = DTYPE
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, from_.shape, "F32") for name, from_ in self._origins.items()
        }
        types = sorted({tensor.type_name for tensor in self._file.tensors.values()})
        self.origin = {"format": "gguf", "types": types, **(origin or {"name": path.name})} | header_hash(self.specs)

    @property
    def front_bytes(self) -> int:
        """How much of the file config and specs were read from: up to the first tensor, or the end of rope_freqs."""
        tensors = self._file.tensors
        if ROPE_FREQS in tensors:
            return tensors[ROPE_FREQS].offset + tensors[ROPE_FREQS].nbytes
        return min(tensor.offset for tensor in tensors.values())

    def _rope_freqs(self) -> list[float] | None:
        if ROPE_FREQS not in self._file.tensors:
            return None
        return [float(x) for x in self._decode(ROPE_FREQS, 0, 1)[0]]

    def _decode(self, name: str, start: int, stop: int) -> Array:
        tensor = self._file.tensors[name]
        return decode_rows(self._file.read_rows(name, start, stop), tensor.type_name, tensor.shape[-1])

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """float32 (stop - start, width), in Hugging Face's row order."""
        origin = self._origins[name]
        if not origin.heads:
            return self._decode(origin.tensor, start, stop)
        if len(origin.shape) == 1:  # a bias: its one row holds what a weight has in its rows
            return self._decode(origin.tensor, 0, 1)[:, rotary_rows(origin, 0, origin.shape[0])]
        wanted = rotary_rows(origin, start, stop)
        first, last = int(wanted.min()), int(wanted.max()) + 1
        rows: Array = self._decode(origin.tensor, first, last)[wanted - first]
        return rows

    def sidecars(self) -> dict[str, bytes]:
        from mlxquant.families.gguf_tokenizer import tokenizer_files

        return tokenizer_files(self._file.metadata)


def rotary_rows(origin: Origin, start: int, stop: int) -> Array:
    """The GGUF rows that are Hugging Face's rows start..stop.

    llama.cpp puts the two halves of each head's rotary pairs side by side (conversion/llama.py, permute): Hugging
    Face's row (half, i) of a head lies there at 2 * i + half.
    """
    head_dim = origin.shape[0] // origin.heads
    row = np.arange(start, stop)
    head, inside = row // head_dim, row % head_dim
    half, i = inside // (head_dim // 2), inside % (head_dim // 2)
    return np.asarray(head * head_dim + 2 * i + half)
