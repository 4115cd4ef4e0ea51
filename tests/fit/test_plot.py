"""The picture of the grid: every cell says what the grid says, can be read, and is written whole or not at all."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mlxquant.errors import TargetError, UsageError
from mlxquant.families.checkpoint import checkpoint
from mlxquant.files import plot_file
from mlxquant.fit import plot as plots
from mlxquant.fit.answer import RAM_GIB, Grid, asked_of, grid
from mlxquant.fit.plot import DEEP, NOTHING, PALE, check_plot, colour, ink_on, plot, words
from mlxquant.fit.subject import Subject
from mlxquant.machine import described
from tests.cli.test_convert_fit import LLAMA_8B

EVIL = "<script>alert(1)</script>&\"'\x1b$x_1$"


@pytest.fixture(scope="module")
def drawn_grid() -> Grid:
    subject = Subject("org/Llama-8B", LLAMA_8B, checkpoint(LLAMA_8B))
    machines = [described(ram=f"{gib}GB") for gib in RAM_GIB]
    return grid(subject, machines, asked_of(subject, machines[0]))


@pytest.fixture
def mpl() -> Iterator[None]:
    pytest.importorskip("matplotlib")
    with plots.style():
        yield


def texts(figure: Any) -> list[str]:
    (axes,) = figure.axes
    return [text.get_text() for text in (*axes.texts, *figure.texts)]


@pytest.mark.usefixtures("mpl")
def test_every_cell_says_what_the_grid_says(drawn_grid):
    (axes,) = plots.figure(drawn_grid).axes
    cells = [text for text in axes.texts if text.get_gid() == "longest"]
    said = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in cells}
    expected = {
        (y, x): words(new) + ("*" if new != old else "")
        for y, (news, olds) in enumerate(zip(drawn_grid.longest, drawn_grid.older, strict=True))
        for x, (new, old) in enumerate(zip(news, olds, strict=True))
    }
    assert said == expected
    assert {"no", "128k"} <= {text.removesuffix("*") for text in said.values()}
    assert any(text.endswith("*") for text in said.values())
    others = texts(plots.figure(drawn_grid))
    assert {level.key for level in drawn_grid.levels} <= set(others)
    assert {f"{gib} GB" for gib in RAM_GIB} <= set(others)


@pytest.mark.usefixtures("mpl")
def test_no_words_overlap_and_none_leave_the_picture(drawn_grid):
    long = replace(drawn_grid, levels=tuple(replace(level, name="4-bit g128 uniform") for level in drawn_grid.levels))
    for shown in (drawn_grid, long, replace(drawn_grid, subject=replace(drawn_grid.subject, name=EVIL + "W" * 99))):
        figure = plots.figure(shown)
        figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        boxes = [text.get_window_extent(renderer) for text in (*figure.axes[0].texts, *figure.texts)]
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
        assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def luminance(rgb: tuple[float, float, float]) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def of_hex(text: str) -> tuple[float, float, float]:
    red, green, blue = (int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


@pytest.mark.parametrize("tokens", [0, 1, 900, *(2**i for i in range(10, 18))])
def test_numbers_can_be_read_on_every_shade(tokens):
    """WCAG 2.2 asks a contrast of 4.5 for text of this size."""
    fill = colour(tokens, 131072)
    low, high = sorted((luminance(fill), luminance(of_hex(ink_on(fill)))))
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_longer_is_darker():
    shades = [luminance(colour(tokens, 131072)) for tokens in (1024, 4096, 16384, 65536, 131072)]
    assert shades == sorted(shades, reverse=True)
    assert colour(0, 8192) == NOTHING
    assert colour(1, 8192) == colour(1024, 8192) == pytest.approx(PALE)
    assert colour(8192, 8192) == colour(9999, 8192) == pytest.approx(DEEP)
    assert colour(512, 512) == pytest.approx(PALE), "a model made for very little"


def test_tokens_are_written_as_in_the_table():
    assert [words(count) for count in (0, 1, 1023, 1024, 9000, 131072)] == ["no", "1", "1023", "1k", "8k", "128k"]


def test_svg_is_well_formed_and_trusts_no_name(drawn_grid, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "grid.svg"
    plot(replace(drawn_grid, subject=replace(drawn_grid.subject, name=EVIL)), path)
    root = ET.fromstring(path.read_text())
    assert not [node for node in root.iter() if node.tag.endswith("script")]
    said = "".join(root.itertext())
    assert "<script>alert(1)</script>" in said
    assert "\\x1b" in said
    assert "$" in said
    assert [p.name for p in tmp_path.iterdir()] == ["grid.svg"]


def test_png_is_an_image_and_the_same_twice(drawn_grid, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.PNG"):
        plot(drawn_grid, tmp_path / name)
    first = (tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first == (tmp_path / "b.PNG").read_bytes()


def test_what_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no suffix"):
        check_plot(tmp_path / "grid")
    with pytest.raises(UsageError, match=re.escape(".html")):
        check_plot(tmp_path / "grid.html")
    with pytest.raises(TargetError, match="there is no folder"):
        check_plot(tmp_path / "missing" / "grid.png")
    monkeypatch.setattr(plot_file, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="matplotlib") as caught:
        check_plot(tmp_path / "grid.png")
    assert "mlxquant[plot]" in str(caught.value.hint)


def test_a_full_disk_leaves_nothing(drawn_grid, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(TargetError):
        plot(drawn_grid, tmp_path / ("n" * 300 + ".svg"))
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_loaded_only_to_draw():
    code = "import sys, mlxquant.fit.plot; sys.exit('matplotlib' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
