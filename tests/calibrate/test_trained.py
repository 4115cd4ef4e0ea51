"""What the trained models are good for: they have learned, their channels differ, and no outlier changed an output."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxquant.calibrate.text import calibration
from mlxquant.run.model import load_model
from mlxquant.run.text import Text
from tests.calibrate.trained import stand_out


@pytest.mark.parametrize("name", ["trained_dense", "trained_experts"])
def test_it_has_learned(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    tokens = mx.array(calibration("builtin", Text.load(folder), 8, 64, seed=1).tokens_BL)
    logits = load_model(folder).model(tokens[:, :-1])
    chosen = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    assert (mx.logsumexp(logits, axis=-1) - chosen).mean().item() < 4.8  # ln 512 is 6.24


@pytest.mark.parametrize("name", ["trained_dense", "trained_experts"])
def test_outliers_change_no_output(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    other = tmp_path / "more"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    before = tensors["model.layers.0.input_layernorm.weight"].copy()
    stand_out(tensors)
    assert (tensors["model.layers.0.input_layernorm.weight"] == 4 * before).sum() == 4
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    tokens = mx.array(np.arange(100)[None] % 512)
    np.testing.assert_allclose(
        np.array(load_model(other).model(tokens)), np.array(load_model(folder).model(tokens)), atol=1e-3
    )
