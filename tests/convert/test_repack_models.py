"""Whole models taken over from GGUF: the MLX folder says what the file's exactly decoded weights say, in every family.

Codes are unchanged or nearly so; what stays float is rounded to float16. The slow part is a real file of llama.cpp's.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mlxquant.convert.gguf_source import GGUFSource
from mlxquant.convert.to_mlx import to_mlx
from mlxquant.measure.agree import kl, log_probabilities
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import REPACK, settings
from mlxquant.run.cache import plan_cache
from mlxquant.run.generate import generate
from mlxquant.run.model import load_model
from mlxquant.run.text import Text
from tests.run.gguf_models import MODELS, MXFP4, PROMPT, make, write

LIMIT_NATS = 1e-4
FAMILIES = {model.family: model for model in MODELS.values()} | {"gpt_oss in MXFP4": MXFP4}


def taken_over(file: Path, out: Path) -> Path:
    source = GGUFSource(file)
    return to_mlx(source, make_plan(source.config, source.specs, settings(recipe=REPACK), source.quantized), out)


def probabilities(path: Path, tokens: list[int]) -> np.ndarray:
    return log_probabilities(load_model(path, expand="on").model, tokens).astype(np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_weights(family: str, tmp_path: Path) -> None:
    """4e-11 to 9e-7 nats: norms rounded to float16. Q8_0, which goes over unchanged."""
    file = write(make(tmp_path / "tiny", FAMILIES[family]), tmp_path / "tiny.gguf", "Q8_0")
    out = taken_over(file, tmp_path / "out")
    assert kl(probabilities(file, PROMPT), probabilities(out, PROMPT)) < 5e-6


@pytest.mark.parametrize("type_name", ["Q4_K_M", "Q5_K_S", "Q6_K", "IQ4_XS", "Q3_K_M", "Q2_K"])
def test_every_type_stays_far_below_its_own_loss(type_name: str, tmp_path: Path) -> None:
    """Its share of the type's own: 3.5 % for Q6_K, 3.2 % for Q2_K, 2.3 % for Q3_K_M, 0.01 to 0.06 % for the others."""
    source = make(tmp_path / "tiny", MODELS["llama"], width=256)
    file = write(source, tmp_path / "tiny.gguf", type_name)
    p, q, ours = (probabilities(path, PROMPT) for path in (source, file, taken_over(file, tmp_path / "out")))
    own, extra = kl(p, q), kl(q, ours)
    assert extra < 0.05 * own


@pytest.fixture(scope="module")
def qwen() -> Path:
    """Qwen2.5-Coder-1.5B-Instruct in Q4_K_M, made by llama.cpp: qwen.gguf of the folder that MLXQUANT_MODELS names."""
    path = Path(os.environ.get("MLXQUANT_MODELS", "")) / "qwen.gguf"
    if not os.environ.get("MLXQUANT_MODELS") or not path.is_file():
        pytest.skip("MLXQUANT_MODELS names no folder with qwen.gguf")
    return path


@pytest.mark.slow
def test_a_file_of_llama_cpp_s_becomes_a_folder_that_chats(qwen: Path, tmp_path: Path) -> None:
    """3.5e-5 nats from the decoded weights (scripts/kl_repack.py, 512 tokens)."""
    from pydoc_data.topics import topics

    out, text = taken_over(qwen, tmp_path / "out"), Text.load(qwen)
    tokens = text.encode(topics["assignment"])[:256]
    assert len(tokens) == 256
    assert kl(probabilities(qwen, tokens), probabilities(out, tokens)) < LIMIT_NATS
    assert "Paris" in answer(out, "What is the capital of France? Answer with one word.")


def answer(folder: Path, question: str) -> str:
    model, text = load_model(folder, expand="on").model, Text.load(folder)
    prompt = text.encode(text.render([{"role": "user", "content": question}]))
    made = [token.id for token in generate(model, prompt, plan_cache(model).make(), max_tokens=16)]
    return text.decode(made)
