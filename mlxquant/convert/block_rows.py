"""Where the rows of a planned GGUF tensor come from: a checkpoint's weights, or another GGUF file's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxquant.codecs.ggml import decode_rows, encode_rows, row_without_scale
from mlxquant.convert.gather import mxfp4_rows, rows, wide_rows
from mlxquant.convert.sources import OpenSource
from mlxquant.errors import SourceError
from mlxquant.families.layout import Change
from mlxquant.files.gguf_file import GGUFFile
from mlxquant.files.imatrix import Imatrix
from mlxquant.plan.gguf_plan import PlannedBlocks
from mlxquant.plan.gguf_types import FLOAT_TYPES
from mlxquant.tensors import DTYPES, TensorSpec

Array = np.ndarray[Any, Any]

# Changes of the numbers themselves, which llama.cpp's converter makes in float32.
_WIDE: tuple[Change, ...] = ("add_one", "subtract_one", "neg_exp", "log_neg")


class BlockRows(Protocol):
    path: Path
    weight_files: tuple[Path, ...]
    origin: dict[str, Any]

    def read(self, tensor: PlannedBlocks, start: int, stop: int) -> Array:
        """Rows start..stop: blocks as uint8 where the tensor is copied or `source_type` is a block type, else floats.

        Raises SourceError naming the file and the tensor when the bytes are not there.
        """
        ...

    def nbytes(self, tensor: PlannedBlocks) -> int:
        """Of all its rows, as `read` hands them out."""
        ...


class CheckpointRows:
    """Of a Hugging Face folder or an MLX folder."""

    def __init__(self, source: OpenSource) -> None:
        self._source = source
        self.path, self.weight_files, self.origin = source.path, source.weight_files, source.origin

    def read(self, tensor: PlannedBlocks, start: int, stop: int) -> Array:
        if tensor.values:
            return np.array([tensor.values], np.float32)
        if tensor.copied:
            return mxfp4_rows(self._source, tensor.target, start, stop)
        if tensor.target.change in _WIDE:
            return wide_rows(self._source, tensor.target, start, stop)
        return rows(self._source, tensor.target, start, stop)

    def nbytes(self, tensor: PlannedBlocks) -> int:
        if tensor.copied:
            return tensor.nbytes
        wide = tensor.values or tensor.target.change in _WIDE
        return tensor.size * DTYPES["F32" if wide else tensor.target.dtype].itemsize


class GGUFRows:
    """Of a .gguf file of any architecture, whole or split, its own names kept."""

    def __init__(self, path: Path, origin: dict[str, Any] | None = None) -> None:
        from mlxquant.convert.sources import header_hash

        self.file = GGUFFile(path)
        self.path, self.weight_files = path, self.file.parts
        specs = {name: TensorSpec(name, t.shape, t.type_name) for name, t in self.file.tensors.items()}
        self.origin = {"format": "gguf", **(origin or {"name": path.name})} | header_hash(specs)

    @property
    def front_bytes(self) -> int:
        """How much of the file the header takes."""
        return min((tensor.offset for tensor in self.file.tensors.values()), default=0)

    def read(self, tensor: PlannedBlocks, start: int, stop: int) -> Array:
        raw = self.file.read_rows(tensor.name, start, stop)
        return raw.view(DTYPES[tensor.source_type].numpy) if tensor.source_type in FLOAT_TYPES else raw

    def nbytes(self, tensor: PlannedBlocks) -> int:
        return self.file.tensors[tensor.name].nbytes


def encode_blocks(tensor: PlannedBlocks, imatrix: Imatrix | None, raw: Array, start: int) -> Array:
    """What `BlockRows.read` gave, from row `start`, as the planned type's blocks: uint8 (rows, row_bytes).

    Rows of a stack of experts each use their own expert's importance. Raises SourceError for NaN and infinity.
    """
    if tensor.copied:
        _refuse_scales(tensor, raw, start)
        return raw
    code = _code(tensor, raw)
    if code not in DTYPES:
        raw, code = decode_rows(raw, code, tensor.target.shape[-1]), "F32"
    entry = imatrix.importance(tensor.name, tensor.target.shape) if imatrix and tensor.importance else None
    if entry is None or len(entry) == 1:
        return _encode(tensor, raw, code, None if entry is None else entry[0], start)
    height = tensor.target.shape[-2]
    parts = [
        _encode(
            tensor, raw[max(first - start, 0) : first + height - start], code, entry[first // height], max(first, start)
        )
        for first in range(start // height * height, start + len(raw), height)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _refuse_scales(tensor: PlannedBlocks, blocks: Array, start: int) -> None:
    if (row := row_without_scale(blocks, tensor.type_name)) >= 0:
        raise SourceError(
            f"{tensor.name}: row {start + row}: a scale that is NaN or infinite", hint="download the file again"
        )


def _code(tensor: PlannedBlocks, raw: Array) -> str:
    """The dtype code, or block type, of rows as they were read."""
    if raw.dtype == np.float32:
        return "F32"
    return tensor.source_type


def _encode(tensor: PlannedBlocks, raw: Array, code: str, importance_I: Array | None, start: int) -> Array:
    from mlxquant.codecs.floats import NonFiniteError

    try:
        blocks = encode_rows(raw, code, tensor.type_name, importance_I)
    except NonFiniteError as error:
        raise SourceError(
            f"{tensor.name}: row {start + error.row}: {error.reason}",
            hint="download the file again; if a value is only too large for F16, use --type BF16 or F32",
        ) from error
    if (row := row_without_scale(blocks, tensor.type_name)) >= 0:
        raise SourceError(
            f"{tensor.name}: row {start + row}: weights{'' if importance_I is None else ', or their importance,'} "
            f"too large for the float16 scales of {tensor.type_name}",
            hint=f"download the file again, or keep the tensor: --tensor-type '{tensor.name}=BF16'",
        )
    return blocks
