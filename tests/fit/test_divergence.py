"""What was measured is what the kept results say, and what was not is said to be something else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlxquant.codecs.spec import AFFINE_BITS
from mlxquant.fit import divergence as module
from mlxquant.fit.divergence import divergence
from mlxquant.fit.values import Level

ROOT = Path(__file__).parent.parent.parent
BIG, SMALL = 8 * 10**9, 6 * 10**8


def level(name: str, bpw: float, size: int = BIG) -> Level:
    """As fit/levels.py makes them."""
    if name[0].isdigit():
        words = name.split()
        options = ["--bits", words[0].removesuffix("-bit")]
        options += [x for w in words[1:] if w[0] == "g" for x in ("--group-size", w[1:])]
        options += [x for w in words[1:] if w[0] != "g" for x in ("--recipe", w)]
        form = "mlx"
    elif name.startswith("mixed"):
        options, form = ["--recipe", name], "mlx"
    elif name == "mxfp4":
        options, form = ["--mode", name], "mlx"
    else:
        options, form = ["--type", name], "gguf"
    nbytes = int(size * bpw / 8)
    return Level(name, form, tuple(options), nbytes, nbytes, nbytes, nbytes, size)


def test_file_is_what_the_kept_results_say():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "divergence.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "size", "student", "model"),
    [
        ("Q4_K_M", BIG, "Q4_K_M.gguf", "qwen"),
        ("IQ4_XS", BIG, "IQ4_XS.gguf", "qwen"),
        ("4-bit", BIG, "mlx-4bit-balanced", "qwen"),
        ("4-bit uniform", BIG, "mlx-4bit", "qwen"),
        ("8-bit", BIG, "mlx-8bit", "qwen"),
        ("8-bit", SMALL, "mlx-8bit", "smol"),
        ("Q2_K", SMALL, "Q2_K.gguf", "smol"),
    ],
)
def test_measured_levels_are_the_measurement(name, size, student, model):
    result = json.loads((ROOT / "benchmarks" / "results" / f"quality-{model}-2026-11-21.json").read_text())
    (kept,) = [s for s in result["reports"]["all"]["students"] if s["model"]["name"] == student]
    found = divergence(level(name, 5.0, size))
    assert (found.kl, found.error) == (kept["divergence"]["kl"]["value"], kept["divergence"]["kl"]["error"])
    assert (found.top1, found.ppl_ratio) == (
        kept["divergence"]["top1"]["value"],
        kept["divergence"]["ppl_ratio"]["value"],
    )
    assert found.how == "measured"


@pytest.mark.parametrize("name", ["6-bit", "2-bit", "4-bit g32 uniform", "4-bit g32", "mixed_3_6"])
def test_more_bits_than_were_measured_are_an_upper_bound(name):
    assert divergence(level(name, 5.0)).how == "at most"


def test_between_two_levels_lies_between_them():
    low, high = divergence(level("Q4_K_M", 4.9)), divergence(level("Q5_K_M", 5.7))
    found = divergence(level("Q5_K_S", 5.5))
    assert high.kl < found.kl < low.kl
    assert low.top1 < found.top1 < high.top1
    assert (found.how, found.error, found.ppl_ratio) == ("interpolated", None, None)
    assert divergence(level("Q5_K_S", low.bpw)).kl == pytest.approx(low.kl)
    assert divergence(level("4-bit g128", 4.25)).how == "interpolated"


@pytest.mark.parametrize(("name", "bpw"), [("nvfp4", 4.5), ("mxfp4 uniform", 4.25), ("TQ1_0", 1.7), ("Q2_K_S", 2.9)])
def test_what_nothing_like_was_measured_has_no_figure(name, bpw):
    assert divergence(level(name, bpw)) is None


@pytest.mark.parametrize("name", ["bf16", "f16", "BF16"])
def test_a_float_model_is_exact(name):
    found = divergence(Level(name, "mlx", (), 2, 2, 2, 2, 1))
    assert (found.kl, found.top1, found.how) == (0.0, 1.0, "exact")


def test_a_stored_folder_counts_as_the_poorest_recipe():
    found = divergence(Level("4-bit", "mlx", (), BIG // 2, 1, 1, 1, BIG))
    assert found == divergence(level("4-bit uniform", 4.5))
    assert divergence(Level("mxfp4", "mlx", (), 2, 2, 2, 2, BIG)) is None


@pytest.mark.parametrize("size", [BIG, SMALL])
def test_ladders_descend(size):
    """More bits, less divergence: pick walks along these."""
    for names in (module.K_QUANTS, [f"{b}-bit uniform" for b in AFFINE_BITS], [f"{b}-bit" for b in AFFINE_BITS]):
        found = [divergence(level(name, 5.0, size)) for name in names]
        assert [d.kl for d in found] == sorted((d.kl for d in found), reverse=True)


def test_a_smaller_model_loses_more_at_every_level():
    for name in (*module.K_QUANTS, *(f"{b}-bit" for b in AFFINE_BITS)):
        if name != "Q2_K":  # on 576 columns that is Q4_0
            assert divergence(level(name, 5.0, SMALL)).kl > divergence(level(name, 5.0, BIG)).kl
