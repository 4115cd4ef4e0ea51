"""Progress bars with an ETA, on stderr, so that stdout stays for results. Silent when nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class _Bar:
    """Drawn while it is a context."""

    _progress: Progress

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class ByteBar(_Bar):
    """A bar that counts bytes: `start(total, done)`, then `advance(n)`. A context manager. `transient`: it goes."""

    def __init__(self, label: str, quiet: bool = False, transient: bool = False) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        off = quiet or not sys.stderr.isatty()
        self._progress = Progress(*columns, console=Console(stderr=True), transient=transient, disable=off)
        self._task = self._progress.add_task(label, total=None)

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self._progress.update(self._task, total=total_bytes, completed=done_bytes)

    def advance(self, nbytes: int) -> None:
        self._progress.advance(self._task, nbytes)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While others print: a line of theirs would be written on the bar's own. For a transient bar."""
        self._progress.stop()
        yield
        self._progress.start()


# Of a bar's label and of the time that its ETA looks back: a longer name would push the ETA out of 80 columns, and
# within rich's 30 s there may not be two windows of a large model, without which it has no ETA.
_LABEL_CHARS = 26
_LOOK_BACK_S = 600


class CountBar(_Bar):
    """One bar after the other: `start(label, total, unit)`, then `advance(n, note)`. A context manager."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
            speed_estimate_period=_LOOK_BACK_S,
        )
        self._task: TaskID | None = None

    def start(self, label: str, total: int, unit: str) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._unit, self._done, self._total = unit, 0, total
        short = label if len(label) <= _LABEL_CHARS else f"{label[: _LABEL_CHARS - 1]}…"
        self._task = self._progress.add_task(escape(short), total=total, note="")

    def advance(self, count: int, note: str = "") -> None:
        if self._task is None:
            return
        self._done += count
        share = f"{self._done / max(1, self._total):.0%}"
        place = share if self._unit == "bytes" else f"{self._done} of {self._total} {self._unit}"
        self._progress.update(self._task, completed=self._done, note=f"{place}  {note}".rstrip())


class _Watch:
    """A bar for each stage; Ctrl-C is asked for between its steps."""

    def __init__(self, bar: CountBar, pressed: Callable[[], bool]) -> None:
        self._bar, self.stopped = bar, pressed

    def stage(self, label: str, total: int, unit: str) -> None:
        self._bar.start(label, total, unit)

    def advance(self, count: int, note: str = "") -> None:
        self._bar.advance(count, note)


@contextmanager
def watching() -> Iterator[_Watch]:
    """For work that is done in steps and can stop between them (measure/runner.py, Watch)."""
    from mlxquant.run.interrupt import interruptible

    with interruptible() as pressed, CountBar() as bar:
        yield _Watch(bar, pressed)


# Below this a prompt is read before a bar could be.
_LONG_PROMPT_TOKENS = 1024


class PromptBar(_Bar):
    """A bar that counts the tokens of a long prompt and is gone when the first token comes: what `generate` calls with
    (tokens done, tokens). A context manager, as a prompt may be stopped.
    """

    def __init__(self) -> None:
        columns = (TextColumn("Reading the prompt"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        if total < _LONG_PROMPT_TOKENS or not sys.stderr.isatty():
            return
        if done == total:
            self._progress.stop()
            return
        self._progress.start()
        self._progress.update(self._task, total=total, completed=done)


def waiting(label: str) -> AbstractContextManager[object]:
    """A sign of life while something takes seconds; nothing where nobody watches."""
    return Console(stderr=True).status(label) if sys.stderr.isatty() else nullcontext()
