"""The one way weights go through memory: read ahead, encode, write behind, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

Array = np.ndarray[Any, Any]
T = TypeVar("T")


class Progress(Protocol):
    """What the executor tells whoever watches: so many source bytes of so many are done."""

    def start(self, total_bytes: int, done_bytes: int) -> None: ...
    def advance(self, nbytes: int) -> None: ...


class Silent:
    """Nobody watches."""

    def start(self, total_bytes: int, done_bytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass


@dataclass(frozen=True)
class Line:
    """One thread that reads ahead, one that writes behind, while the caller's keeps the kernels busy.

    The next chunk is read, and the last one hashed and written, while the kernels encode: those wait on the disk and
    release the GIL, these keep the cores busy. Never more than one chunk waits on either side.
    """

    ahead: ThreadPoolExecutor
    behind: ThreadPoolExecutor

    def run(
        self,
        ranges: Sequence[tuple[int, int]],
        read: Callable[[int, int], Array],
        encode: Callable[[Array, int], T],
        write: Callable[[T], None],
        watch: Progress,
    ) -> None:
        """read(start, stop) -> raw; encode(raw, start) -> what write takes; in the order of `ranges`."""
        writing: Future[None] | None = None
        for raw, start in self._read_ahead(ranges, read):
            encoded = encode(raw, start)
            if writing:
                writing.result()
            writing = self.behind.submit(write, encoded)
            watch.advance(raw.nbytes)
        if writing:
            writing.result()

    def _read_ahead(
        self, ranges: Sequence[tuple[int, int]], read: Callable[[int, int], Array]
    ) -> Iterator[tuple[Array, int]]:
        """(raw rows, first row) in order, the next chunk being read while the caller works on this one."""
        coming = self.ahead.submit(read, *ranges[0])
        for (start, _), following in zip(ranges, [*ranges[1:], None], strict=True):
            raw = coming.result()
            if following:
                coming = self.ahead.submit(read, *following)
            yield raw, start


@contextmanager
def line() -> Iterator[Line]:
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
        yield Line(ahead, behind)
