"""The card, read back by a Markdown parser that is not ours."""

from __future__ import annotations

import shlex

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from mlxquant.cli.eval import command as eval_command
from mlxquant.cli.eval import count
from mlxquant.measure.card import card, command
from mlxquant.measure.columns import columns
from mlxquant.measure.report import Report
from tests.measure import reports

HOSTILE = [
    "a|b",
    "`x` ``y``",
    "`",
    "<script>alert(1)</script>",
    "[click](https://evil.example)",
    "**bold**_it_",
    "line\nbreak\x1b[31m",
    "$x$ & &lt; \\",
]


def parsed(text: str) -> list[Token]:
    """All tokens, inline ones too."""
    found = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        found += [token, *(token.children or ())]
    return found


def rows(text: str) -> list[list[str]]:
    """The table's cells as a reader sees them."""
    cells: list[list[str]] = []
    inside = False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        inside = {"table_open": True, "table_close": False}.get(token.type, inside)
        if inside and token.type == "tr_open":
            cells.append([])
        if inside and token.type == "inline":
            cells[-1].append("".join(child.content for child in token.children or ()))
    return cells


def with_names(*names: str) -> Report:
    return reports.report(tuple(reports.student(name, "x", 4.0, 0.1, 0.01) for name in names))


def test_every_figure_stands_in_the_table():
    report = reports.report()
    head, *body = rows(card(report))
    assert head == ["model", *(column.title for column in columns(report))]
    assert body == [[s.model.name, *(column.cell(s) for column in columns(report))] for s in report.students]


def test_hashes_text_protocol_and_meanings_are_there():
    report = reports.report()
    text = card(report)
    for words in (report.setting.text_sha256, *(s.model.sha256 for s in report.students), report.teacher.sha256):
        assert words in text
    for words in ("64 of 561 windows of 512 tokens", "wiki.txt", "mlx 0.32.4", "float32", "cpu (AMD EPYC)"):
        assert words in text
    for column in columns(report):
        assert text.count(f"- **{column.title}**: ") == 1


def test_what_was_not_measured_is_not_there():
    assert "prefill" not in card(reports.report())
    assert "prefill (tok/s)" in card(reports.timed())
    assert "Stopped" not in card(reports.report())
    assert "rounding noise" not in card(reports.report(setting=reports.setting(floor=0.0)))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_a_name(name: str):
    text = card(with_names(name, "other"))
    shown = name.replace("\n", "\\n").replace("\x1b", "\\x1b")
    assert rows(text)[1][0] == shown
    assert len(rows(text)) == 3
    assert {len(row) for row in rows(text)} == {9}
    plain = card(with_names("name", "other"))
    assert [t.type for t in parsed(text) if t.type != "text"] == [t.type for t in parsed(plain) if t.type != "text"]
    assert "\x1b" not in text


@pytest.mark.parametrize("label", HOSTILE)
def test_a_text_label_and_a_note_stay_text(label: str):
    text = card(reports.report(setting=reports.setting(text=label), notes=(label,)))
    kinds = {t.type for t in parsed(text)} - {"html_block"}
    assert not kinds & {"html_inline", "link_open", "em_open", "s_open"}
    html = [t.content for t in parsed(text) if t.type == "html_block"]
    assert all("script" not in content for content in html)


def test_the_command_line_is_one_that_eval_takes():
    report = reports.report(setting=reports.setting(text="my text.txt", stride=256))
    words = shlex.split(command(report))
    assert words[:2] == ["mlxquant", "eval"]
    context = eval_command.make_context("eval", words[2:])
    taken = context.params
    assert (taken["teacher"], *taken["students"]) == ("smol", *(s.model.name for s in report.students))
    assert (taken["text"], taken["context"], taken["stride"]) == ("my text.txt", 512, 256)
    assert (count(taken["windows"], 0), taken["device"], taken["speed"]) == (64, "cpu", False)
    assert shlex.split(command(reports.timed()))[-1] == "--speed"
    assert "--windows all" in command(reports.report(setting=reports.setting(windows=561)))


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("built-in: language reference and library source of Python 3.11.9 (not WikiText)", []),
        ("wiki text.txt", ["--text", "wiki text.txt"]),
        ("org/name@0123456789ab: data/valid.txt", ["--text", "org/name/data/valid.txt"]),
    ],
)
def test_the_text_is_asked_for_as_eval_takes_it(label: str, words: list[str]):
    found = shlex.split(command(reports.report(setting=reports.setting(text=label))))
    assert found[found.index("smol-mlx-2bit") + 1 : found.index("--context")] == words


def test_the_same_report_gives_the_same_card():
    assert card(reports.report()) == card(reports.report())
