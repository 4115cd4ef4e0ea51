"""Configs as transformers 5 writes them, made readable for stock mlx-lm."""

from __future__ import annotations

import json

from mlxquant.families.mlx_config import mlx_config, text_config
from tests import tiny
from tests.families import checkpoints


def llama(**config):
    return checkpoints.config(checkpoints.folder("llama")) | config


def test_rope_settings_of_transformers_5_are_lifted_to_where_stock_mlx_lm_reads_them():
    config = llama(rope_parameters={"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0})
    del config["rope_theta"]
    flat = text_config(config)
    assert flat["rope_theta"] == 500000.0
    assert flat["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert "rope_scaling" not in text_config(llama(rope_parameters={"rope_theta": 1.0, "rope_type": "default"}))
    assert text_config(llama(rope_parameters={"rope_theta": 1.0}))["rope_theta"] == 10000.0


def test_rope_settings_by_kind_of_layer():
    both = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}  # fmt: skip
    config = llama(rope_parameters=both)
    del config["rope_theta"]
    flat = text_config(config)
    assert (flat["rope_theta"], flat["rope_local_base_freq"]) == (1e6, 1e4)
    assert flat["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_what_transformers_5_saves_runs_with_its_own_rope_in_stock_mlx_lm(tmp_path):
    from mlx_lm.utils import load_model
    from transformers import LlamaConfig

    path = tiny.make(tmp_path / "m", "llama")
    ours = json.loads((path / "config.json").read_text())
    theirs = LlamaConfig(**{k: v for k, v in ours.items() if k != "rope_theta"}, rope_theta=500000.0).to_dict()
    assert "rope_theta" not in theirs  # else this test shows nothing
    (path / "config.json").write_text(json.dumps(mlx_config(theirs)))
    model, _ = load_model(path)
    assert model.args.rope_theta == 500000.0
    assert model.args.rope_scaling is None


def test_gemma3_finds_its_vocabulary_at_the_root():
    config = {"model_type": "gemma3", "text_config": {"vocab_size": 512, "model_type": "gemma3_text"}}
    assert mlx_config(config)["vocab_size"] == 512
    assert text_config(config)["model_type"] == "gemma3"
    assert text_config(config | {"vocab_size": 600})["vocab_size"] == 600


def test_a_tie_that_stands_at_the_root_alone_is_written_where_mlx_lm_asks():
    config = {"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": {"hidden_size": 64}}
    assert mlx_config(config)["text_config"]["tie_word_embeddings"] is True
    own = {**config, "text_config": {"tie_word_embeddings": False}}
    assert text_config(own)["tie_word_embeddings"] is False


def test_a_key_that_mlx_lm_needs_and_transformers_5_leaves_out_is_written():
    assert mlx_config({"model_type": "glm4_moe"})["rope_scaling"] is None


def test_nothing_is_added_where_nothing_is_nested():
    config = llama()
    assert mlx_config(config) == config
    assert mlx_config(llama(rope_parameters=7)) == llama(rope_parameters=7)
