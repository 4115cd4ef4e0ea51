"""A .gguf file seen as a Hugging Face folder: decoded rows in Hugging Face order, config and tokenizer rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.codecs.ggml import decode_rows
from mlxquant.convert.gather import rows
from mlxquant.convert.sources import header_hash
from mlxquant.families.gguf import ROPE_FREQS, hf_config
from mlxquant.families.gguf_tensors import hf_tensors
from mlxquant.files.gguf_file import GGUFFile
from mlxquant.tensors import TensorSpec

Array = np.ndarray[Any, Any]

# The dtype of what stays float. Block scales in GGUF are float16, and bfloat16 would round them as coarsely as an
# 8-bit format does; values that do not fit are refused by name when they come.
DTYPE = "float16"


class Blocks:
    """The file's own tensors, decoded to float32: the Source that a GGUF file's layout is carried out on."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.path = file.path
        self.config: dict[str, Any] = {}
        self.specs: Mapping[str, TensorSpec] = {n: TensorSpec(n, t.shape, "F32") for n, t in file.tensors.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        tensor = self._file.tensors[name]
        return decode_rows(self._file.read_rows(name, start, stop), tensor.type_name, tensor.shape[-1])


class GGUFSource:
    """Every tensor is handed out as float32, whatever its blocks are: decoded once, rounded once by the codec."""

    def __init__(self, path: Path, origin: dict[str, Any] | None = None) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self.weight_files: tuple[Path, ...] = self._file.parts
        shapes = {name: tensor.shape for name, tensor in self._file.tensors.items()}
        self._blocks = Blocks(self._file)
        self._targets = hf_tensors(self._file.metadata, shapes)
        self.config: dict[str, Any] = hf_config(self._file.metadata, shapes, self._rope_freqs())
        self.config["torch_dtype"] = DTYPE
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, target.shape, target.dtype) for name, target in self._targets.items()
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
        return [float(x) for x in self._blocks.read_rows(ROPE_FREQS, 0, 1)[0]]

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """float32 (stop - start, width), rows, norms and experts as Hugging Face or MLX has them."""
        return rows(self._blocks, self._targets[name], start, stop)

    def sidecars(self) -> dict[str, bytes]:
        from mlxquant.families.gguf_tokenizer import tokenizer_files

        return tokenizer_files(self._file.metadata)
