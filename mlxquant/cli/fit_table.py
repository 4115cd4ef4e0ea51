"""`mlxquant fit` for people: the table of levels, the grid of Macs, and what stands beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxquant.fit.memory import limit_bytes
from mlxquant.plan.gguf_types import few
from mlxquant.units import GIB, format_bytes, format_count, format_number

if TYPE_CHECKING:
    from mlxquant.fit.answer import Answer, Grid
    from mlxquant.fit.pick import Pick
    from mlxquant.fit.values import Range, Row
    from mlxquant.machine import Machine

_PIPE_CHARS = 200  # nobody wraps what goes into a pipe
_VERDICTS = {"fits": ("yes", "green"), "tight": ("tight", "yellow"), "no": ("no", "red")}
_REFUSED = 3  # lines of levels that cannot be written


def console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_CHARS)


def show(answer: Answer, chosen: Pick | None) -> None:
    """Model, machine, one line for each level, and what helps."""
    out = console()
    for line in (_model(answer), *_machine(answer.machine), _context(answer)):
        _say(out, line)
    out.print()
    out.print(_levels(answer))
    for line in _notes(answer):
        _say(out, line, "dim")
    if chosen is not None:
        out.print()
        for line in chosen.lines():
            _say(out, line)


def _say(out: Console, line: str, style: str = "") -> None:
    """Names come from files: nothing in them is markup."""
    out.print(Text(line, style=style), soft_wrap=True)


def _model(answer: Answer) -> str:
    shape, first = answer.subject.shape, answer.rows[0].level
    made_for = f", made for {tokens(shape.context_length)} tokens" if shape.context_length else ""
    weights = f"{format_count(first.size)} weights, {shape.layers} layers"
    return f"{answer.subject.name}: {shape.model_type}, {weights}{made_for}"


def _machine(machine: Machine) -> Iterator[str]:
    speed = f", {format_number(machine.bandwidth_bytes_per_s / 1e9)} GB/s" if machine.bandwidth_bytes_per_s else ""
    how = {"read": "read from it", "observed": "as such Macs print it", "derived": "by rule: no such Mac was seen"}
    yield (
        f"{machine.title}{speed}: a model may take {format_bytes(limit_bytes(machine))}, 95 % of the GPU's "
        f"{format_bytes(machine.working_set_bytes)} ({how[machine.limits]}); "
        f"{format_bytes(machine.system_bytes)} stay with the system"
    )
    if machine.older_working_set_bytes is not None:
        yield f"  under macOS 15 and before the GPU's part is {format_bytes(machine.older_working_set_bytes)}"
    if machine.usual_working_set_bytes not in (None, machine.working_set_bytes):
        yield f"  usual for its memory would be {format_bytes(machine.usual_working_set_bytes or 0)}"
    yield from (f"  {remark}" for remark in machine.remarks)


def _context(answer: Answer) -> str:
    asked, cache = answer.asked, answer.cache
    held = cache.peak_bytes(asked.context_tokens, 1, asked.chunk_tokens)
    bits = f"{asked.kv_bits} bits" if asked.kv_bits else "16 bits"
    kinds = ", ".join(f"{count} {kind}" for kind, count in _kinds(answer))
    return f"{tokens(asked.context_tokens)} tokens of context: cache {format_bytes(held)} in {bits} ({kinds})"


def _kinds(answer: Answer) -> Iterable[tuple[str, int]]:
    sums: dict[str, int] = {}
    for kind, number, _ in answer.cache.layers:
        sums[kind] = sums.get(kind, 0) + number
    return sums.items()


def _levels(answer: Answer) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    depths = [depth for depth, _ in answer.rows[0].speed.decode] if answer.rows[0].speed else []
    heads = ["size", "bpw", "needs", "fits", "longest", "8-bit KV"]
    heads += [f"tok/s at {tokens(depth)}" for depth in depths] + ["prefill", "first token"] * bool(depths)
    table.add_column("level", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in answer.rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str | Text]:
    verdict, colour = _VERDICTS[row.verdict]
    if row.verdict == "fits" and row.advice:
        verdict += "*"
    eight = "-" if row.longest_8bit is None else longest(row.longest_8bit)
    cells: list[str | Text] = [row.level.key, format_bytes(row.level.nbytes), f"{row.level.bpw:.2f}"]
    cells += [format_bytes(row.need.total_bytes), Text(verdict, colour), longest(row.longest_float), eight]
    if row.speed:
        cells += [span(found) for _, found in row.speed.decode]
        cells += [span(row.speed.prefill), f"{span(row.speed.ttft_s)} s"]
    return cells


def tokens(count: int) -> str:
    """8192 -> '8k', 131072 -> '128k', 40000 -> '39k' (thousands of 1024, rounded down), 900 -> '900'."""
    return f"{count // 1024}k" if count >= 1024 else str(count)


def longest(count: int) -> str:
    return tokens(count) if count else "no"


def span(found: Range) -> str:
    """'27-35'."""
    return f"{_rounded(found.low)}-{_rounded(found.high)}"


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _notes(answer: Answer) -> Iterator[str]:
    engines = dict.fromkeys(row.speed.engine for row in answer.rows if row.speed)
    if engines:
        yield f"speeds: of 5 measured values 4 lie within; first token after a prompt of 2k; {'; '.join(engines)}"
    elif answer.machine.bandwidth_bytes_per_s is None:
        yield "no speeds: the memory bandwidth of this machine is not known; --chip names a chip, --calibrate times"
    yield from answer.cache.notes
    yield from answer.subject.remarks
    for reason, count, size in answer.left_out:
        yield f"left out: {count} tensors, {format_bytes(size)}: {reason}"
    if answer.machine.device == "cpu":
        yield "no GPU here: weights are expanded to float32 where they fit, four bytes each, which `needs` leaves out"
    if any(row.longest_8bit is not None and row.longest_8bit < row.longest_float for row in answer.rows):
        yield "8-bit KV in MLX: attention over it is not fused and holds scores, so a smaller --prefill-step pays"
    yield from (line for line in _remarks(answer) if "tensors left out" not in line)
    if any(row.verdict == "fits" and row.advice for row in answer.rows):
        yield "* tight, or too much, under macOS 15 and before"
    short = [row for row in _of_one_format(answer.rows) if row.verdict != "fits"]
    if short and (advised := short[-1]).advice:
        yield f"what helps {advised.level.key}:"
        yield from (f"  {line}" for line in advised.advice)
    yield from _refusals(answer)


def _remarks(answer: Answer) -> Iterable[str]:
    return dict.fromkeys(remark for row in answer.rows for remark in row.level.remarks)


def _of_one_format(rows: Sequence[Row]) -> list[Row]:
    """MLX's where there are any: of those the last that does not fit at ease is the nearest to it."""
    return [row for row in rows if row.level.format == rows[0].level.format]


def _refusals(answer: Answer) -> Iterator[str]:
    if answer.subject.quantized and answer.refused:
        yield f"{len(answer.refused)} levels would round again what is quantized: make them of the full-precision model"
        return
    alike: dict[str, list[str]] = {}
    for key, why in answer.refused.items():
        alike.setdefault(why, []).append(key)
    for why, keys in list(alike.items())[:_REFUSED]:
        yield f"{few(keys)} cannot be written: {why}"
    if len(alike) > _REFUSED:
        yield "and others, for other reasons: --json names them"


def show_grid(grid: Grid) -> None:
    """The longest context of each level, a column for each RAM size; a star where macOS 15 gave less."""
    out = console()
    bits = f"{grid.asked.kv_bits}-bit" if grid.asked.kv_bits else "16-bit"
    _say(out, f"{grid.subject.name}: the longest context that fits, {bits} keys and values")
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("level", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for machine in grid.machines:
        table.add_column(f"{machine.memory_bytes / GIB:.3g} GB", justify="right", no_wrap=True)
    for level, new, old in zip(grid.levels, grid.longest, grid.older, strict=True):
        cells = (longest(n) + ("*" if n != o else " ") for n, o in zip(new, old, strict=True))
        table.add_row(level.key, format_bytes(level.nbytes), *cells)
    out.print(table)
    _say(out, "no: not even one token; * less under macOS 15 and before, where the GPU may use less", "dim")
