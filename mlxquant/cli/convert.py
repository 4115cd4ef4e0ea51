"""`mlxquant convert SRC -o OUT`: an MLX folder, or with -o NAME.gguf a GGUF file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.resolve import resolve_source
from mlxquant.cli.sections import SectionCommand, SectionOption, given
from mlxquant.codecs.repacked import REPACKED
from mlxquant.codecs.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, MODES
from mlxquant.errors import UsageError
from mlxquant.plan.gguf_types import FILE_TYPES
from mlxquant.plan.recipe import RECIPES, REPACK, Settings, settings
from mlxquant.tensors import FLOAT_CODES, TensorSpec
from mlxquant.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from mlxquant.convert.sources import OpenSource
    from mlxquant.plan.plan import Plan, PlannedTensor

MLX, GGUF = "For an MLX folder", "For a GGUF file"
COST = ("from", "NMSE", "added", "bpw")  # columns of a repacked file's plan


@dataclass(frozen=True)
class Wish:
    """What is asked for whatever the output is."""

    source: str
    revision: str | None
    dry_run: bool
    as_json: bool
    resume: bool
    restart: bool
    force: bool


@click.command(cls=SectionCommand)
@click.argument("source", metavar="SRC")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The MLX folder, or NAME.gguf, to write.")
@click.option("--revision", help="Branch, tag or commit, when SRC is a Hub id.")
@click.option("--dry-run", is_flag=True, help="Print the plan, tensor by tensor, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the result as one JSON object.")
@click.option("--resume", is_flag=True, help="Go on with OUT.partial; an error if there is none to go on with.")
@click.option("--restart", is_flag=True, help="Throw OUT.partial away and begin again.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--allow-requantize", is_flag=True, help="Quantize again what is quantized in SRC: a second loss.")
@click.option(
    "--bits",
    cls=SectionOption,
    section=MLX,
    type=click.Choice([str(b) for b in AFFINE_BITS]),
    help="Bits per weight code.  [default: 4]",
)
@click.option(
    "--group-size",
    cls=SectionOption,
    section=MLX,
    type=click.Choice([str(g) for g in AFFINE_GROUP_SIZES]),
    help="Weights that share a scale and a bias.  [default: 64]",
)
@click.option(
    "--mode",
    cls=SectionOption,
    section=MLX,
    type=click.Choice(MODES),
    default="affine",
    show_default=True,
    help="MLX number format.",
)
@click.option(
    "--recipe",
    cls=SectionOption,
    section=MLX,
    type=click.Choice(RECIPES),
    help="Who gets more bits. uniform and mixed_* write what stock mlx_lm.convert writes; repack keeps a GGUF file's "
    "own codes.  [default: balanced; repack for a quantized .gguf without other format options]",
)
@click.option(
    "--dtype",
    cls=SectionOption,
    section=MLX,
    type=click.Choice(list(FLOAT_CODES)),
    help="Dtype of what stays float.  [default: the source's]",
)
@click.option(
    "--set",
    "sets",
    cls=SectionOption,
    section=MLX,
    multiple=True,
    metavar="REGEX=CODEC",
    help="Codec for matching tensors: 8g32, mxfp4, keep... Repeatable; the first match wins.",
)
@click.option(
    "--type",
    "file_type",
    cls=SectionOption,
    section=GGUF,
    metavar="TYPE",
    help=f"llama.cpp's file type, upper or lower case: {', '.join(FILE_TYPES)}.",
)
@click.option(
    "--tensor-type",
    "tensor_types",
    cls=SectionOption,
    section=GGUF,
    multiple=True,
    metavar="REGEX=TYPE",
    help="Type of matching tensors, by GGUF name: ffn_down=Q6_K. Repeatable; the first match wins.",
)
@click.option("--output-tensor-type", cls=SectionOption, section=GGUF, metavar="TYPE", help="Type of output.weight.")
@click.option(
    "--token-embedding-type", cls=SectionOption, section=GGUF, metavar="TYPE", help="Type of token_embd.weight."
)
@click.option("--pure", cls=SectionOption, section=GGUF, is_flag=True, help="One type for all: no mixture.")
@click.option(
    "--imatrix",
    cls=SectionOption,
    section=GGUF,
    metavar="FILE",
    help="Importance matrix by llama-imatrix, GGUF or .dat.",
)
@click.option(
    "--split-max-size",
    cls=SectionOption,
    section=GGUF,
    metavar="SIZE",
    help="Several files NAME-00001-of-0000N.gguf of at most SIZE of weights each: 5G, 500M or bytes.",
)
@click.option(
    "--pre",
    cls=SectionOption,
    section=GGUF,
    metavar="NAME",
    help="llama.cpp's name of the pre-tokenizer, where tokenizer.json does not tell.",
)
@click.option("--modelfile", cls=SectionOption, section=GGUF, is_flag=True, help="Write Ollama's Modelfile beside it.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    source: str,
    out: Path | None,
    revision: str | None,
    dry_run: bool,
    as_json: bool,
    resume: bool,
    restart: bool,
    force: bool,
    **options: Any,
) -> None:
    """Quantize SRC (a Hugging Face folder, an MLX folder, a Hub id or a .gguf file) into OUT.

    OUT is an MLX folder, which loads in stock mlx-lm and LM Studio; or with -o NAME.gguf --type TYPE a GGUF file, which
    loads in llama.cpp, Ollama and LM Studio. A conversion that was stopped goes on where it was when the same command
    is given again; OUT appears only when it is complete.
    """
    if resume and restart:
        raise UsageError("--resume and --restart contradict each other", hint="give one of them")
    if out is None and not dry_run:
        raise UsageError("no output", hint="add -o FOLDER or -o NAME.gguf, or --dry-run to see the plan only")
    wish = Wish(source, revision, dry_run, as_json, resume, restart, force)
    if wants_gguf(out, given(ctx, MLX), given(ctx, GGUF)):
        from mlxquant.cli.convert_gguf import convert_gguf

        convert_gguf(wish, out, options)
    else:
        convert_mlx(wish, out, options, bool({"--bits", "--group-size", "--mode", "--dtype"} & set(given(ctx, MLX))))


def wants_gguf(out: Path | None, for_mlx: Sequence[str], for_gguf: Sequence[str]) -> bool:
    """Which of the two outputs the command line means. Raises UsageError where it means both, or neither fully."""
    is_file = out is not None and out.suffix.lower() == ".gguf"
    typed = "--type" in for_gguf
    if is_file and not typed:
        raise UsageError(f"{out}: a GGUF file needs a --type", hint="add --type Q4_K_M, or leave .gguf out for MLX")
    if typed and for_mlx:
        raise UsageError(
            f"{for_mlx[0]} is for MLX folders, and --type is for GGUF files",
            hint=f"leave {for_mlx[0]} out (--tensor-type chooses single tensors' types), or --type for an MLX folder",
        )
    if typed and out is not None and not is_file:
        raise UsageError(
            f"--type is for GGUF files, and {out} does not end in .gguf",
            hint=f"write -o {out}.gguf, or leave --type out for an MLX folder",
        )
    if for_gguf and not typed:
        raise UsageError(f"{for_gguf[0]} is for GGUF files", hint="add -o NAME.gguf --type Q4_K_M, or leave it out")
    return typed


def convert_mlx(wish: Wish, out: Path | None, options: Mapping[str, Any], formatted: bool) -> None:
    """`formatted`: the command line chooses a format, so that a GGUF file's own is not kept unasked."""
    from mlxquant.plan.plan import make_plan

    check_settings(options)  # before anything is pulled
    if wish.dry_run:
        config, specs, quantized = resolve_headers(wish.source, wish.revision)
        print_plan(make_plan(config, specs, mlx_settings(options, quantized, formatted), quantized), wish.as_json)
        return
    from mlxquant.convert.sources import open_source

    path, origin = resolve_source(wish.source, wish.revision)
    opened = open_source(path, origin)
    wanted = mlx_settings(options, opened.quantized, formatted)
    plan = make_plan(opened.config, opened.specs, wanted, opened.quantized)
    assert out is not None
    run(opened, plan, out, wish)


def mlx_settings(options: Mapping[str, Any], quantized: Mapping[str, str], formatted: bool) -> Settings:
    """A GGUF file's own codes are kept where nothing else is asked for: any other format is a second loss."""
    own = not formatted and any(type_name in REPACKED for type_name in quantized.values())
    bits, group_size = options["bits"], options["group_size"]
    return settings(
        bits=int(bits) if bits else None,
        group_size=int(group_size) if group_size else None,
        mode=options["mode"],
        recipe=options["recipe"] or (REPACK if own else "balanced"),
        dtype=options["dtype"],
        sets=options["sets"],
        requantize=options["allow_requantize"],
    )


def check_settings(options: Mapping[str, Any]) -> None:
    """Raises UsageError for contradictions that no source can mend."""
    mlx_settings(options, {}, True)


def resolve_headers(
    source: str, revision: str | None
) -> tuple[dict[str, Any], Mapping[str, TensorSpec], Mapping[str, str]]:
    """Config, tensor specs and what is quantized already; for a Hub id from its headers alone."""
    from mlxquant.cli.resolve import is_hub_id, resolve

    if not is_hub_id(source):
        from mlxquant.convert.sources import open_source

        opened = open_source(resolve(source, revision))
        return opened.config, opened.specs, opened.quantized
    if source.endswith(".gguf"):
        from mlxquant.convert.gguf_source import GGUFSource
        from mlxquant.hub.front import read_front

        front, _, _ = read_front(source, revision, GGUFSource, lambda found: found.front_bytes)
        return front.config, front.specs, front.quantized
    from mlxquant.hub.headers import remote_specs
    from mlxquant.plan.packed import as_floats

    remote = remote_specs(source, revision)
    if not isinstance(remote.config.get("quantization"), dict):
        return remote.config, remote.specs, {}
    config, specs, packed = as_floats(remote.config, remote.specs)
    return config, specs, {name: weight.format for name, weight in packed.items()}


def run(opened: OpenSource, plan: Plan, out: Path, wish: Wish) -> None:
    from mlxquant.cli.progress import ByteBar
    from mlxquant.convert.sidecars import small_files

    # Before the kernels are loaded: parsing a large tokenizer.json takes about as much memory for a moment as they do.
    small = small_files(opened, plan)
    from mlxquant.convert.to_mlx import to_mlx

    if not wish.as_json:
        print_summary(plan)
    began = time.perf_counter()
    with stopped_in_one_line(out), ByteBar(f"Quantizing to {plan.base.label}", quiet=wish.as_json) as bar:
        to_mlx(
            opened,
            plan,
            out,
            resume=wish.resume or None,
            restart=wish.restart,
            force=wish.force,
            small=small,
            progress=bar,
        )
    seconds = time.perf_counter() - began
    if wish.as_json:
        click.echo(json.dumps({"out": str(out), "seconds": seconds, "bytes": plan.nbytes, "bpw": plan.bpw}))
        return
    print_written(out, plan.nbytes, plan.bpw, seconds)


@contextmanager
def stopped_in_one_line(out: Path) -> Iterator[None]:
    """Ctrl-C is a promise, not a failure."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"Stopped. What is done stays in {out}.partial; the same command goes on from there.", err=True)
        sys.exit(130)


def print_written(out: Path, nbytes: int, bpw: float, seconds: float) -> None:
    click.echo(f"Wrote {out}: {format_bytes(nbytes)}, {bpw:.2f} bits per weight, in {format_duration(seconds)}.")
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
    rows = [("tensor", "role", "shape", "codec", *(COST if plan.settings.recipe == REPACK else ()), "bytes")]
    for t in plan.tensors:
        codec = t.codec.label if t.codec.quantized else t.dtype.lower()
        cost = repack_cost(t) if plan.settings.recipe == REPACK else ()
        rows.append((t.name, t.role.value, "x".join(map(str, t.target.shape)), codec, *cost, f"{t.nbytes:,}"))
    sums = [("role", "bytes", "share")]
    sums += [(role, f"{count:,}", f"{count / plan.nbytes:.1%}") for role, count in plan.bytes_by_role().items()]
    print_columns(rows)
    print_columns([*sums, ("total", f"{plan.nbytes:,}", "100.0%")], numbers=2)
    print_summary(plan)


def repack_cost(tensor: PlannedTensor) -> tuple[str, ...]:
    """What the file's own format costs on Gaussian weights, what taking it over adds, and how large that is."""
    bpw = f"{8 * tensor.nbytes / tensor.size:.2f}"
    if tensor.repack is None:
        return "", "", "", bpw
    known = REPACKED[tensor.repack]
    return tensor.repack, f"{known.own:.1e}", f"{known.extra:.0e}" if known.extra else "0", bpw


def print_columns(rows: Sequence[Sequence[str]], numbers: int = 1) -> None:
    """Aligned, the last `numbers` columns to the right; never cut, as names are what people search for."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left, right = len(row) - numbers, range(len(row) - numbers, len(row))
        cells = [text.ljust(width) for text, width in zip(row[:left], widths, strict=False)]
        click.echo("  ".join([*cells, *(row[i].rjust(widths[i]) for i in right)]))
    click.echo()
