"""Opens what `SRC` names, so that everything after sees one thing: Hugging Face names, a config, rows, small files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxquant.convert.sidecars import folder_sidecars
from mlxquant.errors import SourceError
from mlxquant.files.hf_folder import HFFolder
from mlxquant.files.source import Source
from mlxquant.tensors import TensorSpec

Array = np.ndarray[Any, Any]


class OpenSource(Source, Protocol):
    """A Source with its small files and an account of where it came from.

    `quantized`: tensors that have been rounded before -> their format ('Q4_K', '4g64').
    """

    origin: dict[str, Any]
    weight_files: tuple[Path, ...]
    quantized: Mapping[str, str]

    def sidecars(self) -> dict[str, bytes]:
        """Tokenizer, template, generation config, licence: file name -> bytes."""
        ...


class FolderSource:
    """A Hugging Face folder. `origin` is filled in by whoever knows the Hub repository and revision."""

    def __init__(self, path: Path, origin: dict[str, Any] | None = None) -> None:
        self._folder = HFFolder(path)
        self.path = path
        self.config: dict[str, Any] = self._folder.config
        self.specs: Mapping[str, TensorSpec] = self._folder.specs
        self.quantized: Mapping[str, str] = {}
        self.weight_files = tuple(file.path for file in self._folder.files)
        self.origin = {"format": "safetensors", **(origin or {"name": path.resolve().name})} | header_hash(self.specs)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        return self._folder.read_rows(name, start, stop)

    def sidecars(self) -> dict[str, bytes]:
        return folder_sidecars(self.path)


def is_gguf(path: Path) -> bool:
    """Whether to read it as a GGUF file: some write MODEL.GGUF, and a folder may be called anything."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def open_source(path: Path, origin: dict[str, Any] | None = None) -> OpenSource:
    """A folder or a .gguf file. Raises SourceError naming what is wrong with it."""
    if path.is_dir():
        from mlxquant.convert.mlx_source import MLXSource, is_quantized

        return MLXSource(path, origin) if is_quantized(path) else FolderSource(path, origin)
    if is_gguf(path):
        from mlxquant.convert.gguf_source import GGUFSource

        return GGUFSource(path, origin)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder", hint="give a model folder, a .gguf file or a Hub id")
    raise SourceError(
        f"{path}: neither a folder nor a .gguf file", hint="give a model folder with config.json and safetensors"
    )


def header_hash(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """One hash over every tensor's name, dtype and shape."""
    digest = hashlib.sha256()
    for name in sorted(specs):
        digest.update(f"{name} {specs[name].dtype} {specs[name].shape}\n".encode())
    return {"header_sha256": digest.hexdigest()}


def fingerprint(source: OpenSource) -> str:
    """Tells a changed source from an interrupted conversion's: sizes and times of the weight files. Never written
    into the output, which depends on contents alone."""
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.weight_files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()
