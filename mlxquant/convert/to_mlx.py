"""Carries out a plan: reads a row chunk, encodes it, writes it at its place. Decides nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxquant.codecs.encode import encode
from mlxquant.codecs.floats import NonFiniteError
from mlxquant.convert.gather import chunks, rows
from mlxquant.convert.manifest import NAME, manifest
from mlxquant.convert.sidecars import config_json, written_sidecars
from mlxquant.convert.sources import OpenSource, fingerprint
from mlxquant.errors import SourceError
from mlxquant.files.publish import Workspace
from mlxquant.files.shards import ShardWriter, assign, index_json
from mlxquant.plan.plan import Plan, PlannedTensor

SHARD_BYTES = 5 * 10**9
Array = np.ndarray[Any, Any]


class Progress(Protocol):
    """What the executor tells whoever watches: so many source bytes of so many are done."""

    def start(self, total_bytes: int, done_bytes: int) -> None: ...
    def advance(self, nbytes: int) -> None: ...


def to_mlx(
    source: OpenSource,
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    restart: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes the MLX folder `out` and returns it.

    Peak memory is a few row chunks, whatever the model's size. Killed at any point, the next call goes on from the
    journal and ends in the same bytes. Raises SourceError (bytes missing, NaN) and TargetError (see Workspace).
    """
    shards = assign([t.parts for t in plan.tensors], shard_bytes)
    digest = hashlib.sha256(f"{plan.digest()} {shard_bytes} {fingerprint(source)}".encode()).hexdigest()
    with Workspace.open(out, digest, resume=resume, restart=restart, force=force, source=source.path) as work:
        writer = ShardWriter(work, shards)
        todo = [t for t in plan.tensors if not work.done(t.name)]
        if progress:
            progress.start(sum(map(source_bytes, plan.tensors)), sum(map(source_bytes, plan.tensors)) - sum(map(source_bytes, todo)))
        for tensor in todo:
            work.finish(tensor.name, stream(source, tensor, writer, progress.advance if progress else None))
        writer.close()
        write_small_files(source, plan, work, index_json(shards, plan.size))
        work.publish()
    return out


def source_bytes(tensor: PlannedTensor) -> int:
    return tensor.size * 2


def stream(
    source: OpenSource, tensor: PlannedTensor, writer: ShardWriter, advance: Callable[[int], None] | None
) -> dict[str, str]:
    """Encodes one tensor chunk by chunk. Returns the sha256 of each stored part.

    The next chunk is read, and the last one hashed and written, while the kernels encode: those wait on the disk and
    release the GIL, these keep the cores busy.
    """
    parts = tensor.parts
    hashes = {part.name: hashlib.sha256() for part in parts}
    offsets = {part.name: 0 for part in parts}

    def put(arrays: tuple[Array, ...]) -> None:
        for part, array in zip(parts, arrays, strict=True):
            data = memoryview(np.ascontiguousarray(array)).cast("B")
            hashes[part.name].update(data)
            writer.write(part.name, offsets[part.name], data)
            offsets[part.name] += len(data)

    with ThreadPoolExecutor(1) as behind:
        writing = None
        for raw, start in read_ahead(source, tensor):
            arrays = encode_named(tensor, raw, start)
            if writing:
                writing.result()
            writing = behind.submit(put, arrays)
            if advance:
                advance(raw.size * 2)
        if writing:
            writing.result()
    return {name: digest.hexdigest() for name, digest in hashes.items()}


def read_ahead(source: OpenSource, tensor: PlannedTensor) -> Iterator[tuple[Array, int]]:
    """Chunks of the target in order, one of them being read while the caller works on the one before."""
    ranges = list(chunks(tensor.target))
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(rows, source, tensor.target, *ranges[0])
        for (start, _), following in zip(ranges, [*ranges[1:], None], strict=True):
            raw = coming.result()
            if following:
                coming = ahead.submit(rows, source, tensor.target, *following)
            yield raw, start


def encode_named(tensor: PlannedTensor, raw: Array, start: int) -> tuple[Array, ...]:
    """encode(), with the tensor's name added to what it complains of."""
    try:
        return encode(raw, tensor.target.dtype, tensor.dtype, tensor.codec)
    except NonFiniteError as error:
        raise SourceError(
            f"{tensor.name}: row {start + error.row} holds NaN or infinity, or does not fit {tensor.dtype}",
            hint="download the file again; if the value is simply too large, use --dtype bfloat16",
        ) from error


def write_small_files(source: OpenSource, plan: Plan, work: Workspace, index: bytes) -> None:
    """Everything but the weights: tokenizer and template byte for byte, config, index, manifest."""
    sidecars = source.sidecars()
    small = written_sidecars(source.config, sidecars)
    small["model.safetensors.index.json"] = index
    small["config.json"] = config_json(source.config, sidecars, plan, source.origin)
    small[NAME] = manifest(plan, source.origin, work.digests(), small)
    for name, data in small.items():
        work.write_file(name, data)
