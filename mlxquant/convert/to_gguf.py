"""Carries out a GGUF plan: one file, or the parts of a split one, made as an MLX folder is. Decides nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlxquant.convert.block_rows import BlockRows, encode_blocks
from mlxquant.convert.gather import chunks
from mlxquant.convert.gguf_job import TENSORS
from mlxquant.convert.streaming import Line, Progress, Silent, line
from mlxquant.files.gguf_writer import lay_out
from mlxquant.files.place import FilesPlace
from mlxquant.files.publish import Workspace
from mlxquant.files.shards import Shard
from mlxquant.plan.gguf_plan import GGUFPlan, PlannedBlocks


def to_gguf(
    source: BlockRows,
    plan: GGUFPlan,
    metadata: Mapping[str, Any],
    out: Path,
    *,
    resume: bool | None = None,
    restart: bool = False,
    force: bool = False,
    split_bytes: int = 0,
    beside: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Writes `out`, or its parts of about `split_bytes` (0: one file); returns their paths, the first part first.

    Peak memory is a few row chunks, whatever the model's size. Killed at any point, the next call goes on from the
    journal and ends in the same bytes. `metadata`: the whole file's keys (gguf_job.py). `beside`: small
    files to appear in the same folder. Raises SourceError (bytes missing, NaN) and TargetError (see Workspace).
    """
    watch, beside = progress or Silent(), beside or {}
    shards = lay_out(out.name, metadata, [t.spec for t in plan.tensors], split_bytes, sealed=TENSORS)
    place = FilesPlace(out, [*beside, *(shard.file for shard in reversed(shards))])
    with (
        Workspace.open(
            place,
            _digest(plan, shards, source),
            shards,
            source=source.path,
            resume=resume,
            restart=restart,
            force=force,
        ) as work,
        line() as threads,
    ):
        todo = [t for t in plan.tensors if not work.done(t.name)]
        total = sum(map(source.nbytes, plan.tensors))
        watch.start(total, total - sum(map(source.nbytes, todo)))
        for tensor in todo:
            _stream(source, plan, tensor, work, watch, threads)
        for name, data in beside.items():
            work.write_file(name, data)
        work.seal(tensors_sha256(work.checksums[t.name] for t in plan.tensors).encode())
        work.publish()
    return tuple(place.out.with_name(shard.file) for shard in shards)


def _digest(plan: GGUFPlan, shards: tuple[Shard, ...], source: BlockRows) -> str:
    """The headers hold the metadata, where each tensor goes, and mlxquant's version."""
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.weight_files]
    digest = hashlib.sha256(f"{plan.digest()} {stats}".encode())
    for shard in shards:
        digest.update(shard.header)
    return digest.hexdigest()


def _stream(
    source: BlockRows, plan: GGUFPlan, tensor: PlannedBlocks, work: Workspace, watch: Progress, threads: Line
) -> None:
    threads.run(
        list(chunks(tensor.target)),
        partial(source.read, tensor),
        partial(encode_blocks, tensor, plan.imatrix),
        partial(work.write, tensor.name),
        watch,
    )
    work.finish(tensor.name, [tensor.name])


def tensors_sha256(sums: Iterable[str]) -> str:
    """One hash for all tensors: of their own sha256, in the file's order."""
    return hashlib.sha256("".join(sums).encode()).hexdigest()
