"""eval from end to end on tiny models: its figures against plain ones, and every way of stopping and going on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.convert.sources import open_source
from mlxquant.errors import MemoryBudgetError, SourceError
from mlxquant.measure import evaluate as evaluating
from mlxquant.measure.agree import log_probabilities
from mlxquant.measure.corpus import Corpus, load_corpus
from mlxquant.measure.evaluate import evaluate, named
from mlxquant.measure.match import Side
from mlxquant.measure.runner import How, Silent
from mlxquant.measure.windows import Protocol, cut
from mlxquant.run.device import prepare
from mlxquant.run.model import load_model
from mlxquant.run.text import Text
from tests.cli.runner import mlxquant, refused
from tests.tiny import make

CONTEXT, WINDOWS = 64, 6


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A teacher, and students of 8, 4 and 2 bits, one of them a GGUF file."""
    folder = tmp_path_factory.mktemp("eval")
    make(folder / "teacher", "llama", width=256, dtype="float32")
    for bits in (2, 8):
        assert mlxquant("convert", folder / "teacher", "-o", folder / f"{bits}bit", "--bits", bits).code == 0
    assert mlxquant("convert", folder / "teacher", "-o", folder / "Q4_0.gguf", "--type", "Q4_0").code == 0
    return folder


@pytest.fixture(scope="module")
def corpus():
    text = load_corpus("builtin").text[:20_000]
    return Corpus(text, "the beginning of the built-in text", "0" * 64)


def side(path: Path) -> Side:
    return Side(path, open_source(path).config, Text.load(path), path.name)


def run(home, corpus, *students, work=None, watch=None, device=None, expand="auto", teacher="teacher"):
    sides = [side(home / name) for name in (teacher, *students)]
    windows = cut(sides[0].text, corpus, Protocol(CONTEXT, None, WINDOWS))
    how = How(device or prepare("cpu"), expand)
    with tempfile.TemporaryDirectory() as scratch:
        return evaluate(sides[0], sides[1:], windows, how, work or Path(scratch), watch or Silent())


class Stopping(Silent):
    """Ctrl-C after so many windows."""

    def __init__(self, after: int) -> None:
        self.left, self.seen = after, 0

    def stage(self, label, total, unit):
        self.unit = unit
        self.skipped = False

    def advance(self, count, note=""):
        if self.unit == "windows" and (note or count == 1):
            self.seen += 1

    def stopped(self):
        return self.seen >= self.left


def plain(home, name, windows):
    """Mean KL, perplexities and same best tokens from whole forwards, with nothing of eval's."""
    teacher, student = (load_model(home / n, expand="on").model for n in ("teacher", name))
    kl, nll, same = [], [], []
    for tokens in windows.tokens_WL.tolist():
        p, q = (log_probabilities(m, tokens)[CONTEXT // 2 : -1] for m in (teacher, student))
        kl += (np.exp(p) * (p - q)).sum(-1).tolist()
        nll += (-np.take_along_axis(q, np.array(tokens[CONTEXT // 2 + 1 :])[:, None], -1)).ravel().tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    return np.mean(kl), np.exp(np.mean(nll)), np.mean(same)


def test_figures_are_those_of_whole_forwards(home, corpus):
    report = run(home, corpus, "8bit", "2bit", "Q4_0.gguf")
    assert [s.model.name for s in report.students] == ["8bit", "Q4_0.gguf", "2bit"]
    windows = cut(Text.load(home / "teacher"), corpus, Protocol(CONTEXT, None, WINDOWS))
    for student in report.students:
        kl, perplexity, same = plain(home, student.model.name, windows)
        found = student.divergence
        assert found.kl.value == pytest.approx(kl, rel=1e-4, abs=1e-10)
        assert found.ppl_student.value == pytest.approx(perplexity, rel=1e-5)
        assert found.top1.value == pytest.approx(same)
        assert found.positions == WINDOWS * (CONTEXT - 1 - CONTEXT // 2)
        assert found.kl.error > 0
    assert not report.interrupted
    assert report.setting.floor < 1e-9


def test_a_model_is_at_zero_from_itself(home, corpus, tmp_path):
    shutil.copytree(home / "teacher", tmp_path / "same")
    (home / "same").symlink_to(tmp_path / "same")
    (student,) = run(home, corpus, "same").students
    assert student.divergence.kl.value == student.divergence.kl_max == 0.0
    assert student.divergence.top1.value == student.divergence.top5.value == student.divergence.ppl_ratio.value == 1.0


def test_alone_or_beside_others_the_same_figures(home, corpus):
    together = {s.model.name: s.divergence for s in run(home, corpus, "8bit", "2bit").students}
    for name in ("8bit", "2bit"):
        (alone,) = run(home, corpus, name).students
        assert alone.divergence == together[name]


def small(home):
    """A device that holds one of the models, not two."""
    device = prepare("cpu")
    weights = load_model(home / "teacher", expand="on", lazy=True).weight_bytes
    machine = dataclasses.replace(device.machine, working_set_bytes=int(1.5 * weights) + 80_000_000)
    return dataclasses.replace(device, machine=machine)


def test_too_large_together_the_teacher_goes_first(home, corpus):
    roomy = run(home, corpus, "8bit")
    stages = []
    watch = Silent()
    watch.stage = lambda label, total, unit: stages.append(label)
    tight = run(home, corpus, "8bit", device=small(home), watch=watch)
    assert any("teacher, alone" in stage for stage in stages)
    assert tight.students[0].divergence == roomy.students[0].divergence


def test_what_does_not_fit_alone_is_refused(home, corpus):
    device = prepare("cpu")
    tiny = dataclasses.replace(device.machine, working_set_bytes=1_000_000)
    with pytest.raises(MemoryBudgetError):
        run(home, corpus, "8bit", device=dataclasses.replace(device, machine=tiny))


@pytest.mark.parametrize("after", [1, 4, WINDOWS, WINDOWS + 2])
def test_stopped_and_continued_it_is_the_same(home, corpus, tmp_path, after):
    whole = run(home, corpus, "8bit", "2bit")
    watch = Stopping(after)
    stopped = run(home, corpus, "8bit", "2bit", work=tmp_path / "kept", watch=watch)
    assert stopped.interrupted
    assert sum(s.divergence.windows for s in stopped.students) == after
    rest = Stopping(99)
    continued = run(home, corpus, "8bit", "2bit", work=tmp_path / "kept", watch=rest)
    assert rest.seen <= 2 * WINDOWS - after + 2  # a stage says first what is done already
    assert not continued.interrupted
    assert continued.students == whole.students


def test_a_finished_run_reads_no_weights_again(home, corpus, tmp_path, monkeypatch):
    first = run(home, corpus, "8bit", work=tmp_path / "kept")
    monkeypatch.setattr(evaluating.Runner, "read", lambda self: pytest.fail("weights were read"))
    assert run(home, corpus, "8bit", work=tmp_path / "kept") == first


def damage(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def test_states_that_end_before_the_scores_are_computed_again(home, corpus, tmp_path):
    run(home, corpus, "8bit", "2bit", work=tmp_path / "kept", watch=Stopping(4))
    damage(tmp_path / "kept" / "teacher.states")
    again = run(home, corpus, "8bit", "2bit", work=tmp_path / "kept")
    assert again.students == run(home, corpus, "8bit", "2bit").students


def test_a_damaged_floor_is_computed_again_though_the_teacher_is_alone(home, corpus, tmp_path):
    whole = run(home, corpus, "8bit", work=tmp_path / "kept")
    damage(tmp_path / "kept" / "floor.scores")
    (scores,) = {*(tmp_path / "kept").glob("*.scores")} - {tmp_path / "kept" / "floor.scores"}
    scores.unlink()
    again = run(home, corpus, "8bit", work=tmp_path / "kept", device=small(home))
    assert not again.interrupted
    assert again.students == whole.students


def test_a_lost_floor_is_found_again(home, corpus, tmp_path):
    first = run(home, corpus, "8bit", work=tmp_path / "kept")
    (tmp_path / "kept" / "floor.scores").unlink()
    assert run(home, corpus, "8bit", work=tmp_path / "kept") == first


def test_a_refused_file_leaves_the_others_free(home, corpus, tmp_path):
    run(home, corpus, "8bit", work=tmp_path / "kept")
    floor = tmp_path / "kept" / "floor.scores"
    whole = floor.read_bytes()
    floor.write_bytes(b"something else\n")
    with pytest.raises(SourceError, match="no file that eval has kept") as refused:
        run(home, corpus, "8bit", work=tmp_path / "kept")
    floor.write_bytes(whole)
    assert refused  # which holds the frames, and with them what they opened
    run(home, corpus, "8bit", work=tmp_path / "kept")


def test_kept_states_of_another_teacher_are_refused(home, corpus, tmp_path):
    run(home, corpus, "8bit", work=tmp_path / "kept")
    make(home / "other", "llama", width=256, dtype="float32", seed=5)
    with pytest.raises(SourceError, match="teacher"):
        run(home, corpus, "8bit", work=tmp_path / "kept", teacher="other")


def test_a_student_or_a_teacher_of_no_numbers_is_named(home, corpus, tmp_path):
    shutil.copytree(home / "teacher", home / "broken")
    arrays = mx.load(str(home / "broken" / "model.safetensors"))
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * float("nan")
    mx.save_safetensors(str(home / "broken" / "model.safetensors"), arrays, {"format": "pt"})
    with pytest.raises(SourceError, match=r"broken.*no numbers"):
        run(home, corpus, "broken")
    with pytest.raises(SourceError, match=r"broken.*no numbers"):
        run(home, corpus, "8bit", teacher="broken")


def test_names_tell_paths_apart(tmp_path):
    assert named([tmp_path / "a" / "x", tmp_path / "a" / "y"]) == ["x", "y"]
    assert named([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]


# --- the command


def command(home, *arguments):
    return mlxquant("eval", *arguments, "--context", CONTEXT, "--windows", WINDOWS, "--device", "cpu")


def test_command_json(home):
    result = command(home, home / "teacher", home / "8bit", home / "2bit", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert [s["model"]["name"] for s in report["students"]] == ["8bit", "2bit"]
    assert report["setting"]["windows"] == WINDOWS
    assert report["students"][0]["divergence"]["kl"]["value"] < report["students"][1]["divergence"]["kl"]["value"]


def test_command_table_card_and_plot(home, tmp_path):
    pytest.importorskip("matplotlib")
    result = command(home, home / "teacher", home / "8bit", home / "2bit", "--plot", tmp_path / "out.svg", "--speed")
    assert result.code == 0, result.err
    assert "8bit" in result.out
    assert (tmp_path / "out.svg").stat().st_size > 1000
    result = command(home, home / "teacher", home / "8bit", "--card")
    assert result.code == 0, result.err
    assert "| " in result.out


def test_nothing_is_left_behind_once_it_is_shown(home, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr("mlxquant.cli.eval._show", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command(home, home / "teacher", home / "8bit").code == 130
    assert list(tmp_path.rglob("*.scores"))
    assert command(home, home / "teacher", home / "8bit").code == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_nowhere_to_keep_anything(home, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    result = command(home, home / "teacher", home / "8bit")
    refused(result, "--keep DIR")


def test_command_refusals(home, tmp_path):
    refused(command(home, home / "teacher", home / "nowhere"), "nowhere", code=2)
    refused(command(home, home / "teacher", home / "teacher"), "twice", code=2)
    make(tmp_path / "deep", "llama", width=256, layers=3)
    refused(command(home, home / "teacher", tmp_path / "deep"), "deep", "3", "2")
    (tmp_path / "short.txt").write_text("Too short.")
    refused(command(home, home / "teacher", home / "8bit", "--text", tmp_path / "short.txt"), "window", code=2)
    refused(command(home, home / "teacher", home / "8bit", "--plot", tmp_path / "out.bmp"), ".png", code=2)


def test_killed_it_goes_on(home, tmp_path):
    models, options = (home / "teacher", home / "2bit"), ("--windows", "30", "--context", "256", "--json")
    arguments = ["eval", *models, *options, "--keep", tmp_path / "kept"]
    line, nothing = [sys.executable, "-m", "mlxquant", *map(str, arguments)], subprocess.DEVNULL
    process = subprocess.Popen(line, stdout=nothing, stderr=nothing)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "kept").glob("*.scores")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = mlxquant(*arguments)
    assert killed.code == 0, killed.err
    fresh = mlxquant("eval", *models, *options)
    assert json.loads(killed.out)["students"] == json.loads(fresh.out)["students"]
