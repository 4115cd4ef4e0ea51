"""The output appears whole or not at all, and a killed run goes on where it was.

    OUT.partial/lock        one process at a time (flock: the kernel lets go when the process dies)
    OUT.partial/journal     what is finished, with hashes (files/journal.py)
    OUT.partial/model/      what becomes OUT, as it is: a folder by a single rename, files one by one (files/place.py)
    OUT.partial/moving      the names of files that are being moved out of model/
    OUT.partial/calibration/  hidden states between layers, where codes are chosen by data (calibrate/streams.py)
    OUT.partial/replaced/   with `force`: the old OUT, from just before it is replaced to just after

Nothing is flushed before the end. A killed process loses no write, but a power cut may lose any: so a resumed
run trusts the journal only where the bytes on disk have the hash it names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mlxquant.errors import TargetError
from mlxquant.files.journal import Groups, Journal, heading, read_journal
from mlxquant.files.locking import open_locked
from mlxquant.files.place import MODEL, MOVING, REPLACED, FolderPlace, Place, check_apart, exists_error
from mlxquant.files.reading import plain_name, shown
from mlxquant.files.shards import Shard, ShardWriter, check_space
from mlxquant.files.writing import flush, replace_file, writing

CALIBRATION = "calibration"
_OWN = {"lock", "journal", "scratch", CALIBRATION, MODEL, MOVING, REPLACED}  # what OUT.partial may hold
_SMALL_FILES_BYTES = 64 * 2**20  # room left for tokenizer, config, index and journal


class Workspace:
    """An output in the making. Use `Workspace.open`; leaving the `with` early keeps what is finished.

    `checksums` is {tensor: sha256} of all finished tensors, `resumed` the number of groups taken over.
    """

    def __init__(self, place: Place, shards: Sequence[Shard], force: bool) -> None:
        self.place = place
        self.out = place.out
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.folder = self.partial / MODEL
        self.checksums: dict[str, str] = {}
        self.resumed = 0
        self._writers = [ShardWriter(self.folder, shard) for shard in shards]
        self._home = {name: writer for writer in self._writers for name in writer.shard.specs}
        self._done: set[str] = set()
        self._force = force
        self._journal: Journal | None = None
        self._lock = -1

    @classmethod
    def open(
        cls,
        out: Place | Path | str,
        digest: str,
        shards: Sequence[Shard],
        *,
        source: Path | str | None = None,
        resume: bool | None = None,
        restart: bool = False,
        force: bool = False,
    ) -> Workspace:
        """Takes the lock and finds what an earlier run of the same plan (`digest`) has finished.

        out: a path becomes a folder; FilesPlace for a file, or several. resume: True insists that there is an
        earlier run, None takes one where it is. restart: begin anew. force: OUT may exist and is replaced, but only
        by `publish`. Raises TargetError before the first byte is written.
        """
        place = FolderPlace(out) if isinstance(out, (str, Path)) else out
        with writing(place.out):
            place.check(Path(source) if source is not None else None, force)
            work = cls(place, shards, force)
            _check_partial(work.partial, Path(source) if source is not None else None)
            if (taken := place.taken()) and not force and not work.partial.exists():
                raise exists_error(taken)
        work._take_lock()
        try:
            work._begin(heading(digest), resume, restart)
        except BaseException:
            work._leave_no_trace()
            work.close()
            raise
        return work

    # -- the executor's side

    def done(self, group: str) -> bool:
        """Whether the group's parts are already in place."""
        return group in self._done

    def write(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Appends rows to tensor `name`; front to back. Raises TargetError."""
        self._home[name].write(name, array)

    def finish(self, group: str, parts: Iterable[str]) -> None:
        """Notes the group as finished. Raises ValueError when a part lacks bytes, and TargetError."""
        sha256 = {name: self._home[name].sha256(name) for name in parts}
        if self._journal is None:
            raise ValueError("the workspace is closed")
        self._journal.note(group, sha256)
        self._done.add(group)
        self.checksums |= sha256

    def write_file(self, name: str, data: bytes) -> None:
        """Puts a small file beside the weights, all at once. Raises TargetError, also for an unsafe name."""
        weights = {writer.path.name for writer in self._writers}
        if name in weights or not all(plain_name(part) for part in name.split("/")):
            raise TargetError(f"{shown(name)} is no name for a file beside the weights of {self.out}")
        with writing(self.folder / name):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / name, data, self.partial / "scratch")

    def seal(self, data: bytes) -> None:
        """Fills in what the header of the shard with a seal says of all tensors. Raises TargetError."""
        for writer in self._writers:
            if writer.shard.seal != (0, 0):
                writer.seal(data)

    def publish(self) -> None:
        """Makes OUT appear. Raises ValueError while a planned tensor is unfinished, and TargetError."""
        unfinished = [name for name in self._home if name not in self.checksums]
        if unfinished:
            raise ValueError(f"{len(unfinished)} tensors not finished, the first {unfinished[0]}")
        for writer in self._writers:
            writer.prepare()
        for path in [*self.folder.rglob("*"), self.folder]:
            flush(path)
        with writing(self.out):
            if (taken := self.place.taken()) and not self._force:
                raise exists_error(taken)
            self.place.move_in(self.partial)
        flush(self.out.parent)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Lets go of the lock; the partial folder stays for a later run."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- beginning

    def _take_lock(self) -> None:
        with writing(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)
            if self.partial.is_symlink():
                raise TargetError(f"{self.partial}: is a link, expected a folder of our own", hint="remove it")
        busy = TargetError(
            f"{self.partial}: another process is writing it", hint="wait for it or choose another output folder"
        )
        self._lock = open_locked(self.partial / "lock", busy)

    def _begin(self, head: dict[str, Any], resume: bool | None, restart: bool) -> None:
        with writing(self.partial):
            if self.place.settle(self.partial):
                self._clear()
            if (taken := self.place.taken()) and not self._force:
                raise exists_error(taken)
            if restart:
                self._clear()
            found, groups = read_journal(self.partial / "journal")
            self._check_head(found, head, resume)
            self._sweep()
            check_space(self.folder, [writer.shard for writer in self._writers], _SMALL_FILES_BYTES)
            kept = self._take_over(groups)
            self._journal = Journal(self.partial / "journal", self.partial / "scratch", head, kept)
            self.folder.mkdir(exist_ok=True)

    def _clear(self) -> None:
        """The journal goes last: killed here, what is left is still known as ours."""
        for path in sorted(self.partial.iterdir(), key=lambda path: path.name == "journal"):
            if path.name != "lock":
                _remove(path)

    def _check_head(self, found: dict[str, Any] | None, head: dict[str, Any], resume: bool | None) -> None:
        if found is None:
            if any(path.name not in ("lock", "journal", "scratch") for path in self.partial.iterdir()):
                raise TargetError(f"{self.partial}: holds files but no journal", hint="remove it, or use --restart")
            if resume:
                raise TargetError(f"{self.partial}: there is nothing to resume", hint="run without --resume")
        elif found != head:
            same_plan = found.get("plan") == head["plan"]
            what = f"mlxquant {found.get('mlxquant')}" if same_plan else "another plan or source"
            raise TargetError(
                f"{self.partial}: was begun with {what}",
                hint="use --restart to begin anew, or repeat the first command to go on",
            )

    def _sweep(self) -> None:
        """Removes what an earlier run left beside the shards: this run writes its own small files again."""
        if not self.folder.exists():
            return
        keep = {writer.path.name for writer in self._writers}
        for path in self.folder.iterdir():
            if path.name not in keep or not path.is_file() or path.is_symlink():
                _remove(path)

    def _take_over(self, groups: Groups) -> Groups:
        """Of an earlier run's groups, those whose bytes are on disk as they were written."""
        intact = {writer.path for writer in self._writers if writer.intact()}
        kept = {
            group: sha256
            for group, sha256 in groups.items()
            if all(self._stored(name, digest, intact) for name, digest in sha256.items())
        }
        for sha256 in kept.values():
            self.checksums |= sha256
        self._done = set(kept)
        self.resumed = len(kept)
        return kept

    def _stored(self, name: str, digest: str, intact: set[Path]) -> bool:
        writer = self._home.get(name)
        return writer is not None and writer.path in intact and writer.stored_sha256(name) == digest

    def _leave_no_trace(self) -> None:
        """A refused beginning leaves no empty OUT.partial behind."""
        if {path.name for path in self.partial.iterdir()} <= {"lock"}:
            shutil.rmtree(self.partial, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _check_partial(partial: Path, source: Path | None) -> None:
    """`restart` empties OUT.partial, so it must be a conversion's, and never what the conversion reads."""
    if source is not None and source.exists():
        check_apart(partial, source)
    names = {path.name for path in partial.iterdir()} if partial.is_dir() else set()
    if "journal" not in names and names - _OWN:
        raise TargetError(
            f"{partial}: holds files but no journal, so no conversion made it",
            hint="move it away or choose another output name",
        )
