"""A Hugging Face model folder as a Source: config.json and one or more safetensors files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mlxquant.errors import SourceError
from mlxquant.files.reading import plain_name, read_json_object, shown
from mlxquant.files.safetensors_file import SafetensorsFile
from mlxquant.tensors import TensorSpec

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class HFFolder:
    """Implements files.source.Source. `specs` stand in the order they lie on disk: by shard, then by offset.

    No descriptor is held between reads; `close` and `with` exist so that callers need not know that.
    """

    def __init__(self, path: Path | str) -> None:
        """Reads the config and all headers. Raises SourceError naming the file that is wrong."""
        self.path = Path(path)
        if not self.path.is_dir():
            found = "is a file" if self.path.exists() else "does not exist"
            raise SourceError(f"{self.path}: {found}, expected a folder with {CONFIG} and weights in it")
        if not os.access(self.path, os.R_OK | os.X_OK):
            raise SourceError(f"{self.path}: cannot be read: Permission denied", hint="ask for read permission")
        self.config: dict[str, Any] = _config(self.path)
        index = _index(self.path)
        self.files = tuple(SafetensorsFile(self.path / name) for name in _weight_files(self.path, index))
        self._home: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for name in file.specs:
                self._add(name, file)
        _check_index(self.path, index, self._home)
        self.specs: dict[str, TensorSpec] = {name: file.specs[name] for name, file in self._home.items()}

    def _add(self, name: str, file: SafetensorsFile) -> None:
        if name in self._home:
            first = self._home[name].path.name
            raise SourceError(f"{self.path}: tensor {shown(name)} is in {first} and in {file.path.name}")
        self._home[name] = file

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        """See Source.read_rows."""
        if name not in self._home:
            raise SourceError(f"{self.path}: has no tensor {shown(name)}")
        return self._home[name].read_rows(name, start, stop)

    def close(self) -> None:
        pass

    def __enter__(self) -> HFFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        raise SourceError(f"{folder}: has no {CONFIG}", hint="give the folder that holds it and the weights")
    return read_json_object(folder / CONFIG)


def _index(folder: Path) -> dict[str, str] | None:
    """{tensor: file name} of the index, or None. Names are checked: none may lead out of the folder."""
    path = folder / INDEX
    if not path.exists():
        return None
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: has no weight_map, expected an object of tensor names and file names")
    for tensor, name in weight_map.items():
        if not plain_name(name) or not name.endswith(".safetensors"):
            raise SourceError(
                f"{path}: tensor {shown(tensor)} is said to be in {shown(name)},"
                " expected the name of a .safetensors file in this folder"
            )
    return weight_map


def _weight_files(folder: Path, index: dict[str, str] | None) -> list[str]:
    """The files to read, in order. As in transformers a single model.safetensors comes before an index."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    if index is not None:
        names = sorted(set(index.values()))
        _all_here(folder, names, INDEX)
        return names
    # Files that begin with a dot are macOS's resource forks on foreign disks, not weights.
    found = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("."))
    # Mistral's repositories hold the same weights once more, as consolidated*.safetensors.
    names = [n for n in found if n.startswith("model")] or found
    if not names:
        raise _no_weights(folder)
    _all_here(folder, _numbered(names), "the number in the shards' names")
    return names


def _numbered(names: list[str]) -> list[str]:
    """All shards that 'model-00002-of-00003.safetensors' says there are."""
    expected = []
    for name in names:
        if match := re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.safetensors)", name):
            expected += [f"{match[1]}{i:05d}{match[2]}" for i in range(1, int(match[3]) + 1)]
    return sorted(set(expected))


def _all_here(folder: Path, names: list[str], told_by: str) -> None:
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(
            f"{folder}: {missing[0]}{more} missing, which {told_by} names", hint="download the folder again"
        )


def _check_index(folder: Path, index: dict[str, str] | None, home: dict[str, SafetensorsFile]) -> None:
    missing = [name for name in index or () if name not in home]
    if index and missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(
            f"{folder / INDEX}: {index[missing[0]]} lacks tensor {shown(missing[0])}{more} of the index",
            hint="download the folder again",
        )


def _no_weights(folder: Path) -> SourceError:
    names = sorted(p.name for p in folder.iterdir())
    pickles = [n for n in names if n.endswith(_PICKLES) and n != "training_args.bin"]
    ggufs = [n for n in names if n.endswith(".gguf")]
    if pickles:
        return SourceError(
            f"{folder}: has weights only as pickle ({pickles[0]}), which can run any code and is not read",
            hint="take a revision with .safetensors, or save it as such with transformers: save_pretrained",
        )
    if ggufs:
        return SourceError(
            f"{folder}: has no .safetensors file, but {ggufs[0]}", hint=f"give {folder / ggufs[0]} itself"
        )
    return SourceError(f"{folder}: has no .safetensors file", hint="download the weights too")
