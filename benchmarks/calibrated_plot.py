"""Divergence against bits per weight, a line for each method, as calibrated.py keeps it: .svg or .png."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mlxquant.files import plot_file
from mlxquant.measure.columns import MILLI
from mlxquant.measure.plot_page import INK, PAPER, themed

# Okabe and Ito's colours, which the colour-blind tell apart; marks differ besides. GGUF levels are in ink.
COLOURS = ("#0080c6", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#7a5cc0", "#56b4e9")
MARKS = "o^vP*<>Xhd"
GGUF = {
    "GGUF": ("s", PAPER),
    "GGUF, imatrix": ("s", INK),
    "GGUF, pure": ("D", PAPER),
    "GGUF, pure, imatrix": ("D", INK),
}
_STYLE = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
Row = dict[str, Any]


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    plot_file.check_file(path, (".svg", ".png"))
    with plot_file.style(_STYLE):
        data = plot_file.file_bytes(figure(rows, title), path.suffix[1:])
    path.write_bytes(data if path.suffix == ".png" else themed(data.decode(), title).encode())


def figure(rows: Sequence[Row], title: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    drawn = Figure(figsize=(9.0, 6.0), facecolor=PAPER)
    axes = drawn.add_axes((0.085, 0.085, 0.895, 0.825))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.margins(x=0.07)
    found = series(rows)
    for place, name in enumerate(name for name in found if name not in GGUF):
        colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
        line(axes, name, found[name], {"color": colour, "marker": mark})
    for name, (mark, fill) in GGUF.items():
        line(axes, name, found.get(name, []), {"color": INK, "marker": mark, "mfc": fill, "linestyle": ":"})
    levels(axes, [row for row in rows if not row["format"]])
    axes.set_xlabel("bits per weight, all tensors")
    axes.set_title("mean KL divergence, milli-nats; bars: two standard errors", loc="left", fontsize=9.5)
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="both", color=INK, alpha=0.13, linewidth=0.6)
    axes.legend(frameon=False, loc="upper right")
    drawn.text(0.085, 0.965, f"What calibration is worth: {title}", fontsize=12.5)
    return drawn


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """A method's formats make a line, its budgets another; GGUF levels one with importance and one without."""

    def of(row: Row) -> str:
        if row["format"]:
            return f"{row['method']}{', budget' if row['format'].startswith('bpw') else ''}"
        kind = "GGUF, pure" if "pure" in row["method"] else "GGUF"
        return f"{kind}, imatrix" if "imatrix" in row["method"] else kind

    ordered = sorted(rows, key=lambda row: (of(row), row["bpw"]))
    return {name: list(found) for name, found in groupby(ordered, key=of)}


def line(axes: Any, name: str, rows: Sequence[Row], style: dict[str, Any]) -> None:
    kl = [row["divergence"]["kl"] for row in rows]
    bars = [2 * (k["error"] or 0) * MILLI for k in kl]
    if rows:
        at = [row["bpw"] for row in rows], [k["value"] * MILLI for k in kl]
        axes.errorbar(*at, yerr=bars, label=name, markersize=6, linewidth=1.1, **style)


def levels(axes: Any, rows: Sequence[Row]) -> None:
    """Names beside GGUF levels, which say more than their bits: once, where a level is there with importance and
    without."""
    for row in rows:
        name, *switches = row["method"].split("+")
        if switches or all(other["method"] != f"{name}+imatrix" for other in rows):
            at = row["bpw"], row["divergence"]["kl"]["value"] * MILLI
            axes.annotate(name, at, (6, -9), textcoords="offset points", fontsize=8)
