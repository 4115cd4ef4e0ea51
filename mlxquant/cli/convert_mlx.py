"""The MLX side of `mlxquant convert`: settings, plan, run, and what is said of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.convert_budget import is_budget, with_budget
from mlxquant.cli.converting import Wish, print_columns, print_shares, print_written, stopped_in_one_line
from mlxquant.cli.resolve import resolve_headers, resolve_source
from mlxquant.codecs.repacked import REPACKED
from mlxquant.plan.recipe import REPACK, RTN, SEARCH, Settings, settings
from mlxquant.units import format_bytes, format_count

if TYPE_CHECKING:
    from mlxquant.convert.sources import OpenSource
    from mlxquant.plan.plan import Plan, PlannedTensor

COST = ("from", "NMSE", "added", "bpw")  # columns of a repacked file's plan


def convert_mlx(wish: Wish, out: Path | None, options: Mapping[str, Any], formatted: bool) -> None:
    """`formatted`: the command line chooses a format, so that a GGUF file's own is not kept unasked."""
    from mlxquant.plan.plan import make_plan

    check_settings(options)  # before anything is pulled
    budget = is_budget(options)
    if wish.dry_run and not budget:
        config, specs, quantized = resolve_headers(wish.source, wish.revision)
        print_plan(make_plan(config, specs, mlx_settings(options, quantized, formatted), quantized), wish.as_json)
        return
    from mlxquant.convert.sources import open_source

    path, origin = resolve_source(wish.source, wish.revision)
    opened = open_source(path, origin)
    wanted = mlx_settings(options, opened.quantized, formatted)
    plan = make_plan(opened.config, opened.specs, wanted, opened.quantized)
    if budget:
        plan = with_budget(opened, plan, out, options, wish.as_json)
        if wish.dry_run:
            print_plan(plan, wish.as_json)
            return
    assert out is not None
    if calibrated(plan.settings, options):
        from mlxquant.cli.convert_calibrated import convert_calibrated

        convert_calibrated(opened, plan, out, wish, options)
    else:
        run(opened, plan, out, wish)


def calibrated(wanted: Settings, options: Mapping[str, Any]) -> bool:
    """Whether codes are chosen by text: search does without, unless text is named."""
    named = wanted.rotate or options["calibration"] is not None
    return wanted.method not in (RTN, SEARCH) or (wanted.method == SEARCH and named)


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
        method=options["method"],
        rotate=options["rotate"],
    )


def check_settings(options: Mapping[str, Any]) -> None:
    """Raises UsageError for contradictions that no source can mend."""
    mlx_settings(options, {}, True)


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


def print_summary(plan: Plan) -> None:
    click.echo(
        f"{plan.model_type}: {format_count(plan.size)} weights, {plan.settings.recipe} recipe, {plan.base.label} by "
        f"{plan.settings.method} -> {format_bytes(plan.nbytes)}, {plan.bpw:.2f} bits per weight"
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
    print_columns(rows)
    print_shares("role", plan.bytes_by_role(), plan.nbytes)
    print_summary(plan)


def repack_cost(tensor: PlannedTensor) -> tuple[str, ...]:
    """What the file's own format costs on Gaussian weights, what taking it over adds, and how large that is."""
    bpw = f"{8 * tensor.nbytes / tensor.size:.2f}"
    if tensor.repack is None:
        return "", "", "", bpw
    known = REPACKED[tensor.repack]
    return tensor.repack, f"{known.own:.1e}", f"{known.extra:.0e}" if known.extra else "0", bpw
