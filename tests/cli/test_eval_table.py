"""What `eval` prints for people: nothing cut, nothing hostile, the sums right."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from mlxquant.cli.eval_table import show, show_layers
from mlxquant.measure.columns import KLD, columns
from mlxquant.measure.report import Estimate, Report, Speed, Worst
from tests.measure import reports

EVIL = 'x\x1b[31m\x07[bold]y[/bold] :smile: \u202e "q" \\'


@dataclass(frozen=True)
class Row:
    """As measure/layers.py's Injected."""

    name: str
    layer: int | None
    kind: str
    kl: Estimate


def printed(report: Report, width: int | None = 80) -> str:
    """width None: piped."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None) if width else Console(file=out)
    show(report, console)
    return out.getvalue()


def layers(rows: list[Row], width: int = 80) -> list[str]:
    out = io.StringIO()
    show_layers(rows, Estimate(0.05, 0.001), Console(file=out, width=width, force_terminal=True, color_system=None))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("report", [reports.report(), reports.timed()], ids=["plain", "timed"])
@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_no_number_is_cut_at_any_width(report: Report, width: int):
    text = printed(report, width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text
    for student in report.students:
        line = next(line for line in text.splitlines() if line.startswith(f"{student.model.name}  "))
        assert KLD.cell(student) in line
        assert f"{student.model.size.bpw:.2f}" in line


def test_at_80_columns_the_most_telling_figures_stay():
    text = printed(reports.report())
    for head in ("size", "bpw", "KLD", "PPL ratio", "same top"):
        assert f" {head}" in text.splitlines()[5]
    assert "Left out at this width: max, RMS Δp." in text
    teacher = replace(reports.report().teacher, speed=Speed(1234.5, 45.6, 650_000_000))
    assert "decode 45.6 tok/s, peak 650 MB" in " ".join(printed(replace(reports.timed(), teacher=teacher)).split())
    for head in ("prefill", "decode", "peak"):
        assert head in printed(reports.timed()).splitlines()[5]


def test_long_names_are_folded_and_not_lost():
    name = "a-very-long-name-of-a-model-that-somebody-made-Q4_K_M.gguf"
    student = reports.student(name, "x", 4.0, 0.1, 0.01)
    text = printed(reports.report((student,)))
    table = text[text.index("───") :].splitlines()[1:4]
    assert "".join(line.split()[0] for line in table).startswith(name[:40])


def test_a_pipe_gets_every_column_on_one_line():
    report = reports.timed()
    lines = printed(report, None).splitlines()
    for student in report.students:
        line = next(line for line in lines if line.startswith(student.model.name))
        for column in columns(report):
            assert f" {column.cell(student) if column is KLD else column.brief(student)}" in line


def test_above_the_table_stands_what_it_means():
    text = " ".join(printed(reports.report(setting=reports.setting(floor=2e-6)), 120).split())
    for words in (
        "Teacher: smol (269 MB, 16.00 bpw), perplexity 18.31 ± 0.37",
        "wiki.txt; 64 of 561 windows of 512 tokens",
        "BOS (token 1)",
        "cpu (AMD EPYC)",
        "Differences below 0.00200 mnat are rounding noise of this device.",
        "apart): smol-Q8_0.gguf, smol-mlx-8bit; smol-mlx-6bit, smol-Q6_K.gguf.",
    ):
        assert words in text


def test_each_column_that_is_shown_is_explained_and_no_other():
    text = " ".join(printed(reports.report()).split())
    for column in columns(reports.report()):
        assert (f"{column.head}: {column.note}" in text) == (column.head not in ("max", "RMS Δp"))


def test_the_worst_positions_of_the_worst_student():
    text = printed(reports.report())
    assert text.count("is worst, what comes next") == 1
    assert '7,250 mnat, window 4, token 302: " Paris" | " Paris" | " the"' in text
    assert 'after "def mean(values):\\n    return"' in text
    none = tuple(replace(s, worst=()) for s in reports.report().students)
    assert "is worst" not in printed(reports.report(none))


@pytest.mark.parametrize("width", [80, None])
def test_names_texts_and_tokens_reach_the_terminal_as_text(width: int | None):
    worst = (Worst(1.0, 0, 300, EVIL, EVIL, EVIL, EVIL),)
    student = reports.student(EVIL, "x", 4.0, 0.1, 0.01, worst=worst)
    report = reports.report((student,), setting=reports.setting(text=EVIL), notes=(EVIL,))
    text = printed(replace(report, teacher=replace(report.teacher, name=EVIL)), width)
    assert all(c.isprintable() or c == "\n" for c in text)
    flat = "".join(text.split())
    # Teacher, text, note, name in the table (folded at 80 columns) and below it, four pieces of text.
    assert flat.count("\\x1b[31m\\x07[bold]y[/bold]:smile:\\u202e") == (8 if width else 9)


def rows_of(text: list[str]) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text if line.strip() and line[0] != " "}


def matrix() -> list[Row]:
    def row(layer: int | None, kind: str, value: float) -> Row:
        return Row(f"{layer}.{kind}", layer, kind, Estimate(value, None))

    return [
        row(None, "embed", 0.0042),
        row(0, "attn_q", 0.001),
        row(0, "ffn_up", 0.002),
        row(0, "ffn_up", 0.003),  # two tensors of one kind: experts, or two norms
        row(2, "attn_q", 0.0125),
        row(2, "ffn_up", 0.0000001),
    ]


def test_layers_and_kinds_are_summed_and_the_largest_marked():
    found = rows_of(layers(matrix()))
    assert found["layer"] == ["attn_q", "ffn_up", "sum"]
    assert found["0"] == ["1.0", "5.0", "6.0"]
    assert found["2"] == ["12.5*", "<0.1", "12.5*"]
    assert found["sum"] == ["13.5*", "5.0", "18.5"]
    assert found["embed"] == ["4.2*"]
    text = " ".join(" ".join(layers(matrix())).split())
    assert "The sum is 22.7, the whole student 50.0 ± 1.0" in text


def test_a_matrix_that_does_not_fit_goes_on_below():
    kinds = [f"kind_number_{i}" for i in range(9)]
    rows = [Row("", layer, k, Estimate(0.001 * (i + 1), None)) for layer in (0, 1) for i, k in enumerate(kinds)]
    text = layers(rows, 60)
    assert max(map(cell_len, text)) <= 60
    heads = [line.split()[1:] for line in text if line.startswith("layer")]
    assert [kind for head in heads for kind in head] == [*kinds, "sum"]
    firsts = [line.split()[1:] for line in text if line.startswith("0 ")]
    assert [float(v.rstrip("*")) for first in firsts for v in first] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 45]


def test_only_tensors_outside_of_layers():
    assert rows_of(layers([Row("head", None, "head", Estimate(0.01, None))]))["head"] == ["10.0*"]


def test_students_that_are_the_teacher():
    assert layers([]) == ["No tensor of the student differs from the teacher's."]
