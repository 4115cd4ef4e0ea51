"""Progress bars with an ETA, on stderr, so that stdout stays for results. Silent when nobody watches."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class ByteBar:
    """A bar that counts bytes: `start(total, done)`, then `advance(n)`. A context manager."""

    def __init__(self, label: str, quiet: bool = False) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())
        self._task = self._progress.add_task(label, total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self._progress.update(self._task, total=total_bytes, completed=done_bytes)

    def advance(self, nbytes: int) -> None:
        self._progress.advance(self._task, nbytes)
