"""An importance matrix, as llama-imatrix writes it: for each weight, how much each of its columns matters.

Two forms (llama.cpp, common/imatrix-loader.cpp; the arithmetic is load_imatrix of tools/quantize/quantize.cpp, to
the bit):

    GGUF    tensors <name>.in_sum2 (matrices, width): sums of squared inputs, and <name>.counts (matrices, 1):
            how many were summed. An expert that was never asked (count 0) counts all its columns alike.
    .dat    entries; each: name, calls, values (matrices * width) of mean * calls; then chunks and one dataset.
            The file does not tell how many matrices there are.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.errors import SourceError
from mlxquant.files.gguf_file import GGUFFile, GGUFTensor
from mlxquant.files.reading import InputFile, shown
from mlxquant.files.writing import write_whole

NAME_LIMIT_BYTES = 256  # ggml's own limit is 64
_TEXT_LIMIT_BYTES = 127  # llama_model_kv_override::val_str
_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_SUMS, _COUNTS = ".in_sum2", ".counts"
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_HINT = "make it with llama-imatrix, or download it again"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Imatrix:
    """`entries`: {GGUF name of a weight: float32, (matrices, width), or (1, all of it) from a .dat file}.

    `file`: the path as it was given; `chunks`: pieces of text that it was computed on, 0 when not told.
    """

    file: str
    entries: dict[str, Array]
    datasets: tuple[str, ...]
    chunks: int

    def importance(self, name: str, shape: tuple[int, ...]) -> Array | None:
        """What llama-quantize passes on for a tensor of this outermost-first shape: float32 (matrices, width).

        None without an entry, and for token embeddings with one of another size. Raises SourceError as `check`.
        """
        self.check(name, shape)
        entry, (matrices, width) = self.entries.get(name), _wanted(shape)
        return entry.reshape(matrices, width) if entry is not None and entry.size == matrices * width else None

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises SourceError when the entry has another size than the tensor asks for: it is another model's."""
        entry, (matrices, width) = self.entries.get(name), _wanted(shape)
        if entry is None or entry.size == matrices * width or name in _EMBEDDINGS:
            return
        raise SourceError(
            f"{self.file}: {name} has {entry.size} values, expected {matrices} x {width}",
            hint="take the importance matrix of this very model",
        )

    def metadata(self) -> dict[str, Any]:
        """The quantize.imatrix.* keys, as llama-quantize writes them: texts cut at 127 bytes, counts as uint32."""
        keys: dict[str, Any] = {"quantize.imatrix.file": _cut(self.file)}
        if self.datasets:
            keys["quantize.imatrix.dataset"] = _cut(self.datasets[0])
        keys["quantize.imatrix.entries_count"] = np.uint32(len(self.entries))
        if self.chunks > 0:
            keys["quantize.imatrix.chunks_count"] = np.uint32(self.chunks)
        return keys


@dataclass(frozen=True)
class Sums:
    """Of one weight: sums of squared inputs (matrices, width), and how many tokens each matrix saw (matrices,)."""

    in_sum2: Array
    counts: Array


def _wanted(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[-3] if len(shape) > 2 else 1), shape[-1]


def _cut(text: str) -> str:
    # A path may hold bytes that are no text; GGUF's strings may not.
    return text.encode(errors="surrogateescape")[:_TEXT_LIMIT_BYTES].decode(errors="ignore")


def read_imatrix(path: Path | str) -> Imatrix:
    """Reads either form. Raises SourceError for what is neither, is cut short, or holds no finite importance."""
    file = InputFile(Path(path))
    if file.nbytes >= 4 and file.read(0, 4, "the magic") == b"GGUF":
        return _read_gguf(GGUFFile(path), str(path))
    return _Legacy(file, str(path)).read()


def _read_gguf(file: GGUFFile, path: str) -> Imatrix:
    if missing := [key for key in _KEYS if key not in file.metadata]:
        raise SourceError(f"{path}: has no {missing[0]}: not an importance matrix", hint=_HINT)
    chunks, datasets = file.metadata["imatrix.chunk_count"], file.metadata["imatrix.datasets"]
    if type(chunks) is not int or not 0 <= chunks < 2**31 or not isinstance(datasets, list):
        found = f"imatrix.chunk_count {shown(chunks)} and imatrix.datasets {shown(datasets)}"
        raise SourceError(f"{path}: has {found}, expected a number and a list", hint=_HINT)
    names = {name.removesuffix(end) for name in file.tensors for end in (_SUMS, _COUNTS) if name.endswith(end)}
    entries = {name: _entry(file, name, path) for name in sorted(names)}
    return _made(path, entries, [text for text in datasets if isinstance(text, str)], chunks)


def _entry(file: GGUFFile, name: str, path: str) -> Array:
    sums, counts = _floats(file, name + _SUMS, path), _floats(file, name + _COUNTS, path)
    if not len(counts) or not len(sums) or len(sums) % len(counts):
        raise SourceError(f"{path}: {shown(name)} has {len(sums)} sums for {len(counts)} matrices", hint=_HINT)
    if not np.isfinite(counts).all():
        raise SourceError(f"{path}: {shown(name)} has a count that is not finite", hint=_HINT)
    # Counts are stored as floats; llama.cpp rounds them halves up before it divides.
    count = np.floor(counts.astype(np.float64) + 0.5).astype(np.float32)[:, None]
    sums = _sound(sums.reshape(len(counts), -1), name, path)
    return np.where(count > 0, sums / np.maximum(count, np.float32(1)), np.float32(1))


def _floats(file: GGUFFile, name: str, path: str) -> Array:
    tensor = file.tensors.get(name, GGUFTensor((), "missing", 0, 0))
    if tensor.type_name != "F32":
        raise SourceError(f"{path}: tensor {shown(name)} is {tensor.type_name}, expected F32", hint=_HINT)
    return file.read_rows(name, 0, tensor.rows).reshape(-1).view("<f4").astype(np.float32, copy=False)


def _sound(values: Array, name: str, path: str) -> Array:
    if np.isfinite(values).all() and values.min() >= 0:
        return values
    raise SourceError(f"{path}: {shown(name)} has importance below 0 or not finite", hint=_HINT)


def _made(path: str, entries: dict[str, Array], datasets: list[str], chunks: int) -> Imatrix:
    if not entries:
        raise SourceError(f"{path}: an importance matrix without entries", hint=_HINT)
    return Imatrix(path, entries, tuple(datasets), chunks)


def write_imatrix(
    path: Path, sums: Mapping[str, Sums], datasets: Sequence[str], chunks: int, chunk_tokens: int
) -> None:
    """Writes llama-imatrix's GGUF form whole or not at all: its keys, its order of tensors, its bytes.

    sums: by GGUF name of the weight. datasets: what the text was, one or more. chunks: of `chunk_tokens` tokens each.
    Raises TargetError.
    """
    write_whole(path, imatrix_bytes(sums, datasets, chunks, chunk_tokens))


def imatrix_bytes(sums: Mapping[str, Sums], datasets: Sequence[str], chunks: int, chunk_tokens: int) -> bytes:
    """IMatrixCollector::save_imatrix of llama.cpp's tools/imatrix/imatrix.cpp; counts are floats there, too."""
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory(prefix="mlxquant-") as folder:
        file = Path(folder) / "imatrix.gguf"
        writer = GGUFWriter(file, "imatrix")
        writer.kv_data[0].clear()  # of an architecture it has none
        writer.add_string("general.type", "imatrix")
        writer.add_array(_KEYS[0], list(datasets))
        writer.add_uint32(_KEYS[1], chunks)
        writer.add_uint32(_KEYS[2], chunk_tokens)
        for name in sorted(sums):
            for end, values in ((_SUMS, sums[name].in_sum2), (_COUNTS, sums[name].counts[:, None])):
                values = np.ascontiguousarray(values, np.float32)
                writer.add_tensor(name + end, values[0] if len(values) == 1 else values)  # as ggml_n_dims counts
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()


class _Legacy:
    """Goes through a .dat file once, front to back; nothing is believed that the rest of the file cannot hold."""

    def __init__(self, file: InputFile, path: str) -> None:
        self._file, self._path, self._at = file, path, 0

    def read(self) -> Imatrix:
        count = self._number("the number of entries")
        if not 0 < count <= self._left // 16:  # the smallest entry
            raise self._wrong(f"{count} entries in {self._file.nbytes} bytes: neither GGUF nor a .dat file")
        entries: dict[str, Array] = {}
        for number in range(count):
            name = self._text(f"the name of entry {number}")
            if name in entries:
                raise self._wrong(f"the entry {shown(name)} stands there twice")
            entries[name] = self._values(name)
        return _made(self._path, entries, *self._rest())

    def _values(self, name: str) -> Array:
        calls, count = self._number(f"entry {shown(name)}"), self._number(f"entry {shown(name)}")
        if not 0 < count <= self._left // 4:
            raise self._wrong(f"entry {shown(name)} has {count} values, {self._left} bytes are left")
        values = np.empty(count, "<f4")
        self._file.read_into(self._at, values, f"entry {shown(name)}")
        self._at += values.nbytes
        values = _sound(values.astype(np.float32, copy=False), name, self._path)
        return (values / np.float32(calls) if calls > 0 else values).reshape(1, -1)

    def _rest(self) -> tuple[list[str], int]:
        """The dataset and the chunks: files from before they were written end here."""
        chunks = self._number("the chunks") if self._left >= 4 else 0
        length = self._number("the dataset") if self._left >= 4 else 0
        if not 0 < length <= min(self._left, 4096):
            return [], chunks
        text = self._file.read(self._at, length, "the dataset")
        return [text.partition(b"\0")[0].decode(errors="replace")], chunks

    def _text(self, what: str) -> str:
        length = self._number(what)
        if not 0 < length <= min(self._left, NAME_LIMIT_BYTES):
            raise self._wrong(f"{what} has {length} bytes, expected 1 to {NAME_LIMIT_BYTES}")
        text = self._file.read(self._at, length, what)
        self._at += length
        try:
            return text.decode()
        except UnicodeDecodeError as exc:
            raise self._wrong(f"{what} is not UTF-8") from exc

    @property
    def _left(self) -> int:
        return self._file.nbytes - self._at

    def _number(self, what: str) -> int:
        (number,) = struct.unpack("<i", self._file.read(self._at, 4, what))
        self._at += 4
        return int(number)

    def _wrong(self, found: str) -> SourceError:
        return SourceError(f"{self._path}: as an importance matrix: {found}", hint=_HINT)
