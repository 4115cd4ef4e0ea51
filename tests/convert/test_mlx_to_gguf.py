"""Quantized MLX folders, as stock mlx-lm writes them, as GGUF files: exactly the floats that MLX decodes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import convert as stock_convert
from safetensors.numpy import load_file, save_file

from tests import tiny
from tests.cli.runner import mlxquant, refused
from tests.families.gguf_checkpoints import VARIANTS
from tests.gguf_files import read_gguf

AFFINE = {"q_bits": 4, "q_group_size": 64}
MXFP4 = {"q_bits": 4, "q_group_size": 32, "q_mode": "mxfp4"}


def stock(source: Path, out: Path, **how: object) -> Path:
    stock_convert(str(source), str(out), **({"quantize": True} | how if how else {}))
    return out


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """MLX's tensors, every packed one as the float32 numbers it stands for (mx.dequantize)."""
    block = json.loads((folder / "config.json").read_text()).get("quantization", {})
    arrays = mx.load(str(folder / "model.safetensors"))
    found = {}
    for name, array in arrays.items():
        base = name.rpartition(".")[0]
        if name.endswith(".weight") and f"{base}.scales" in arrays:
            own = block.get(base) or block
            scales, biases = arrays[f"{base}.scales"], arrays.get(f"{base}.biases")
            scales = scales if scales.dtype == mx.uint8 else scales.astype(mx.float32)
            biases = None if biases is None else biases.astype(mx.float32)
            size, mode = (own["group_size"], own["bits"]), own.get("mode", "affine")
            array = mx.dequantize(array, scales, biases, *size, mode=mode, dtype=mx.float32)
        elif name.endswith((".scales", ".biases")) and f"{base}.weight" in arrays:
            continue
        found[name] = np.array(array.astype(mx.float32))
    return found


def as_hugging_face(mlx: Path, hf: Path, out: Path) -> Path:
    """A checkpoint under Hugging Face's names whose float32 weights are what the MLX folder stands for."""
    values, names = decoded(mlx), load_file(hf / "model.safetensors").keys()
    stored = {}
    for name in names:
        if found := re.fullmatch(r"(.*\.)experts\.(\d+)(\..*)", name):
            stored[name] = np.ascontiguousarray(values[f"{found[1]}switch_mlp{found[3]}"][int(found[2])])
        elif name in values:
            stored[name] = values[name]
    out.mkdir()
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    for file in hf.iterdir():
        if file.suffix == ".json" and file.name != "model.safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    return out


def convert(source: Path, out: Path, type_name: str, *flags: str) -> dict[str, np.ndarray]:
    result = mlxquant("convert", source, "-o", out, "--type", type_name, *flags)
    assert result.code == 0, result
    return read_gguf(out)[2]


@pytest.mark.parametrize("how", [AFFINE, MXFP4], ids=["4g64", "mxfp4"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "gemma3_text"])
def test_float_files_hold_what_mlx_decodes(tmp_path: Path, family: str, how: dict[str, object]) -> None:
    """Where llama.cpp wants other rows (llama) or norms (gemma), as from a checkpoint of these numbers."""
    hf = tiny.make(tmp_path / "hf", family, build=VARIANTS[family])
    mlx = stock(hf, tmp_path / "mlx", **how)
    expected = convert(as_hugging_face(mlx, hf, tmp_path / "wide"), tmp_path / "wide.gguf", "F32")
    for type_name in ("F32", "F16"):
        found = convert(mlx, tmp_path / f"{type_name}.gguf", type_name)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            matrix = values.ndim > 1 and "ffn_gate_inp" not in name
            wanted = values.astype(np.float16).astype(np.float32) if type_name == "F16" and matrix else values
            assert np.array_equal(found[name], wanted), (name, type_name)


def test_quantizing_a_second_time_is_asked_for(tmp_path: Path) -> None:
    mlx = stock(tiny.make(tmp_path / "hf", width=256), tmp_path / "mlx", **AFFINE)
    command = ["convert", mlx, "-o", tmp_path / "m.gguf", "--type", "q4_k_m"]
    refused(mlxquant(*command), "4g64 in the source", "--allow-requantize")
    result = mlxquant(*command, "--allow-requantize")
    assert "rounded a second time" in result.out
    wide = as_hugging_face(mlx, tmp_path / "hf", tmp_path / "wide")
    expected = convert(wide, tmp_path / "wide.gguf", "q4_k_m")
    found = read_gguf(tmp_path / "m.gguf")[2]
    assert all(np.array_equal(found[name], values) for name, values in expected.items())


@pytest.mark.parametrize("how", [{}, AFFINE], ids=["floats", "4g64"])
def test_norms_are_shifted_once(tmp_path: Path, how: dict[str, object]) -> None:
    """qwen3_next: MLX's folder has 1 + w already. gemma: MLX adds 1 as it runs, and its folder has w."""
    for family, shift in (("qwen3_next", 0.0), ("gemma", 1.0), ("gemma2", 1.0), ("gemma3_text", 1.0)):
        hf = tiny.make(tmp_path / family, family)
        mlx = stock(hf, tmp_path / f"{family}-mlx", **how)
        values, found = decoded(mlx), convert(mlx, tmp_path / f"{family}.gguf", "F32")
        from_hf = convert(hf, tmp_path / f"{family}-hf.gguf", "F32")
        norms = {"blk.1.attn_norm.weight": "model.layers.1.input_layernorm.weight",
                 "output_norm.weight": "model.norm.weight"}  # fmt: skip
        if family == "qwen3_next":
            norms["blk.0.ssm_norm.weight"] = "model.layers.0.linear_attn.norm.weight"
        for name, mlx_name in norms.items():
            assert np.array_equal(found[name], values[mlx_name] + np.float32(shift)), (family, name)
            assert 0.8 < found[name].mean() < 1.2, (family, name)
            # MLX adds in bfloat16, llama.cpp's converter in float32.
            assert np.allclose(found[name], from_hf[name], rtol=2**-8, atol=0), (family, name)
