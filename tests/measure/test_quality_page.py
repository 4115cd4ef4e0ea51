"""The page about quality says what the kept files say, and the scripts behind it find what is out of order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlxquant.measure.report import Estimate, Student
from tests.measure import reports

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
# llama.cpp, tools/quantize/README.md, meta-llama/Llama-3.1-8B, "bits/weight"
LLAMA_8B = {
    "Q2_K": 3.1593,
    "Q3_K_M": 3.9960,
    "Q3_K_L": 4.2979,
    "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944,
    "Q5_K_S": 5.5704,
    "Q5_K_M": 5.7036,
    "Q6_K": 6.5633,
    "Q8_0": 8.5008,
    "IQ4_XS": 4.4597,
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return {name: __import__(name) for name in ("quality", "quality_page", "quality_bits")}


def student(name: str, kl: float, behind: float | None = None, error: float = 0.001) -> Student:
    step = None if behind is None else Estimate(behind, error)
    return reports.student(name, "Q4_K_M", 4.5, kl, 0.01, behind=step)


def ladder(*students: Student) -> dict[str, Any]:
    return reports.report(students).to_json()


def test_the_page_is_what_the_kept_files_say() -> None:
    done = subprocess.run(
        [sys.executable, "quality_page.py", "--check"], cwd=SCRIPTS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_bits_per_weight_are_those_that_llama_cpp_publishes(scripts: dict[str, ModuleType]) -> None:
    bits = scripts["quality_bits"]
    (model,) = (model for model in bits.MODELS if model.name == "Llama 3.1 8B")
    assert {level: round(bits.bits_per_weight(model, level), 4) for level in LLAMA_8B} == LLAMA_8B


def test_figures_are_written_where_they_are_asked_for(scripts: dict[str, ModuleType]) -> None:
    better, worse = student("Q4_K_M.gguf", 0.05), student("mlx-4bit", 0.08, 0.03)
    both = ladder(better, worse)
    kept = {"m": {"date": "2026-01-01", "reports": {"all": both, "gguf": ladder(better), "pairs": [both]}}}

    def fill(words: str) -> str:
        return scripts["quality_page"].fill(f"before <!-- = {words} -->old<!-- / --> after", kept)

    assert fill("m mlx-4bit kl") == "before <!-- = m mlx-4bit kl -->80 ± 10 milli-nats<!-- / --> after"
    assert "4.50<" in fill("m mlx-4bit bpw")
    assert ">30.0 ± 1.0 milli-nats<" in fill("pair m Q4_K_M mlx-4bit")
    assert ">-30.0 ± 1.0 milli-nats<" in fill("pair m mlx-4bit Q4_K_M")
    assert "| mlx-4bit | 4.50 |" in fill("ladder m all")
    assert "64 windows of 512 tokens" in fill("setting m")
    for words in ("other Q8_0 kl", "m Q8_0 kl", "ladder m mlx", "ladder other gguf", "pair m Q4_K_M Q8_0"):
        assert "not measured yet" in fill(words), words
    with pytest.raises(SystemExit, match="means nothing"):
        fill("nonsense")


def test_a_ladder_out_of_order_or_too_close_is_found(scripts: dict[str, ModuleType]) -> None:
    faults, names = scripts["quality"].faults, ["a", "b", "c"]
    a, b, c = student("a", 0.1), student("b", 0.2, 0.1), student("c", 0.3, 0.1)
    assert faults(ladder(a, b, c), names) == []
    assert "order a < c < b" in faults(ladder(a, student("c", 0.2, 0.1), student("b", 0.3, 0.1)), names)[0]
    close = faults(ladder(a, student("b", 0.1, 0.0019), c), names)
    assert len(close) == 1
    assert "b is" in close[0]
