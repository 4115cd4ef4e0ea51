"""What both outputs of `mlxquant convert` share: what is asked for, and what is said of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from mlxquant.units import format_bytes, format_duration


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


@contextmanager
def stopped_in_one_line(out: Path) -> Iterator[None]:
    """Ctrl-C is a promise, not a failure."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"Stopped. What is done stays in {out}.partial; the same command goes on from there.", err=True)
        sys.exit(130)


def is_gguf(out: Path | None) -> bool:
    """Whether the output that is named is a GGUF file."""
    return out is not None and out.suffix.lower() == ".gguf"


def print_written(out: Path, nbytes: int, bpw: float, seconds: float) -> None:
    click.echo(f"Wrote {out}: {format_bytes(nbytes)}, {bpw:.2f} bits per weight, in {format_duration(seconds)}.")
    click.echo(f"Next: mlxquant verify {out}   or   mlxquant chat {out}")


def print_shares(what: str, sums: Mapping[str, int], total: int) -> None:
    rows = [(name, f"{count:,}", f"{count / total:.1%}") for name, count in sums.items()]
    print_columns([(what, "bytes", "share"), *rows, ("total", f"{total:,}", "100.0%")], numbers=2)


def print_columns(rows: Sequence[Sequence[str]], numbers: int = 1) -> None:
    """Aligned, the last `numbers` columns to the right; never cut, as names are what people search for."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left, right = len(row) - numbers, range(len(row) - numbers, len(row))
        cells = [text.ljust(width) for text, width in zip(row[:left], widths, strict=False)]
        click.echo("  ".join([*cells, *(row[i].rjust(widths[i]) for i in right)]))
    click.echo()
