"""The grid of `mlxquant fit --table` as a picture: the longest context of each level on Macs of each RAM size.

matplotlib draws it; it is an optional dependency and imported only here. Each cell says its number, and its shade says
it again: darker blue is a longer context, steps of the logarithm. Ink is dark on light cells and light on dark ones,
and the paper is painted, so that the picture reads the same in a light and a dark page.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxquant.errors import TargetError, UsageError
from mlxquant.files.writing import replace_file
from mlxquant.units import GIB, format_bytes

if TYPE_CHECKING:
    from mlxquant.fit.answer import Grid

SUFFIXES = (".png", ".svg")
INK, PAPER = "#24292f", "#ffffff"
PALE, DEEP = (0.87, 0.93, 0.98), (0.0, 0.27, 0.53)  # of the shortest and the longest context, RGB
NOTHING = "#f3f4f6"  # not even one token fits
SHORTEST_TOKENS, LONGEST_TOKENS = 1024, 131072  # the ends of the scale of shades
_LIGHT_INK_FROM = 0.5  # of the scale: darker cells have light ink
_NAME_CHARS = 60
_CELL_INCHES, _ROW_INCHES, _LEFT_INCHES = 0.86, 0.33, 2.1
_TOP_INCHES, _BOTTOM_INCHES, _RIGHT_INCHES = 1.05, 0.5, 0.25
_STYLE = {
    "figure.dpi": 100,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "svg.fonttype": "none",  # text stays text: it can be searched, and it is read aloud
    "svg.hashsalt": "mlxquant",
    "text.parse_math": False,  # a $ in a name is a $
    "text.color": INK,
}


def check_plot(path: Path) -> None:
    """What can be refused before anything is computed. Raises UsageError for another suffix or without matplotlib,
    TargetError for a folder that is not there.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{path}: a plot is a .png or .svg file, found {path.suffix or 'no suffix'}",
            hint="name it out.png or out.svg",
        )
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed", hint="pip install 'mlxquant[plot]'")
    if not path.parent.is_dir():
        raise TargetError(f"{path}: there is no folder {path.parent}", hint="make it, or choose another")


def plot(grid: Grid, path: Path) -> None:
    """Draws the grid into `path`, whole or not at all. Raises as `check_plot`, and TargetError for a full disk.

    The same grid gives the same bytes under one version of matplotlib.
    """
    check_plot(path)
    with style():
        data = _bytes(figure(grid), path.suffix.lower()[1:])
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        replace_file(path, data, scratch)
    finally:
        with suppress(OSError):  # a name too long for any file cannot be removed either
            scratch.unlink()


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's defaults and ours, whatever the user's matplotlibrc says; the user's again afterwards."""
    import matplotlib
    import matplotlib.style

    with matplotlib.style.context("default"), matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names in scripts that DejaVu lacks
        yield


def _bytes(drawn: Any, kind: str) -> bytes:
    out = io.BytesIO()
    nothing: dict[str, None] = {} if kind == "png" else dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawn.savefig(out, format=kind, dpi=200, metadata=nothing)
    return out.getvalue()


def figure(grid: Grid) -> Any:
    """matplotlib's Figure, to be drawn and saved under `style()`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows = len(grid.machines), len(grid.levels)
    width = _LEFT_INCHES + columns * _CELL_INCHES + _RIGHT_INCHES
    height = _TOP_INCHES + rows * _ROW_INCHES + _BOTTOM_INCHES
    drawn = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(drawn)
    box = (
        _LEFT_INCHES / width,
        _BOTTOM_INCHES / height,
        columns * _CELL_INCHES / width,
        rows * _ROW_INCHES / height,
    )
    axes = drawn.add_axes(box)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.axis("off")
    _heads(axes, grid)
    for y, (new, old) in enumerate(zip(grid.longest, grid.older, strict=True)):
        for x, (tokens, before) in enumerate(zip(new, old, strict=True)):
            _cell(axes, x, y, tokens, before)
    _words(drawn, grid, width, height)
    return drawn


def _heads(axes: Any, grid: Grid) -> None:
    """RAM above the columns, name and size of each level before its row; a line where the format changes."""
    for x, machine in enumerate(grid.machines):
        axes.text(x + 0.5, -0.3, f"{machine.memory_bytes / GIB:.3g} GB", ha="center", va="bottom", fontweight="bold")
    before = grid.levels[0].format if grid.levels else None
    for y, level in enumerate(grid.levels):
        axes.text(-1.02, y + 0.5, level.key, ha="right", va="center")
        axes.text(-0.08, y + 0.5, format_bytes(level.nbytes), ha="right", va="center", alpha=0.75, fontsize=8.5)
        if level.format != before:
            axes.plot([-2.4, len(grid.machines)], [y, y], "-", color=INK, linewidth=0.8, clip_on=False, gid="formats")
        before = level.format


def _cell(axes: Any, x: int, y: int, tokens: int, older_tokens: int) -> None:
    from matplotlib.patches import Rectangle

    depth = shade(tokens)
    if depth is None:
        colour: Any = NOTHING
    else:
        colour = tuple((1 - depth) * pale + depth * deep for pale, deep in zip(PALE, DEEP, strict=True))
    axes.add_patch(Rectangle((x + 0.02, y + 0.04), 0.96, 0.92, facecolor=colour, linewidth=0, gid="cell"))
    ink = PAPER if depth is not None and depth >= _LIGHT_INK_FROM else INK
    star = "" if tokens == older_tokens else "*"
    axes.text(x + 0.5, y + 0.52, words(tokens) + star, ha="center", va="center", color=ink, gid="longest")


def shade(tokens: int) -> float | None:
    """0 for the shortest context that is told apart, 1 for the longest; None where nothing fits."""
    if tokens <= 0:
        return None
    ends = log(SHORTEST_TOKENS), log(LONGEST_TOKENS)
    return min(1.0, max(0.0, (log(tokens) - ends[0]) / (ends[1] - ends[0])))


def words(tokens: int) -> str:
    """As the table has them: '128k' (of 1024, rounded down), '900', and '–' where not even one token fits."""
    if tokens <= 0:
        return "–"
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def _words(drawn: Any, grid: Grid, width: float, height: float) -> None:
    left = 0.18 / width
    made_for = grid.subject.shape.context_length
    cache = f"{grid.asked.kv_bits}-bit" if grid.asked.kv_bits else "16-bit"
    under = [f"{cache} keys and values", f"prompts in chunks of {grid.asked.chunk_tokens:,}"]
    under += [f"made for {words(made_for)} tokens"] if made_for else []
    title = f"The longest context that fits: {visible(grid.subject.name)}"
    drawn.text(left, 1 - 0.3 / height, title, fontsize=12.5, va="center")
    drawn.text(left, 1 - 0.55 / height, "; ".join(under), fontsize=8.5, va="center")
    note = "–: not one token   * less under macOS 15 and before   RAM as Apple prints it, working set of macOS 26"
    drawn.text(left, 0.2 / height, note, fontsize=8, va="center")


def visible(name: str) -> str:
    """A name from a file: what nobody would see as an escape, and short."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    half = _NAME_CHARS // 2
    return shown if len(shown) <= _NAME_CHARS else f"{shown[: half - 1]}…{shown[-half:]}"
