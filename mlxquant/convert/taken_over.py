"""Rows of an MLX target as blocks of the GGUF file they come from, and those blocks as MLX arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxquant.codecs.floats import NonFiniteError
from mlxquant.codecs.ggml import block
from mlxquant.codecs.repack import repack
from mlxquant.convert.gather import rows
from mlxquant.errors import SourceError
from mlxquant.plan.plan import PlannedTensor
from mlxquant.tensors import TensorSpec

Array = np.ndarray[Any, Any]


class HasBlocks(Protocol):
    path: Path
    specs: Mapping[str, TensorSpec]

    def read_blocks(self, name: str, start: int, stop: int) -> Array: ...


class _Blocks:
    """A Source of rows of bytes, on which the layout of rows of weights is carried out."""

    def __init__(self, source: HasBlocks, type_name: str) -> None:
        self.path, self.config = source.path, dict[str, Any]()
        self.read_rows = source.read_blocks
        self.specs: Mapping[str, TensorSpec] = _Widths(source.specs, type_name)


class _Widths(dict[str, TensorSpec]):
    """Specs made as they are asked for: a model has thousands, a target a few."""

    def __init__(self, specs: Mapping[str, TensorSpec], type_name: str) -> None:
        super().__init__()
        self._specs, self._type_name = specs, type_name

    def __missing__(self, name: str) -> TensorSpec:
        shape = self._specs[name].shape
        return TensorSpec(name, (*shape[:-1], row_bytes(self._type_name, shape[-1])), "U8")


def row_bytes(type_name: str, width: int) -> int:
    elements, nbytes = block(type_name)
    return width // elements * nbytes


def block_rows(source: HasBlocks, tensor: PlannedTensor, start: int, stop: int) -> Array:
    """uint8 (stop - start, row_bytes) of a tensor with `repack`. Raises SourceError when the file is short."""
    type_name, shape = str(tensor.repack), tensor.target.shape
    target = replace(tensor.target, shape=(*shape[:-1], row_bytes(type_name, shape[-1])), dtype="U8")
    return rows(_Blocks(source, type_name), target, start, stop)


def repack_named(tensor: PlannedTensor, raw: Array, start: int) -> tuple[Array, ...]:
    """repack(), with the tensor's name added to what it complains of."""
    try:
        return repack(raw, str(tensor.repack), tensor.target.shape[-1])
    except NonFiniteError as error:
        raise SourceError(
            f"{tensor.name}: row {start + error.row}: {error.reason}", hint="download the file again"
        ) from error
