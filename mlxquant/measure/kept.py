"""A file of equal records that a run can be killed over: what `eval` has scored so far.

    {"kept": 1, "header": {...}, "dtype": "<f4", "shape": [255, 576]}\n      what the records belong to
    record, checksum, record, checksum, ...                                 checksum: blake2b-8 of number and bytes

Records are written one after the other and never changed, so a killed process leaves at most one torn record, at the
end. Nothing is flushed: after a power cut checksums tell what reached the disk, and what follows the first bad record
is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mlxquant.errors import SourceError, TargetError
from mlxquant.files.locking import open_locked
from mlxquant.files.reading import parse_json_object, shown
from mlxquant.files.writing import write_all, writing

Array = np.ndarray[Any, Any]

VERSION = 1
_SUM_BYTES = 8
_HEADER_LIMIT_BYTES = 1 << 16
_ONE_READ_BYTES = 2**30  # macOS refuses a single read of 2 GiB or more
_NEXT = "delete it, or choose another folder with --keep"
_FIXED = ("kept", "header", "dtype", "shape")


class Kept:
    """Use `Kept.open`. `len` is the number of whole records; one process at a time has the file."""

    def __init__(self, path: Path, fd: int, record: np.dtype[Any]) -> None:
        self.path = path
        self._fd = fd
        self._dtype, self._shape = record.base, record.shape
        self._nbytes = record.itemsize
        self._start = self._count = 0

    @classmethod
    def open(cls, path: Path, header: dict[str, Any], record: Any) -> Kept:
        """An existing file of the same header is gone on with, from its first damaged record on.

        header: of JSON's values; whatever makes other records. record: what np.dtype takes: a dtype, or (dtype, shape).
        Raises SourceError for a file of another header or none, TargetError where nothing can be written or another
        process writes it.
        """
        kind = np.dtype(record)
        line = _line(header, kind)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        hint = "wait for it, or choose another folder with --keep"
        kept = cls(path, open_locked(path, TargetError(f"{path}: another process is writing it", hint=hint)), kind)
        try:
            kept._begin(line, list(header))
        except BaseException:
            kept.close()
            raise
        return kept

    def __len__(self) -> int:
        return self._count

    def append(self, record: Array) -> None:
        """One more record. Raises TargetError, and ValueError for one of another dtype or shape."""
        if (record.dtype, record.shape) != (self._dtype, self._shape):
            expected = f"{self._dtype} {self._shape}"
            raise ValueError(f"a record of {record.dtype} {record.shape}, where {expected} are kept")
        data = record.tobytes()
        data += _checksum(self._count, data)
        end = self._at(self._count)
        try:
            with writing(self.path, len(data)):
                write_all(self._fd, end, memoryview(data))
        except TargetError:
            with contextlib.suppress(OSError):  # a full disk gets its room back
                os.ftruncate(self._fd, end)
            raise
        self._count += 1

    def read(self, i: int) -> Array:
        """Record i, read-only. Raises SourceError when its bytes are no longer those that were written."""
        if not 0 <= i < self._count:
            raise IndexError(f"record {i} of {self._count}")
        try:
            data = self._whole(i)
        except OSError as exc:
            raise SourceError(f"{self.path}: record {i + 1} cannot be read: {exc.strerror}", hint=_NEXT) from exc
        if data is None:
            raise SourceError(f"{self.path}: record {i + 1} changed while it was in use", hint=_NEXT)
        return np.frombuffer(data, self._dtype).reshape(self._shape)

    def all(self) -> Array:
        """All records, stacked: (len, *shape)."""
        stacked = np.empty((self._count, *self._shape), self._dtype)
        for i in range(self._count):
            stacked[i] = self.read(i)
        return stacked

    def close(self) -> None:
        """Lets go of the file and its lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _begin(self, line: bytes, keys: list[str]) -> None:
        """Checks the header, or writes it, and counts whole records; the rest is cut off. keys: first the one to name
        where several differ."""
        with writing(self.path):
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise SourceError(f"{self.path}: is no regular file", hint=_NEXT)
            found = self._pread(0, _HEADER_LIMIT_BYTES)
            self._start = len(line)
            if line.startswith(found):  # nothing, or a header that was cut short
                os.ftruncate(self._fd, 0)
                write_all(self._fd, 0, memoryview(line))
            elif not found.startswith(line):
                raise self._another(found, line, keys)
            while self._whole(self._count) is not None:
                self._count += 1
            os.ftruncate(self._fd, self._at(self._count))

    def _another(self, found: bytes, line: bytes, keys: list[str]) -> SourceError:
        """What is wrong with a file that begins otherwise."""
        try:
            there = parse_json_object(found.partition(b"\n")[0], str(self.path))
        except SourceError:
            there = {}
        if tuple(there) != _FIXED or not isinstance(there["header"], dict):
            return SourceError(f"{self.path}: is no file that eval has kept", hint=_NEXT)
        before, now = (dict(value.pop("header")) | value for value in (there, json.loads(line)))
        order = dict.fromkeys([*keys, *now, *before])
        key = next((key for key in order if before.get(key) != now.get(key)), "header")
        named = {"kept": "file format"}.get(key, key)
        values = f"found {shown(before.get(key))}, expected {shown(now.get(key))}"
        return SourceError(f"{self.path}: was kept for another {named}: {values}", hint=_NEXT)

    def _at(self, i: int) -> int:
        return self._start + i * (self._nbytes + _SUM_BYTES)

    def _whole(self, i: int) -> bytes | None:
        """The bytes of record i; None when they are not there, or not as they were written."""
        data = self._pread(self._at(i), self._nbytes + _SUM_BYTES)
        record, checksum = data[: self._nbytes], data[self._nbytes :]
        return record if checksum == _checksum(i, record) else None

    def _pread(self, offset: int, count: int) -> bytes:
        """`count` bytes, or as many as there are."""
        parts, done = [], 0
        while done < count:
            part = os.pread(self._fd, min(count - done, _ONE_READ_BYTES), offset + done)
            if not part:
                break
            parts.append(part)
            done += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _line(header: dict[str, Any], record: np.dtype[Any]) -> bytes:
    """The first line of a file. Raises ValueError for records that are no plain bytes, and for a header too long."""
    if record.hasobject or not record.itemsize:
        raise ValueError(f"records of {record} cannot be kept")
    dtype = np.lib.format.dtype_to_descr(record.base)
    values = (VERSION, dict(sorted(header.items())), dtype, record.shape)
    line = json.dumps(dict(zip(_FIXED, values, strict=True))).encode() + b"\n"
    if len(line) > _HEADER_LIMIT_BYTES:
        raise ValueError(f"a header of {len(line)} bytes, expected at most {_HEADER_LIMIT_BYTES}")
    return line


def _checksum(i: int, record: bytes) -> bytes:
    """With its number, so that a record in another's place is none."""
    checksum = hashlib.blake2b(i.to_bytes(8, "little"), digest_size=_SUM_BYTES)
    checksum.update(record)
    return checksum.digest()
