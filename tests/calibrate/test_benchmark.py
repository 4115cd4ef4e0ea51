"""benchmarks/calibrated.py end to end on a tiny model, and the page's table of what it keeps."""

from __future__ import annotations

import json
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make

ROOT = Path(__file__).parent.parent.parent


def run(*words: object) -> str:
    command = [sys.executable, ROOT / "benchmarks" / "calibrated.py", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_one_student_at_a_time_is_made_scored_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "calibrated-tiny-2026-01-01.json"
    make(model)
    text.write_text("\n".join(pydoc_data.topics.topics.values())[:60_000])
    words = [model, "--text", text, "--windows", 2, "--formats", "4g64", "--untimed", "-o", out]
    run(*words, "--methods", "mlx_lm")
    first = json.loads(out.read_text())["rows"][0]
    last = json.loads(run(*words, "--methods", "mlx_lm,rtn", "--plot", tmp_path / "plot.svg").splitlines()[-1])
    stock, ours = json.loads(out.read_text())["rows"]
    assert stock == first  # was not made again
    assert last["kl"] == {
        "mlx_lm 4g64": stock["divergence"]["kl"]["value"],
        "rtn 4g64": ours["divergence"]["kl"]["value"],
    }
    assert stock["divergence"]["kl"]["value"] > 0
    assert ours["ratio_to_mlx_lm"] == 1.0  # the same tensors
    assert "rtn" in (tmp_path / "plot.svg").read_text()
    students = [path.name for path in (tmp_path / f"{out.stem}-students").iterdir()]
    assert students == ["kept"]

    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import peers_table

    monkeypatch.setattr(peers_table, "RESULTS", tmp_path)
    rows = [line.split(" | ") for line in peers_table.text(["model"]).splitlines() if "4g64" in line]
    assert [row[4] for row in rows] == ["1.000", "1.000"]
    assert peers_table.text(["model", "rtn/4g64", "mlx_lm/4g64"]) == "1.000"
    assert peers_table.text(["other"]).strip() == peers_table.MISSING


def test_text_that_calibrates_is_not_scored(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "calibrated.py", tmp_path, "-o", tmp_path / "o.json"]
    same: list[Any] = ["--text", tmp_path / "t", "--calibration", tmp_path / "t"]
    done = subprocess.run(list(map(str, [*command, *same])), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "fitted" in done.stderr
