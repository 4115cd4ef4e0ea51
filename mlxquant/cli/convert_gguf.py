"""The GGUF side of `mlxquant convert`: settings, plan, run, and what is said of them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.converting import Wish, print_columns, print_shares, print_written, stopped_in_one_line
from mlxquant.cli.resolve import is_hub_id, resolve_headers, resolve_source
from mlxquant.errors import UsageError
from mlxquant.plan.gguf_types import TypeSettings, type_settings
from mlxquant.units import format_bytes, format_count, parse_bytes

if TYPE_CHECKING:
    from mlxquant.convert.gguf_job import GGUFJob
    from mlxquant.files.imatrix import Imatrix
    from mlxquant.plan.gguf_plan import GGUFPlan

_SCALES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def convert_gguf(wish: Wish, out: Path | None, options: Mapping[str, Any]) -> None:
    wanted = type_settings(
        options["file_type"],
        tensor_types=options["tensor_types"],
        output_tensor_type=options["output_tensor_type"],
        token_embedding_type=options["token_embedding_type"],
        pure=options["pure"],
    )
    split_bytes = parse_split(options["split_max_size"]) if options["split_max_size"] else 0
    imatrix = _imatrix(options["imatrix"])
    if wish.dry_run and is_hub_id(wish.source):
        print_plan(plan_from_headers(wish, wanted, imatrix, options["allow_requantize"]), wish.as_json)
        return
    from mlxquant.convert.gguf_job import open_job

    path, origin = resolve_source(wish.source, wish.revision)
    job = open_job(
        path,
        origin,
        wanted,
        imatrix=imatrix,
        pre=options["pre"],
        allow_requantize=options["allow_requantize"],
    )
    if wish.dry_run:  # after all that the conversion itself would refuse, the tokenizer included
        print_plan(job.plan, wish.as_json)
        return
    assert out is not None
    _run(job, out, wish, split_bytes, options["modelfile"])


def parse_split(text: str) -> int:
    """'5G', '500M', '100K' (powers of 1000, as llama-gguf-split has them) or bytes. Raises UsageError."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip().upper())
    try:
        size = int(match[1]) * _SCALES[match[2]] if match else parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"--split-max-size: {error.message}", hint="write it like 5G or 500M") from error
    if not size:
        raise UsageError(f"--split-max-size {text}: nothing fits into it", hint="write it like 5G or 500M")
    return size


def _imatrix(path: str | None) -> Imatrix | None:
    if path is None:
        return None
    from mlxquant.files.imatrix import read_imatrix

    return read_imatrix(path)


def plan_from_headers(wish: Wish, wanted: TypeSettings, imatrix: Imatrix | None, allow_requantize: bool) -> GGUFPlan:
    """The plan of a Hub id, from its headers alone: its tokenizer is looked at when it is converted."""
    from mlxquant.plan.gguf_plan import plan_checkpoint, plan_gguf

    if wish.source.endswith(".gguf"):
        from mlxquant.convert.block_rows import GGUFRows
        from mlxquant.hub.front import read_front

        rows, _, _ = read_front(wish.source, wish.revision, GGUFRows, lambda found: found.front_bytes)
        return plan_gguf(rows.file.typed, rows.file.tensors, wanted, imatrix=imatrix, allow_requantize=allow_requantize)
    config, specs, rounded = resolve_headers(wish.source, wish.revision)
    return plan_checkpoint(config, specs, wanted, imatrix=imatrix, rounded=rounded, allow_requantize=allow_requantize)


def _run(job: GGUFJob, out: Path, wish: Wish, split_bytes: int, with_modelfile: bool) -> None:
    from mlxquant.cli.progress import ByteBar
    from mlxquant.convert.to_gguf import to_gguf

    if not wish.as_json:
        print_summary(job.plan)
    beside = _modelfile(job, out, split_bytes) if with_modelfile else {}
    began = time.perf_counter()
    with (
        stopped_in_one_line(out),
        ByteBar(f"Writing {job.plan.settings.file_type}", quiet=wish.as_json) as bar,
    ):
        files = to_gguf(
            job.rows,
            job.plan,
            job.metadata,
            out,
            resume=wish.resume or None,
            restart=wish.restart,
            force=wish.force,
            split_bytes=split_bytes,
            beside=beside,
            progress=bar,
        )
    seconds = time.perf_counter() - began
    plan = job.plan
    if wish.as_json:
        found = {"out": str(files[0]), "files": [str(file) for file in files], "seconds": seconds}
        click.echo(json.dumps(found | {"bytes": plan.nbytes, "bpw": plan.bpw}))
        return
    if len(files) > 1:
        click.echo(f"{len(files)} files, {files[0].name} to {files[-1].name}: loaders are given the first.")
    print_written(out.with_name(files[0].name), plan.nbytes, plan.bpw, seconds)
    if beside:
        click.echo(f"      ollama create NAME -f {out.with_name(next(iter(beside)))}")


def _modelfile(job: GGUFJob, out: Path, split_bytes: int) -> dict[str, bytes]:
    from mlxquant.convert.modelfile import NAME, modelfile

    if split_bytes and job.plan.nbytes > split_bytes:
        raise UsageError("--modelfile: Ollama reads no split file", hint="leave out --split-max-size")
    return {NAME: modelfile(out.name, job.metadata, job.ends)}


def print_summary(plan: GGUFPlan) -> None:
    click.echo(
        f"{plan.architecture}: {format_count(plan.size)} weights, {plan.settings.file_type}"
        f"{' with importance matrix' if plan.imatrix else ''} -> {format_bytes(plan.nbytes)}, "
        f"{plan.bpw:.2f} bits per weight"
    )
    for remark in plan.remarks:
        click.echo(f"  note: {remark}")


def print_plan(plan: GGUFPlan, as_json: bool) -> None:
    """The whole plan: a table for people, one JSON object for scripts."""
    if as_json:
        click.echo(json.dumps(plan.to_json()))
        return
    rows = [("tensor", "shape", "source", "type", "bytes")]
    rows += [
        (t.name, "x".join(map(str, t.target.shape)), t.source_type, t.type_name + "*" * t.importance, f"{t.nbytes:,}")
        for t in plan.tensors
    ]
    print_columns(rows)
    if any(t.importance for t in plan.tensors):
        click.echo("* with its entry of the importance matrix\n")
    print_shares("type", plan.bytes_by_type(), plan.nbytes)
    print_summary(plan)
