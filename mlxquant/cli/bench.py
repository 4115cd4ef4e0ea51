"""`mlxquant bench MODEL`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxquant.cli.progress import waiting
from mlxquant.cli.resolve import resolve
from mlxquant.cli.running import engine_options, open_ready, open_text
from mlxquant.errors import UsageError
from mlxquant.units import format_bytes, format_number

if TYPE_CHECKING:
    from mlxquant.measure.speed import Row
    from mlxquant.run.model import LoadedModel
    from mlxquant.run.ready import Ready


def numbers(text: str, option: str, least: int) -> list[int]:
    """'128,512' -> [128, 512]. Raises UsageError naming the option."""
    from mlxquant.units import parse_tokens

    values = [parse_tokens(word) for word in text.split(",")]
    if min(values) < least:
        raise UsageError(f"{option} {text}: {min(values)} is too small", hint=f"use {least} or more")
    return values


@click.command()
@click.argument("model")
@click.option("-p", "--prompt", default="512", show_default=True, help="Prompt tokens; several with commas.")
@click.option("-n", "--generate", "generated", default="128", show_default=True, help="Generated tokens; likewise.")
@click.option("-d", "--depth", default="0", show_default=True, help="Tokens in the cache beforehand; likewise.")
@click.option("-r", "--repeats", type=click.IntRange(1), default=3, show_default=True, help="Repetitions of each case.")
@click.option("--against", type=click.Choice(["mlx-lm"]), help="Run stock mlx-lm on the same folder in turn.")
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print the JSON line only.")
def command(
    model: str,
    prompt: str,
    generated: str,
    depth: str,
    repeats: int,
    against: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Time MODEL: prefill and decode for each prompt size, generated length and cache depth.

    The first token's time belongs to prefill. Peak memory is MLX's own, reset for each trial. A table for people, one
    JSON line last.
    """
    from mlxquant.measure.speed import bench, cases
    from mlxquant.measure.traffic import bandwidth_bytes_per_s, bytes_per_token

    wanted = cases(numbers(prompt, "--prompt", 1), numbers(generated, "--generate", 2), numbers(depth, "--depth", 0))
    path = resolve(model, options["revision"])
    stock = stock_rows(path, wanted, repeats) if against else []
    _, where, text = open_text(str(path), options | {"revision": None})
    longest = max(c.depth_tokens + c.prompt_tokens + c.generated_tokens for c in wanted)
    ready = open_ready(path, where, text, options, longest)
    loaded, plan = ready.loaded, ready.plan
    bandwidth, bandwidth_source = bandwidth_bytes_per_s(where.machine)
    per_token = bytes_per_token(loaded.model, loaded.config)
    with waiting(f"Timing {path.name}"):
        rows = list(bench(loaded.model, plan.make, loaded.vocabulary, wanted, repeats, ready.prefill_step))
    share = [
        row.mean("decode_tok_s") * (per_token + plan.held_bytes(row.case.depth_tokens + row.case.prompt_tokens))
        / bandwidth
        for row in rows
    ]  # fmt: skip
    if not as_json:
        draw(path, ready, rows, share, stock, f"{format_bytes(bandwidth)}/s {bandwidth_source}")
    click.echo(json.dumps(result(path, loaded, where, rows, share, stock, bandwidth)))


def stock_rows(path: Path, wanted: Any, repeats: int) -> list[Row]:
    """Stock mlx-lm goes first, in a process that has ended before ours loads: two copies might not fit."""
    from mlxquant.convert.sources import is_gguf
    from mlxquant.measure.stock import stock_rows as run

    if is_gguf(path):
        raise UsageError(f"{path}: stock mlx-lm reads no GGUF file", hint="convert it first, then bench the folder")
    with waiting(f"Timing {path.name} under stock mlx-lm, in a process of its own"):
        return run(path, wanted, repeats)


def draw(path: Path, ready: Ready, rows: list[Row], share: list[float], stock: list[Row], bandwidth: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console, loaded = Console(), ready.loaded
    console.print(f"{path.name}: {loaded.quantization}, {format_bytes(loaded.weight_bytes)} in memory", highlight=False)
    for note in ready.notes:
        console.print(f"  note: {note}", highlight=False)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in ("", "depth", "prompt", "gen", "first", "prefill", "decode", "peak", "limit"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(*cells("mlxquant", row), f"{share[i]:.0%}")
        if stock:
            table.add_row(*cells("mlx-lm", stock[i]), "")
            ratios = [row.mean(f) / stock[i].mean(f) for f in ("prefill_tok_s", "decode_tok_s")]
            table.add_row("ratio", "", "", "", "", *(f"{r:.2f}x" for r in ratios), "", "", style="bold")
    console.print(table)
    console.print(f"prefill and decode in tok/s; limit: share of {bandwidth}", highlight=False)


def cells(name: str, row: Row) -> list[str]:
    def spread(field: str) -> str:
        return f"{format_number(row.mean(field))} ± {format_number(row.deviation(field))}"

    case = row.case
    counts = [f"{n:,}" for n in (case.depth_tokens, case.prompt_tokens, case.generated_tokens)]
    first = f"{row.mean('ttft_s'):.2f} s"
    return [name, *counts, first, spread("prefill_tok_s"), spread("decode_tok_s"), format_bytes(row.peak_bytes)]


def result(
    path: Path, loaded: LoadedModel, where: Any, rows: list[Row], share: list[float], stock: list[Row], bandwidth: float
) -> dict[str, Any]:
    """The JSON line."""
    from importlib.metadata import version

    value: dict[str, Any] = {
        "model": path.name,
        "quantization": loaded.quantization,
        "weight_bytes": loaded.weight_bytes,
        "expanded": loaded.expanded,
        "device": where.kind,
        "blas": where.blas.name,
        "chip": where.machine.chip,
        "bandwidth_bytes_per_s": bandwidth,
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "rows": [row.to_json() | {"share_of_limit": s} for row, s in zip(rows, share, strict=True)],
    }
    if stock:
        value["mlx_lm_rows"] = [row.to_json() for row in stock]
        value["ratios"] = [
            {f: a.mean(f) / b.mean(f) for f in ("prefill_tok_s", "decode_tok_s")}
            for a, b in zip(rows, stock, strict=True)
        ]
    return value
