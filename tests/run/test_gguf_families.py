"""Every family as a GGUF file of ours: real llama.cpp says what stock mlx-lm says of the source, and so do we of the
file.

llama.cpp computes in float32 here and rounds nothing but gelu (a table of float16), so that a wrong rope, epsilon,
window, cap, scale or gate of experts cannot hide.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from mlxquant.families.gguf_limits import unsaid
from mlxquant.families.gguf_table import ARCHS
from mlxquant.files.hf_folder import HFFolder
from mlxquant.measure.agree import log_probabilities
from mlxquant.run.cache import plan_cache
from mlxquant.run.generate import generate
from mlxquant.run.model import load_model
from tests.gguf_files import LlamaCpp
from tests.run.gguf_models import MODELS, PROMPT, changed, make, write

TOKENS = 32
_HOME = TemporaryDirectory(prefix="mlxquant-gguf-families-")
every_model = pytest.mark.parametrize("name", MODELS)


@cache
def folder(name: str) -> Path:
    return make(Path(_HOME.name) / name / "tiny", MODELS[name])  # llama.cpp goes by names: it wants Phi-3's tokens


@cache
def file(name: str) -> Path:
    return write(folder(name), Path(_HOME.name) / f"{name}.gguf")


def of_source(path: Path, tokens: list[int]) -> np.ndarray:
    return log_probabilities(load_model(path, expand="on").model, tokens)


def greedy(path: Path) -> list[int]:
    model = load_model(path, expand="on").model
    return [token.id for token in generate(model, PROMPT, plan_cache(model).make(), max_tokens=TOKENS)]


@every_model
def test_llama_cpp_agrees_with_stock_mlx_lm(name: str) -> None:
    pytest.importorskip("xllamacpp")
    theirs = LlamaCpp(file(name), exact=True).probabilities(PROMPT, TOKENS)
    tokens = [token for token, _ in theirs]
    assert len(tokens) == TOKENS
    ours_LV = of_source(folder(name), PROMPT + tokens)[len(PROMPT) - 1 : -1]
    away = max(abs(ours_LV[i, token] - found) for i, (_, top) in enumerate(theirs) for token, found in top.items())
    assert away < MODELS[name].bound
    assert greedy(folder(name)) == tokens


@every_model
def test_the_way_back_gives_the_same_logits(name: str) -> None:
    source, back = (of_source(path, PROMPT) for path in (folder(name), file(name)))
    np.testing.assert_allclose(back, source, rtol=0, atol=1e-5)


@every_model
def test_settings_show(name: str, tmp_path: Path) -> None:
    """Each of them changes what the model says by far more than agreement allows."""
    model = MODELS[name]
    source = of_source(folder(name), PROMPT)
    for key, value in ({"rms_norm_eps": 1e-3} | model.matters).items():
        other = of_source(changed(folder(name), tmp_path / key, **{key: value}), PROMPT)
        assert np.abs(other - source).max() > 20 * model.bound, key


def test_every_family_is_here() -> None:
    assert {model.family for model in MODELS.values()} >= ARCHS.keys()


@every_model
def test_nothing_is_left_unsaid(name: str) -> None:
    assert unsaid(HFFolder(folder(name)).config) == ()
