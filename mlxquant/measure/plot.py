"""A report as a picture: divergence against bits per weight, as .png, .svg or .html.

matplotlib draws it; it is an optional dependency and imported only here. A figure is made of one ink on one paper, so
that svg and html can change both (plot_page.py), and of two colours that stand out on white and on black alike: blue
and vermillion, which the colour-blind tell apart (Okabe and Ito's pair, the blue a little lighter), and which differ in
the shape of their marks besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import takewhile
from math import isfinite, log10
from pathlib import Path
from typing import Any

from mlxquant.files import plot_file
from mlxquant.files.writing import write_whole
from mlxquant.measure.columns import MILLI, significant
from mlxquant.measure.plot_labels import Box, place
from mlxquant.measure.plot_page import INK, PAPER, page, themed
from mlxquant.measure.report import Report, Student
from mlxquant.units import visible

SUFFIXES = (".png", ".svg", ".html")
MARKS = {"MLX": ("o", "#0080c6"), "GGUF": ("s", "#d55e00")}
ZERO = 1e-6  # milli-nats: what is below is the rounding of float64, and drawn on the edge
ERRORS = 2  # standard errors that a bar is long, to each side
_NAME_CHARS = 36
_TEXT_CHARS = 80
_MARK_POINTS = 7
_LABEL_POINTS = 8.5
_INCHES = (8.0, 5.2)
_AXES = (0.085, 0.12, 0.895, 0.71)  # left, bottom, width and height, of the figure's
_STYLE = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)


@dataclass(frozen=True)
class Point:
    """kl and error in milli-nats. error: ERRORS standard errors, 0 where there are none."""

    name: str
    kind: str
    bpw: float
    kl: float
    error: float


def check_plot(path: Path) -> None:
    """What can be refused before anything is computed. Raises as plot_file.check_file."""
    plot_file.check_file(path, SUFFIXES)


def plot(report: Report, path: Path) -> None:
    """Draws the report into `path`, whole or not at all. Raises as `check_plot`, and TargetError for a full disk.

    The same report gives the same bytes under one version of matplotlib.
    """
    check_plot(path)
    suffix = path.suffix.lower()
    with style():
        data = plot_file.file_bytes(figure(report), "png" if suffix == ".png" else "svg")
    if suffix != ".png":
        title = f"Divergence of quantized models from {visible(report.teacher.name)} against bits per weight"
        svg = themed(data.decode(), title)
        data = (page(report, svg) if suffix == ".html" else svg).encode()
    write_whole(path, data)


def style() -> AbstractContextManager[None]:
    """What `figure` is to be drawn and saved under."""
    return plot_file.style(_STYLE)


def figure(report: Report) -> Any:
    """matplotlib's Figure, to be drawn and saved under `style()`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=_INCHES, facecolor=PAPER)
    FigureCanvasAgg(drawn)
    axes = drawn.add_axes(_AXES)
    points, missing = _points(report.students)
    bottom, top = limits(points, report.setting.floor * MILLI)
    _axes(axes, points, bottom, top)
    words = _floor(axes, report.setting.floor * MILLI, bottom)
    _front(axes, points, bottom)
    for point in points:
        _mark(axes, point, bottom)
    words.append(_legend(axes, points))
    _label(axes, points, bottom, words)
    _words(drawn, report, missing)
    return drawn


def _points(students: Sequence[Student]) -> tuple[list[Point], list[str]]:
    """What can be drawn, and the names of what cannot."""
    names = short([student.model.name for student in students])
    points, missing = [], []
    for student, name in zip(students, names, strict=True):
        kl, bpw = student.divergence.kl, student.model.size.bpw
        if not (isfinite(kl.value) and isfinite(bpw)):
            missing.append(f"{name} (KLD {significant(kl.value * MILLI)})")
            continue
        error = kl.error if kl.error is not None and isfinite(kl.error) else 0.0
        kind = "GGUF" if student.model.name.lower().endswith(".gguf") else "MLX"
        points.append(Point(name, kind, bpw, kl.value * MILLI, ERRORS * error * MILLI))
    return points, missing


def short(names: Sequence[str]) -> list[str]:
    """Without what all of them begin with, up to a -, _, / or dot, and without .gguf, unless two would be alike."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    shared = "".join(letters[0] for letters in alike) if len(names) > 1 else ""
    cut = max(shared.rfind(c) for c in "-_/.") + 1
    found = [visible(name[cut:].removesuffix(".gguf")) for name in names]
    found = [name if len(name) <= _NAME_CHARS else f"{name[:17]}…{name[-18:]}" for name in found]
    return found if len(set(found)) == len(names) and all(found) else [visible(name) for name in names]


def limits(points: Sequence[Point], floor: float) -> tuple[float, float]:
    """Of the y axis, in milli-nats: steps of 1, 2, 5; a decade at least. What is 0 gets a place below the others."""
    above = [p.kl for p in points if p.kl >= ZERO] or [max(floor, ZERO)]
    low = min(above) / (6 if any(p.kl < ZERO for p in points) else 1.6)
    if floor > low / 30:
        low = min(low, floor / 1.6)
    high = 1.6 * max([*above, *(p.kl + p.error for p in points), 6 * low])
    return _step(low, down=True), _step(high, down=False)


def _step(value: float, down: bool) -> float:
    decade = 10.0 ** int(log10(value) // 1)
    steps = [decade * n for n in (1, 2, 5, 10)]
    return max(s for s in steps if s <= value) if down else min(s for s in steps if s >= value)


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front: those for which no other has at most their bits and at most their divergence; by bits."""
    best, found = float("inf"), []
    for point in sorted(points, key=lambda p: (p.bpw, p.kl)):
        if point.kl < best:
            best = point.kl
            found.append(point)
    return found


def _axes(axes: Any, points: Sequence[Point], bottom: float, top: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    widths = [p.bpw for p in points] or [4.0]
    room = max(1.0, 0.08 * (max(widths) - min(widths)))
    axes.set_xlim(max(0, min(widths) - room), max(widths) + room)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if top / bottom > 200 else (1.0, 2.0, 5.0), numticks=99))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bits per weight")
    axes.set_title("mean KL divergence, milli-nats", loc="left", fontsize=9.5)
    axes.tick_params(which="minor", length=2)
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=INK, alpha=0.13, linewidth=0.6)
    axes.set_axisbelow(True)


def _tick(value: float, _: int) -> str:
    return f"{value:,.4f}".rstrip("0").rstrip(".") if value > 0.9e-4 else f"{value:.0e}".replace("e-0", "e-")


def _floor(axes: Any, floor: float, bottom: float) -> list[Any]:
    """The band below the floor, where it is in sight, and its name."""
    if floor <= bottom:
        return []
    axes.axhspan(bottom, floor, color=INK, alpha=0.09, linewidth=0)
    at = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    return [axes.annotate("rounding noise of this device", (0.01, floor), (0, -3), va="top", fontsize=8, **at)]


def _front(axes: Any, points: Sequence[Point], bottom: float) -> None:
    found = front(points)
    xs, ys = [p.bpw for p in found], [max(p.kl, bottom) for p in found]
    axes.plot(xs, ys, "--", color=INK, alpha=0.55, linewidth=1.1, zorder=2, gid="front")


def _mark(axes: Any, point: Point, bottom: float) -> None:
    """The mark, on the edge where it is 0, and its bar, which runs into the edge where it reaches 0."""
    shape, colour = MARKS[point.kind]
    ends = [point.kl + point.error, point.kl - point.error]
    if point.error:
        inside = [end for end in ends if end > bottom]
        axes.plot([point.bpw] * 2, [max(end, bottom) for end in ends], "-", color=colour, linewidth=1.3, gid="bar")
        axes.plot([point.bpw] * len(inside), inside, "_", color=colour, markersize=_MARK_POINTS)
    at = [point.bpw], [max(point.kl, bottom)]
    axes.plot(*at, shape, color=colour, markersize=_MARK_POINTS, mew=0, clip_on=False, zorder=4, gid="mark")


def _legend(axes: Any, points: Sequence[Point]) -> Any:
    from matplotlib.lines import Line2D

    kinds = [kind for kind in MARKS if any(p.kind == kind for p in points)]
    handles = [
        Line2D([], [], linestyle="", marker=MARKS[kind][0], color=MARKS[kind][1], ms=_MARK_POINTS, mew=0, label=kind)
        for kind in kinds
    ]
    if len(front(points)) > 1:
        handles.append(
            Line2D([], [], linestyle="--", color=INK, alpha=0.55, label="Pareto front: none is smaller and closer")
        )
    return axes.legend(handles=handles, loc="upper right", frameon=False)


def _label(axes: Any, points: Sequence[Point], bottom: float, words: Sequence[Any]) -> None:
    """Names beside their marks, where they cover neither one another nor marks, bars and other words."""
    scale = 72 / axes.figure.dpi  # points of a pixel
    renderer = axes.figure.canvas.get_renderer()

    def box(drawn: Any) -> Box:
        extent = drawn.get_window_extent(renderer)
        return Box(*(scale * v for v in (extent.x0, extent.y0, extent.x1, extent.y1)))

    def spot(bpw: float, kl: float) -> tuple[float, float]:
        x, y = axes.transData.transform((bpw, max(kl, bottom)))
        return scale * x, scale * y

    def size(text: str) -> tuple[float, float]:
        drawn = axes.text(0, 0, text, fontsize=_LABEL_POINTS)
        found = box(drawn)
        drawn.remove()
        return found.right - found.left, found.top - found.bottom

    texts = [p.name if p.kl >= ZERO else f"{p.name} ({significant(p.kl)})" for p in points]
    anchors = [spot(p.bpw, p.kl) for p in points]
    half = _MARK_POINTS / 2
    taken = [Box(x - half, y - half, x + half, y + half) for x, y in anchors]
    for point, (x, _) in zip(points, anchors, strict=True):
        low, high = (spot(point.bpw, point.kl + error)[1] for error in (-point.error, point.error))
        taken.append(Box(x - half, low, x + half, high))
    taken += map(box, words)
    line = [spot(p.bpw, p.kl) for p in front(points)]
    corners = place(anchors, [size(text) for text in texts], taken, line, box(axes).grown(-_MARK_POINTS / 2))
    for point, text, (x, y), corner in zip(points, texts, anchors, corners, strict=True):
        _write(axes, text, (point.bpw, max(point.kl, bottom)), (corner.x - x, corner.y - y), corner.led)


def _write(axes: Any, text: str, at: tuple[float, float], offset: tuple[float, float], led: bool) -> None:
    arrow = {"arrowstyle": "-", "color": INK, "alpha": 0.5, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
    axes.annotate(
        text,
        at,
        offset,
        textcoords="offset points",
        ha="left",
        va="bottom",
        fontsize=_LABEL_POINTS,
        gid="label",
        annotation_clip=False,
        arrowprops=arrow if led else None,
    )


def _words(drawn: Any, report: Report, missing: Sequence[str]) -> None:
    s = report.setting
    text = visible(s.text)
    text = text if len(text) <= _TEXT_CHARS else f"{text[: _TEXT_CHARS - 1]}…"
    drawn.text(_AXES[0], 0.945, f"What quantizing cost: distance from {visible(report.teacher.name)}", fontsize=12.5)
    drawn.text(_AXES[0], 0.905, f"{s.windows:,} windows of {s.context:,} tokens; {text}", fontsize=8.5)
    bars = f"bars: {ERRORS} standard errors"
    left = f"; not drawn: {', '.join(missing)}" if missing else ""
    drawn.text(_AXES[0], 0.015, bars + left, fontsize=8)
