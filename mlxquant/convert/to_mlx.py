"""Carries out a plan: reads a row chunk, encodes it, writes it at its place. Decides nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from mlxquant.codecs.encode import encode
from mlxquant.codecs.floats import NonFiniteError, widen
from mlxquant.codecs.spec import Codec
from mlxquant.convert.gather import chunks, refuse_shifted_norms, rows
from mlxquant.convert.manifest import NAME, manifest
from mlxquant.convert.sidecars import small_files
from mlxquant.convert.sources import OpenSource, fingerprint
from mlxquant.convert.streaming import Line, Progress, Silent, line
from mlxquant.convert.taken_over import HasBlocks, block_rows, repack_named, row_bytes
from mlxquant.errors import SourceError, UsageError
from mlxquant.files.publish import Workspace
from mlxquant.files.shards import INDEX, LIMIT_BYTES, assign, index_json
from mlxquant.plan.plan import Plan, PlannedTensor
from mlxquant.plan.recipe import RTN, SEARCH
from mlxquant.tensors import DTYPES

Array = np.ndarray[Any, Any]


def to_mlx(
    source: OpenSource,
    plan: Plan,
    out: Path,
    *,
    resume: bool | None = None,
    restart: bool = False,
    force: bool = False,
    shard_bytes: int = LIMIT_BYTES,
    small: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the MLX folder `out` and returns it.

    Peak memory is a few row chunks, whatever the model's size. Killed at any point, the next call goes on from the
    journal and ends in the same bytes. `small`: small_files(source, plan), where the caller has it already. Raises
    SourceError (bytes missing, NaN), TargetError (see Workspace) and UsageError for a method that needs calibration.
    """
    method = plan.settings.method
    encoder_of(method)
    watch = progress or Silent()
    small = small_files(source, plan) if small is None else small
    refuse_shifted_norms(source, (t.target for t in plan.tensors))
    shards = assign([t.parts for t in plan.tensors], shard_bytes)
    digest = hashlib.sha256(f"{plan.digest()} {shard_bytes} {fingerprint(source)}".encode()).hexdigest()
    with (
        Workspace.open(out, digest, shards, source=source.path, resume=resume, restart=restart, force=force) as work,
        line() as threads,
    ):
        todo = [t for t in plan.tensors if not work.done(t.name)]
        total = sum(map(source_bytes, plan.tensors))
        watch.start(total, total - sum(map(source_bytes, todo)))
        for tensor in todo:
            stream(source, tensor, work, watch, threads, method)
        write_small_files(source, plan, work, {**small, INDEX: index_json(shards, plan.size)})
        work.publish()
    return out


def source_bytes(tensor: PlannedTensor) -> int:
    """As they come from the source: blocks, or floats."""
    if tensor.repack:
        return tensor.size // tensor.target.shape[-1] * row_bytes(tensor.repack, tensor.target.shape[-1])
    return tensor.size * DTYPES[tensor.target.dtype].itemsize


def stream(
    source: OpenSource, tensor: PlannedTensor, work: Workspace, watch: Progress, threads: Line, method: str = RTN
) -> None:
    """Encodes one tensor chunk by chunk. method: rtn or search."""
    parts = [part.name for part in tensor.parts]

    def put(arrays: tuple[Array, ...]) -> None:
        for name, array in zip(parts, arrays, strict=True):
            work.write(name, array)

    if tensor.repack:  # only plans for a GGUF file take blocks over, so its source has them
        read, make = partial(block_rows, cast(HasBlocks, source), tensor), partial(repack_named, tensor)
    else:
        read, make = partial(rows, source, tensor.target), partial(encode_named, tensor, method=method)
    threads.run(list(chunks(tensor.target)), read, make, put, watch)
    work.finish(tensor.name, parts)


def encoder_of(method: str) -> Callable[[Array, str, str, Codec], tuple[Array, ...]]:
    """encode() or search(): raw rows, source code, dtype code, codec -> parts. Raises UsageError for other methods."""
    if method == RTN:
        return encode
    if method != SEARCH:
        raise UsageError(
            f"--method {method} chooses codes by calibration text, not row by row",
            hint=f"--method {SEARCH} needs no text",
        )
    from mlxquant.codecs.search import search  # compiles loops that rtn does without

    return search


def encode_named(tensor: PlannedTensor, raw: Array, start: int, *, method: str = RTN) -> tuple[Array, ...]:
    """encode() or search(), with the tensor's name added to what it complains of. What is no float stays as it is."""
    if not DTYPES[tensor.target.dtype].floating:
        return (raw,)
    with named(tensor, start):
        arrays = encoder_of(method)(raw, tensor.target.dtype, tensor.dtype, tensor.codec)
        if not tensor.codec.quantized:
            check_finite(arrays[0], tensor.dtype)
        return arrays


@contextmanager
def named(tensor: PlannedTensor, start: int = 0) -> Iterator[None]:
    """Adds the tensor's name to what an encoder complains of. start: the first of the rows that it was given."""
    try:
        yield
    except NonFiniteError as error:
        raise SourceError(
            f"{tensor.name}: row {start + error.row}: {error.reason}",
            hint="download the file again; if a value is only too large for the dtype, use --dtype bfloat16",
        ) from error


def check_finite(raw: Array, dtype: str) -> None:
    """The quantizing kernels look while they work; what is only copied is looked at here."""
    finite = np.isfinite(widen(raw, dtype)).reshape(len(raw), -1).all(axis=1)
    if not finite.all():
        raise NonFiniteError(int(np.argmin(finite)), f"NaN, infinity, or a number too large for {DTYPES[dtype].label}")


def write_small_files(source: OpenSource, plan: Plan, work: Workspace, small: Mapping[str, bytes]) -> None:
    """Everything but the weights, and a manifest of all that was written."""
    for name, data in small.items():
        work.write_file(name, data)
    work.write_file(NAME, manifest(plan, source.origin, work.checksums, small))
