"""What is quantized, and how, against stock mlx-lm's own quantize_model."""

from __future__ import annotations

import pytest

from mlxquant.codecs.spec import KEEP, affine
from mlxquant.families.mlx_layout import layout
from mlxquant.families.mlx_quant import mlx_lm_codec, preset, quantizable
from tests.families import checkpoints


def stock_quantized(path, group_size: int, bits: int) -> dict[str, tuple[int, int]]:
    """Name of each quantized weight -> (bits, group_size), after the real quantize_model."""
    from mlx_lm.utils import quantize_model

    model, config = checkpoints.stock_model(path)
    model, _ = quantize_model(model, config, group_size, bits)
    return {
        f"{name}.weight": (module.bits, module.group_size)
        for name, module in model.named_modules()
        if hasattr(module, "bits")
    }


@pytest.mark.parametrize(("family", "tied"), checkpoints.TIES)
def test_quantized_weights_and_formats_are_stock_mlx_lms(family, tied):
    path = checkpoints.folder(family, tied)
    config = checkpoints.config(path)
    ours = {}
    base = affine(4, 32)
    for target in layout(config, checkpoints.specs(path)).targets:
        stock = mlx_lm_codec(config["model_type"], target)
        codec = base if stock is None else stock
        if codec != KEEP and base.divides(target.shape[-1]):
            ours[target.name] = (codec.bits, codec.group_size)
    assert ours == stock_quantized(path, 32, 4)


def test_a_remapped_type_follows_its_module():
    assert not quantizable("kimi_k2", "model.layers.1.mlp.gate.weight", (4, 128))
    assert quantizable("qwen2_moe", "model.layers.1.mlp.gate.weight", (4, 128))


def test_presets_match_the_end_of_a_path_as_stock_does():
    assert preset("qwen3_moe", "model.layers.0.mlp.gate.weight") == affine(8, 64)
    assert preset("qwen3_moe", "model.layers.0.mlp.switch_mlp.gate_proj.weight") is None
    assert preset("granitemoe", "model.layers.0.block_sparse_moe.switch_mlp.down_proj.weight") == affine(8, 64)
    assert preset("granite", "lm_head.weight") == affine(8, 64)
    assert preset("llama", "lm_head.weight") is None
