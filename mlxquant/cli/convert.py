"""`mlxquant convert SRC -o OUT`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.resolve import resolve_source
from mlxquant.codecs.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, MODES
from mlxquant.errors import UsageError
from mlxquant.plan.recipe import RECIPES, settings
from mlxquant.tensors import FLOAT_CODES, TensorSpec
from mlxquant.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from mlxquant.convert.sources import OpenSource
    from mlxquant.plan.plan import Plan


@click.command()
@click.argument("source", metavar="SRC")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The MLX folder to write.")
@click.option("--bits", type=click.Choice([str(b) for b in AFFINE_BITS]), help="Bits per weight code.  [default: 4]")
@click.option(
    "--group-size",
    type=click.Choice([str(g) for g in AFFINE_GROUP_SIZES]),
    help="Weights that share a scale and a bias.  [default: 64]",
)
@click.option("--mode", type=click.Choice(MODES), default="affine", show_default=True, help="MLX number format.")
@click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    default="balanced",
    show_default=True,
    help="Who gets more bits. uniform and mixed_* write what stock mlx_lm.convert writes.",
)
@click.option(
    "--dtype", type=click.Choice(list(FLOAT_CODES)), help="Dtype of what stays float.  [default: the source's]"
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="REGEX=CODEC",
    help="Codec for matching tensors: 8g32, mxfp4, keep... Repeatable; the first match wins.",
)
@click.option("--revision", help="Branch, tag or commit, when SRC is a Hub id.")
@click.option("--dry-run", is_flag=True, help="Print the plan, tensor by tensor, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the result as one JSON object.")
@click.option("--resume", is_flag=True, help="Go on with OUT.partial; an error if there is none to go on with.")
@click.option("--restart", is_flag=True, help="Throw OUT.partial away and begin again.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def command(
    source: str,
    out: Path | None,
    bits: str | None,
    group_size: str | None,
    mode: str,
    recipe: str,
    dtype: str | None,
    sets: tuple[str, ...],
    revision: str | None,
    dry_run: bool,
    as_json: bool,
    resume: bool,
    restart: bool,
    force: bool,
) -> None:
    """Quantize SRC (a Hugging Face folder, a Hub id or a .gguf file) into the MLX folder OUT.

    OUT loads in stock mlx-lm and LM Studio. A conversion that was stopped goes on where it was when the same command
    is given again; OUT appears only when it is complete.
    """
    if resume and restart:
        raise UsageError("--resume and --restart contradict each other", hint="give one of them")
    if out is None and not dry_run:
        raise UsageError("no output folder", hint="add -o OUT, or --dry-run to see the plan only")
    wanted = settings(
        bits=int(bits) if bits else None,
        group_size=int(group_size) if group_size else None,
        mode=mode,
        recipe=recipe,
        dtype=dtype,
        sets=sets,
    )
    from mlxquant.plan.plan import make_plan

    if dry_run:
        config, specs = resolve_headers(source, revision)
        print_plan(make_plan(config, specs, wanted), as_json)
        return
    from mlxquant.convert.sources import open_source

    path, origin = resolve_source(source, revision)
    opened = open_source(path, origin)
    plan = make_plan(opened.config, opened.specs, wanted)
    assert out is not None
    run(opened, plan, out, resume, restart, force, as_json)


def resolve_headers(source: str, revision: str | None) -> tuple[dict[str, Any], Mapping[str, TensorSpec]]:
    """Config and tensor specs; for a Hub id from its headers alone, without downloading weights."""
    from mlxquant.cli.resolve import is_hub_id, resolve

    if not is_hub_id(source):
        from mlxquant.convert.sources import open_source

        opened = open_source(resolve(source, revision))
        return opened.config, opened.specs
    if source.endswith(".gguf"):
        from mlxquant.convert.gguf_source import GGUFSource
        from mlxquant.hub.front import read_front

        front, _, _ = read_front(source, revision, GGUFSource, lambda found: found.front_bytes)
        return front.config, front.specs
    from mlxquant.hub.headers import remote_specs

    remote = remote_specs(source, revision)
    return remote.config, remote.specs


def run(
    opened: OpenSource, plan: Plan, out: Path, resume: bool, restart: bool, force: bool, as_json: bool
) -> None:
    from mlxquant.cli.progress import ByteBar
    from mlxquant.convert.sidecars import small_files

    # Before the kernels are loaded: parsing a large tokenizer.json takes about as much memory for a moment as they do.
    small = small_files(opened, plan)
    from mlxquant.convert.to_mlx import to_mlx

    if not as_json:
        print_summary(plan)
    began = time.perf_counter()
    try:
        with ByteBar(f"Quantizing to {plan.base.label}", quiet=as_json) as bar:
            to_mlx(
                opened, plan, out, resume=resume or None, restart=restart, force=force, small=small, progress=bar
            )
    except KeyboardInterrupt:
        click.echo(f"Stopped. What is done stays in {out}.partial; the same command goes on from there.", err=True)
        sys.exit(130)
    seconds = time.perf_counter() - began
    if as_json:
        click.echo(json.dumps({"out": str(out), "seconds": seconds, "bytes": plan.nbytes, "bpw": plan.bpw}))
        return
    click.echo(
        f"Wrote {out}: {format_bytes(plan.nbytes)}, {plan.bpw:.2f} bits per weight, in {format_duration(seconds)}."
    )
    click.echo(f"Next: mlxquant verify {out}   or   mlxquant chat {out}")


def print_summary(plan: Plan) -> None:
    click.echo(
        f"{plan.model_type}: {format_count(plan.size)} weights, {plan.settings.recipe} recipe, {plan.base.label} -> "
        f"{format_bytes(plan.nbytes)}, {plan.bpw:.2f} bits per weight"
    )
    for remark in plan.remarks:
        click.echo(f"  note: {remark}")


def print_plan(plan: Plan, as_json: bool) -> None:
    """The whole plan: a table for people, one JSON object for scripts."""
    if as_json:
        click.echo(json.dumps(plan.to_json()))
        return
    rows = [("tensor", "role", "shape", "codec", "bytes")]
    for t in plan.tensors:
        codec = t.codec.label if t.codec.quantized else t.dtype.lower()
        rows.append((t.name, t.role.value, "x".join(map(str, t.target.shape)), codec, f"{t.nbytes:,}"))
    sums = [("role", "bytes", "share")]
    sums += [(role, f"{count:,}", f"{count / plan.nbytes:.1%}") for role, count in plan.bytes_by_role().items()]
    print_columns(rows)
    print_columns([*sums, ("total", f"{plan.nbytes:,}", "100.0%")], numbers=2)
    print_summary(plan)


def print_columns(rows: Sequence[Sequence[str]], numbers: int = 1) -> None:
    """Aligned, the last `numbers` columns to the right; never cut, as names are what people search for."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left, right = len(row) - numbers, range(len(row) - numbers, len(row))
        cells = [text.ljust(width) for text, width in zip(row[:left], widths, strict=False)]
        click.echo("  ".join([*cells, *(row[i].rjust(widths[i]) for i in right)]))
    click.echo()
