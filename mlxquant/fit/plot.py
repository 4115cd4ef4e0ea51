"""The grid of `mlxquant fit --table` as a picture: the longest context of each level on Macs of each RAM size.

matplotlib draws it; it is an optional dependency and imported only here. Each cell says its number, and its shade says
it again: darker blue is a longer context, by its logarithm, up to what the model was made for. Ink is dark on light
cells and light on dark ones, and the paper is painted, so that the picture reads the same in a light and a dark page.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxquant.files import plot_file
from mlxquant.files.writing import write_whole
from mlxquant.units import GIB, format_bytes, format_tokens, visible

if TYPE_CHECKING:
    from mlxquant.fit.answer import Grid

SUFFIXES = (".png", ".svg")
INK, BLACK, PAPER = "#24292f", "#000000", "#ffffff"
Colour = tuple[float, float, float]  # red, green, blue
PALE, DEEP = (0.87, 0.93, 0.98), (0.0, 0.27, 0.53)  # of the shortest and the longest context
NOTHING = (0.953, 0.957, 0.965)  # not even one token fits
SHORTEST_TOKENS = 1024  # the light end of the scale of shades
UNKNOWN_TOKENS = 131072  # and its dark end, where the config does not say what context the model was made for
_NAME_CHARS = 60
_TITLE_POINTS = 12.5
_CELL_INCHES, _ROW_INCHES = 0.86, 0.33
_MARGIN_INCHES, _CHAR_INCHES = 0.18, 0.082  # of a letter in a level's name, and a little air
_TOP_INCHES, _BOTTOM_INCHES, _RIGHT_INCHES = 1.05, 0.5, 0.25
_STYLE = {"text.color": INK}


def check_plot(path: Path) -> None:
    """What can be refused before anything is computed. Raises as plot_file.check_file."""
    plot_file.check_file(path, SUFFIXES)


def plot(grid: Grid, path: Path) -> None:
    """Draws the grid into `path`, whole or not at all. Raises as `check_plot`, and TargetError for a full disk.

    The same grid gives the same bytes under one version of matplotlib.
    """
    check_plot(path)
    with style():
        data = plot_file.file_bytes(figure(grid), path.suffix.lower()[1:])
    write_whole(path, data)


def style() -> AbstractContextManager[None]:
    """What `figure` is to be drawn and saved under."""
    return plot_file.style(_STYLE)


def figure(grid: Grid) -> Any:
    """matplotlib's Figure, to be drawn and saved under `style()`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns, rows = len(grid.machines), len(grid.levels)
    # Names of levels, their sizes (as wide as a cell), cells.
    left = _MARGIN_INCHES + _CHAR_INCHES * max(len(level.key) for level in grid.levels) + _CELL_INCHES
    width = left + columns * _CELL_INCHES + _RIGHT_INCHES
    height = _TOP_INCHES + rows * _ROW_INCHES + _BOTTOM_INCHES
    drawn = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(drawn)
    box = (
        left / width,
        _BOTTOM_INCHES / height,
        columns * _CELL_INCHES / width,
        rows * _ROW_INCHES / height,
    )
    axes = drawn.add_axes(box)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.axis("off")
    _heads(axes, grid)
    whole = grid.subject.shape.context_length or UNKNOWN_TOKENS
    for y, (new, old) in enumerate(zip(grid.longest, grid.older, strict=True)):
        for x, (tokens, before) in enumerate(zip(new, old, strict=True)):
            _cell(axes, (x, y), colour(tokens, whole), words(tokens) + ("" if tokens == before else "*"))
    _words(drawn, grid, width, height)
    return drawn


def _heads(axes: Any, grid: Grid) -> None:
    """RAM above the columns, name and size of each level before its row; a line where the format changes."""
    left = 1 + _CHAR_INCHES / _CELL_INCHES * max(len(level.key) for level in grid.levels)
    for x, machine in enumerate(grid.machines):
        axes.text(x + 0.5, -0.3, f"{machine.memory_bytes / GIB:.3g} GB", ha="center", va="bottom", fontweight="bold")
    before = grid.levels[0].format
    for y, level in enumerate(grid.levels):
        axes.text(-1.02, y + 0.5, level.key, ha="right", va="center")
        axes.text(-0.08, y + 0.5, format_bytes(level.nbytes), ha="right", va="center", alpha=0.75, fontsize=8.5)
        if level.format != before:
            axes.plot([-left, len(grid.machines)], [y, y], "-", color=INK, linewidth=0.8, clip_on=False, gid="formats")
        before = level.format


def _cell(axes: Any, at: tuple[int, int], fill: Colour, text: str) -> None:
    from matplotlib.patches import Rectangle

    x, y = at
    axes.add_patch(Rectangle((x + 0.02, y + 0.04), 0.96, 0.92, facecolor=fill, linewidth=0, gid="cell"))
    axes.text(x + 0.5, y + 0.52, text, ha="center", va="center", color=ink_on(fill), gid="longest")


def colour(tokens: int, whole: int) -> Colour:
    """From PALE for the shortest context that is told apart to DEEP for all that the model was made for."""
    if tokens <= 0:
        return NOTHING
    span = log(max(whole, 2 * SHORTEST_TOKENS) / SHORTEST_TOKENS)
    depth = min(1.0, max(0.0, log(tokens / SHORTEST_TOKENS) / span))
    red, green, blue = ((1 - depth) * pale + depth * deep for pale, deep in zip(PALE, DEEP, strict=True))
    return red, green, blue


def ink_on(fill: Colour) -> str:
    """Black or white, whichever stands out more: at a luminance of 0.179 they do alike (WCAG 2)."""
    red, green, blue = (((c + 0.055) / 1.055) ** 2.4 for c in fill)
    return PAPER if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else BLACK


def words(tokens: int) -> str:
    """As the table has them: '128k', '900', and 'no' where not even one token fits."""
    return format_tokens(tokens) if tokens > 0 else "no"


def _words(drawn: Any, grid: Grid, width: float, height: float) -> None:
    left = _MARGIN_INCHES / width
    made_for = grid.subject.shape.context_length
    cache = f"{grid.asked.kv_bits}-bit" if grid.asked.kv_bits else "16-bit"
    under = [f"{cache} keys and values", f"prompts in chunks of {grid.asked.chunk_tokens:,}"]
    under += [f"made for {words(made_for)} tokens"] if made_for else []
    title = f"The longest context that fits: {_title_of(grid.subject.name)}"
    head = drawn.text(left, 1 - 0.3 / height, title, fontsize=_TITLE_POINTS, va="center")
    room = (1 - 2 * left) * drawn.bbox.width / head.get_window_extent(drawn.canvas.get_renderer()).width
    head.set_fontsize(_TITLE_POINTS * min(1.0, room))
    drawn.text(left, 1 - 0.55 / height, "; ".join(under), fontsize=8.5, va="center")
    note = "no: not even one token; *: less under macOS 15 and before; RAM as Apple prints it, limits of macOS 26"
    drawn.text(left, 0.2 / height, note, fontsize=8, va="center")


def _title_of(name: str) -> str:
    """A name from a file: what nobody would see as an escape, and short."""
    shown = visible(name)
    half = _NAME_CHARS // 2
    return shown if len(shown) <= _NAME_CHARS else f"{shown[: half - 1]}…{shown[-half:]}"
