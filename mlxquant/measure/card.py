"""A report as a Markdown block for a model card, as GitHub and the Hub draw it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

from mlxquant.measure.columns import caveats, columns, estimate, floor, protocol
from mlxquant.measure.report import Model, Report
from mlxquant.units import format_bytes, visible

# What Markdown or a table could act on; as entities they are text and nothing else. Not the underscores of Q4_K_M.
_ACTIVE = re.compile(r"[&<>\\`*\[\]|~$@#]|_(?![A-Za-z0-9])|(?<![A-Za-z0-9])_")


def card(report: Report) -> str:
    """Heading, table, protocol, command line, hashes, and what the columns mean. The same report, the same text."""
    parts = [
        "## What quantizing cost",
        _lead(report),
        "\n".join(_table(report)),
        "\n".join(f"- {plain(line)}" for line in (*caveats(report), *report.notes)),
        "\n".join(f"- **{column.title}**: {plain(column.note)}" for column in columns(report)),
        f"**Protocol**: {plain(protocol(report))}. "
        f"Text: {plain(report.setting.text)} (sha256 {code(report.setting.text_sha256)}). "
        f"± is the standard error, clustered by window. {plain(floor(report))}".rstrip(),
        f"Made with {plain(_versions(report))}:",
        _fenced(command(report)),
        "\n".join(_hashes([report.teacher, *(student.model for student in report.students)])),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def command(report: Report) -> str:
    """The command line that gives these figures, with the models' names in place of their paths."""
    s = report.setting
    words = ["mlxquant", "eval", report.teacher.name, *(student.model.name for student in report.students)]
    words += [] if s.text.startswith("built-in:") else ["--text", _text(s.text)]
    words += ["--context", str(s.context)]
    words += ["--stride", str(s.stride)] if s.stride != s.context else []
    words += ["--windows", str(s.windows) if s.windows < s.available else "all"]
    words += ["--device", s.device.split(" ")[0]]
    words += ["--speed"] if any(student.model.speed for student in report.students) else []
    return shlex.join(words)


def _text(label: str) -> str:
    """corpus.py's label as what --text takes: a file is called by its name, a dataset's file by its place there."""
    dataset = re.fullmatch(r"([^/@]+/[^/@]+)@[0-9a-f]+: (.+)", label)
    return f"{dataset[1]}/{dataset[2]}" if dataset else label


def plain(text: str) -> str:
    """Text in which nothing is Markdown, HTML or a line of its own."""
    return _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", visible(text))


def code(text: str) -> str:
    """A code span, whatever backticks the text has."""
    text = visible(text)
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _fenced(text: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}sh\n{visible(text)}\n{fence}"


def _lead(report: Report) -> str:
    teacher, found = report.teacher, report.students[:1]
    facts = [format_bytes(teacher.size.nbytes), f"{teacher.size.bpw:.2f} bits per weight"]
    facts += [f"perplexity {estimate(student.divergence.ppl_teacher)}" for student in found]
    return f"How far each model's predictions are from those of {code(teacher.name)} ({', '.join(facts)}):"


def _table(report: Report) -> Iterator[str]:
    shown = columns(report)
    yield _row(["model", *(column.title for column in shown)])
    yield _row([":---", *("---:" for _ in shown)])
    for student in report.students:
        # A cell ends at a bar even in a code span; there, too, a backslash before it is the table's.
        name = code(student.model.name).replace("|", "\\|")
        yield _row([name, *(plain(column.cell(student)) for column in shown)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _versions(report: Report) -> str:
    return ", ".join(f"{name} {version}" for name, version in report.setting.versions.items() if version)


def _hashes(models: Sequence[Model]) -> Iterator[str]:
    yield "<details><summary>sha256 of the models' files</summary>\n"
    yield from (f"- {code(model.name)}: {code(model.sha256)}" for model in models)
    yield "\n</details>"
