"""Sizes that others published, from config files alone: benchmarks/sizes/published.csv, within 1 %."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from mlxquant.families.checkpoint import parameters

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "sizes.py"


def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_sizes", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


sizes = benchmark()
LINES = sizes.lines(sizes.PUBLISHED)


def named(line):
    return f"{line['model']} {line['level']} {line['published']} {line['unit']}"


@pytest.mark.parametrize("line", LINES, ids=named)
def test_published_sizes_within_a_hundredth(line):
    assert abs(sizes.row_of(line).error) < sizes.TOLERANCE


@pytest.mark.parametrize("line", [line for line in LINES if line["holds"] == "tensors"], ids=named)
def test_published_tensors_to_the_byte(line):
    """Or but for DeepSeek's expert biases, which some conversions keep in float32: 29,696 bytes of 377 billion."""
    row = sizes.row_of(line)
    assert row.published_bytes - row.predicted_bytes in (0, 256 * 58 * 2 if row.model == "deepseek-v3" else 0)


def test_each_model_has_a_published_figure_in_both_formats():
    found = {(line["model"], line["level"].split()[0]) for line in LINES}
    assert {(model, form) for model in sizes.MODELS for form in ("mlx", "gguf")} <= found


@pytest.mark.parametrize(
    ("model", "billions"),
    # Of Qwen3 as the Hub counts the tensors of its files; of the others as their model cards round.
    [
        ("qwen3-4b", 4.022468096), ("qwen3-8b", 8.19073536), ("qwen3-14b", 14.7683072), ("qwen3-32b", 32.762123264),
        ("qwen3-30b-a3b", 30.532122624), ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.6), ("mistral-7b-v0.3", 7.25),
        ("gpt-oss-20b", 20.9), ("deepseek-v3", 671),
    ],
)  # fmt: skip
def test_parameters(model, billions):
    digits = len(str(billions).partition(".")[2])
    assert round(parameters(sizes.config_of(model)) / 1e9, digits) == billions


def test_the_page_has_these_tables():
    """Rows that anybody can make again: what is published, what is predicted alone, what guides say."""
    page = (PATH.parents[1] / "docs" / "fit.md").read_text().splitlines()
    made = [*sizes.markdown([sizes.row_of(line) for line in LINES]), *sizes.guides()]
    assert [line for line in made if line.startswith("|") and line not in page] == []
