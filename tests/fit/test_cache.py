"""cache_of against what it foretells: the caches of stock mlx-lm's own models, run; and what run/cache.py traces."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache as remember

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from mlxquant.errors import SourceError, UsageError
from mlxquant.families.shape import ModelShape
from mlxquant.fit.cache import cache_of
from mlxquant.fit.growth import fed
from mlxquant.run.cache import plan_cache
from mlxquant.run.generate import generate
from tests.tiny import FAMILIES, VOCAB

WINDOW = 24
# Small windows that come round often; head widths that some group size divides.
SMALL = {"sliding_window": WINDOW, "sliding_window_pattern": 2, "vocab_size": VOCAB, "tie_word_embeddings": False}
WIDE = {
    "deepseek_v2": {"qk_rope_head_dim": 32, "v_head_dim": 128},
    "deepseek_v3": {"qk_rope_head_dim": 64, "kv_lora_rank": 128},
    "glm4_moe_lite": {"qk_rope_head_dim": 64, "kv_lora_rank": 64},
}
OPTIONS = [{}, {"kv_bits": 8}, {"kv_bits": 4, "group_size": 32}, {"max_kv_size": 48}]
# Across a growth step, over the window and under it, chunks that are no multiple of a step, one token at a time.
# Prompts longer than a window and shorter, chunks that are no multiple of a step, one token at a time, none generated.
RUNS = [(70, 4, 33), (5, 3, 1), (1, 1, 512), (257, 0, 300)]
LONG = (250, 12, 96)  # three chunks, then over a growth step while it decodes


def config_of(family):
    config, _ = FAMILIES[family](np.random.default_rng(0), 128, 4, False)
    inner = config.get("text_config")
    if inner is not None:
        inner |= SMALL
    return config | SMALL | WIDE.get(family, {})


def made(config, dtype=mx.bfloat16):
    """(stock mlx-lm's model of a config, random; the shape that mlxquant reads from the same config)."""
    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(config))
    model.set_dtype(dtype)
    model.eval()
    return model, ModelShape.from_config(config)


@remember
def model_of(family, dtype=mx.bfloat16):
    return made(config_of(family), dtype)


def planned(model, kv_bits=None, group_size=64, max_kv_size=None):
    return plan_cache(model, kv_bits=kv_bits, kv_group_size=group_size, max_kv_size=max_kv_size)


def watched(model, moments):
    """The model, that notes the cache after every call: bytes of all of it, bytes of its largest array."""

    def call(tokens, cache):
        logits = model(tokens, cache=cache)
        arrays = [
            array.nbytes for _, array in tree_flatten([entry.state for entry in cache]) if hasattr(array, "nbytes")
        ]
        moments.append((sum(entry.nbytes for entry in cache), max(arrays)))
        return logits

    return call


def lazy_run(model, cache, prompt, new, chunk):
    """What `watched` notes of a run in which nothing is evaluated: shapes and dtypes are all that is asked for."""
    moments = []
    for size in [size for size, times in fed(prompt, new, chunk) for _ in range(times)]:
        watched(model, moments)(mx.zeros((1, size), dtype=mx.int32), cache)
    return moments


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2], OPTIONS[3]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_real_caches_after_prefill_and_decode(family, options):
    """In float32, as models run on a CPU: experts have no other kernel there."""
    model, shape = model_of(family, mx.float32)
    found, moments = cache_of(shape, **options, item_bytes=4), []
    prompt, new, chunk = LONG
    cache = planned(model, **options).make()
    tokens = list(generate(watched(model, moments), list(range(prompt)), cache, max_tokens=new, prefill_step=chunk))
    assert len(tokens) == new
    assert found.final_bytes(*LONG) == sum(entry.nbytes for entry in cache) == moments[-1][0]
    assert found.peak_bytes(*LONG) == max(held for held, _ in moments)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_runs_of_other_lengths(family, options):
    """In bfloat16, as models run on a Mac."""
    model, shape = model_of(family)
    found, plan = cache_of(shape, **options), planned(model, **options)
    for lengths in RUNS:
        moments = lazy_run(model, plan.make(), *lengths)
        peak = max(held for held, _ in moments)
        assert (found.final_bytes(*lengths), found.peak_bytes(*lengths)) == (moments[-1][0], peak)
    prompt, _, chunk = LONG
    assert found.largest_bytes(prompt, chunk) == max(
        array for _, array in lazy_run(model, plan.make(), prompt, 1, chunk)
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_tracing_a_model_finds_the_same_cache(family, options):
    model, shape = model_of(family)
    found, traced = cache_of(shape, **options), planned(model, **options).cost
    held = Counter()
    for kind, count, growth in found.layers:
        if kind not in ("none", "shared"):
            held[growth, kind == "quantized"] += count
    assert held == Counter({(growth, kind == "quantized"): count for kind, count, growth in traced.layers})
    assert sum(count for _, count, _ in found.layers) == shape.layers
    assert found.quantizable == planned(model, kv_bits=8, max_kv_size=options.get("max_kv_size")).cost.quantizable
    assert [note for note in found.notes if "changes nothing" in note] == list(traced.notes)


@pytest.mark.parametrize(
    ("family", "changes", "kinds"),
    [
        ("llama", {"layer_types": ["sliding_attention", "full_attention"] * 2}, {"sliding": 2, "full": 2}),
        # A window in the config that mlx-lm's caches do not keep to.
        ("smollm3", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, {"full": 4}),
        ("mistral", {}, {"full": 4}),
        ("gemma2", {}, {"full": 4}),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}, {"full": 4}),
        ("phi3", {}, {"full": 4}),
        ("deepseek_v2", {}, {"expanded": 4}),
        ("deepseek_v3", {}, {"latent": 4}),
        ("qwen3_next", {}, {"linear": 2, "full": 2}),
        ("mamba2", {}, {"ssm": 4}),
        ("nemotron_h", {}, {"ssm": 1, "full": 1, "none": 2}),
    ],
)
def test_kinds_are_those_that_mlx_lm_makes(family, changes, kinds):
    model, shape = made(config_of(family) | changes)
    found = cache_of(shape)
    assert {kind: number for kind, number, _ in found.layers} == kinds
    assert any("whole context" in note for note in found.notes) == (family in ("gemma2", "smollm3"))
    assert found.peak_bytes(*LONG) == max(held for held, _ in lazy_run(model, make_prompt_cache(model), *LONG))


def test_layers_that_share_a_cache_hold_nothing_but_read():
    """gemma4: the last layer of each kind with a cache of its own is read again, and so cannot be quantized."""
    config = config_of("gemma4")
    config["text_config"] |= {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3,
    }  # fmt: skip
    model, shape = made(config)
    found, plan = cache_of(shape, kv_bits=8), planned(model, kv_bits=8)
    assert [slot.kind for slot in plan.slots] == ["sliding", "quantized", "sliding", "full"]
    assert [(kind, number) for kind, number, _ in found.layers] == [
        ("sliding", 2), ("quantized", 1), ("full", 1), ("shared", 1), ("shared", 1),
    ]  # fmt: skip
    assert found.final_bytes(*LONG) == lazy_run(model, plan.make(), *LONG)[-1][0]
    full, window = 2 * 64 * 2 * 2, 2 * 32 * 2 * 2  # heads, width, keys and values, bytes
    plain = cache_of(shape)
    assert plain.bytes_per_token == 2 * full
    assert plain.read_bytes(1000) == 3 * 1000 * full + 3 * WINDOW * window


@pytest.mark.parametrize(("width", "asked", "size"), [(64, 64, 64), (96, 64, 32), (128, 128, 128), (80, 64, None)])
def test_group_size_follows_the_head_width(width, asked, size):
    model, shape = made(config_of("qwen3") | {"head_dim": width})
    found, plan = cache_of(shape, kv_bits=4, group_size=asked), planned(model, kv_bits=4, group_size=asked)
    assert {slot.group_size for slot in plan.slots} == {size or 0}
    assert found.bytes_per_token == plan.bytes_per_token
    if size:
        assert found.bytes_per_token == 4 * 2 * 2 * (width // 2 + 4 * width // size)
    assert any("head width 80" in note for note in found.notes) == (size is None)
    assert any("groups of 32" in note for note in found.notes) == (size == 32)


def test_states_do_not_grow_and_windows_are_read_whole():
    ssm = cache_of(model_of("mamba2")[1])
    assert ssm.bounded
    assert ssm.bytes_per_token == 0
    assert ssm.read_bytes(0) == ssm.read_bytes(10**6) == ssm.final_bytes(1, 1, 512)
    hybrid = cache_of(model_of("gemma3_text")[1], max_kv_size=48)
    assert hybrid.bounded
    assert hybrid.read_bytes(10**6) == hybrid.read_bytes(48) > hybrid.read_bytes(47)
    assert not cache_of(model_of("gemma3_text")[1]).bounded


LLAMA = {"rms_norm_eps": 1e-5, "vocab_size": 128256, "intermediate_size": 14336}
GDN = {
    "linear_num_value_heads": 48, "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
}  # fmt: skip
MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}


def sizes(model_type, hidden, layers, heads, kv_heads, head_dim, **others):
    return LLAMA | others | {
        "model_type": model_type, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim,
    }  # fmt: skip


# Sizes as published in their config.json; bytes a token, and bytes that do not grow, by hand from mlx-lm's code.
PUBLISHED = {
    "Llama-3.1-8B": (sizes("llama", 4096, 32, 32, 8, 128), 131_072, 0),
    "gpt-oss-20b": (sizes("gpt_oss", 2880, 24, 64, 8, 64, sliding_window=128), 24_576, 12 * 128 * 2048),
    "gemma-3-27b": (
        sizes("gemma3_text", 5376, 62, 32, 16, 128, sliding_window=1024, sliding_window_pattern=6),
        81_920, 52 * 1024 * 8192,
    ),
    "Qwen3.6-27B": (
        {"model_type": "qwen3_5", "text_config": sizes("qwen3_5_text", 5120, 64, 24, 4, 256, **GDN)},
        65_536, 48 * (3_145_728 + 61_440),
    ),
    "DeepSeek-V3": (sizes("deepseek_v3", 7168, 61, 128, 128, 56, **MLA), 61 * 1152, 0),
    "DeepSeek-V2-Lite": (sizes("deepseek_v2", 2048, 27, 16, 16, 128, rope_scaling={}, **MLA), 27 * 10_240, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_of_published_models(name):
    config, per_token, fixed = PUBLISHED[name]
    found = cache_of(ModelShape.from_config(config))
    assert found.bytes_per_token == per_token
    assert found.read_bytes(100_000) == 100_000 * per_token + fixed
    # A prompt of whole steps is allocated to the byte; a window is at its largest with the last chunk joined to it.
    assert found.final_bytes(2**20, 1, 2048) == 2**20 * per_token + fixed
    assert found.peak_bytes(2**20, 1, 2048) >= found.final_bytes(2**20, 1, 2048)


def test_what_cannot_be_reckoned_is_said():
    config = config_of("llama") | {"layer_types": ["sliding_attention", "full_attention"] * 2}
    with pytest.raises(SourceError, match="no sliding_window"):
        cache_of(ModelShape.from_config(config | {"sliding_window": None}))
    _, shape = model_of("llama")
    for wrong in ({"kv_bits": 3}, {"kv_bits": 4, "group_size": 48}, {"max_kv_size": 2}):
        with pytest.raises(UsageError):
            cache_of(shape, **wrong)
    with pytest.raises(SourceError, match="shares the cache of a full layer"):
        cache_of(replace(shape, shared_kv_layers=shape.layers))
