"""One safetensors file: its header, checked, and rows of its tensors.

The format (https://github.com/huggingface/safetensors, README): 8 bytes little-endian header length, a JSON
object {name: {dtype, shape, data_offsets}}, then the data. The safetensors library decides what is valid, but
it gives no offsets; so we read the header too, and with it say what is wrong in words that help.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.files.reading import InputFile, one_line, parse_json_object, shown
from mlxquant.tensors import DTYPES, TensorSpec

HEADER_LIMIT_BYTES = 100_000_000  # the library's own MAX_HEADER_SIZE
DIMENSION_LIMIT = 2**32
RANK_LIMIT = 32
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Header:
    """`specs` in the order of the data; `offsets` count from the start of the file."""

    specs: dict[str, TensorSpec]
    offsets: dict[str, int]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Reads the header only. Raises SourceError (UnsupportedError for a dtype we have no name for)."""
    return _read_header(InputFile(path))


class SafetensorsFile:
    """Reads rows with positioned reads into arrays it allocates: peak memory is the rows asked for.

    Holds no descriptor between reads, so there is nothing to close.
    """

    def __init__(self, path: Path) -> None:
        """Raises SourceError for whatever is wrong with the file."""
        self.path = path
        self._file = InputFile(path)
        self.header = _read_header(self._file)
        self.specs = self.header.specs

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows start..stop, (stop - start, width), in the stored dtype's numpy type; bfloat16 as uint16 bits.

        Raises SourceError when the file lacks the tensor or the bytes, ValueError for rows that do not exist.
        """
        if name not in self.specs:
            raise SourceError(f"{self.path}: has no tensor {shown(name)}")
        spec = self.specs[name]
        if not 0 <= start <= stop <= spec.rows:
            raise ValueError(f"rows {start}..{stop} of {name}, which has {spec.rows}")
        rows = np.empty((stop - start, spec.width), DTYPES[spec.dtype].numpy)
        first = self.header.offsets[name] + start * spec.width * rows.itemsize
        self._file.read_into(first, rows, f"tensor {shown(name)}")
        return rows


def _read_header(file: InputFile) -> Header:
    start = file.read(0, min(8, file.nbytes), "the header length")
    if len(start) < 8:
        raise _cut(file.path, f"{len(start)} bytes long, too short for a safetensors file")
    length = int.from_bytes(start, "little")
    if file.read(0, min(len(_LFS_POINTER), file.nbytes), "the header") == _LFS_POINTER:
        raise SourceError(f"{file.path}: is a Git LFS pointer, not the weights", hint="run `git lfs pull`")
    if length > HEADER_LIMIT_BYTES:
        raise SourceError(
            f"{file.path}: no safetensors file: header length {length}, expected up to {HEADER_LIMIT_BYTES}",
            hint="download the file again",
        )
    text = file.read(8, length, "the header")
    header = parse_header(text, file.nbytes - 8 - length, str(file.path))
    _ask_library(file.path)
    return header


def parse_header(text: bytes, data_bytes: int, where: str) -> Header:
    """The header of a file whose data section is `data_bytes` long; `where` begins each message.

    Tensors must cover the data section in full, without overlap: the format wants both, because holes can
    hide another file and overlaps can make a small file fill the memory. Raises SourceError.
    """
    if not text.startswith(b"{"):
        raise SourceError(f"{where}: the header is no JSON object; not a safetensors file")
    entries = parse_json_object(text, f"{where}: header")
    metadata = _metadata(entries.pop("__metadata__", None), where)
    spans = sorted(_spans(entries, where), key=lambda span: span[1:])
    end, before = 0, None
    for spec, first, last in spans:
        if first != end:
            fault = "overlaps" if first < end else "leaves a hole after"
            fault += f" tensor {shown(before)}" if before is not None else " the header"
            raise SourceError(f"{where}: tensor {shown(spec.name)} {fault}: begins at byte {first}, expected {end}")
        end, before = last, spec.name
    if end > data_bytes:
        raise _cut(where, f"tensors take {end} bytes, the file holds {max(data_bytes, 0)}")
    if end < data_bytes:
        raise SourceError(f"{where}: {data_bytes - end} bytes after the last tensor belong to none")
    base = 8 + len(text)
    return Header({s.name: s for s, _, _ in spans}, {s.name: base + first for s, first, _ in spans}, metadata)


def _metadata(value: object, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise SourceError(f"{where}: __metadata__ is not an object of strings")
    return value


def _spans(entries: dict[str, Any], where: str) -> Iterator[tuple[TensorSpec, int, int]]:
    for name, entry in entries.items():
        try:
            yield _span(name, entry)
        except SourceError as exc:
            raise type(exc)(f"{where}: tensor {shown(name)} {exc.message}", hint=exc.hint) from None


def _span(name: str, entry: object) -> tuple[TensorSpec, int, int]:
    """One entry of the header -> (spec, first byte, end byte) in the data section.

    Raises SourceError without the names, which `_spans` adds.
    """
    if not isinstance(entry, dict):
        raise SourceError(f"is described by a {type(entry).__name__}, expected an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedError(f"has dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _is_shape(shape):
        raise SourceError(f"has shape {shown(shape)}, expected a list of whole numbers from 0 to 2**32")
    if not isinstance(span, list) or len(span) != 2 or not all(_whole(n, 2**64) for n in span):
        raise SourceError(f"has data_offsets {shown(span)}, expected [first, end]")
    first, end = span
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - first != needed:
        raise SourceError(f"has {end - first} bytes, but {dtype} {shown(shape)} takes {shown(needed)}")
    return TensorSpec(name, tuple(shape), dtype), first, end


def _is_shape(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= RANK_LIMIT and all(_whole(n, DIMENSION_LIMIT) for n in value)


def _whole(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _ask_library(path: Path) -> None:
    """The library's word counts: it may refuse a file that we would read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as exc:
        raise SourceError(f"{path}: not a valid safetensors file: {one_line(exc)}") from exc


def _cut(where: object, found: str) -> SourceError:
    return SourceError(f"{where}: {found}", hint="the file is cut short: download it again")
