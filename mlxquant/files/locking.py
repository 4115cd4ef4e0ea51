"""One process at a time: flock, because the kernel lets go when the process dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from mlxquant.errors import TargetError
from mlxquant.files.writing import target_error, writing


def open_locked(path: Path, busy: TargetError) -> int:
    """A descriptor of `path`, made where it is missing, for reading and writing; closing it lets go of the lock.

    Raises `busy` when another process has it, and TargetError. O_NONBLOCK: a pipe must not wait for its other end.
    """
    with writing(path):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path, flags, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it may have removed the file between our open and our lock.
        if not os.path.samestat(os.fstat(fd), path.stat()):
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError) as exc:
        os.close(fd)
        raise busy from exc
    except OSError as exc:
        os.close(fd)
        raise target_error(path, exc) from exc
    return fd
