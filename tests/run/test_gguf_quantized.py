"""Every file type that we write, in real llama.cpp: it loads, and says what its exactly decoded weights say.

llama.cpp rounds activations to 8 bits before it multiplies them with quantized weights (to bfloat16 for BF16), so the
two agree within a bound. Measured (2026-11-21, x86-64): 0.008 to 0.038 nats in the mean and 0.18 at most, where the
weights before quantizing are 0.14 nats (Q5) to 1.5 (Q2_K) away in the mean.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from mlxquant.files.gguf_file import GGUFFile
from mlxquant.files.imatrix import Imatrix
from mlxquant.measure.agree import log_probabilities
from mlxquant.plan.gguf_types import FILE_TYPES
from mlxquant.run.model import load_model
from tests.gguf_files import LlamaCpp
from tests.run.gguf_models import MODELS, MXFP4, PROMPT, make, write

pytest.importorskip("xllamacpp")
TOKENS = 16
BOUNDS = {"F32": 5e-5, "F16": 2e-3, "BF16": 0.02}  # nats in the mean; 0.06 for blocks
_HOME = TemporaryDirectory(prefix="mlxquant-gguf-types-")


@cache
def folder(name: str) -> Path:
    return make(Path(_HOME.name) / name / "tiny", MODELS[name], width=256)


@cache
def importance() -> Imatrix:
    """Every column of every matrix as important as the next: what Q2_K_S asks for."""
    file = GGUFFile(write(folder("llama"), Path(_HOME.name) / "f32.gguf"))
    names = [n for n, t in file.tensors.items() if n.startswith("blk.") and len(t.shape) == 2]
    return Imatrix("ones", {n: np.ones((1, file.tensors[n].shape[-1]), np.float32) for n in names}, (), 1)


def away(theirs: list[tuple[int, dict[int, float]]], weights: Path) -> np.ndarray:
    """|log-probability by llama.cpp - by `weights`| of the ten likeliest tokens at each place."""
    tokens = PROMPT + [token for token, _ in theirs]
    ours_LV = log_probabilities(load_model(weights, expand="on").model, tokens)[len(PROMPT) - 1 : -1]
    return np.array([abs(ours_LV[i, t] - found) for i, (_, top) in enumerate(theirs) for t, found in top.items()])


@pytest.mark.parametrize("type_name", FILE_TYPES)
def test_llama_cpp_says_what_the_decoded_weights_say(type_name: str, tmp_path: Path) -> None:
    file = write(folder("llama"), tmp_path / "tiny.gguf", type_name, importance() if type_name == "Q2_K_S" else None)
    theirs = LlamaCpp(file, exact=True).probabilities(PROMPT, TOKENS)
    found = away(theirs, file)
    assert found.mean() < BOUNDS.get(type_name, 0.06)
    assert found.max() < 6 * BOUNDS.get(type_name, 0.06)
    if type_name not in (*BOUNDS, "Q8_0", "Q6_K"):
        assert away(theirs, folder("llama")).mean() > 3 * found.mean()  # so it is the decoded weights that agree


def test_experts_that_are_published_in_blocks(tmp_path: Path) -> None:
    source = make(tmp_path / "tiny", MXFP4)
    file = write(source, tmp_path / "tiny.gguf")
    assert "MXFP4" in {tensor.type_name for tensor in GGUFFile(file).tensors.values()}
    theirs = LlamaCpp(file, exact=True).probabilities(PROMPT, TOKENS)
    for weights in (file, source):
        assert away(theirs, weights).mean() < 0.1  # 0.049
