"""Is this GGUF file what its plan said? `verify` for a file: all it needs stands in the file itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.codecs.ggml import decode_rows, known_types
from mlxquant.convert.block_rows import encode_blocks
from mlxquant.convert.checks import READ_BYTES, Check
from mlxquant.convert.gather import chunks
from mlxquant.convert.gguf_job import PLAN, SETTINGS, SOURCE, TENSORS, VERSION, GGUFJob, open_job
from mlxquant.convert.to_gguf import tensors_sha256
from mlxquant.errors import MlxquantError, SourceError, UsageError
from mlxquant.files.gguf_file import GGUFFile, GGUFTensor
from mlxquant.files.gguf_spec import SPLIT_KEYS
from mlxquant.files.imatrix import Imatrix
from mlxquant.files.reading import one_line, shown
from mlxquant.plan.gguf_plan import imatrix_sha256, plain_value
from mlxquant.plan.gguf_types import TypeSettings, allows_quantization, order, tensor_types, type_settings

Advance = Callable[[int], None]
_FILE_TYPE = "general.file_type"
_TOKENS, _EMBEDDING = "tokenizer.ggml.tokens", "token_embd.weight"


@dataclass(frozen=True)
class WrittenGGUF:
    """A file of ours: `settings` is what its types were chosen by, `extra` what else bears on them."""

    file: GGUFFile
    settings: TypeSettings
    extra: Mapping[str, Any]
    source: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.file.tensors.values())


def open_written_gguf(path: Path) -> WrittenGGUF:
    """Raises SourceError when the file cannot be read, was not written by mlxquant, or not last."""
    file = GGUFFile(path)
    if missing := [key for key in (VERSION, SETTINGS, SOURCE, PLAN, TENSORS) if key not in file.metadata]:
        raise SourceError(
            f"{path}: has no key {missing[0]}, so it was not written by mlxquant (or was changed since)",
            hint="verify a file that `mlxquant convert` wrote",
        )
    try:
        extra, source = (dict(json.loads(file.metadata[key])) for key in (SETTINGS, SOURCE))
        names = ("output_tensor_type", "token_embedding_type", "pure")
        overrides = [f"{pattern}={type_name}" for pattern, type_name in extra["tensor_types"]]
        settings = type_settings(extra["file_type"], tensor_types=overrides, **{name: extra[name] for name in names})
        _ = extra["source_dtype"], extra["allow_requantize"], extra["imatrix_sha256"]
        if not isinstance(extra["pre"], str | None):
            raise ValueError(f"pre is {extra['pre']!r}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, MlxquantError) as error:
        what = shown(one_line(error))
        raise SourceError(f"{path}: {SETTINGS} cannot be read: {what}", hint="convert again") from error
    if (found := file.metadata.get(_FILE_TYPE)) != settings.file_type_id:
        # llama-quantize keeps all keys that it does not know.
        raise SourceError(
            f"{path}: {_FILE_TYPE} is {shown(found)}, and mlxquant wrote {settings.file_type_id} "
            f"({settings.file_type}): another tool has rewritten the file since",
            hint="verify the file that `mlxquant convert` wrote; what was made of it, nothing here can prove",
        )
    return WrittenGGUF(file, settings, extra, source)


def check_gguf(
    path: Path,
    source: Path | None = None,
    origin: dict[str, Any] | None = None,
    *,
    imatrix: Imatrix | None = None,
    advance: Advance | None = None,
) -> Iterator[Check]:
    """Yields each check as it is done. `source`, `imatrix`: as they were given to `convert`."""
    written = open_written_gguf(path)
    if source is not None:
        refuse_other_imatrix(written, imatrix)
    yield check_keys(written)
    yield check_types(written)
    yield check_tensors(written, advance or (lambda nbytes: None))
    if source is None:
        return
    job = open_job(
        source,
        origin,
        written.settings,
        imatrix=imatrix,
        pre=written.extra["pre"],
        allow_requantize=bool(written.extra["allow_requantize"]),
    )
    same = check_plan(written, job)
    yield same
    yield check_metadata(written, job)
    if same.ok:
        yield check_weights(written, job, advance or (lambda nbytes: None))


def refuse_other_imatrix(written: WrittenGGUF, imatrix: Imatrix | None) -> None:
    """Nothing is wrong with the file, so no check failed. Raises UsageError."""
    path, expected = written.file.path, written.extra["imatrix_sha256"]
    if expected is not None and imatrix is None:
        name = shown(written.file.metadata.get("quantize.imatrix.file"))
        raise UsageError(f"{path}: was made with the importance matrix {name}", hint="add --imatrix FILE")
    if expected is None and imatrix is not None:
        raise UsageError(f"{path}: was made without an importance matrix", hint="leave --imatrix out")
    if imatrix is not None and imatrix_sha256(imatrix) != expected:
        raise UsageError(f"{path}: was not made with {imatrix.file}", hint="give the matrix it was made with")


def check_keys(written: WrittenGGUF) -> Check:
    """What a loader relies on: order, a token for each row of the embedding at most."""
    keys, tensors = written.file.metadata, written.file.tensors
    if list(tensors) != order(tensors):
        return Check("keys", False, "the tensors are not in llama.cpp's order")
    tokens, rows = keys.get(_TOKENS), tensors[_EMBEDDING].rows if _EMBEDDING in tensors else 0
    if isinstance(tokens, list) and rows and len(tokens) > rows:
        return Check("keys", False, f"{len(tokens)} tokens, but {_EMBEDDING} has {rows} rows")
    parts = f" in {len(written.file.parts)} files" if len(written.file.parts) > 1 else ""
    return Check("keys", True, f"{len(keys)} keys, {len(tensors)} tensors, {written.nbytes:,} bytes{parts}")


def check_types(written: WrittenGGUF) -> Check:
    """llama.cpp's rules, asked again. What they leave alone keeps the source's type, which only a checkpoint's rules
    tell; blocks that were quantized in the source may have been kept."""
    tensors, settings = written.file.tensors, written.settings
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    # Whether there was a matrix decides, not which entries it had.
    names = shapes.keys() if written.extra["imatrix_sha256"] else None
    try:
        expected, _ = tensor_types(written.file.metadata, shapes, settings, names, str(written.extra["source_dtype"]))
    except (MlxquantError, ValueError, TypeError, LookupError) as error:
        return Check("types", False, shown(one_line(error)))
    from_gguf = written.source.get("format") == "gguf"
    for name, tensor in tensors.items():
        left = tensor.type_name == "MXFP4" or (from_gguf and not allows_quantization(name, tensor.shape))
        if tensor.type_name != expected[name] and not left:
            return Check("types", False, f"{shown(name)} is {tensor.type_name}, expected {expected[name]}")
    return Check("types", True, f"as {settings.file_type} has them")


def check_tensors(written: WrittenGGUF, advance: Advance) -> Check:
    """One pass: every byte as it was written, every number finite."""
    sums = []
    for name, tensor in written.file.tensors.items():
        digest = hashlib.sha256()
        for start, raw in _rows(written.file, name, tensor):
            digest.update(raw.data)
            advance(raw.nbytes)
            if not _finite(raw, tensor):
                return Check("tensors", False, f"{shown(name)}: NaN or infinity in rows {start}..{start + len(raw)}")
        sums.append(digest.hexdigest())
    if tensors_sha256(sums) != written.file.metadata[TENSORS]:
        return Check("tensors", False, f"their bytes have changed since they were written ({TENSORS} differs)")
    return Check("tensors", True, f"{len(sums)} tensors unchanged since they were written, all numbers finite")


def _rows(file: GGUFFile, name: str, tensor: GGUFTensor) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    step = max(1, READ_BYTES // max(1, tensor.row_bytes))
    for start in range(0, tensor.rows, step):
        yield start, file.read_rows(name, start, min(start + step, tensor.rows))


def _finite(raw: np.ndarray[Any, Any], tensor: GGUFTensor) -> bool:
    if tensor.type_name not in known_types():
        return True
    return bool(np.isfinite(decode_rows(raw, tensor.type_name, tensor.width)).all())


def check_plan(written: WrittenGGUF, job: GGUFJob) -> Check:
    same = job.plan.digest() == written.file.metadata[PLAN]
    return Check("plan", same, f"the source gives {'the same plan' if same else 'another plan: not this source'}")


def check_metadata(written: WrittenGGUF, job: GGUFJob) -> Check:
    """Every key made anew, the tokenizer's above all."""
    found = {k: plain_value(v) for k, v in written.file.typed.items() if k not in (*SPLIT_KEYS, TENSORS)}
    expected = {k: plain_value(v) for k, v in job.metadata.items()}
    for key in sorted(found.keys() | expected.keys()):
        # repr, since NaN is not equal to itself
        if repr(found.get(key)) != repr(expected.get(key)):
            ours, theirs = (shown(side.get(key, ("", "nothing"))[1]) for side in (found, expected))
            return Check("metadata", False, f"{shown(key)} is {ours}, and the source gives {theirs}")
    tokenizer = sum(key.startswith("tokenizer.") for key in found)
    return Check("metadata", True, f"{len(found)} keys as the source gives them, {tokenizer} of them the tokenizer's")


def check_weights(written: WrittenGGUF, job: GGUFJob, advance: Advance) -> Check:
    """Every chunk encoded anew: the encoder is deterministic, so bytes must be equal."""
    for tensor in job.plan.tensors:
        for start, stop in chunks(tensor.target):
            raw = job.rows.read(tensor, start, stop)
            expected = encode_blocks(tensor, job.plan.imatrix, raw, start)
            stored = written.file.read_rows(tensor.name, start, stop)
            advance(stored.nbytes)
            if not np.array_equal(stored, expected):
                return Check("weights", False, f"{tensor.name}: rows {start}..{stop} are not what the source gives")
    return Check("weights", True, f"{len(job.plan.tensors)} tensors encoded anew: the same bytes")
