"""Families whose checkpoints hold more than text: other names for the same tensors, and published sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.checkpoint import checkpoint
from mlxquant.families.gguf_table import module_of_config
from mlxquant.families.mlx_layout import layout
from mlxquant.tensors import TensorSpec
from tests import tiny
from tests.families import checkpoints
from tests.tiny_nested import NESTED


def described(family):
    path = checkpoints.folder(family, family in tiny.ALWAYS_TIED)
    return checkpoints.config(path), checkpoints.specs(path)


def renamed(specs, name):
    """Every tensor under another name; those that `name` gives none are left out."""
    found = {name(old): spec for old, spec in specs.items() if name(old)}
    return {new: replace(spec, name=new) for new, spec in found.items()}


def shapes(config, specs):
    return {t.name: (t.shape, t.change) for t in layout(config, specs).targets}


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "qwen3_vl"])
def test_a_checkpoint_for_text_alone_gives_the_same_targets(family):
    config, specs = described(family)
    flat = {**config["text_config"], "model_type": family}
    alone = renamed(specs, lambda n: None if "visual" in n else n.replace("model.language_model.", "model."))
    assert shapes(flat, alone) == shapes(config, specs)


@pytest.mark.parametrize("family", ["gemma4", "qwen3_5", "mistral3"])
def test_names_with_language_model_inside_and_outside_give_the_same_targets(family):
    config, specs = described(family)
    inside, outside = "model.language_model.", "language_model.model."
    old, new = (inside, outside) if any(n.startswith(inside) for n in specs) else (outside, inside)
    moved = renamed(specs, lambda n: n.replace(old, new, 1) if n.startswith(old) else n)
    assert set(moved) != set(specs)
    assert shapes(config, moved) == shapes(config, specs)


def test_a_tensor_under_two_names_is_an_error():
    config, specs = described("qwen3_5")
    twice = TensorSpec("language_model.lm_head.weight", specs["lm_head.weight"].shape, "BF16")
    with pytest.raises(SourceError, match=r"twice.*lm_head\.weight"):
        layout(config, specs | {twice.name: twice})


def test_keys_and_values_that_a_layer_does_not_use_are_dropped_and_others_are_not():
    config, specs = described("gemma4")
    dropped = [n for n, why in layout(config, specs).dropped if "shares" in why]
    assert len(dropped) == 6
    assert all(".layers.2." in n or ".layers.3." in n for n in dropped)
    name = "model.language_model.layers.0.self_attn.v_proj.weight"
    with pytest.raises(SourceError, match=r"layers\.0\.self_attn\.v_proj"):
        layout(config, {n: s for n, s in specs.items() if n != name})


@pytest.mark.parametrize("family", [*NESTED, "glm4_moe", "glm4_moe_lite", "lfm2", "lfm2_moe", "olmo3", "ministral3"])
def test_no_gguf_file_is_written_of_them_yet(family):
    with pytest.raises(UnsupportedError, match="not a family that mlxquant writes as GGUF"):
        module_of_config(described(family)[0])


# config.json of the published models, without what no size depends on, and weights in thousand millions: what the model
# cards of google/gemma-4-* say, and Qwen's names.
QWEN = {
    "head_dim": 256, "vocab_size": 248320, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
}  # fmt: skip
GEMMA = {
    "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False,
    "attention_k_eq_v": True, "sliding_window_pattern": 6,
}  # fmt: skip
PUBLISHED = {
    "Qwen3.6-27B": ("qwen3_5", 27, QWEN | {
        "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64, "num_attention_heads": 24,
        "num_key_value_heads": 4, "linear_num_value_heads": 48,
    }),
    "Qwen3.6-35B-A3B": ("qwen3_5_moe", 35, QWEN | {
        "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2,
        "linear_num_value_heads": 32, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    }),
    "gemma-4-26B-A4B": ("gemma4", 25.2, GEMMA | {
        "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_global_key_value_heads": 2, "enable_moe_block": True, "num_experts": 128,
        "top_k_experts": 8, "moe_intermediate_size": 704,
    }),
    "gemma-4-31B": ("gemma4", 30.7, GEMMA | {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60, "num_attention_heads": 32,
        "num_key_value_heads": 16, "num_global_key_value_heads": 4,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_of_published_models(name):
    model_type, expected, text = PUBLISHED[name]
    found = sum(spec.size for spec in checkpoint({"model_type": model_type, "text_config": text}).values())
    assert round(found / 1e9, 1 if isinstance(expected, float) else None) == expected


def test_gemma_4_e2b_is_effective_2_3_without_the_rows_that_are_looked_up():
    """mlx-lm's defaults for a silent config are those of google/gemma-4-E2B."""
    specs = checkpoint({"model_type": "gemma4", "text_config": {}})
    table = specs.pop("model.language_model.embed_tokens_per_layer.weight")
    assert table.shape == (262144, 35 * 256)
    assert round(sum(spec.size for spec in specs.values()) / 1e9, 1) == 2.3
