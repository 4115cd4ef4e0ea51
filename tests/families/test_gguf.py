"""GGUF keys and tensors back to Hugging Face: the tiny checkpoints that tests/gguf_files.py wrote come back
exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf import hf_config
from mlxquant.families.gguf_rope import llama3_factors
from mlxquant.families.gguf_tensors import hf_tensors
from mlxquant.families.layout import Piece, Target
from tests import tiny
from tests.gguf_files import LlamaCpp, permute, read_folder, read_gguf, write_gguf

FAMILIES = ("llama", "qwen2", "qwen3")  # which tests/gguf_files.py writes; test_gguf_keys.py has the others
SHAPES = {"token_embd.weight": (512, 64)}
KEYS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 2048,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
}


def unpermuted(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's rotary order -> Hugging Face's, row by row and slowly: row 2 * i + half of a head was
    (half, i)."""
    out, dim = np.empty_like(values), values.shape[0] // heads
    for head in range(heads):
        for row in range(dim):
            out[head * dim + (row % 2) * (dim // 2) + row // 2] = values[head * dim + row]
    return out


def test_the_test_s_own_orders_are_inverse() -> None:
    rows = np.arange(24)
    assert not np.array_equal(permute(rows, 3), rows)
    assert np.array_equal(unpermuted(permute(rows, 3), 3), rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("type", ["F32", "F16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_come_back_exactly(family: str, type: str, tied: bool, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "hf", family, width=64, dtype="float16", tied=tied)
    metadata, shapes, values = read_gguf(write_gguf(folder, tmp_path / "a.gguf", type))
    expected = read_folder(folder)
    origins = hf_tensors(metadata, shapes)
    assert set(origins) == set(expected)
    for name, origin in origins.items():
        got = values[origin.pieces[0].source]
        if origin.change == "halves":
            got = unpermuted(got, origin.heads)
        assert origin.shape == got.shape
        assert np.array_equal(got, expected[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_config_comes_back(family: str, tied: bool, tmp_path: Path) -> None:
    folder = tiny.make(
        tmp_path / "hf",
        family,
        width=64,
        layers=3,
        tied=tied,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        eos_token_id=2,
    )
    metadata, shapes, _ = read_gguf(write_gguf(folder, tmp_path / "a.gguf"))
    metadata["tokenizer.ggml.eos_token_id"] = 2
    written = json.loads((folder / "config.json").read_text())
    del written["torch_dtype"]
    extra = {"attention_bias": False, "mlp_bias": False} if family == "llama" else {}
    assert hf_config(metadata, shapes) == written | extra | {"pad_token_id": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_says_what_llama_cpp_says(family: str, tmp_path: Path) -> None:
    """The rebuilt config and tensors in stock mlx-lm's model, float32: same greedy tokens. Catches a wrong
    rope, head width, epsilon or order of rows that a round trip through our own reading would not."""
    import mlx.core as mx
    from mlx_lm.utils import _get_classes

    folder = tiny.make(tmp_path / "hf", family, rope_theta=5000.0, rms_norm_eps=1e-2)
    file = write_gguf(folder, tmp_path / "a.gguf", "F32")
    metadata, shapes, values = read_gguf(file)
    config = hf_config(metadata, shapes)
    weights = {}
    for name, origin in hf_tensors(metadata, shapes).items():
        value = values[origin.pieces[0].source]
        weights[name] = mx.array(unpermuted(value, origin.heads) if origin.heads else value)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.load_weights(list(weights.items()))
    prompt = [5, 60, 7, 99, 200, 7, 31]
    tokens = list(prompt)
    with mx.stream(mx.cpu):
        for _ in range(12):
            tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    assert tokens[len(prompt) :] == LlamaCpp(file).generate(prompt, 12)


def test_biases_of_a_llama_are_permuted_too(tmp_path: Path) -> None:
    """gguf's own name map and llama.cpp's order on biases, which a Llama has when attention_bias is true."""
    folder = tiny.make(tmp_path / "hf", "llama", width=64, layers=1)
    metadata, shapes, _ = read_gguf(write_gguf(folder, tmp_path / "a.gguf"))
    shapes |= {f"blk.0.attn_{part}.bias": (n,) for part, n in (("q", 128), ("k", 64), ("v", 64), ("output", 64))}
    assert hf_config(metadata, shapes)["attention_bias"] is True
    origins = hf_tensors(metadata, shapes)
    for part, theirs, change, heads in (("k", "k", "halves", 2), ("v", "v", "none", 0), ("o", "output", "none", 0)):
        name, pieces = f"model.layers.0.self_attn.{part}_proj.bias", (Piece(f"blk.0.attn_{theirs}.bias", 0, 1),)
        assert origins[name] == Target(name, (64,), "F32", pieces, change, heads=heads)
    del shapes["blk.0.attn_output.bias"]
    with pytest.raises(SourceError, match=r"blk\.0\.attn_output\.bias is missing"):
        hf_tensors(metadata, shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_gguf_s_own_map(family: str, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "hf", family, width=64, layers=2)
    metadata, shapes, _ = read_gguf(write_gguf(folder, tmp_path / "a.gguf"))
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, 2)
    for hf_name, origin in hf_tensors(metadata, shapes).items():
        assert names.get_name(hf_name, try_suffixes=(".weight", ".bias")) == origin.pieces[0].source


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("type", ["F16", "Q4_1", "Q8_0"])
def test_the_test_files_run_in_llama_cpp(family: str, type: str, tmp_path: Path) -> None:
    file = write_gguf(tiny.make(tmp_path / "hf", family), tmp_path / "a.gguf", type)
    tokens = LlamaCpp(file).generate([5, 6, 7], 4)
    assert len(tokens) == 4


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({}, None),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.type": "linear"}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 32768,
                "llama.rope.scaling.yarn_beta_fast": 32.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "beta_fast": 32.0,
            },
        ),
    ],
)
def test_rope_scaling_from_keys(keys: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    found = hf_config(KEYS | keys, SHAPES).get("rope_scaling")
    assert found == (scaling and scaling | {"type": scaling["rope_type"]})


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 4096)])
def test_llama3_rope_scaling_from_its_factors(factor: float, original: int) -> None:
    """The tensor as llama.cpp's converter computes it (in float32), with Llama 3.1's and 3.2's parameters."""
    freqs = 1.0 / (np.float32(500000.0) ** (np.arange(0, 64, 2, dtype=np.float32) / 64))
    factors = []
    for wavelength in 2 * math.pi / freqs:
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    stored = np.array(factors, np.float32).tolist()
    keys = KEYS | {"llama.rope.freq_base": 500000.0, "llama.attention.key_length": 64}
    config = hf_config(keys, SHAPES | {"rope_freqs.weight": (32,)}, stored)
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def test_rope_factors_that_scale_nothing_are_nothing() -> None:
    config = hf_config(KEYS, SHAPES | {"rope_freqs.weight": (16,)}, [1.0] * 16)
    assert "rope_scaling" not in config


def test_rope_factors_of_nobody_are_refused() -> None:
    factors = llama3_factors(10000.0, 32, 8.0, 1.5, 3.0, 5000)
    shapes = SHAPES | {"rope_freqs.weight": (16,)}
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight: no known Llama 3 rope scaling"):
        hf_config(KEYS, shapes, factors)
    with pytest.raises(SourceError, match="15 values, expected 16"):
        hf_config(KEYS, shapes, factors[1:])
    for value in (0.0, float("nan")):
        with pytest.raises(SourceError, match="the largest value is"):
            hf_config(KEYS, shapes, [value] * 16)
    with pytest.raises(SourceError, match="values were not given"):
        hf_config(KEYS, shapes)


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("general.architecture", "clip", UnsupportedError, "architecture 'clip' .*llama, .*qwen2, .*gpt-oss"),
        ("general.architecture", None, SourceError, r"general\.architecture is missing"),
        ("llama.block_count", "2", SourceError, r"block_count: found '2' \(str\), expected an integer"),
        ("llama.block_count", True, SourceError, "expected an integer"),
        ("llama.block_count", 0, SourceError, "found 0, expected at least 1"),
        ("llama.context_length", None, SourceError, r"llama\.context_length is missing"),
        ("llama.attention.head_count", [2, 4], SourceError, "layers differ"),
        ("llama.attention.head_count", list(range(1, 9999)), SourceError, "layers differ"),
        ("llama.attention.head_count_kv", 3, SourceError, "no multiple of 3"),
        ("llama.attention.key_length", 33, SourceError, "33 wide, expected an even number"),
        ("llama.attention.value_length", 16, UnsupportedError, r"value_length: found 16"),
        ("llama.rope.dimension_count", 16, UnsupportedError, r"dimension_count: found 16"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), SourceError, "expected a finite number"),
        ("llama.rope.scaling.type", "longrope", UnsupportedError, "'longrope' is not supported"),
        ("tokenizer.ggml.eos_token_id", "x", SourceError, r"eos_token_id: found 'x'"),
    ],
)
def test_bad_keys(key: str, value: Any, error: type[SourceError], message: str) -> None:
    keys = {k: v for k, v in (KEYS | {key: value}).items() if v is not None}
    with pytest.raises(error, match=message) as caught:
        hf_config(keys, SHAPES)
    assert type(caught.value) is error
    assert len(caught.value.message) < 300


def test_experts_where_the_family_has_none_are_refused() -> None:
    keys = {key.replace("llama", "qwen2"): value for key, value in KEYS.items()}
    keys |= {"general.architecture": "qwen2", "qwen2.expert_count": 8}
    with pytest.raises(UnsupportedError, match=r"expert_count > 0 \(mixture of experts\) in a qwen2 model"):
        hf_config(keys, SHAPES)


def test_layers_may_repeat_one_number() -> None:
    assert hf_config(KEYS | {"llama.feed_forward_length": [128, 128]}, SHAPES)["intermediate_size"] == 128


def test_a_tensor_too_many_too_few_or_too_large_is_named(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "hf", "llama", width=64)
    metadata, shapes, _ = read_gguf(write_gguf(folder, tmp_path / "a.gguf"))
    with pytest.raises(UnsupportedError, match=r"'blk\.2\.ffn_up\.weight' \(1 in all\) has no place"):
        hf_tensors(metadata, shapes | {"blk.2.ffn_up.weight": (128, 64)})
    with pytest.raises(SourceError, match=r"ffn_up\.weight: shape \(128, 65\), expected \(128, 64\)"):
        hf_tensors(metadata, shapes | {"blk.1.ffn_up.weight": (128, 65)})
    with pytest.raises(SourceError, match=r"blk\.1\.ffn_up\.weight is missing"):
        hf_tensors(metadata, {k: v for k, v in shapes.items() if k != "blk.1.ffn_up.weight"})
    with pytest.raises(SourceError, match=r"token_embd\.weight: 511 rows, expected one for each of 512 tokens"):
        hf_config(metadata, shapes | {"token_embd.weight": (511, 64)})
    with pytest.raises(SourceError, match=r"token_embd\.weight is missing"):
        hf_config(metadata, {})
    with pytest.raises(SourceError, match=r"is missing"):
        hf_tensors(metadata | {"llama.block_count": 10**12}, shapes)
