"""How large a model is and which one it is, from its files alone."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.codecs.blocks import cores
from mlxquant.convert.described import describe_path
from mlxquant.convert.sources import is_gguf, open_source
from mlxquant.errors import SourceError
from mlxquant.files.hf_folder import CONFIG
from mlxquant.files.reading import InputFile
from mlxquant.measure.report import Size
from mlxquant.plan.describe import Description
from mlxquant.run.text import Text
from mlxquant.tensors import DTYPES

_BLOCK_BYTES = 4 * 2**20
_CODES = {dtype.label: dtype.code for dtype in DTYPES.values()}


def size_of(path: Path) -> Size:
    """Of a Hugging Face or MLX folder, or a GGUF file, from its headers. Raises SourceError."""
    found = describe_path(path)
    if found.bpw is None:
        raise SourceError(f"{path}: has no weights", hint="give a model folder or a .gguf file")
    return Size(found.nbytes, found.parameters, found.bpw, _label(found))


def _label(found: Description) -> str:
    """What people call a model so quantized: 'Q4_K_M', '4 bit affine, group size 64', 'mxfp4', 'BF16'."""
    weights: Counter[str] = Counter()
    for tensor in found.tensors:
        weights[tensor.format] += tensor.size
    most = weights.most_common(1)[0][0]
    if found.container == "gguf":
        declared = found.made.get("file_type", "")
        return most if not declared or declared.isdigit() else declared  # digits: a file type without a name
    if packed := [name for name, _ in weights.most_common() if name not in _CODES]:
        return _packed_label(packed)
    scheme = found.quantization or {}
    if method := scheme.get("quant_method"):  # packed by others: AWQ, GPTQ, FP8
        return f"{scheme['bits']} bit {method}" if "bits" in scheme else str(method)
    return _CODES[most]


def _packed_label(formats: list[str]) -> str:
    """Of codecs' labels, such as 4g64 and mxfp4."""
    affine = sorted((int(m[1]), int(m[2])) for name in formats if (m := re.fullmatch(r"(\d+)g(\d+)", name)))
    others = [name for name in formats if not re.fullmatch(r"\d+g\d+", name)]
    if affine:
        bits, groups = (_listed(dict.fromkeys(sorted(values))) for values in zip(*affine, strict=True))
        others.append(f"{bits} bit affine, group size {groups}")
    return _listed(others)


def _listed(items: Iterable[object]) -> str:
    """'4', '4 and 6', '3, 4 and 6'."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def sha256_of(path: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """sha256, hex, of what a model computes with. progress: told (bytes done, bytes in all), one call at a time.

    A GGUF file's is its own, the one that the Hub lists. Of several files (config.json and safetensors, parts of a
    split GGUF) it is taken over a line for each in the order of their names: name, size, sha256. What the parts of a
    split GGUF are called does not count. Raises SourceError.
    """
    source = open_source(path)
    files = {part.name: InputFile(part) for part in source.weight_files}
    if not is_gguf(path):
        files[CONFIG] = InputFile(path / CONFIG)
    names = sorted(files)
    digests = _Hashing([files[name] for name in names], progress).run()
    if len(digests) == 1:
        return digests[0]
    called = [str(i) for i in range(len(names))] if is_gguf(path) else names
    lines = (f"{c} {files[name].nbytes} {d}\n" for c, name, d in zip(called, names, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class _Hashing:
    """Files on threads: hashlib lets go of the interpreter's lock, and one core hashes slower than disks read."""

    def __init__(self, files: list[InputFile], progress: Callable[[int, int], None] | None) -> None:
        self._files, self._progress = files, progress
        self._total = sum(file.nbytes for file in files)
        self._done, self._stop = 0, False
        self._lock = threading.Lock()

    def run(self) -> list[str]:
        if len(self._files) == 1:
            return [self._digest(self._files[0])]
        with ThreadPoolExecutor(min(len(self._files), cores())) as pool:
            try:
                return list(pool.map(self._digest, self._files))
            finally:  # where one failed, or Ctrl-C came, the others need not go on
                self._stop = True

    def _digest(self, file: InputFile) -> str:
        digest, buffer = hashlib.sha256(), np.empty(_BLOCK_BYTES, np.uint8)
        for start in range(0, file.nbytes, _BLOCK_BYTES):
            if self._stop:
                break
            block = buffer[: min(_BLOCK_BYTES, file.nbytes - start)]
            file.read_into(start, block, "its contents")
            digest.update(block.data)
            self._advance(len(block))
        return digest.hexdigest()

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._total)


def tokenizer_sha256(text: Text) -> str:
    """sha256, hex, of what turns text into tokens: templates and names of files do not count.

    Of the serialised pipeline (normalizer, pre-tokenizer, model, post-processor, added tokens); of the vocabulary and
    merges for a tokenizer that is written in Python.
    """
    backend = getattr(text.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # set by the last call, not the tokenizer's own
            pipeline.pop(state, None)
        return _json_sha256(pipeline)
    merges = getattr(text.tokenizer, "bpe_ranks", None) or {}
    return _json_sha256([text.tokenizer.get_vocab(), [list(pair) for pair in merges]])


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
