"""The checkpoint that config.json stands for, beside real ones, whose names tests/tiny_families.py has by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.checkpoint import checkpoint, has_merges, header_bytes, parameters
from mlxquant.families.mlx_layout import layout
from mlxquant.files.shards import assign
from mlxquant.plan.gguf_plan import plan_checkpoint
from mlxquant.plan.gguf_types import type_settings
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings
from mlxquant.tensors import TensorSpec
from tests.families.checkpoints import TIES, config, folder, specs
from tests.families.gguf_checkpoints import LAYERS, WIDTH, gpt_oss_mxfp4


@pytest.mark.parametrize(("family", "tied"), TIES)
def test_equals_the_real_checkpoint(family, tied):
    """But for what a conversion leaves out: vision towers, multi-token prediction."""
    path = folder(family, tied)
    real, about = specs(path), config(path)
    left_out = {name for name, _ in layout(about, real).dropped}
    assert checkpoint(about) == {name: spec for name, spec in real.items() if name not in left_out}


@pytest.mark.parametrize(("family", "tied"), TIES)
def test_plans_equal_those_of_the_real_checkpoint(family, tied):
    path = folder(family, tied)
    real, about = specs(path), config(path)
    ours, theirs = (make_plan(about, found, settings(bits=4, recipe="uniform")) for found in (checkpoint(about), real))
    assert ours.tensors == theirs.tensors
    try:
        theirs = plan_checkpoint(about, real, type_settings("Q4_K_M"))
    except UnsupportedError:  # a family without a place in GGUF
        return
    assert plan_checkpoint(about, checkpoint(about), type_settings("Q4_K_M")).tensors == theirs.tensors


def test_gpt_oss_as_it_was_published():
    about, arrays = gpt_oss_mxfp4(np.random.default_rng(0), WIDTH, LAYERS, False)
    about |= {"vocab_size": 512, "torch_dtype": "bfloat16"}
    codes = {np.dtype(np.uint8): "U8"}
    assert checkpoint(about) == {n: TensorSpec(n, a.shape, codes.get(a.dtype, "BF16")) for n, a in arrays.items()}


def test_dtype_is_config_s_unless_asked_for():
    about = config(folder("llama")) | {"torch_dtype": "float16"}
    assert {spec.dtype for spec in checkpoint(about).values()} == {"F16"}
    assert {spec.dtype for spec in checkpoint(about, "F32").values()} == {"F32"}
    assert {spec.dtype for spec in checkpoint(about | {"torch_dtype": "int4"}).values()} == {"BF16"}


def test_missing_key_is_named():
    about = config(folder("llama"))
    del about["hidden_size"]
    with pytest.raises(SourceError, match="hidden_size"):
        checkpoint(about)


@pytest.mark.parametrize(("family", "tied"), TIES)
def test_parameters_are_counted_without_names(family, tied):
    about = config(folder(family, tied))
    assert parameters(about) == sum(spec.size for spec in checkpoint(about).values())


def test_header_of_a_gguf_file_is_near():
    """Byte counts of a real llama.cpp file of SmolLM2-135M (1,785,664) and of Qwen2.5-1.5B (5,950,528)."""
    smol = [f"blk.{i}.ffn_down.weight" for i in range(272)]
    qwen = [f"blk.{i}.ffn_down.weight" for i in range(339)]
    assert header_bytes("gguf", 49_152, smol) == pytest.approx(1_785_664, rel=0.09)
    assert header_bytes("gguf", 151_936, qwen) == pytest.approx(5_950_528, rel=0.01)


@pytest.mark.parametrize("bits", [4, 8])
def test_header_of_an_mlx_folder_is_near(bits):
    """As files/shards.py writes it."""
    about = config(folder("llama"))
    plan = make_plan(about, checkpoint(about), settings(bits=bits, recipe="uniform"))
    (shard,) = assign([tensor.parts for tensor in plan.tensors])
    assert header_bytes("mlx", 512, shard.specs) == pytest.approx(len(shard.header), rel=0.08)


def test_tokenizers_are_guessed():
    for family, vocab, merges in (
        ("llama", 32_000, False), ("llama", 128_256, True), ("mistral", 32_768, False), ("mistral", 131_072, True),
        ("qwen3", 151_936, True), ("gemma3_text", 262_208, False), ("gemma4_text", 262_144, True),
    ):  # fmt: skip
        assert has_merges({"model_type": family, "vocab_size": vocab}) is merges
