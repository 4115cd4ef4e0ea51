"""The writing side of the disk: whole buffers at offsets, every failure one TargetError with a next step."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxquant.errors import TargetError
from mlxquant.units import format_bytes

_ONE_WRITE_BYTES = 2**30  # macOS refuses a single write of 2 GiB or more
_AGAIN = "then run the same command again: what is finished is kept"
_FULL = f"free some space, {_AGAIN}"
_DENIED = "choose a folder that you may write to"
# errno -> what to say, what to do
_FAULTS = {
    errno.ENOSPC: ("the disk is full", _FULL),
    errno.EDQUOT: ("the disk quota is used up", _FULL),
    errno.EFBIG: (
        "the file system or a limit allows no file this long",
        "write to an APFS, exFAT or ext4 disk",
    ),
    errno.EROFS: ("the file system is read-only", _DENIED),
    errno.EACCES: ("permission denied", _DENIED),
    errno.EPERM: ("permission denied", _DENIED),
    errno.ENOTDIR: ("a part of the path is a file", "choose another output folder"),
    errno.EEXIST: ("a file of that name is in the way", "remove it or choose another output folder"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter output name"),
    errno.EIO: ("the disk reports an error", f"check the disk, {_AGAIN}"),
}


def target_error(path: Path, exc: OSError, needed_bytes: int | None = None) -> TargetError:
    """The one line for an OSError met while writing `path`."""
    reason, hint = _FAULTS.get(exc.errno or 0, (exc.strerror or str(exc), _DENIED))
    message = f"{path}: cannot be written: {reason}"
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = f"{format_bytes(needed_bytes)} needed, " if needed_bytes is not None else ""
        message += f" ({needed}{format_bytes(free_bytes(path))} free)"
    return TargetError(message, hint=hint)


@contextmanager
def writing(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns any OSError of the block into a TargetError that names `path`."""
    try:
        yield
    except OSError as exc:
        raise target_error(path, exc, needed_bytes) from exc


def free_bytes(path: Path) -> int:
    """Free bytes for an ordinary user on the disk that `path` is, or will be, on; 0 when nobody can say."""
    for place in (path, *path.parents):
        try:
            found = os.statvfs(place)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize
    return 0


def write_all(fd: int, offset: int, view: memoryview) -> None:
    """Writes all of `view` at `offset`, however often the system takes only a part. Raises OSError."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + _ONE_WRITE_BYTES], offset + done)


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk itself. Raises TargetError."""
    with writing(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _flush(fd)
        finally:
            os.close(fd)


def _flush(fd: int) -> None:
    # On macOS fsync stops at the drive's cache; F_FULLFSYNC goes through, where the file system knows it.
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(fd, full)
            return
        except OSError as exc:
            if exc.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # folders on some network disks cannot be flushed
            raise


def write_whole(path: Path, data: bytes) -> None:
    """Puts `data` at `path` all at once, and leaves nothing beside it. Raises TargetError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        replace_file(path, data, scratch)
    finally:
        with suppress(OSError):  # a name too long for any file cannot be removed either
            scratch.unlink()


def replace_file(path: Path, data: bytes, scratch: Path) -> None:
    """Puts `data` at `path` all at once: written as `scratch` on the same disk, then renamed."""
    with writing(path, len(data)):
        scratch.write_bytes(data)
        scratch.replace(path)
