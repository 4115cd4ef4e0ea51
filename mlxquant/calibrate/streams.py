"""Hidden states between layers, kept in files: memory stays that of one layer, and a stopped run goes on from the last.

    OUT.partial/calibration/full-0003.f32        what enters layer 3 of the model as it is
    OUT.partial/calibration/quantized-0003.f32   and of the quantized one
    OUT.partial/calibration/done-0003.json       both are whole: their hashes, and the records of what was done before

Nothing is believed on the word of a file's name: what has not the hash that its done-*.json names is computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.files.reading import InputFile
from mlxquant.files.writing import write_whole, writing

Array = np.ndarray[Any, Any]

FULL, QUANTIZED = "full", "quantized"
_BATCH_TOKENS = 4096


class Stream:
    """float32 (B, L, H) in a file. Written front to back, read some samples at a time."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape

    def batches(self, tokens: int = _BATCH_TOKENS) -> Iterator[tuple[slice, Array]]:
        """(which samples, their states), about so many tokens at once. Raises SourceError for a file cut short."""
        count, length, width = self.shape
        step = max(1, tokens // length)
        file = InputFile(self.path)
        for start in range(0, count, step):
            stop = min(start + step, count)
            states = np.empty((stop - start, length, width), np.float32)
            file.read_into(4 * start * length * width, states, "hidden states")
            yield slice(start, stop), states

    def write(self, parts: Iterator[Array]) -> str:
        """All samples, in order; returns their sha256. Raises TargetError."""
        digest = hashlib.sha256()
        with writing(self.path), self.path.open("wb") as file:
            for part in parts:
                data = np.ascontiguousarray(part, np.float32)
                digest.update(data.data)
                file.write(data.data)
        return digest.hexdigest()

    def intact(self, sha256: str) -> bool:
        size = 4 * int(np.prod(self.shape))
        if not self.path.is_file() or self.path.stat().st_size != size:
            return False
        digest = hashlib.sha256()
        for _, states in self.batches():
            digest.update(states.data)
        return digest.hexdigest() == sha256


class Streams:
    """The states of both streams by layer. shape: (B, L, H) of each."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], kinds: tuple[str, ...] = (FULL, QUANTIZED)) -> None:
        self.folder, self.shape, self.kinds = folder, shape, kinds
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def of(self, kind: str, layer: int) -> Stream:
        return Stream(self.folder / f"{kind}-{layer:04}.f32", self.shape)

    def all_of(self, layer: int) -> dict[str, Stream]:
        return {kind: self.of(kind, layer) for kind in self.kinds}

    def finish(self, layer: int, sha256: dict[str, str], records: list[dict[str, Any]]) -> None:
        """What enters `layer` is whole. records: what is to be told of all layers before it. Drops older states."""
        value = {"sha256": sha256, "records": records}
        write_whole(self._done(layer), (json.dumps(value) + "\n").encode())
        for path in self.folder.iterdir():
            number = path.stem.rpartition("-")[2]
            if number.isdigit() and int(number) < layer:
                path.unlink()

    def resume(self) -> tuple[int, list[dict[str, Any]]]:
        """(the last layer whose entering states are whole, the records before it), or (-1, [])."""
        layers = sorted((int(p.stem.rpartition("-")[2]) for p in self.folder.glob("done-*.json")), reverse=True)
        for layer in layers:
            value = _read(self._done(layer))
            if value and all(self.of(kind, layer).intact(value["sha256"].get(kind, "")) for kind in self.kinds):
                return layer, list(value["records"])
        return -1, []

    def _done(self, layer: int) -> Path:
        return self.folder / f"done-{layer:04}.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(value, dict) and isinstance(value.get("sha256"), dict) and isinstance(value.get("records"), list)
    return value if whole else None
