"""`mlxquant eval` for people: the table, what it stands for, and the matrix of `--layers`.

Names, text and tokens come from files: nothing of them is markup or a control sequence here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxquant.measure.columns import (
    BPW,
    DELTA,
    KLD,
    MAX,
    MILLI,
    P99,
    RATIO,
    SIZE,
    SPEED,
    TOP,
    Column,
    caveats,
    columns,
    decimals_of,
    estimate,
    fixed,
    floor,
    protocol,
    significant,
)
from mlxquant.units import format_bytes, format_number, visible

if TYPE_CHECKING:
    from mlxquant.measure.layers import Injected
    from mlxquant.measure.report import Estimate, Report, Student, Worst

# Which columns go first where they do not all fit. What --speed asked for stays longer than what is near another.
_LEAVE = (MAX, DELTA, P99, RATIO, SIZE, *reversed(SPEED), TOP, BPW)
_NAME_CHARS = 24  # a longer name is folded before a column goes
_GAP = 2  # between columns: one of padding and one for the line in the head
_PIPE_CHARS = 200  # nobody wraps what goes into a pipe
_LARGEST = "*"


def show(report: Report, console: Console) -> None:
    """Prints the report, and where the worst student is worst."""
    console = _wide(console)
    for line in _heading(report):
        _say(console, line)
    shown = _fitting(report, console.width)
    console.print(_table(report, shown))
    left = [column.head for column in columns(report) if column not in shown]
    if left:
        _say(console, f"Left out at this width: {', '.join(left)}.", "dim")
    for column in shown:
        _say(console, f"{column.head}: {column.note}", "dim")
    _say(console, "± is the standard error, clustered by window.", "dim")
    for line in (*caveats(report), *(f"note: {note}" for note in report.notes)):
        _say(console, line)
    for student in report.students[-1:]:
        _worst(student, console)


def _wide(console: Console) -> Console:
    return console if console.is_terminal else Console(file=console.file, width=_PIPE_CHARS)


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(visible(line), style))


def _heading(report: Report) -> list[str]:
    teacher, found = report.teacher, report.students[:1]
    perplexity = "".join(f", perplexity {estimate(s.divergence.ppl_teacher)}" for s in found)
    size = f"{format_bytes(teacher.size.nbytes)}, {teacher.size.bpw:.2f} bpw"
    timed = teacher.speed
    speed = (
        f", decode {format_number(timed.decode_tok_s)} tok/s, peak {format_bytes(timed.peak_bytes)}" if timed else ""
    )
    lines = [
        f"Teacher: {teacher.name} ({size}){perplexity}{speed}",
        f"Text: {report.setting.text}; {protocol(report)}.",
    ]
    return [*lines, *filter(None, [floor(report)])]


def _fitting(report: Report, width: int) -> list[Column]:
    shown = list(columns(report))
    names = max((cell_len(visible(s.model.name)) for s in report.students), default=0)
    for column in _LEAVE:
        if min(names, _NAME_CHARS) + sum(_width(c, report.students) + _GAP for c in shown) <= width:
            break
        if column in shown:
            shown.remove(column)
    return shown


def _width(column: Column, students: Iterable[Student]) -> int:
    return max(len(column.head), len(column.unit), *(len(_cell(column, s)) for s in students))


def _cell(column: Column, student: Student) -> str:
    return column.cell(student) if column is KLD else column.brief(student)


def _table(report: Report, shown: Sequence[Column]) -> Table:
    table = _empty()
    table.add_column("", overflow="fold")
    for column in shown:
        _number_column(table, f"{column.head}\n{column.unit}")
    for student in report.students:
        table.add_row(Text(visible(student.model.name)), *(_cell(column, student) for column in shown))
    return table


def _empty() -> Table:
    return Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, padding=(0, _GAP - 1, 0, 0))


def _number_column(table: Table, head: str) -> None:
    table.add_column(Text(head), justify="right", no_wrap=True)


def _worst(student: Student, console: Console) -> None:
    if not student.worst:
        return
    _say(console, "")
    _say(console, f"Where {student.model.name} is worst, what comes next by text | teacher | student:")
    for place in student.worst:
        _place(place, console)


def _place(place: Worst, console: Console) -> None:
    words = " | ".join(_quoted(text) for text in (place.next, place.teacher_best, place.student_best))
    kl = f"{significant(place.kl * MILLI)} mnat"
    _say(console, f"  {kl}, window {place.window + 1}, token {place.position + 1}: {words}")
    _say(console, f"    after {_quoted(place.text)}", "dim")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def show_layers(rows: Sequence[Injected], whole: Estimate, console: Console) -> None:
    """A matrix of layer and tensor kind: mean KL of the teacher with this one tensor of the student's, in milli-nats.

    Tensors of no layer stand below it by their kind. Where not all kinds fit, the matrix goes on below itself. whole:
    mean KL of the student as a whole.
    """
    console = _wide(console)
    if not rows:
        _say(console, "No tensor of the student differs from the teacher's.")
        return
    heads, lines = _matrix(rows)
    for table in _side_by_side(heads, lines, console.width):
        console.print(table)
    total = sum(row.kl.value for row in rows)
    _say(
        console,
        f"KL divergence in mnat (0.001 nats) of the teacher with one tensor of the student's; {_LARGEST}: the largest "
        f"tensor, layer and kind. The sum is {significant(total * MILLI)}, the whole student {estimate(whole, MILLI)}: "
        "together tensors do not do what each does alone, added up.",
        "dim",
    )


def _matrix(rows: Sequence[Injected]) -> tuple[list[str], list[list[str]]]:
    """Heads, and lines that begin with their label. Sums by layer and by kind are the last column and line."""
    layered = [row for row in rows if row.layer is not None]
    kinds = list(dict.fromkeys(row.kind for row in layered))
    single = _Sums((row.layer, row.kind, row.kl.value) for row in layered)
    by_layer = _Sums((row.layer, row.kl.value) for row in layered)
    by_kind = _Sums((row.kind, row.kl.value) for row in layered)
    outside = _Sums((row.kind, row.kl.value) for row in rows if row.layer is None)
    # As many decimals for all as the largest needs for three digits: the eye then finds the long ones.
    decimals = decimals_of(MILLI * max(single.largest, outside.largest))
    lines = [
        [f"{layer[0]}", *(single.cell(decimals, *layer, kind) for kind in kinds), by_layer.cell(decimals, *layer)]
        for layer in sorted(by_layer)
    ]
    if layered:
        total = fixed(MILLI * sum(by_layer.values()), decimals) + " "
        lines.append(["sum", *(by_kind.cell(decimals, kind) for kind in kinds), total])
    lines += [[visible(key[0]), *("" for _ in kinds), outside.cell(decimals, *key)] for key in outside]
    return ["layer", *map(visible, kinds), "sum"], lines


class _Sums(dict[tuple[Any, ...], float]):
    """(key..., value) -> the sum of each key's values, in the order they come."""

    def __init__(self, found: Iterable[tuple[Any, ...]]) -> None:
        super().__init__()
        for *key, value in found:
            self[tuple(key)] = self.get(tuple(key), 0.0) + value
        self.largest = max(self.values(), default=0.0)

    def cell(self, decimals: int, *key: Any) -> str:
        """In milli-nats, the largest marked."""
        if key not in self:
            return ""
        return fixed(self[key] * MILLI, decimals) + (_LARGEST if self[key] == self.largest else " ")


def _side_by_side(heads: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> Iterator[Table]:
    """Tables of as many columns as fit, each with the labels; lines that have nothing in one are left out of it."""
    widths = [max(cell_len(line[i]) for line in (heads, *lines)) for i in range(len(heads))]
    start = 1
    while start < len(heads):
        stop, used = start + 1, widths[0] + _GAP + widths[start] + _GAP
        while stop < len(heads) and used + widths[stop] + _GAP <= width:
            used += widths[stop] + _GAP
            stop += 1
        table = _empty()
        table.add_column(heads[0], overflow="fold")
        for head in heads[start:stop]:
            _number_column(table, head)
        for line in lines:
            if any(line[start:stop]):
                table.add_row(*(Text(cell) for cell in (line[0], *line[start:stop])))
        yield table
        start = stop
