"""Quantized MLX folders as sources: what stock mlx-lm wrote comes back as the floats that MLX itself decodes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import convert as stock_convert

from mlxquant.convert.mlx_source import MLXSource
from mlxquant.convert.sources import open_source
from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.mlx_layout import layout
from tests import tiny


def stock(tmp_path: Path, family: str, **how: object) -> Path:
    source = tiny.make(tmp_path / "source", family)
    stock_convert(str(source), str(tmp_path / "mlx"), quantize=True, **how)
    return tmp_path / "mlx"


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("llama", {"q_bits": 4, "q_group_size": 64}),
        ("qwen3_moe", {"q_bits": 5, "q_group_size": 32}),
        ("qwen3", {"q_bits": 4, "q_group_size": 32, "q_mode": "mxfp4"}),
        ("gemma3", {"quant_predicate": "mixed_3_6"}),
    ],
)
def test_rows_are_what_mlx_decodes(tmp_path: Path, family: str, how: dict[str, object]) -> None:
    path = stock(tmp_path, family, **how)
    source = open_source(path)
    assert isinstance(source, MLXSource)
    arrays = mx.load(str(path / "model.safetensors"))
    block = json.loads((path / "config.json").read_text())["quantization"]
    assert source.quantized
    assert "quantization" not in source.config
    for name in source.quantized:
        base = name.removesuffix(".weight")
        own = block.get(base) if isinstance(block.get(base), dict) else block
        scales = arrays[base + ".scales"]
        scales = scales if scales.dtype == mx.uint8 else scales.astype(mx.float32)
        biases = arrays[base + ".biases"].astype(mx.float32) if base + ".biases" in arrays else None
        expected = np.array(
            mx.dequantize(
                arrays[name],
                scales,
                biases,
                own["group_size"] or 64,
                own["bits"],
                mode=own.get("mode", "affine"),
                dtype=mx.float32,
            )
        )
        spec = source.specs[name]
        assert (spec.shape, spec.dtype) == (expected.shape, "F32")
        rows = source.read_rows(name, 1, spec.rows)
        assert np.array_equal(rows, expected.reshape(spec.rows, -1)[1:]), name


def test_layout_has_a_place_for_every_weight(tmp_path: Path) -> None:
    source = open_source(stock(tmp_path, "qwen3_moe"))
    laid_out = layout(source.config, source.specs)
    assert {t.name for t in laid_out.targets} == set(source.specs)


def test_scales_of_another_model_are_refused(tmp_path: Path) -> None:
    path = stock(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text())
    config["quantization"]["bits"] = 8
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="which is not 8g64"):
        open_source(path)


def test_a_format_that_fits_the_words_only_is_refused_by_the_model(tmp_path: Path) -> None:
    """Words and scales of 4g64 are those of 8g32 with half the width."""
    path = stock(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text())
    config["quantization"] |= {"group_size": 32, "bits": 8}
    (path / "config.json").write_text(json.dumps(config))
    source = open_source(path)
    with pytest.raises(SourceError, match=r"from config\.json"):
        layout(source.config, source.specs)


def test_a_format_mlx_does_not_have_is_refused(tmp_path: Path) -> None:
    path = stock(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text())
    config["quantization"] |= {"group_size": 128, "bits": 2}
    config["quantization"]["lm_head"] = {"group_size": 16, "bits": 1}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises((SourceError, UnsupportedError), match=r"is not|no format"):
        open_source(path)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("scales", lambda a: a.astype(mx.float16), "biases is BF16 [256, 2], expected F16 [256, 2]"),
        ("scales", lambda a: a.astype(mx.int16), "scales is I16 [256, 2], expected BF16 [256, 2]"),
        ("biases", lambda a: a.T, "biases is BF16 [2, 256], expected BF16 [256, 2]"),
        ("biases", lambda a: None, "biases is missing, expected BF16 [256, 2]"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, part: str, change: Callable, said: str) -> None:
    path = stock(tmp_path, "llama")
    arrays, name = mx.load(str(path / "model.safetensors")), f"model.layers.0.mlp.up_proj.{part}"
    changed = change(arrays.pop(name))
    mx.save_safetensors(str(path / "model.safetensors"), arrays | ({} if changed is None else {name: changed}))
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(SourceError, match=re.escape(f"model.layers.0.mlp.up_proj.{said}")):
        open_source(path)
