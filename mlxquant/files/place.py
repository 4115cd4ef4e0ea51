"""Where a finished output goes: into one folder by one rename, or beside one another as files, the main one last.

Both can be killed at any moment: `settle` ends what a dead process has begun. Until the last rename the old output
comes back, then the new one stays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mlxquant.errors import TargetError
from mlxquant.files.reading import plain_name
from mlxquant.files.writing import flush, replace_file

MODEL, MOVING, REPLACED = "model", "moving", "replaced"
_MAGIC = b"GGUF"


class Place(Protocol):
    """`out` names the output; OUT.partial stands beside it."""

    out: Path

    def check(self, source: Path | None, force: bool) -> None:
        """Raises TargetError where writing, or replacing, would harm what is there."""
        ...

    def taken(self) -> Path | None:
        """What is in the way."""
        ...

    def settle(self, partial: Path) -> bool:
        """Ends a killed `move_in`. True: it was through, and nothing in `partial` is of use any more."""
        ...

    def move_in(self, partial: Path) -> None:
        """Replaces what is there by what is in partial/model. Raises OSError."""
        ...


class FolderPlace:
    """OUT is a folder."""

    def __init__(self, out: Path | str) -> None:
        self.out = _absolute(out)

    def check(self, source: Path | None, force: bool) -> None:
        out = self.out
        if not out.name:
            raise TargetError(f"{out}: is no folder to write a model into", hint="name a new folder")
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            kind = "a link" if out.is_symlink() else "a file"
            raise TargetError(
                f"{out}: is {kind}, expected a folder that does not exist yet", hint="choose another name"
            )
        if source is not None and source.exists():
            check_apart(out, source)
        if force and out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
            raise TargetError(
                f"{out}: is not replaced, since it is no model folder (it has no config.json)",
                hint="remove it yourself or choose another name",
            )

    def taken(self) -> Path | None:
        return self.out if self.out.exists() else None

    def settle(self, partial: Path) -> bool:
        replaced = partial / REPLACED
        if replaced.exists() and not self.out.exists():
            replaced.rename(self.out)
            return False
        return self.out.exists() and not (partial / MODEL).exists()

    def move_in(self, partial: Path) -> None:
        """OUT is missing for the moment between two renames."""
        replaced = partial / REPLACED
        if self.out.exists():
            self.out.rename(replaced)
        try:
            (partial / MODEL).rename(self.out)
        except OSError:
            if replaced.exists():
                replaced.rename(self.out)
            raise


class FilesPlace:
    """Several files in one folder. The last of `names` is the one that readers open first: it leaves first and comes
    last, so that there is never a set of files that looks whole and is not. A single file is replaced in one step.
    """

    def __init__(self, out: Path | str, names: Sequence[str]) -> None:
        self.out = _absolute(out)
        self.names = tuple(names)

    def check(self, source: Path | None, force: bool) -> None:
        for path in self._paths():
            if path.is_symlink() or path.is_dir():
                kind = "a link" if path.is_symlink() else "a folder"
                raise TargetError(
                    f"{path}: is {kind}, expected a file that does not exist yet", hint="choose another name"
                )
            if source is not None and source.exists() and path.exists() and path.samefile(source):
                raise TargetError(f"{path}: is the source file", hint="choose another name")
            if force and path.suffix.lower() == ".gguf" and path.exists() and _first_bytes(path) not in (_MAGIC, b""):
                raise TargetError(
                    f"{path}: is not replaced, since it is no GGUF file", hint="remove it or choose another name"
                )

    def taken(self) -> Path | None:
        return next((path for path in self._paths() if path.exists()), None)

    def settle(self, partial: Path) -> bool:
        names = _names(partial / MOVING)
        if not names:
            return False
        if not (partial / MODEL / names[-1]).exists():
            return True
        for name in names:
            if not (partial / MODEL / name).exists():
                self._beside(name).rename(partial / MODEL / name)
        for name in names:
            if (partial / REPLACED / name).exists():
                (partial / REPLACED / name).rename(self._beside(name))
        (partial / MOVING).unlink()
        return False

    def move_in(self, partial: Path) -> None:
        (partial / REPLACED).mkdir(exist_ok=True)
        replace_file(partial / MOVING, json.dumps(self.names).encode(), partial / "scratch")
        flush(partial / MOVING)
        try:
            self._move(partial)
        except OSError:
            self.settle(partial)
            raise

    def _move(self, partial: Path) -> None:
        if len(self.names) > 1:
            for name in reversed(self.names):
                if self._beside(name).exists():
                    self._beside(name).rename(partial / REPLACED / name)
        for name in self.names:
            (partial / MODEL / name).replace(self._beside(name))

    def _paths(self) -> list[Path]:
        return [self._beside(name) for name in self.names]

    def _beside(self, name: str) -> Path:
        return self.out.with_name(name)


def check_apart(out: Path, source: Path) -> None:
    """Raises TargetError where one of the two lies inside the other."""
    source = source.resolve()
    if source.is_dir() and any(p.exists() and p.samefile(source) for p in (out, *out.parents)):
        where = "is" if out.exists() and out.samefile(source) else "lies inside"
        raise TargetError(f"{out}: {where} the source folder", hint="write beside it")
    if out.exists() and any(p.samefile(out) for p in source.parents):
        raise TargetError(f"{out}: holds the source {source.name}", hint="write beside it")


def exists_error(out: Path) -> TargetError:
    return TargetError(f"{out}: already exists", hint="use --force to replace it, or choose another name")


def _names(moving: Path) -> list[str]:
    """What `move_in` noted; nothing where it has not begun, or a power cut took the note before it did."""
    try:
        names = json.loads(moving.read_bytes())
    except (FileNotFoundError, ValueError):
        return []
    return names if isinstance(names, list) and all(isinstance(n, str) and plain_name(n) for n in names) else []


def _absolute(out: Path | str) -> Path:
    return Path(os.path.abspath(out))  # noqa: PTH100 - lexical on purpose: OUT need not exist


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_MAGIC))
