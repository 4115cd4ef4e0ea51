"""A quantized GGUF file as an MLX folder: stock mlx-lm loads it, and its weights are the file's."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load

from mlxquant.codecs.floats import NonFiniteError
from mlxquant.codecs.ggml import block
from mlxquant.codecs.repack import repack
from mlxquant.codecs.repacked import REPACKED
from mlxquant.convert.checks import check_folder
from mlxquant.convert.gguf_source import GGUFSource
from mlxquant.convert.to_mlx import to_mlx
from mlxquant.errors import SourceError
from mlxquant.plan.plan import Plan, make_plan
from mlxquant.plan.recipe import settings
from tests import tiny
from tests.gguf_files import write_gguf


def repacked(tmp_path: Path, family: str, type_name: str) -> tuple[GGUFSource, Plan, Path]:
    file = write_gguf(tiny.make(tmp_path / family, family), tmp_path / "model.gguf", type_name)
    source = GGUFSource(file)
    plan = make_plan(source.config, source.specs, settings(recipe="repack"), source.quantized)
    return source, plan, to_mlx(source, plan, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_1", "Q8_0"])
def test_stock_mlx_lm_holds_the_files_weights(tmp_path: Path, family: str, type_name: str) -> None:
    source, plan, out = repacked(tmp_path, family, type_name)
    model, _ = load(str(out))
    stored = dict(tree_flatten(model.parameters()))
    codec = REPACKED[type_name].codec
    quantized = [t for t in plan.tensors if t.repack]
    assert len(quantized) == sum(1 for spec in source.specs.values() if len(spec.shape) == 2)
    for tensor in quantized:
        base = tensor.name.removesuffix(".weight")
        scales, biases = (stored[f"{base}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        ours = mx.dequantize(stored[tensor.name], scales, biases, codec.group_size, codec.bits)
        assert np.array_equal(np.array(ours), source.read_rows(tensor.name, 0, tensor.target.shape[0])), tensor.name


def test_verify_proves_it(tmp_path: Path) -> None:
    source, _, out = repacked(tmp_path, "llama", "Q4_1")
    checks = list(check_folder(out, source))
    assert [c for c in checks if not c.ok] == []
    other = GGUFSource(write_gguf(tiny.make(tmp_path / "b", seed=1), tmp_path / "b.gguf", "Q4_1"))
    assert "not the source's Q4_1 blocks" in next(c.detail for c in check_folder(out, other) if not c.ok)


def test_a_damaged_scale_is_refused_with_tensor_and_row(tmp_path: Path) -> None:
    source, plan, _ = repacked(tmp_path, "llama", "Q4_0")
    tensor = source.file.tensors["blk.1.ffn_up.weight"]
    with source.path.open("r+b") as file:
        file.seek(tensor.offset + 5 * tensor.row_bytes)
        file.write(b"\xff\xff")
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj\.weight: row 5: a scale that is NaN"):
        to_mlx(GGUFSource(source.path), plan, tmp_path / "again")


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("type_name", ["Q4_K", "Q6_K", "Q3_K", "IQ4_XS"])
def test_an_infinite_scale_is_an_error_without_warnings(type_name: str) -> None:
    raw = np.zeros((1, block(type_name)[1]), np.uint8)
    raw[0, 1::2] = 0x7C  # halves at even places are infinite, codes and sub-scales are 0
    with pytest.raises(NonFiniteError, match="a scale that is NaN"):
        repack(raw, type_name, 256)
