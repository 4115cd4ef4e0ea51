"""What a conversion has finished, as JSON lines: the plan, then each group with the sha256 of its parts.

{"mlxquant": "0.1.0", "journal": 1, "plan": "<digest>"}
{"group": "model.norm.weight", "sha256": {"model.norm.weight": "<hex>"}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxquant import __version__
from mlxquant.files.writing import replace_file, writing

VERSION = 1
Groups = dict[str, dict[str, str]]  # {group: {tensor: sha256}}


def heading(plan_digest: str) -> dict[str, Any]:
    """The first line. Another version of mlxquant may write other bytes: a run goes on only under its own."""
    return {"mlxquant": __version__, "journal": VERSION, "plan": plan_digest}


def read_journal(path: Path) -> tuple[dict[str, Any] | None, Groups]:
    """(heading, groups) of an earlier run; (None, {}) where there is none.

    Lines that cannot be read, the torn last one above all, are passed over: hashes vouch for the others.
    """
    if not path.exists():
        return None, {}
    entries = [_entry(line) for line in path.read_bytes().splitlines()]
    groups = {e["group"]: e["sha256"] for e in entries[1:] if e and _is_group(e)}
    return (entries[0] if entries and entries[0] else None), groups


class Journal:
    """Appends one line for each finished group."""

    def __init__(self, path: Path, scratch: Path, head: dict[str, Any], kept: Groups) -> None:
        """Begins the file anew with what is kept: a torn line at its end must not swallow the next one."""
        self._path = path
        lines = [_line(head), *(_group_line(group, sha256) for group, sha256 in kept.items())]
        replace_file(path, b"".join(lines), scratch)
        with writing(path):
            self._file = path.open("ab", buffering=0)

    def note(self, group: str, sha256: Mapping[str, str]) -> None:
        """Raises TargetError."""
        with writing(self._path):
            self._file.write(_group_line(group, sha256))

    def close(self) -> None:
        self._file.close()


def _group_line(group: str, sha256: Mapping[str, str]) -> bytes:
    return _line({"group": group, "sha256": dict(sha256)})


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _is_group(entry: dict[str, Any]) -> bool:
    return isinstance(entry.get("group"), str) and isinstance(entry.get("sha256"), dict)


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
