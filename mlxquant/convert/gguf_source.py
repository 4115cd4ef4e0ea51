"""A .gguf file seen as a Hugging Face folder: decoded rows in Hugging Face order, config and tokenizer rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.codecs.ggml import decode_rows
from mlxquant.convert.gather import rows
from mlxquant.convert.sources import header_hash
from mlxquant.errors import UnsupportedError
from mlxquant.families.gguf import hf_config
from mlxquant.families.gguf_table import ROPE_TENSORS
from mlxquant.families.gguf_tensors import hf_tensors
from mlxquant.files.gguf_file import GGUFFile
from mlxquant.tensors import TensorSpec

Array = np.ndarray[Any, Any]

# The dtype of what stays float. Block scales in GGUF are float16, and bfloat16 would round them as coarsely as an
# 8-bit format does; values that do not fit are refused by name when they come.
DTYPE = "float16"
FLOATS = ("F32", "F16", "BF16", "F64")


class Blocks:
    """The file's own tensors, decoded to float32: the Source that a GGUF file's layout is carried out on."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.path = file.path
        self.config: dict[str, Any] = {}
        self.specs: Mapping[str, TensorSpec] = {n: TensorSpec(n, t.shape, "F32") for n, t in file.tensors.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        tensor = self.file.tensors[name]
        return decode_rows(self.file.read_rows(name, start, stop), tensor.type_name, tensor.shape[-1])


class RawBlocks(Blocks):
    """The same tensors with their blocks as they are: rows of bytes."""

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        self.specs = {n: TensorSpec(n, (*t.shape[:-1], t.row_bytes), "U8") for n, t in file.tensors.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        return self.file.read_rows(name, start, stop)


class GGUFSource:
    """Every tensor is handed out as float32, whatever its blocks are: decoded once, rounded once by the codec.

    `quantized`: the block type of each tensor that has one; its rows can be had as blocks too.
    """

    def __init__(self, path: Path, origin: dict[str, Any] | None = None) -> None:
        self.path = path
        self.file = GGUFFile(path)
        self.weight_files: tuple[Path, ...] = self.file.parts
        shapes = {name: tensor.shape for name, tensor in self.file.tensors.items()}
        self._blocks, self._raw = Blocks(self.file), RawBlocks(self.file)
        self._targets = hf_tensors(self.file.metadata, shapes)
        self.config: dict[str, Any] = hf_config(self.file.metadata, shapes, *self._rope())
        self.config["torch_dtype"] = DTYPE
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, target.shape, target.dtype) for name, target in self._targets.items()
        }
        self.quantized: Mapping[str, str] = {
            name: type_name
            for name, target in self._targets.items()
            if (type_name := self.file.tensors[target.pieces[0].source].type_name) not in FLOATS
        }
        types = sorted({tensor.type_name for tensor in self.file.tensors.values()})
        self.origin = {"format": "gguf", "types": types, **(origin or {"name": path.name})} | header_hash(self.specs)

    @property
    def front_bytes(self) -> int:
        """How much of the file config and specs were read from: up to the first tensor, or the end of rope factors."""
        tensors = self.file.tensors
        factors = [tensors[name].offset + tensors[name].nbytes for name in ROPE_TENSORS if name in tensors]
        return max(factors, default=min(tensor.offset for tensor in tensors.values()))

    def _rope(self) -> tuple[list[float] | None, tuple[list[float], list[float]] | None]:
        """Llama 3's rope factors and Phi-3's, long and short: tensors here, entries of config.json there."""
        names = [name for name in ROPE_TENSORS if name in self.file.tensors]
        found = {name: [float(x) for x in self._blocks.read_rows(name, 0, 1)[0]] for name in names}
        freqs, long, short = (found.get(name) for name in ROPE_TENSORS)
        return freqs, None if long is None or short is None else (long, short)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """float32 (stop - start, width), rows, norms and experts as Hugging Face or MLX has them."""
        return rows(self._blocks, self._targets[name], start, stop)

    def read_blocks(self, name: str, start: int, stop: int) -> Array:
        """uint8 (stop - start, row_bytes): the same rows as they lie in the file.

        Raises UnsupportedError for a tensor that is not made of whole rows of the file's.
        """
        target, tensor = self._targets[name], self.file.tensors[self._targets[name].pieces[0].source]
        if target.change not in ("none", "halves"):
            raise UnsupportedError(f"{name}: its blocks cannot be taken over", hint=f"use --set '{name}=keep'")
        raw = replace(target, shape=(*target.shape[:-1], tensor.row_bytes), dtype="U8")
        return rows(self._raw, raw, start, stop)

    def sidecars(self) -> dict[str, bytes]:
        from mlxquant.families.gguf_tokenizer import tokenizer_files

        return tokenizer_files(self.file.metadata)
