"""The picture: where names go, what is on the front, colours left to the reader, files whole or not there."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxquant.errors import TargetError, UsageError
from mlxquant.measure import plot as plots
from mlxquant.measure.columns import columns
from mlxquant.measure.plot import MARKS, Point, check_plot, front, limits, plot, short
from mlxquant.measure.plot_labels import Box, place
from mlxquant.measure.report import Report
from mlxquant.units import visible
from tests.measure import reports

EVIL = "<script>alert(1)</script>&\"'\x1b$x_1$"
S = reports.student
CASES = {
    "one": (S("m-Q4_K_M.gguf", "x", 5.26, 0.0521, 0.0011),),
    "two": (S("m-Q8_0.gguf", "x", 8.5, 0.0006, 0.00002), S("m-mlx-4bit", "x", 4.5, 0.158, 0.0032)),
    "twelve": (
        *reports.report().students,
        S("smol-IQ4_XS.gguf", "x", 4.46, 0.149, 0.003),
        S("smol-Q4_K_S.gguf", "x", 5.2, 0.056, 0.0012),
        S("smol-Q3_K_M.gguf", "x", 4.4, 0.21, 0.004),
    ),
    "on one spot": tuple(S(f"m-number-{i}-of-eight", "x", 4.5, 0.1, 0.003) for i in range(8)),
    "reaching 0": (S("a.gguf", "x", 8.5, 3e-7, 4e-7), S("b", "x", 4.5, 0.158, 0.0032)),
    "exactly 0": (S("same", "x", 16.0, 0.0, 0.0), S("b", "x", 4.5, 0.158, 0.0032)),
    "as good as 0": (S("same", "x", 16.0, 1e-17, 1e-17), S("b", "x", 4.5, 0.158, 0.0032)),
    "all 0": (S("same", "x", 16.0, 0.0, None),),
    "no errors": (S("a.gguf", "x", 8.5, 3e-4, None), S("b", "x", 4.5, 0.158, None)),
}


def of(case: str) -> Report:
    return reports.report(CASES[case])


@pytest.fixture
def mpl() -> Iterator[None]:
    pytest.importorskip("matplotlib")
    with plots.style():
        yield


def gid(figure: Any, name: str) -> list[Any]:
    return figure.findobj(lambda artist: artist.get_gid() == name)


def extent(artist: Any, figure: Any) -> Box:
    from matplotlib.text import Text

    # An annotation's own extent takes in its line.
    renderer = figure.canvas.get_renderer()
    found = Text.get_window_extent(artist, renderer) if isinstance(artist, Text) else artist.get_window_extent(renderer)
    return Box(found.x0, found.y0, found.x1, found.y1)


@pytest.mark.usefixtures("mpl")
@pytest.mark.parametrize("case", CASES)
def test_names_cover_neither_one_another_nor_marks(case: str):
    figure = plots.figure(of(case))
    figure.canvas.draw()
    labels = [extent(label, figure) for label in gid(figure, "label")]
    marks = [extent(mark, figure) for mark in gid(figure, "mark")]
    legend = extent(figure.axes[0].get_legend(), figure)
    assert len(labels) == len(marks) == len(CASES[case])
    assert all(a.overlap(b) == 0 for a, b in combinations(labels, 2))
    assert all(a.overlap(b) == 0 for a in labels for b in (*marks, legend))
    assert all(label.within(Box(0, 0, *figure.bbox.size)) for label in labels)


@pytest.mark.usefixtures("mpl")
@pytest.mark.parametrize("case", CASES)
def test_every_student_is_a_mark_of_its_kind_inside_the_axes(case: str):
    figure = plots.figure(of(case))
    axes = figure.axes[0]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for mark, student in zip(gid(figure, "mark"), CASES[case], strict=True):
        (x,), (y,) = mark.get_data()
        kind = "GGUF" if student.model.name.endswith(".gguf") else "MLX"
        assert (mark.get_marker(), mark.get_color()) == MARKS[kind]
        assert x == student.model.size.bpw
        kl = 1000 * student.divergence.kl.value
        assert y == (pytest.approx(kl) if kl > 1e-6 else bottom)
        assert left < x < right
        assert bottom <= y < top
    assert axes.get_yscale() == "log"


@pytest.mark.usefixtures("mpl")
def test_bars_are_two_standard_errors_and_run_into_the_edge_at_0():
    figure = plots.figure(of("reaching 0"))
    low, high = sorted(gid(figure, "bar")[0].get_ydata())
    assert low == figure.axes[0].get_ylim()[0]
    assert high == pytest.approx(1000 * (3e-7 + 2 * 4e-7))
    low, high = sorted(gid(figure, "bar")[1].get_ydata())
    assert (low, high) == pytest.approx((158 - 6.4, 158 + 6.4))
    assert gid(plots.figure(of("no errors")), "bar") == []


@pytest.mark.usefixtures("mpl")
def test_what_cannot_be_drawn_is_said():
    broken = S("broken", "x", 2.5, float("inf"), float("nan"))
    figure = plots.figure(reports.report((*CASES["two"], broken)))
    assert len(gid(figure, "mark")) == 2
    assert any("not drawn: broken (KLD inf)" in text.get_text() for text in figure.texts)


@pytest.mark.usefixtures("mpl")
def test_the_floor_is_shown_where_it_is_in_sight():
    def said(floor: float) -> bool:
        found = plots.figure(reports.report(CASES["two"], setting=reports.setting(floor=floor)))
        return any("rounding noise" in text.get_text() for text in found.axes[0].texts)

    assert said(1e-4)
    assert not said(1e-9)


def point(bpw: float, kl: float, error: float = 0.0) -> Point:
    return Point(f"{bpw} {kl}", "MLX", bpw, kl, error)


def test_the_front_is_what_no_other_is_better_than():
    rng = np.random.default_rng(4)
    for _ in range(50):
        points = [point(*map(float, pair)) for pair in rng.integers(0, 6, (12, 2))]
        best = [
            p
            for p in points
            if not any(q.bpw <= p.bpw and q.kl <= p.kl and (q.bpw < p.bpw or q.kl < p.kl) for q in points)
        ]
        assert {(p.bpw, p.kl) for p in front(points)} == {(p.bpw, p.kl) for p in best}
        assert [p.bpw for p in front(points)] == sorted({p.bpw for p in best})


@pytest.mark.parametrize("kls", [(12.0,), (0.0,), (0.0, 1e-4), (1e-17, 1e-4), (1e-4, 1e4), (5.0, 5.1), (1e-12,)])
@pytest.mark.parametrize("floor", [0.0, 1e-6, 3.0])
def test_limits_hold_all_points_and_a_decade(kls: tuple[float, ...], floor: float):
    points = [point(4.0, kl, kl / 10) for kl in kls]
    bottom, top = limits(points, floor)
    assert top >= 9.99 * bottom > 0
    assert all(p.kl + p.error < top and (p.kl > bottom or p.kl < 1e-6) for p in points)
    for edge in (bottom, top):
        assert re.fullmatch(r"[125]\.?0*e[-+]\d+", f"{edge:.6e}")


def test_what_is_as_good_as_0_does_not_stretch_the_axis():
    assert limits([point(4.0, 1.0), point(4.0, 1e-14)], 0.0)[0] >= 0.1


@pytest.mark.usefixtures("mpl")
def test_numbers_on_the_axis_have_room():
    for kl in (3e-8, 2e-6, 1e-3, 1.0, 80.0):
        figure = plots.figure(reports.report((S("a", "x", 4.0, kl, None),)))
        figure.canvas.draw()
        ticks = [t for t in figure.axes[0].get_yticklabels() if t.get_text()]
        assert all(extent(tick, figure).left >= 0 for tick in ticks)
        shown = [float(t.get_text().replace(",", "")) for t in ticks]
        assert shown == pytest.approx(list(figure.axes[0].get_yticks()))


@pytest.mark.usefixtures("mpl")
def test_a_dollar_in_a_name_is_a_dollar(tmp_path: Path):
    plot(reports.report((S("$x_1$", "x", 4.0, 0.1, None),)), tmp_path / "a.svg")
    assert ">$x_1$</text>" in (tmp_path / "a.svg").read_text()


def test_a_tiny_lower_end_does_not_stretch_the_axis():
    assert limits([point(4.0, 1.0, 0.99999)], 0.0)[0] >= 0.1


def test_names_are_written_once_where_they_begin_alike():
    assert short(["a-b-Q4.gguf", "a-b-Q8.gguf"]) == ["Q4", "Q8"]
    assert short(["m-Q4.gguf"]) == ["m-Q4"]
    assert short(["m/Q4.gguf", "m/Q4"]) == ["m/Q4.gguf", "m/Q4"]  # would be alike
    assert short(["abc-", "abc-d"]) == ["abc-", "abc-d"]  # nothing would be left
    assert short(["abcd", "abce"]) == ["abcd", "abce"]
    assert len(short(["x" * 30 + "y" * 30])[0]) == 36


def test_names_find_free_places_wherever_marks_are():
    rng = np.random.default_rng(1)
    for _ in range(30):
        anchors = [tuple(spot) for spot in rng.uniform((40, 30), (460, 290), (12, 2)).tolist()]
        taken = [Box(x - 3, y - 3, x + 3, y + 3) for x, y in anchors]
        corners = place(anchors, [(70.0, 11.0)] * 12, taken, sorted(anchors), Box(0, 0, 500, 320))
        boxes = [Box(c.x, c.y, c.x + 70, c.y + 11) for c in corners]
        assert all(a.overlap(b) == 0 for a, b in combinations(boxes, 2))
        assert all(a.overlap(b) == 0 for a in boxes for b in taken)
        for box, corner, anchor in zip(boxes, corners, anchors, strict=True):
            assert box.within(Box(0, 0, 500, 320))
            nearer = [other for other in anchors if box.distance(other) < box.distance(anchor)]
            assert corner.led or not nearer


def crowd(anchors: list[tuple[float, float]], line: list[tuple[float, float]]) -> list[tuple[Box, bool]]:
    taken = [Box(x - 3, y - 3, x + 3, y + 3) for x, y in anchors]
    corners = place(anchors, [(40.0, 11.0)] * len(anchors), taken, line, Box(0, 0, 500, 320))
    return [(Box(c.x, c.y, c.x + 40, c.y + 11), c.led) for c in corners]


def test_a_name_stands_by_its_own_mark_or_has_a_line_to_it():
    rng = np.random.default_rng(2)
    for _ in range(30):
        anchors = [tuple(spot) for spot in rng.uniform((240, 150), (262, 172), (7, 2)).tolist()]
        for (box, led), anchor in zip(crowd(anchors, []), anchors, strict=True):
            assert led or all(box.distance(anchor) < box.distance(other) for other in anchors if other != anchor)


def test_two_marks_side_by_side_on_the_front_keep_their_names_apart():
    left, right = (100.0, 100.0), (107.0, 101.0)
    (first, _), (second, _) = crowd([left, right], [(0, 110), left, (150, 60)])
    assert first.distance(left) < first.distance(right)
    assert second.distance(right) < second.distance(left)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("paper", ["#ffffff", "#0d1117"])
def test_marks_stand_out_on_light_and_dark(paper: str):
    """WCAG 2.1 asks for a contrast of 3 to 1 of graphics."""
    for _, colour in MARKS.values():
        low, high = sorted((luminance(colour), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 3.7


def drawn(tmp_path: Path, suffix: str, report: Report) -> bytes:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"out.{suffix}"
    plot(report, path)
    assert list(tmp_path.iterdir()) == [path]
    return path.read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_svg_leaves_ink_and_paper_to_the_reader(tmp_path: Path, case: str):
    text = drawn(tmp_path, "svg", of(case)).decode()
    root = ET.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    colours = set(re.findall(r"#[0-9a-f]{3,8}\b", " ".join(e.get("style", "") for e in root.iter())))
    assert colours <= {colour for _, colour in MARKS.values()}
    texts = list(root.iter(f"{name}text"))
    assert len(texts) > 8
    for element in texts:
        assert "fill: currentColor" in element.get("style", "")
        assert element.get("fill") is None
    css = "".join(element.text or "" for element in root.iter(f"{name}style"))
    dark = css[css.index("@media(prefers-color-scheme:dark)") :]
    assert "color:" in dark
    assert ".paper{fill:" in dark
    assert sum(e.get("class") == "paper" for e in root.iter()) == 1
    assert not re.search(r"\d{4}-\d\d-\d\d", text)  # no date


def test_svg_is_the_same_bytes_in_another_process_and_under_another_matplotlibrc(tmp_path: Path):
    here = drawn(tmp_path, "svg", reports.report())
    rc = tmp_path / "matplotlibrc"
    rc.write_text("font.size: 20\nlines.linewidth: 9\nsvg.hashsalt: x\naxes.grid: False\n")
    code = "from tests.measure import reports; from mlxquant.measure.plot import *; import sys\n"
    code += "plot(reports.report(), Path(sys.argv[1]))"
    other = tmp_path / "other.svg"
    env = os.environ | {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(rc)}
    subprocess.run([sys.executable, "-c", code, str(other)], check=True, env=env, cwd=Path(__file__).parents[2])
    assert other.read_bytes() == here


def test_the_users_own_settings_are_left_alone(tmp_path: Path):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"font.size": 31.0}):
        drawn(tmp_path, "svg", of("one"))
        assert matplotlib.rcParams["font.size"] == 31.0


def test_png_is_an_image_with_a_ground_of_its_own(tmp_path: Path):
    data = drawn(tmp_path, "png", of("twelve"))
    assert data == drawn(tmp_path, "png", of("twelve"))
    import matplotlib.image

    image = matplotlib.image.imread(tmp_path / "out.png")
    assert image.shape == (1040, 1600, 4)
    assert (image[..., 3] == 1).all()
    assert image[0, 0, :3].min() > 0.99


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_html_is_one_file_that_loads_nothing_and_trusts_no_name(tmp_path: Path):
    students = (S(EVIL, "x", 4.0, 0.1, 0.01), *CASES["two"])
    report = reports.report(students, setting=reports.setting(text=EVIL), notes=(EVIL,))
    report = replace(report, teacher=replace(report.teacher, name=EVIL))
    text = drawn(tmp_path, "html", report).decode()
    page = Tags()
    page.feed(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "base"}
    for _, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "href")]
        assert (attributes.get("xlink:href") or "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", text)
    assert "\x1b" not in text
    words = "".join(page.words)
    assert words.count(visible(EVIL)) >= 5
    ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    for student in report.students:
        for column in columns(report):
            assert f"{column.cell(student)}" in words
    assert "prefers-color-scheme:dark" in text


@pytest.mark.parametrize("name", ["out.pdf", "out", "out.svg.gz"])
def test_another_suffix_is_refused_by_name(tmp_path: Path, name: str):
    with pytest.raises(UsageError) as error:
        check_plot(tmp_path / name)
    assert name in error.value.message
    assert all(suffix in error.value.message for suffix in (".png", ".svg", ".html"))


def test_a_folder_that_is_not_there_is_refused_before_anything_is_computed(tmp_path: Path):
    pytest.importorskip("matplotlib")
    with pytest.raises(TargetError, match="there is no folder"):
        check_plot(tmp_path / "no" / "out.SVG")


def test_without_matplotlib_the_way_to_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="matplotlib") as error:
        check_plot(tmp_path / "out.png")
    assert error.value.hint == "pip install 'mlxquant[plot]'"


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.svg"
    path.write_text("before")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(TargetError, match=r"out\.svg"):
            plot(of("one"), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "before"


def test_a_name_too_long_for_any_file_is_said(tmp_path: Path):
    pytest.importorskip("matplotlib")
    with pytest.raises(TargetError, match="cannot be written"):
        plot(reports.report(), tmp_path / f"{'a' * 300}.svg")


def test_nothing_here_needs_matplotlib_until_it_draws():
    code = "import sys, mlxquant.measure.plot, mlxquant.measure.card; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
