"""Shapes against stock mlx-lm's own arguments, and configs that lie."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.known import FACTS, KNOWN_TYPES, REMAPPING
from mlxquant.families.shape import ModelShape
from tests import tiny
from tests.families import checkpoints

# Keys of FACTS.defaults that mlx-lm keeps elsewhere than in ModelArgs of the same module, and why.
ELSEWHERE = {
    "gemma3": "ModelArgs wraps text_config; checked below",
    "mistral3": "ModelArgs wraps text_config, read as ministral3 or as llama",
}
# Keys that must be there and may be null, as they mostly are: mlx_config writes them.
NULLABLE = {"glm4_moe": {"rope_scaling"}}
# Where ModelArgs only wraps text_config: (module, class) of the arguments that this is read by.
INNER = {
    "qwen3_5": ("qwen3_5", "TextModelArgs"), "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "gemma3n": ("gemma3n", "TextConfig"), "gemma4": ("gemma4_text", "ModelArgs"), "qwen3_vl": ("qwen3", "ModelArgs"),
}  # fmt: skip


def arguments(module: str):
    name, arguments = INNER.get(module, (module, "ModelArgs"))
    return getattr(importlib.import_module(f"mlx_lm.models.{name}"), arguments)


@pytest.mark.parametrize("module", [m for m in FACTS if m not in ELSEWHERE])
def test_defaults_and_required_keys_are_the_installed_mlx_lms(module):
    fields = {f.name: f for f in dataclasses.fields(arguments(module))}
    for key, value in FACTS[module].defaults.items():
        assert fields[key].default == value, key
    bare = (dataclasses.MISSING, dataclasses.MISSING)
    required = {n for n, f in fields.items() if (f.default, f.default_factory) == bare} - {"model_type"}
    base = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"}
    assert required - base - NULLABLE.get(module, set()) <= set(FACTS[module].required)


@pytest.mark.parametrize("module", [m for m, f in FACTS.items() if f.tie == "config" and m not in ELSEWHERE])
def test_a_missing_tie_means_what_it_means_to_mlx_lm(module):
    field = {f.name: f for f in dataclasses.fields(arguments(module))}["tie_word_embeddings"]
    if field.default is dataclasses.MISSING:
        assert "tie_word_embeddings" in FACTS[module].required
    else:
        assert FACTS[module].defaults["tie_word_embeddings"] is field.default


def test_gemma3_defaults_are_gemma3_texts_and_its_own_three():
    args = arguments("gemma3")(model_type="gemma3", text_config={})
    inner = arguments("gemma3_text").from_dict({"model_type": "gemma3_text", **args.text_config})
    for key, value in FACTS["gemma3"].defaults.items():
        assert getattr(inner, key) == value, key


def test_remapping_is_mlx_lms():
    from mlx_lm.utils import MODEL_REMAPPING

    assert all(MODEL_REMAPPING[model_type] == module for model_type, module in REMAPPING.items())


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_tiny_model_has_the_layers_and_caches_of_stock(family):
    path = checkpoints.folder(family, family in tiny.ALWAYS_TIED)
    shape = ModelShape.from_config(checkpoints.config(path))
    assert (shape.layers, shape.hidden_size, shape.vocab_size) == (4, 128, tiny.VOCAB)
    assert len(shape.mixers) == len(shape.ffns) == shape.layers
    model, _ = checkpoints.stock_model(path)
    if hasattr(model, "make_cache"):
        kinds = {
            "full": "KVCache",
            "sliding": "RotatingKVCache",
            "linear": "ArraysCache",
            "ssm": "ArraysCache",
        }
        own = shape.mixers[: shape.layers - shape.shared_kv_layers]
        expected = [kinds[m] for m in own if m != "none"]
        assert [type(c).__name__ for c in model.make_cache()] == expected


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "qwen3_5_moe", "mamba2", "nemotron_h"])
def test_recurrent_state_is_what_stock_allocates(family):
    import mlx.core as mx

    path = checkpoints.folder(family)
    shape = ModelShape.from_config(checkpoints.config(path))
    model, _ = checkpoints.stock_model(path)
    model.set_dtype(mx.float32)  # the CPU multiplies experts in no other
    cache = model.make_cache()
    mx.eval(model(mx.array([[1, 2, 3, 4, 5]]), cache=cache))
    conv, state = cache[0][0], cache[0][1]
    assert conv.shape == (1, shape.conv_kernel - 1, shape.conv_channels)
    assert sorted(state.shape) == sorted((1, shape.state_heads, shape.state_key, shape.state_value))


def llama(**config):
    return checkpoints.config(checkpoints.folder("llama")) | config


def test_llama():
    shape = ModelShape.from_config(llama(num_key_value_heads=None, head_dim=None))
    assert (shape.module, shape.heads, shape.kv_heads, shape.head_dim) == ("llama", 4, 4, 32)
    assert (shape.context_length, shape.sliding_window, shape.experts, shape.modalities) == (
        2048,
        None,
        0,
        ("text",),
    )
    assert shape.mixers == ("full",) * 4
    assert shape.ffns == ("dense",) * 4


def test_sliding_layers_come_from_layer_types():
    kinds = ["sliding_attention", "full_attention"] * 2
    shape = ModelShape.from_config(llama(layer_types=kinds, sliding_window=64))
    assert shape.mixers == ("sliding", "full") * 2
    assert shape.sliding_window == 64


def test_head_dim_is_ignored_where_mlx_lm_ignores_it():
    config = checkpoints.config(checkpoints.folder("qwen2")) | {"head_dim": 77}
    assert ModelShape.from_config(config).head_dim == 32


def test_text_config_and_modalities():
    shape = ModelShape.from_config(checkpoints.config(checkpoints.folder("gemma3", True)))
    assert shape.modalities == ("text", "vision")
    assert shape.model_type == "gemma3"
    assert shape.hidden_size == 128


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "4096"), ("hidden_size", 0), ("hidden_size", -1), ("hidden_size", True),
        ("hidden_size", 2.0), ("hidden_size", 2**40), ("hidden_size", None), ("hidden_size", [128]),
        ("num_hidden_layers", 10**9), ("num_attention_heads", {}), ("vocab_size", None), ("head_dim", "x"),
        ("num_key_value_heads", 0), ("tie_word_embeddings", "yes"), ("layer_types", "full"),
        ("layer_types", ["full_attention"]), ("layer_types", [1, 2, 3, 4]), ("max_position_embeddings", 1.5),
        ("model_type", None), ("model_type", 7), ("rms_norm_eps", None), ("text_config", []),
        ("hidden_size", "9" * 9999), ("model_type", "x" * 9999), ("tie_word_embeddings", [[]] * 999),
    ],
)  # fmt: skip
def test_a_config_of_lies_is_one_line_that_names_the_key(key, value):
    with pytest.raises(SourceError, match=key) as caught:
        ModelShape.from_config(llama(**{key: value}))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_unknown_layer_kind_is_unsupported():
    with pytest.raises(UnsupportedError, match="chunked_attention"):
        ModelShape.from_config(llama(layer_types=["chunked_attention"] * 4))


def test_a_family_inside_that_is_not_known_is_unsupported():
    config = checkpoints.config(checkpoints.folder("mistral3"))
    config["text_config"] = config["text_config"] | {"model_type": "mistral4"}
    with pytest.raises(UnsupportedError, match="'mistral4'"):
        ModelShape.from_config(config)


def test_lfm2s_feed_forward_width_is_what_its_code_makes_of_the_config():
    """LFM2-350M: 6656 in config.json, 4608 rows in the published w1 (feed_forward.w1.weight)."""
    wanted = {"block_ff_dim": 6656, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0}
    config = checkpoints.config(checkpoints.folder("lfm2", True)) | wanted
    assert ModelShape.from_config(config).intermediate_size == 4608
    assert ModelShape.from_config(config | {"block_auto_adjust_ff_dim": False}).intermediate_size == 6656
    with pytest.raises(SourceError, match="block_ffn_dim_multiplier"):
        ModelShape.from_config(config | {"block_ffn_dim_multiplier": float("nan")})


def test_the_last_layers_of_gemma4_share_caches_of_those_before():
    config = checkpoints.config(checkpoints.folder("gemma4", True))
    shape = ModelShape.from_config(config)
    assert (shape.shared_kv_layers, shape.global_head_dim, shape.global_kv_heads) == (2, 64, 2)
    assert (shape.per_layer_size, shape.wide_shared_ffn, shape.modalities) == (64, True, ("text", "vision", "audio"))
    config["text_config"] = config["text_config"] | {"num_kv_shared_layers": 4}
    with pytest.raises(SourceError, match="num_kv_shared_layers is 4"):
        ModelShape.from_config(config)


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(UnsupportedError, match="'bert'") as caught:
        ModelShape.from_config(llama(model_type="bert"))
    assert all(known in caught.value.hint for known in KNOWN_TYPES)
