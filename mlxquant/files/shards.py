"""The weight files we write: which tensor goes where is known, with every header byte, before any data.

A safetensors shard's data section begins at a multiple of 8 and holds its tensors by falling item size: each is
aligned to its own (stock readers may map them) and there are no holes (the format forbids them). GGUF's shards are
laid out by files/gguf_writer.py and written by the same ShardWriter.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxquant.errors import TargetError
from mlxquant.files.writing import free_bytes, write_all, writing
from mlxquant.tensors import DTYPES, TensorSpec
from mlxquant.units import format_bytes

LIMIT_BYTES = 5 * 10**9
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# mlx-lm asks for this entry to know that no layout change is left to do.
METADATA = {"format": "mlx"}
_CHUNK_BYTES = 8 * 2**20


class Stored(Protocol):
    """What a shard must know of a tensor."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Shard:
    """`header`: all bytes before the first tensor's. `specs` and `offsets` (from the file's start) are in file order.

    `seal`: where in the header (start, stop) bytes stand that are known only when all tensors are: a placeholder
    until then.
    """

    file: str
    header: bytes
    specs: Mapping[str, Stored]
    offsets: Mapping[str, int]
    nbytes: int  # of the whole file
    seal: tuple[int, int] = (0, 0)


def assign(groups: Iterable[Sequence[TensorSpec]], limit_bytes: int = LIMIT_BYTES) -> tuple[Shard, ...]:
    """Packs groups (a weight with its scales and biases), in the order given, into files up to `limit_bytes`.

    A group goes into one file, unless it alone is over the limit; a tensor over it gets a file of its own.
    Raises ValueError for a name given twice.
    """
    files: list[list[TensorSpec]] = [[]]
    used = 0
    for part in _indivisible(groups, limit_bytes):
        cost = sum(map(_cost, part))
        if files[-1] and used + cost > limit_bytes:
            files.append([])
            used = 0
        files[-1].extend(part)
        used += cost
    names = Counter(spec.name for file in files for spec in file)
    if len(names) < names.total():
        raise ValueError(f"tensor {names.most_common(1)[0][0]} is planned twice")
    return tuple(_shard(_file_name(i, len(files)), specs) for i, specs in enumerate(files))


def _indivisible(groups: Iterable[Sequence[TensorSpec]], limit_bytes: int) -> Iterable[Sequence[TensorSpec]]:
    for group in groups:
        if sum(map(_cost, group)) <= limit_bytes:
            yield group
        else:
            yield from ((spec,) for spec in group)


def _cost(spec: TensorSpec) -> int:
    """Bytes of the tensor and the most its header entry can take: two offsets of 20 digits, dtype, quotes."""
    return spec.nbytes + len(json.dumps(spec.name)) + len(str(spec.shape)) + 100


def _file_name(index: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _shard(file: str, specs: Sequence[TensorSpec]) -> Shard:
    ordered = sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize)
    starts, end = {}, 0
    for spec in ordered:
        starts[spec.name] = end
        end += spec.nbytes
    header = _header(ordered, starts)
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Shard(file, header, {spec.name: spec for spec in ordered}, offsets, len(header) + end)


def _header(specs: Sequence[TensorSpec], starts: dict[str, int]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": METADATA}
    for spec in specs:
        first = starts[spec.name]
        span = [first, first + spec.nbytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": span}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_json(shards: Sequence[Shard], total_parameters: int | None = None) -> bytes:
    """The text of INDEX: stock mlx-lm writes one even for a single file, and other readers count on it.

    `total_parameters` counts the model's, not the packed words.
    """
    tensors = [(name, shard.file) for shard in shards for name in shard.specs]
    metadata = {"total_size": sum(shard.nbytes - len(shard.header) for shard in shards)}
    if total_parameters is not None:
        metadata["total_parameters"] = total_parameters
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(tensors))}, indent=4).encode()


def check_space(folder: Path, shards: Sequence[Shard], reserve_bytes: int = 0) -> None:
    """Compares the disk with all that is still to be written there. Raises TargetError.

    What an earlier run has put into `folder` counts as written; `reserve_bytes` is for the other files.
    """
    needed = sum(shard.nbytes for shard in shards) + reserve_bytes
    for shard in shards:
        path = folder / shard.file
        needed -= min(path.stat().st_blocks * 512, shard.nbytes) if path.exists() else 0
    free = free_bytes(folder)
    if needed > free:
        raise TargetError(
            f"{folder}: {format_bytes(needed)} needed, {format_bytes(free)} free on this disk",
            hint=f"free {format_bytes(needed - free)} or write to another disk",
        )


class ShardWriter:
    """One shard on disk: full size and header from the start, each tensor filled front to back.

    Different tensors may be written in any order and from different threads. Holds no descriptor in between.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.path = folder / shard.file
        self.shard = shard
        self._ready = False
        self._making = threading.Lock()
        self._written: dict[str, tuple[int, Any]] = {}

    def intact(self) -> bool:
        """Whether the file is there with this very header and length, sealed or not. Says nothing about the data."""
        try:
            with self.path.open("rb") as file:
                header = self._unsealed(file.read(len(self.shard.header)))
                return header == self.shard.header and os.fstat(file.fileno()).st_size == self.shard.nbytes
        except OSError:
            return False

    def _unsealed(self, header: bytes) -> bytes:
        start, stop = self.shard.seal
        return header[:start] + self.shard.header[start:stop] + header[stop:]

    def seal(self, data: bytes) -> None:
        """Puts `data` in the header's place for it. Raises TargetError, ValueError for data of another length."""
        start, stop = self.shard.seal
        if len(data) != stop - start:
            raise ValueError(f"{self.shard.file}: {len(data)} bytes for a seal of {stop - start}")
        self.prepare()
        with writing(self.path):
            fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                write_all(fd, start, memoryview(data))
            finally:
                os.close(fd)

    def prepare(self) -> None:
        """Makes the file unless it is intact. Raises TargetError."""
        with self._making:
            if not self._ready and not self.intact():
                self._make()
            self._ready = True

    def _make(self) -> None:
        with writing(self.path, self.shard.nbytes):
            self.path.unlink(missing_ok=True)
            with self.path.open("xb") as file:
                file.write(self.shard.header)
                file.truncate(self.shard.nbytes)

    def write(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Appends the bytes of `array` to those of tensor `name` written so far.

        Raises TargetError, and ValueError when the tensor would become longer than planned.
        """
        self.prepare()
        spec = self.shard.specs[name]
        done, digest = self._written.get(name, (0, hashlib.sha256()))
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        if done + len(view) > spec.nbytes:
            raise ValueError(f"{name}: {done + len(view)} bytes written, {spec.nbytes} planned")
        with writing(self.path, spec.nbytes - done):
            fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                write_all(fd, self.shard.offsets[name] + done, view)
            finally:
                os.close(fd)
        digest.update(view)
        self._written[name] = done + len(view), digest

    def sha256(self, name: str) -> str:
        """Of the bytes written. Raises ValueError while the tensor is not complete."""
        done, digest = self._written.get(name, (0, hashlib.sha256()))
        if done != self.shard.specs[name].nbytes:
            raise ValueError(f"{name}: {done} bytes written, {self.shard.specs[name].nbytes} planned")
        return str(digest.hexdigest())

    def stored_sha256(self, name: str) -> str:
        """Of the bytes on disk now, read in chunks. Raises TargetError."""
        digest, left = hashlib.sha256(), self.shard.specs[name].nbytes
        with writing(self.path), self.path.open("rb") as file:
            file.seek(self.shard.offsets[name])
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()
