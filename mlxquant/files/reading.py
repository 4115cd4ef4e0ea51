"""The reading side of the disk: bytes into arrays with positioned reads, and every failure one SourceError.

Never mmap: pages of a mapped file count in our resident memory, and one that is truncated kills the process.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.errors import SourceError
from mlxquant.units import format_bytes

JSON_LIMIT_BYTES = 32 * 2**20  # the largest config.json and shard indexes on the Hub are a few MB
# Objects, lists and entries of one JSON text: 300,000 tensors. Python takes 100 bytes and more for each.
JSON_LIMIT_PARTS = 2_000_000
_ONE_READ_BYTES = 2**30  # macOS refuses a single read of 2 GiB or more


class InputFile:
    """A regular file that must stay the one it was when first seen.

    Each read opens it anew: chunks are megabytes, an open costs microseconds, and no number of shards can use
    up the descriptors (macOS gives 256). Reads are independent, so threads may share one InputFile.
    """

    def __init__(self, path: Path) -> None:
        """Raises SourceError when `path` is missing, unreadable or not a regular file."""
        self.path = path
        self._stamp: tuple[int, ...] | None = None
        with self.open() as fd:
            self.nbytes = os.fstat(fd).st_size

    @contextmanager
    def open(self) -> Iterator[int]:
        """A descriptor for a few reads. O_NONBLOCK: a pipe must end in an error, not wait for its writer."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
            raise _unreadable(self.path, exc) from exc
        try:
            self._check(os.fstat(fd))
            yield fd
        finally:
            os.close(fd)

    def _check(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise SourceError(f"{self.path}: is {kind}, expected a file")
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if self._stamp not in (None, stamp):
            raise SourceError(
                f"{self.path}: changed while it was being read", hint="leave the source alone and start again"
            )
        self._stamp = stamp

    def read(self, offset: int, count: int, what: str) -> bytes:
        """`count` bytes at `offset`. Raises SourceError saying that the file ends inside `what`."""
        buffer = np.empty(max(0, min(count, self.nbytes - offset)), np.uint8)
        if len(buffer) < count:
            raise _short(self.path, what, count, len(buffer))
        self.read_into(offset, buffer, what)
        return buffer.tobytes()

    def read_into(self, offset: int, array: np.ndarray[Any, Any], what: str) -> None:
        """Fills a C-contiguous array from `offset` on; memory used is the array's own. Raises SourceError."""
        if not array.nbytes:
            return
        view, done = array.reshape(-1).view(np.uint8).data, 0
        with self.open() as fd:
            # Not preadv: macOS has it since version 11 only, and some Python builds there go without. The descriptor
            # is this call's own, so its position is, too.
            os.lseek(fd, offset, os.SEEK_SET)
            while done < len(view):
                try:
                    got = os.readv(fd, [view[done : done + _ONE_READ_BYTES]])
                except OSError as exc:
                    raise _unreadable(self.path, exc) from exc
                if not got:
                    raise _short(self.path, what, len(view), done)
                done += got


def read_json_object(path: Path, limit_bytes: int = JSON_LIMIT_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises SourceError: missing, too long, not JSON, or not an object."""
    file = InputFile(path)
    if file.nbytes > limit_bytes:
        found, limit = format_bytes(file.nbytes), format_bytes(limit_bytes)
        raise SourceError(f"{path}: {found} long, expected at most {limit}")
    return parse_json_object(file.read(0, file.nbytes, "the JSON text"), str(path))


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """`where` begins the message. Two entries of one name are refused: readers differ in which they take."""
    parts = sum(map(text.count, (b"{", b"[", b",")))
    if parts > JSON_LIMIT_PARTS:
        raise SourceError(f"{where}: JSON of {parts} parts, expected at most {JSON_LIMIT_PARTS}")
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError as exc:
        raise SourceError(f"{where}: JSON nested too deeply") from exc
    except ValueError as exc:  # JSONDecodeError, UnicodeDecodeError, a number of thousands of digits
        raise SourceError(f"{where}: not valid JSON ({one_line(exc)})") from exc
    if not isinstance(value, dict):
        raise SourceError(f"{where}: holds a JSON {type(value).__name__}, expected an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the name {shown(twice)} appears twice")
    return value


def plain_name(name: object) -> bool:
    """Whether `name` is a file name that stays in its folder and means the same on every system."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in (".", "..")
        and not re.search(r'[\x00-\x1f/\\:*?"<>|]', name)
    )


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlist = 8


def shown(value: object) -> str:
    """A value of unknown origin, quoted and cut: a message stays one line and drives no terminal."""
    return _repr.repr(value)


def one_line(exc: BaseException) -> str:
    return re.sub(r"\s+", " ", str(exc))[:200]


def _unreadable(path: Path, exc: Exception) -> SourceError:
    if isinstance(exc, FileNotFoundError):
        return SourceError(f"{path}: no such file")
    reason = exc.strerror if isinstance(exc, OSError) else None
    return SourceError(f"{path}: cannot be read: {reason or one_line(exc)}")


def _short(path: Path, what: str, expected: int, got: int) -> SourceError:
    return SourceError(
        f"{path}: ends inside {what}: {got} bytes found, {expected} expected",
        hint="the file is cut short: download it again",
    )
