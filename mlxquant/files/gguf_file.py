"""One GGUF file, or all parts of a split one: metadata as plain Python values, and raw rows of blocks.

The format is ggml's docs/gguf.md. `gguf.GGUFReader` maps the file, believes its counts and makes a numpy view
for each token, so the header is walked here instead (GGUFReader is the tests' oracle): forward only, each
length checked against what is left of the file before anything is allocated.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.files.reading import InputFile, shown

# What a header may hold. The largest real ones (262k tokens and as many merges) are 20 MB with 1.3M elements.
HEADER_LIMIT_BYTES = 100_000_000
ELEMENT_LIMIT = 4_000_000
STRING_LIMIT_BYTES = 4_000_000  # chat templates take some 10 kB, and one odd letter makes Python keep four bytes each
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
BLOCKS = {name: (elements, nbytes) for name, elements, nbytes in GGML_TYPES.values()}

# gguf_metadata_value_type of the scalars -> struct format, which numpy knows, too
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY, _UINT32 = 7, 8, 9, 4
_FEW = 1000  # numbers that are lists for convenience; more stay numpy's, in as much room as they take in the file
_U64 = struct.Struct("<Q")
PARTS_LIMIT = 1000
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFTensor:
    """`shape` is outermost first (GGUF stores it the other way round); `offset` is from the file's start, and `part`
    is the file's place in `GGUFFile.parts`.
    """

    shape: tuple[int, ...]
    type_name: str
    offset: int
    nbytes: int
    part: int = 0

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1]) if self.shape else 1

    @property
    def row_bytes(self) -> int:
        elements, nbytes = BLOCKS[self.type_name]
        return self.width // elements * nbytes


class GGUFFile:
    """`metadata`: {key: int, float, bool, str or list}; `tensors`: {name: GGUFTensor} in file order; `parts`: the
    files, one unless the model is split: then the first part names the others, which must lie beside it.

    Holds no descriptor between reads, so there is nothing to close.
    """

    def __init__(self, path: Path | str) -> None:
        """Reads the headers. Raises SourceError, UnsupportedError for versions and types we do not know."""
        self.path = Path(path)
        self._files = [InputFile(self.path)]
        self.metadata, self._kinds, self.tensors = _read_header(self._files[0], 0)
        for part in _other_parts(self.path, self.metadata):
            self._add(InputFile(part))
        self.parts = tuple(file.path for file in self._files)
        total = self.metadata.get("split.tensors.count", len(self.tensors))
        if len(self.parts) > 1 and total != len(self.tensors):
            raise SourceError(f"{self.path}: its {len(self.parts)} parts hold {len(self.tensors)} of {total} tensors")

    def _add(self, file: InputFile) -> None:
        number = len(self._files)
        metadata, _, tensors = _read_header(file, number)
        if (metadata.get("split.no"), metadata.get("split.count")) != (number, self.metadata["split.count"]):
            raise SourceError(f"{file.path}: is not part {number + 1} of {self.path.name}", hint="download it again")
        if twice := sorted(tensors.keys() & self.tensors.keys()):
            raise SourceError(f"{file.path}: has the tensor {shown(twice[0])}, which an earlier part has as well")
        self._files.append(file)
        self.tensors |= tensors

    @property
    def typed(self) -> dict[str, Any]:
        """`metadata` with GGUF's own types: numpy scalars and arrays, bool, str, list[str], list[bool]."""
        return {key: _typed(value, *self._kinds[key]) for key, value in self.metadata.items()}

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
        file = self._files[tensor.part]
        file.read_into(tensor.offset + start * tensor.row_bytes, rows, f"tensor {shown(name)}")
        return rows


def _read_header(
    file: InputFile, part: int
) -> tuple[dict[str, Any], dict[str, tuple[int, int]], dict[str, GGUFTensor]]:
    with file.open() as fd, os.fdopen(os.dup(fd), "rb", buffering=2**20) as stream:
        walk = _Walk(stream, file.path, file.nbytes, part)
        n_tensors, n_keys = walk.preamble()
        metadata = walk.metadata(n_keys)
        return metadata, walk.kinds, walk.tensors(n_tensors)


def _other_parts(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """Of a split model, by the names that llama.cpp gives them (llama_split_path)."""
    count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if not isinstance(count, int) or count <= 1:
        return []
    name = _SPLIT_NAME.fullmatch(path.name)
    if count > PARTS_LIMIT or name is None or int(name["count"]) != count:
        raise SourceError(
            f"{path}: is one of {shown(count)} parts of a split model, expected a name like MODEL-00001-of-00003.gguf",
            hint="give the parts their names back",
        )
    others = [path.with_name(f"{name['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(2, count + 1)]
    if number != 0:
        raise SourceError(
            f"{path}: is part {shown(number)} of a split model, counted from 0",
            hint=f"give the first one, {name['stem']}-00001-of-{count:05d}.gguf",
        )
    if missing := [part for part in others if not part.is_file()]:
        raise SourceError(
            f"{missing[0]}: is missing; {path.name} is the first of {count} parts", hint="put all parts into one folder"
        )
    return others


def _typed(value: Any, kind: int, inner: int) -> Any:
    if kind in _SCALARS and kind != _BOOL:
        return _dtype(kind).type(value)
    if kind == _ARRAY and inner not in (_STRING, _BOOL):
        return np.array(value, _dtype(inner))
    return value


def _dtype(kind: int) -> np.dtype[Any]:
    return np.dtype(np.dtype(_SCALARS[kind]).str)  # Q alone is C's long long, which is not numpy's uint64 everywhere


class _Walk:
    """Goes through the header once, front to back."""

    def __init__(self, stream: BinaryIO, path: Path, file_bytes: int, part: int) -> None:
        self._read = stream.read
        self._path = path
        self._file_bytes = file_bytes
        self._left = self._budget = min(file_bytes, HEADER_LIMIT_BYTES)
        self._elements_left = ELEMENT_LIMIT
        self._alignment = 32
        self._part = part
        self.kinds: dict[str, tuple[int, int]] = {}  # key: (value type, type of an array's elements)

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
            self.kinds[key] = kind, kind
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
        placed = {name: replace(t, offset=base + t.offset) for name, t in found.items()}
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
        return GGUFTensor(shape, type_name, offset, math.prod(shape) // elements * nbytes, self._part)

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

    def _array(self, key: str) -> Any:
        what = f"key {shown(key)}"
        kind, count = self._number("I", what), self._number("Q", what)
        if count > self._elements_left:
            raise self._wrong(f"{what} has {count} elements, expected at most {ELEMENT_LIMIT} in all")
        self._elements_left -= count
        self.kinds[key] = _ARRAY, kind
        if kind == _STRING:
            return [self._string(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._wrong(f"{what} is an array of value type {kind}, expected numbers or strings")
        dtype = _dtype(kind)
        numbers = np.frombuffer(self._take(count * dtype.itemsize, what), dtype)
        return numbers.tolist() if kind == _BOOL or count <= _FEW else numbers

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(form), what))[0]

    def _string(self, what: str) -> str:
        (length,) = _U64.unpack(self._take(8, what))
        if STRING_LIMIT_BYTES < length <= self._left:
            raise self._wrong(f"{what} holds a text of {length} bytes, expected at most {STRING_LIMIT_BYTES}")
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
