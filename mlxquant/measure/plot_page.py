"""What makes a plot readable in light and dark: the reader's own colours in svg, and a page around it."""

from __future__ import annotations

import re
from html import escape

from mlxquant.measure.columns import caveats, columns, floor, protocol
from mlxquant.measure.report import Report
from mlxquant.units import format_bytes, visible

# What the picture is drawn with, and what is looked for in the svg: no other part of it has these colours.
INK, PAPER = "#24292f", "#fffffe"
_DARK_INK, _DARK_PAPER = "#e6edf3", "#0d1117"
_FONTS = "'DejaVu Sans', Verdana, sans-serif"  # Verdana has the widths that names were laid out with

_SVG_STYLE = (
    f"svg{{color:{INK}}}.paper{{fill:#fff}}"
    f"@media(prefers-color-scheme:dark){{svg{{color:{_DARK_INK}}}.paper{{fill:{_DARK_PAPER}}}}}"
)
_PAGE_STYLE = f"""\
:root{{color-scheme:light dark;color:{INK};background:#fff}}
@media(prefers-color-scheme:dark){{:root{{color:{_DARK_INK};background:{_DARK_PAPER}}}}}
body{{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}}
svg{{width:100%;max-width:60rem;height:auto}}
.wide{{overflow-x:auto}}
table{{border-collapse:collapse;white-space:nowrap;font-variant-numeric:tabular-nums}}
th,td{{text-align:right;padding:.25rem .6rem;border-bottom:1px solid color-mix(in srgb,currentColor 20%,transparent)}}
th:first-child,td:first-child{{text-align:left;padding-left:0}}
dt{{font-weight:600;float:left;clear:left;margin-right:.5rem}}
dd{{margin:0}}
"""


def themed(svg: str, title: str) -> str:
    """matplotlib's svg with ink and paper left to the reader's colour scheme.

    The paper is drawn, too: a page may be light where the reader's system is dark, and shows the file as an image.
    """
    svg = svg.replace(f'style="fill: {PAPER}"', 'class="paper"').replace(INK, "currentColor")
    svg = svg.replace("'DejaVu Sans'", _FONTS)
    head = f"<title>{escape(title)}</title>\n <style>{_SVG_STYLE}</style>"
    return re.sub(r"(<svg [^>]*)>", lambda tag: f'{tag[1]} role="img">\n {head}', svg, count=1)


def page(report: Report, svg: str) -> str:
    """One file that loads nothing: the picture, the table, what it stands for."""
    title = f"What quantizing {visible(report.teacher.name)} cost"
    size = f"{format_bytes(report.teacher.size.nbytes)}, {report.teacher.size.bpw:.2f} bits per weight"
    sentences = [
        f"Teacher: {report.teacher.name} ({size}).",
        f"Text: {report.setting.text}; {protocol(report)}. ± is the standard error, clustered by window.",
        floor(report),
        *caveats(report),
        *report.notes,
    ]
    notes = "".join(f"<dt>{escape(c.title)}</dt><dd>{escape(c.note)}</dd>\n" for c in columns(report))
    return f"""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{_PAGE_STYLE}</style>
{svg[svg.index("<svg") :].strip()}
<div class="wide">
{_table(report)}
</div>
{"".join(f"<p>{escape(visible(line))}</p>" for line in sentences if line)}
<dl>
{notes}</dl>
</html>
"""


def _table(report: Report) -> str:
    shown = columns(report)
    head = "".join(f"<th>{escape(name)}</th>" for name in ("model", *(c.title for c in shown)))
    rows = "\n".join(
        "<tr>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in (visible(s.model.name), *(c.cell(s) for c in shown)))
        + "</tr>"
        for s in report.students
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
