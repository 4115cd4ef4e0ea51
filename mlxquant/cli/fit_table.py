"""`mlxquant fit` for people: the table of levels, the grid of Macs, and what stands beside them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxquant.fit.memory import FILL, limit_bytes
from mlxquant.plan.gguf_types import few
from mlxquant.plan.plan import left_out_remark
from mlxquant.units import GIB, format_bytes, format_count, format_number, format_tokens, visible

if TYPE_CHECKING:
    from mlxquant.fit.answer import Answer, Grid
    from mlxquant.fit.pick import Pick
    from mlxquant.fit.values import Range, Row
    from mlxquant.machine import Machine

    Cell = Callable[[Row], str | Text]

_PIPE_CHARS = 200  # nobody wraps what goes into a pipe
_VERDICTS = {"fits": ("yes", "green"), "tight": ("tight", "yellow"), "no": ("no", "red")}
_MOST = 3  # lines of remarks, and of levels that cannot be written
_EIGHT, _PREFILL, _FIRST = "longest\n8-bit KV", "prefill\ntok/s", "first\ntoken"


def console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_CHARS)


def show(answer: Answer, chosen: Pick | None) -> None:
    """Model, machine, one line for each level, and what helps."""
    out = console()
    for line in (_model(answer), *_machine(answer.machine), _context(answer)):
        _say(out, line)
    out.print()
    table, gone = _levels(answer, out.width)
    out.print(table)
    if gone:
        _say(out, f"left out at this width: {', '.join(gone)}", "dim")
    for line in _notes(answer):
        _say(out, line, "dim")
    if chosen is not None:
        out.print()
        for line in chosen.lines():
            _say(out, line)


def _say(out: Console, line: str, style: str = "") -> None:
    """Names come from files: nothing in them is markup, or for the terminal to act on."""
    out.print(Text(visible(line), style=style), soft_wrap=True)


def _model(answer: Answer) -> str:
    shape, first = answer.subject.shape, answer.rows[0].level
    made_for = f", made for {format_tokens(shape.context_length)} tokens" if shape.context_length else ""
    weights = f"{format_count(first.size)} weights, {shape.layers} layers"
    return f"{answer.subject.name}: {shape.model_type}, {weights}{made_for}"


def _machine(machine: Machine) -> Iterator[str]:
    speed = f", {format_number(machine.bandwidth_bytes_per_s / 1e9)} GB/s" if machine.bandwidth_bytes_per_s else ""
    yield f"{machine.title}{speed}: a model may take {format_bytes(limit_bytes(machine))}{_whole(machine)}"
    if machine.older_working_set_bytes is not None:
        yield f"  under macOS 15 and before the GPU's part is {format_bytes(machine.older_working_set_bytes)}"
    if machine.usual_working_set_bytes not in (None, machine.working_set_bytes):
        yield f"  usual for its memory would be {format_bytes(machine.usual_working_set_bytes or 0)}"
    yield from (f"  {remark}" for remark in machine.remarks)


def _whole(machine: Machine) -> str:
    """What the limit is a part of. A working set that was raised by hand is not used up to 95 %."""
    whole, kept = format_bytes(machine.working_set_bytes), format_bytes(machine.system_bytes)
    share = "95 %" if limit_bytes(machine) == int(FILL * machine.working_set_bytes) else "part"
    if machine.device == "cpu":
        return f", {share} of the {whole} that are free now; no GPU was found"
    how = {"read": "read from it", "observed": "as such Macs report it", "derived": "by rule: no such Mac was seen"}
    return f", {share} of the GPU's {whole} ({how[machine.limits]}); {kept} stay with the system"


def _context(answer: Answer) -> str:
    asked, cache = answer.asked, answer.cache
    held = cache.peak_bytes(asked.context_tokens, 1, asked.chunk_tokens)
    bits = f"{asked.kv_bits} bits" if asked.kv_bits else "16 bits"
    kinds = ", ".join(f"{count} {kind}" for kind, count in _kinds(answer))
    made_for = answer.subject.shape.context_length
    beyond = "; more than the model was made for" if made_for and asked.context_tokens > made_for else ""
    long = format_tokens(asked.context_tokens)
    return f"{long} tokens of context: cache {format_bytes(held)} in {bits} ({kinds}){beyond}"


def _kinds(answer: Answer) -> Iterable[tuple[str, int]]:
    sums: dict[str, int] = {}
    for kind, number, _ in answer.cache.layers:
        sums[kind] = sums.get(kind, 0) + number
    return sums.items()


def _levels(answer: Answer, width: int) -> tuple[Table, list[str]]:
    """The table, and the heads of the columns that gave way to `width`: a number cut short would be a wrong one."""
    columns, gone = _columns(answer), []
    for head in _give_way(answer):
        if _natural_width(_table(answer, columns)) <= width:
            break
        if columns.pop(head, None):
            gone.append(head.replace("\n", " "))
    return _table(answer, columns), gone


def _natural_width(table: Table) -> int:
    return Console(width=_PIPE_CHARS).measure(table).maximum


def _table(answer: Answer, columns: Mapping[str, Cell]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("\nlevel", no_wrap=True)
    for head in columns:
        table.add_column(head if "\n" in head else f"\n{head}", justify="right", no_wrap=True)
    for row in answer.rows:
        table.add_row(row.level.key, *(cell(row) for cell in columns.values()))
    return table


def _columns(answer: Answer) -> dict[str, Cell]:
    """Head -> what stands below it."""
    columns: dict[str, Cell] = {
        "size": lambda row: format_bytes(row.level.nbytes),
        "bpw": lambda row: f"{row.level.bpw:.2f}",
        "needs": lambda row: format_bytes(row.need.total_bytes),
        "fits": _verdict,
        "longest\ncontext": lambda row: longest(row.longest_float),
        _EIGHT: lambda row: "-" if row.longest_8bit is None else longest(row.longest_8bit),
    }
    columns |= {_at(depth): partial(_decode, at) for at, depth in enumerate(_depths(answer))}
    if _depths(answer):
        columns[_PREFILL] = lambda row: span(row.speed.prefill) if row.speed else ""
        columns[_FIRST] = lambda row: f"{span(row.speed.ttft_s)} s" if row.speed else ""
    return columns


def _give_way(answer: Answer) -> list[str]:
    """Heads, in the order in which they leave a narrow terminal. Decoding at the context's end stays."""
    between = [_at(depth) for depth in reversed(_depths(answer))]
    ends = (_at(0), _at(answer.asked.context_tokens))
    return ["bpw", *(head for head in between if head not in ends), _PREFILL, _EIGHT, _FIRST, _at(0)]


def _depths(answer: Answer) -> list[int]:
    speed = answer.rows[0].speed
    return [depth for depth, _ in speed.decode] if speed else []


def _at(depth: int) -> str:
    return f"tok/s\nat {format_tokens(depth)}"


def _decode(at: int, row: Row) -> str:
    return span(row.speed.decode[at][1]) if row.speed else ""


def _verdict(row: Row) -> Text:
    verdict, colour = _VERDICTS[row.verdict]
    return Text(verdict + "*" * (row.verdict == "fits" and bool(row.advice)), colour)


def longest(count: int) -> str:
    return format_tokens(count) if count else "no"


def span(found: Range) -> str:
    """'27-35'."""
    return f"{_rounded(found.low)}-{_rounded(found.high)}"


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


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
        yield "without a GPU weights are expanded to float32 where they fit, four bytes each, which `needs` leaves out"
    if any(row.longest_8bit is not None and row.longest_8bit < row.longest_float for row in answer.rows):
        yield "8-bit KV in MLX: attention over it is not fused and holds scores, so a smaller --prefill-step pays"
    yield from _remarks(answer)
    if any(row.verdict == "fits" and row.advice for row in answer.rows):
        yield "* tight, or too much, under macOS 15 and before"
    # Of the levels that do not fit and of those that are tight, the nearest to a fit.
    nearest = {row.verdict: row for row in _of_one_format(answer.rows) if row.verdict != "fits" and row.advice}
    for row in nearest.values():
        yield f"what helps {row.level.key}:"
        yield from (f"  {line}" for line in row.advice)
    yield from _refusals(answer)


def _remarks(answer: Answer) -> Iterator[str]:
    """Of all levels together; what is left out has been named already."""
    found = dict.fromkeys(remark for row in answer.rows for remark in row.level.remarks)
    named = {left_out_remark(reason, count) for reason, count, _ in answer.left_out}
    said = [remark for remark in found if remark not in named]
    yield from said[:_MOST]
    if len(said) > _MOST:
        yield f"and {len(said) - _MOST} more of this kind: `mlxquant convert --dry-run` names those of a level"


def _of_one_format(rows: Sequence[Row]) -> list[Row]:
    """Those of the first format, which is MLX where there is any."""
    return [row for row in rows if row.level.format == rows[0].level.format]


def _refusals(answer: Answer) -> Iterator[str]:
    if answer.subject.quantized and answer.refused:
        yield f"{len(answer.refused)} levels would round again what is quantized: make them of the full-precision model"
        return
    alike: dict[str, list[str]] = {}
    for key, why in answer.refused.items():
        alike.setdefault(why, []).append(key)
    for why, keys in list(alike.items())[:_MOST]:
        yield f"{few(keys)} cannot be written: {why}"
    if len(alike) > _MOST:
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
