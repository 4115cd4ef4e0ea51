"""One GGUF file: metadata as plain Python values, and raw rows of blocks.

The format is ggml's docs/gguf.md. `gguf.GGUFReader` maps the file, believes its counts and makes a numpy view
for each token, so the header is walked here instead (GGUFReader is the tests' oracle): forward only, each
length checked against what is left of the file before anything is allocated.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.files.reading import InputFile, shown

# What a header may hold. The largest real ones (262k tokens and as many merges) are 20 MB with 1.3M elements.
HEADER_LIMIT_BYTES = 100_000_000
ELEMENT_LIMIT = 4_000_000
COUNT_LIMIT = 100_000
DIMENSION_LIMIT = 2**32

# ggml_type: number -> name, elements in a block, bytes of a block (ggml.h and ggml-common.h).
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
_BLOCKS = {name: (elements, nbytes) for name, elements, nbytes in GGML_TYPES.values()}

# gguf_metadata_value_type of the scalars -> struct format
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFTensor:
    """`shape` is outermost first (GGUF stores it the other way round); `offset` is from the file's start."""

    shape: tuple[int, ...]
    type_name: str
    offset: int
    nbytes: int

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1]) if self.shape else 1

    @property
    def row_bytes(self) -> int:
        elements, nbytes = _BLOCKS[self.type_name]
        return self.width // elements * nbytes


class GGUFFile:
    """`metadata`: {key: int, float, bool, str or list}; `tensors`: {name: GGUFTensor} in file order.

    Holds no descriptor between reads, so there is nothing to close.
    """

    def __init__(self, path: Path | str) -> None:
        """Reads the header. Raises SourceError, UnsupportedError for versions and types we do not know."""
        self.path = Path(path)
        self._file = InputFile(self.path)
        with self._file.open() as fd, os.fdopen(os.dup(fd), "rb", buffering=2**20) as stream:
            walk = _Walk(stream, self.path, self._file.nbytes)
            n_tensors, n_keys = walk.preamble()
            self.metadata: dict[str, Any] = walk.metadata(n_keys)
            _refuse_split(self.path, self.metadata)
            self.tensors: dict[str, GGUFTensor] = walk.tensors(n_tensors)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows start..stop as raw blocks, uint8 (stop - start, row_bytes).

        Raises SourceError when the file lacks the tensor or the bytes, ValueError for rows that do not exist.
        """
        if name not in self.tensors:
            raise SourceError(f"{self.path}: has no tensor {shown(name)}")
        tensor = self.tensors[name]
        if not 0 <= start <= stop <= tensor.rows:
            raise ValueError(f"rows {start}..{stop} of {name}, which has {tensor.rows}")
        rows = np.empty((stop - start, tensor.row_bytes), np.uint8)
        self._file.read_into(tensor.offset + start * tensor.row_bytes, rows, f"tensor {shown(name)}")
        return rows


class _Walk:
    """Goes through the header once, front to back."""

    def __init__(self, stream: BinaryIO, path: Path, file_bytes: int) -> None:
        self._read = stream.read
        self._path = path
        self._file_bytes = file_bytes
        self._left = self._budget = min(file_bytes, HEADER_LIMIT_BYTES)
        self._elements_left = ELEMENT_LIMIT
        self._alignment = 32

    def preamble(self) -> tuple[int, int]:
        """(tensors, metadata keys)."""
        if self._left < 24 or self._take(4, "the magic") != b"GGUF":
            raise self._wrong("does not begin with GGUF; not a GGUF file")
        version = self._number("I", "the version")
        if version & 0xFFFF == 0:
            raise UnsupportedError(f"{self._path}: big-endian GGUF", hint="take the little-endian file")
        if version not in (2, 3):
            raise UnsupportedError(f"{self._path}: GGUF version {version}, expected 2 or 3")
        n_tensors, n_keys = self._number("Q", "the counts"), self._number("Q", "the counts")
        # The smallest tensor entry takes 24 bytes, the smallest key with its value 13.
        for count, least, what in ((n_tensors, 24, "tensors"), (n_keys, 13, "metadata keys")):
            if count > COUNT_LIMIT or count * least > self._left:
                raise self._wrong(f"claims {count} {what}, more than its {self._file_bytes} bytes can hold")
        return n_tensors, n_keys

    def metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self._string("a metadata key")
            if key in values:
                raise self._wrong(f"has the metadata key {shown(key)} twice")
            kind = self._number("I", f"key {shown(key)}")
            values[key] = self._value(kind, key)
            if key == "general.alignment":
                self._set_alignment(kind, values[key])
        return values

    def tensors(self, count: int) -> dict[str, GGUFTensor]:
        found: dict[str, GGUFTensor] = {}
        for _ in range(count):
            name = self._string("a tensor name")
            if name in found:
                raise self._wrong(f"has the tensor {shown(name)} twice")
            found[name] = self._tensor(name)
        header_bytes = self._budget - self._left
        base = -(-header_bytes // self._alignment) * self._alignment
        placed = {n: GGUFTensor(t.shape, t.type_name, base + t.offset, t.nbytes) for n, t in found.items()}
        self._check_places(placed)
        return placed

    def _tensor(self, name: str) -> GGUFTensor:
        what = f"tensor {shown(name)}"
        n_dims = self._number("I", what)
        if n_dims > 4:
            raise self._wrong(f"{what} has {n_dims} dimensions, expected at most 4")
        shape = tuple(self._number("Q", what) for _ in range(n_dims))[::-1]
        kind, offset = self._number("I", what), self._number("Q", what)
        if kind not in GGML_TYPES:
            raise UnsupportedError(
                f"{self._path}: {what} has ggml type {kind}, which this version does not know",
                hint="take a file of another quantization, or a newer mlxquant",
            )
        type_name, elements, nbytes = GGML_TYPES[kind]
        width = shape[-1] if shape else 1
        if max(shape, default=1) > DIMENSION_LIMIT or width % elements:
            raise self._wrong(f"{what} has shape {shape}, which {type_name} blocks of {elements} cannot hold")
        if offset % self._alignment:
            raise self._wrong(f"{what} begins at {offset}, expected a multiple of {self._alignment}")
        return GGUFTensor(shape, type_name, offset, math.prod(shape) // elements * nbytes)

    def _check_places(self, tensors: dict[str, GGUFTensor]) -> None:
        end, before = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if tensor.offset < end:
                raise self._wrong(f"tensor {shown(name)} overlaps tensor {shown(before)}")
            end, before = tensor.offset + tensor.nbytes, name
            if end > self._file_bytes:
                raise SourceError(
                    f"{self._path}: tensor {shown(name)} ends at byte {end}, the file has {self._file_bytes}",
                    hint="the file is cut short: download it again",
                )

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], f"key {shown(key)}")
        if kind == _STRING:
            return self._string(f"key {shown(key)}")
        if kind == _ARRAY:
            return self._array(key)
        raise self._wrong(f"key {shown(key)} has value type {kind}, expected 0 to 12")

    def _array(self, key: str) -> list[Any]:
        what = f"key {shown(key)}"
        kind, count = self._number("I", what), self._number("Q", what)
        if count > self._elements_left:
            raise self._wrong(f"{what} has {count} elements, expected at most {ELEMENT_LIMIT} in all")
        self._elements_left -= count
        if kind == _STRING:
            return [self._string(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._wrong(f"{what} is an array of value type {kind}, expected numbers or strings")
        form = _SCALARS[kind]
        return list(struct.unpack(f"<{count}{form}", self._take(count * struct.calcsize(form), what)))

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(form), what))[0]

    def _string(self, what: str) -> str:
        (length,) = _U64.unpack(self._take(8, what))
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as exc:
            raise self._wrong(f"{what} holds text that is not UTF-8") from exc

    def _take(self, count: int, what: str) -> bytes:
        if count > self._left:
            raise self._wrong(
                f"{what} wants {count} bytes, {self._left} are left"
                + (" of the 100 MB a header may have" if self._budget < self._file_bytes else " in the file")
            )
        data = self._read(count)
        if len(data) < count:
            raise self._wrong(f"ends inside {what}")
        self._left -= count
        return data

    def _set_alignment(self, kind: int, value: Any) -> None:
        if kind != _UINT32 or value == 0 or value & (value - 1):
            raise self._wrong(f"general.alignment is {shown(value)}, expected a 32-bit power of two")
        self._alignment = value

    def _wrong(self, found: str) -> SourceError:
        return SourceError(f"{self._path}: {found}")


def _refuse_split(path: Path, metadata: dict[str, Any]) -> None:
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedError(
            f"{path}: is one of the {parts} parts of a split GGUF, which are not read",
            hint="join them first: llama-gguf-split --merge FIRST-PART OUT.gguf",
        )
