"""The layout against stock mlx-lm: the same names, shapes and bits for every family, and nothing lost in
silence."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.mlx_layout import layout
from mlxquant.families.mlx_modules import FAMILIES
from mlxquant.tensors import TensorSpec
from tests import tiny
from tests.families import checkpoints
from tests.tiny_nested import NESTED


@pytest.mark.parametrize(("family", "tied"), checkpoints.TIES)
def test_targets_are_stock_mlx_lms_parameters(family, tied):
    path = checkpoints.folder(family, tied)
    made = layout(checkpoints.config(path), checkpoints.specs(path))
    ours, stock = checkpoints.built(path, made), checkpoints.stock_parameters(path)
    assert sorted(ours) == sorted(stock)
    assert len(ours) == len(made.targets)
    for name, value in stock.items():
        assert ours[name].shape == value.shape, name
        assert np.array_equal(ours[name].view(value.dtype), value), name


def test_every_family_of_the_tables_has_a_checkpoint():
    assert set(FAMILIES) == set(tiny.FAMILIES) - {"mistral"}  # mlx-lm runs mistral as llama


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_source_tensor_is_used_or_dropped_with_a_reason(family):
    path = checkpoints.folder(family, family in tiny.ALWAYS_TIED)
    specs = checkpoints.specs(path)
    made = layout(checkpoints.config(path), specs)
    used = {piece.source for target in made.targets for piece in target.pieces}
    assert used | {name for name, _ in made.dropped} == set(specs)
    assert all(reason for _, reason in made.dropped)


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f not in ("gpt_oss", "gemma3")])
def test_each_missing_tensor_is_named(family):
    path = checkpoints.folder(family, family in tiny.ALWAYS_TIED)
    config, specs = checkpoints.config(path), checkpoints.specs(path)
    dropped = {name for name, _ in layout(config, specs).dropped}
    for name in set(specs) - dropped:
        without = {n: s for n, s in specs.items() if n != name}
        if family == "gemma3_text" and name == "lm_head.weight":
            continue  # tied, then
        with pytest.raises(SourceError, match=re.escape(name.removeprefix("model.language_model."))):
            layout(config, without)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_each_wrong_shape_is_named(family):
    path = checkpoints.folder(family, family in tiny.ALWAYS_TIED)
    config, specs = checkpoints.config(path), checkpoints.specs(path)
    dropped = {name for name, _ in layout(config, specs).dropped}
    for name, spec in specs.items():
        if name in dropped:
            continue
        wrong = TensorSpec(name, (spec.shape[0] + 1, *spec.shape[1:]), spec.dtype)
        with pytest.raises(SourceError, match=re.escape(name)) as caught:
            layout(config, specs | {name: wrong})
        assert str(list(wrong.shape)) in str(caught.value)
        assert str(list(spec.shape)) in str(caught.value)


def llama(**config):
    path = checkpoints.folder("llama")
    return checkpoints.config(path) | config, checkpoints.specs(path)


def test_an_unknown_tensor_is_an_error_that_lists_it():
    config, specs = llama()
    names = [f"model.layers.{i}.self_attn.qq.weight" for i in range(20)]
    extra = {name: TensorSpec(name, (2,), "F32") for name in names}
    with pytest.raises(UnsupportedError, match=r"20 tensors .*layers\.0\.self_attn\.qq.* and 12 more"):
        layout(config, specs | extra)


def test_a_layer_more_than_config_says_is_an_error():
    config, specs = llama(num_hidden_layers=3)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.3\.input_layernorm"):
        layout(config, specs)


def test_many_layers_that_are_not_there_end_soon_in_one_line():
    config, specs = llama(num_hidden_layers=1024)
    with pytest.raises(SourceError, match="tensors are missing") as caught:
        layout(config, specs)
    assert len(str(caught.value)) < 1000


def test_many_experts_that_are_not_there_end_soon_in_one_line():
    path = checkpoints.folder("qwen3_moe")
    with pytest.raises(SourceError) as caught:
        layout(checkpoints.config(path) | {"num_experts": 65536}, checkpoints.specs(path))
    assert len(str(caught.value)) < 1000


def test_inverse_frequencies_are_dropped_with_a_reason():
    config, specs = llama()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    made = layout(config, specs | {name: TensorSpec(name, (16,), "F32")})
    assert [n for n, _ in made.dropped] == [name]


def test_a_tied_models_spare_head_is_dropped_with_a_reason():
    config, specs = llama(tie_word_embeddings=True)
    made = layout(config, specs)
    assert [n for n, _ in made.dropped] == ["lm_head.weight"]
    assert "lm_head.weight" not in {t.name for t in made.targets}


def test_a_head_that_stock_mlx_lm_would_lose_because_config_is_silent_is_refused():
    config, specs = llama()
    del config["tie_word_embeddings"]
    with pytest.raises(SourceError, match=r"lm_head\.weight") as caught:
        layout(config, specs)
    assert "tie_word_embeddings" in caught.value.hint


def test_a_head_of_its_own_that_the_family_cannot_have_is_refused():
    path = checkpoints.folder("gemma", True)
    with pytest.raises(UnsupportedError, match="no output head"):
        layout(checkpoints.config(path) | {"tie_word_embeddings": False}, checkpoints.specs(path))


def test_a_tied_checkpoint_of_a_family_that_always_has_a_head_copies_the_embedding(tmp_path):
    path = tiny.make(tmp_path / "m", "stablelm", tie_word_embeddings=True)
    tensors = checkpoints.arrays(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")
    made = layout(checkpoints.config(path), checkpoints.specs(path))
    ours = checkpoints.built(path, made)
    assert np.array_equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"])


def test_quantized_weights_are_not_taken_for_float():
    config, specs = llama()
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UnsupportedError, match=f"{name} is F8_E4M3"):
        layout(config, specs | {name: replace(specs[name], dtype="F8_E4M3")})


def test_experts_of_two_dtypes_are_not_stacked():
    path = checkpoints.folder("qwen3_moe")
    specs = checkpoints.specs(path)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    with pytest.raises(SourceError, match=re.escape(name)):
        layout(checkpoints.config(path), specs | {name: replace(specs[name], dtype="F16")})


def test_gpt_oss_in_the_transposed_layout_is_refused_by_us_and_by_stock(tmp_path):
    path = tiny.make(tmp_path / "m", "gpt_oss", layers=2)
    tensors = checkpoints.arrays(path)
    for i in range(2):
        p = f"model.layers.{i}.mlp.experts."
        gate, up, down = (tensors.pop(f"{p}{n}_proj.weight") for n in ("gate", "up", "down"))
        gate_bias, up_bias, down_bias = (tensors.pop(f"{p}{n}_proj.bias") for n in ("gate", "up", "down"))
        fused = np.stack([gate.swapaxes(1, 2), up.swapaxes(1, 2)], axis=-1).reshape(4, 128, 512)
        tensors |= {f"{p}gate_up_proj": fused, f"{p}down_proj": np.ascontiguousarray(down.swapaxes(1, 2))}
        tensors[f"{p}gate_up_proj_bias"] = np.stack([gate_bias, up_bias], axis=-1).reshape(4, 512)
        tensors[f"{p}down_proj_bias"] = down_bias
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="transposed"):
        layout(checkpoints.config(path), checkpoints.specs(path))
    with pytest.raises(ValueError):
        checkpoints.stock_model(path)


@pytest.mark.parametrize(
    "family", ["qwen3_next", "qwen3_moe", "deepseek_v3", "granitemoe", "mamba2", "nemotron_h", *NESTED]
)
def test_an_mlx_folder_passes_through_unchanged(family, tmp_path):
    """What mlx-lm saved is a source too: nothing is stacked, split or shifted a second time."""
    path = checkpoints.folder(family)
    made = layout(checkpoints.config(path), checkpoints.specs(path))
    ours = checkpoints.built(path, made)
    again = tmp_path / "mlx"
    again.mkdir()
    save_file({n: np.ascontiguousarray(v) for n, v in ours.items()}, again / "model.safetensors")
    (again / "config.json").write_text(json.dumps(checkpoints.config(path)))
    twice = checkpoints.built(again, layout(checkpoints.config(again), checkpoints.specs(again)))
    stock = checkpoints.stock_parameters(again)
    assert sorted(twice) == sorted(ours) == sorted(stock)
    for name in ours:
        assert np.array_equal(twice[name].view(np.uint16), ours[name].view(np.uint16)), name
        assert np.array_equal(twice[name].view(np.uint16), stock[name]), name


def test_gemma3_as_newer_transformers_saves_it_gives_the_same_targets():
    path = checkpoints.folder("gemma3", True)
    config, specs = checkpoints.config(path), checkpoints.specs(path)
    moved = {}
    for name, spec in specs.items():
        new = name.replace("language_model.model.", "model.language_model.", 1)
        new = f"model.{name}" if new == name else new
        moved[new] = replace(spec, name=new)
    here, there = layout(config, specs), layout(config, moved)
    assert [(t.name, t.shape) for t in here.targets] == [(t.name, t.shape) for t in there.targets]
    assert len(here.dropped) == len(there.dropped) == 2


def test_multi_token_prediction_layers_are_dropped_only_where_config_announces_them():
    path = checkpoints.folder("deepseek_v3")
    config, specs = checkpoints.config(path), checkpoints.specs(path)
    extra = {"model.layers.4.eh_proj.weight": TensorSpec("model.layers.4.eh_proj.weight", (128, 256), "BF16")}
    made = layout(config | {"num_nextn_predict_layers": 1}, specs | extra)
    assert [n for n, _ in made.dropped] == list(extra)
    with pytest.raises(UnsupportedError, match="eh_proj"):
        layout(config, specs | extra)


def test_what_must_not_be_cast_is_marked_as_stock_marks_it():
    for family in ("deepseek_v3", "nemotron_h", "qwen3_next", "llama", *NESTED):
        path = checkpoints.folder(family)
        made = layout(checkpoints.config(path), checkpoints.specs(path))
        model, _ = checkpoints.stock_model(path)
        predicate = getattr(model, "cast_predicate", lambda _: True)
        assert {t.name: t.cast for t in made.targets} == {t.name: predicate(t.name) for t in made.targets}
