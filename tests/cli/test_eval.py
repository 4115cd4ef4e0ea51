"""What `eval` says to people: its bar, its refusals before anything is pulled, and what a stopped run ends with."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
from rich.console import Console

from mlxquant.cli.progress import CountBar
from mlxquant.convert.sources import open_source
from mlxquant.measure.match import Side
from mlxquant.measure.runner import How
from mlxquant.measure.timed import with_speed
from mlxquant.run import interrupt
from mlxquant.run.device import prepare
from mlxquant.run.text import Text
from tests.cli.runner import mlxquant, refused
from tests.measure import reports
from tests.tiny import make

SHORT = ("--context", 64, "--windows", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    make(folder / "teacher", dtype="float32")
    assert mlxquant("convert", folder / "teacher", "-o", folder / "4bit", "--bits", 4).code == 0
    return folder


@pytest.fixture
def pressed(monkeypatch):
    """Ctrl-C, pressed before the first window."""

    @contextmanager
    def interruptible():
        yield lambda: True

    monkeypatch.setattr(interrupt, "interruptible", interruptible)


def test_a_bar_shows_its_eta_however_long_the_name_and_however_slow_a_window():
    now, bar = [0.0], CountBar()
    bar._progress.get_time = lambda: now[0]
    bar.start("2 of 12: Some-Model-30B-A3B-Instruct-2507-Q4_K_M.gguf", 64, "windows")
    for _ in range(4):  # of a minute each
        now[0] += 60
        bar.advance(1, "KLD 0.00123")
    console = Console(width=80, color_system=None)
    with console.capture() as shown:
        console.print(bar._progress.get_renderable())
    (line,) = shown.get().splitlines()
    assert line.startswith("2 of 12: Some-Model")
    assert "4 of 64 windows" in line
    assert line.rstrip().endswith("1:00:00")


def test_options_and_text_are_refused_before_a_model_is_pulled():
    refused(mlxquant("eval", "org/model", "org/other", "--windows", "some"), "--windows some", code=2)
    refused(mlxquant("eval", "org/model", "org/other", "--stride", 7), "--stride 7", code=2)
    refused(mlxquant("eval", "org/model", "org/other", "--text", "wiki.txt"), "wiki.txt", code=2)


def test_a_stopped_run_shows_what_it_has_and_how_to_go_on(home, tmp_path, pressed):
    keep = tmp_path / "Kept"
    result = mlxquant("eval", home / "teacher", home / "4bit", *SHORT, "--speed", "--keep", keep)
    assert result.code == 130
    assert "4bit was scored on 1 of 2 windows" in result.out
    assert "decode" not in result.out  # nobody waits for timings after Ctrl-C
    assert result.err.splitlines() == ["Stopped: the same command goes on from here."]


def test_stopped_layers_say_that_they_are_not_all(home, pressed):
    result = mlxquant("eval", home / "teacher", home / "4bit", *SHORT, "--layers")
    assert result.code == 130
    assert "these are 1 of " in result.err
    found = json.loads(mlxquant("eval", home / "teacher", home / "4bit", *SHORT, "--layers", "--json").out)
    assert found["interrupted"]
    assert len(found["tensors"]) == 1


def test_whole_layers_are_no_stopped_ones(home):
    result = mlxquant("eval", home / "teacher", home / "4bit", *SHORT, "--layers", "--json")
    assert result.code == 0
    assert not json.loads(result.out)["interrupted"]


def test_a_teacher_named_last_is_noticed(home):
    result = mlxquant("eval", home / "4bit", home / "teacher", *SHORT)
    assert "The teacher is quantized itself" in result.out
    assert result.out.splitlines()[-1].startswith("Next: ")
    assert "quantized itself" not in mlxquant("eval", home / "teacher", home / "4bit", *SHORT).out


def test_figures_outlive_a_plot_that_cannot_be_written(home, tmp_path):
    pytest.importorskip("matplotlib")
    result = mlxquant("eval", home / "teacher", home / "4bit", *SHORT, "--plot", tmp_path / ("x" * 300 + ".svg"))
    refused(result, "cannot be written")
    assert "KLD" in result.out


def test_figures_outlive_a_model_that_is_too_large_to_be_timed(home):
    device = prepare("cpu")
    small = replace(device, machine=replace(device.machine, working_set_bytes=1_000))
    teacher = home / "teacher"
    side = Side(teacher, open_source(teacher).config, Text.load(teacher), "smol")
    found = with_speed(reports.report(), [side], How(small))
    assert found.students == reports.report().students
    assert found.notes[-1].startswith("not timed: ")


def test_figures_outlive_ctrl_c_while_models_are_timed(home, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxquant.measure.timed.with_speed", stopped)
    result = mlxquant("eval", home / "teacher", home / "4bit", *SHORT, "--speed", "--json")
    assert result.code == 130
    assert json.loads(result.out)["students"]
