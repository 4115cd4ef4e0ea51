from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from mlxquant.errors import UsageError
from mlxquant.fit.growth import fed
from mlxquant.run.cache import plan_cache
from mlxquant.run.generate import generate
from mlxquant.run.model import load_model


class Attention(nn.Module):
    def __init__(self, dim, heads, head_dim, sinks=False, latent=False):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.o = nn.Linear(heads * head_dim, dim, bias=False)
        self.heads, self.latent = heads, latent
        if sinks:
            self.sinks = mx.zeros((heads,))

    def __call__(self, x, cache):
        batch, length, _ = x.shape
        q, k, v = (
            part.reshape(batch, length, self.heads, -1).swapaxes(1, 2) for part in mx.split(self.qkv(x), 3, axis=-1)
        )
        mask = create_attention_mask(x, cache)
        if isinstance(cache, CacheList):
            cache = cache[0]
        k, v = cache.update_and_fetch(k, v)
        if self.latent:
            k = k.swapaxes(-1, -2).swapaxes(-1, -2)  # what MLA does with its rotary key; a quantized cache has none
        out = scaled_dot_product_attention(
            q, k, v, cache=cache, scale=1.0, mask=mask, sinks=self.sinks if "sinks" in self else None
        )
        return x + self.o(out.swapaxes(1, 2).reshape(batch, length, -1))


class Recurrent(nn.Module):
    """A state that is a running mean, as linear-attention layers have one."""

    def __init__(self, dim):
        super().__init__()
        self.weight = mx.ones((dim,))

    def __call__(self, x, cache):
        state = cache[0] if cache[0] is not None else mx.zeros((1, x.shape[-1]), dtype=x.dtype)
        cache[0] = 0.5 * state + x.mean(axis=1)
        return x + cache[0][:, None] * self.weight


class Mixed(nn.Module):
    """Layers of any kind of cache, one after another."""

    def __init__(self, *kinds, head_dim=64):
        super().__init__()
        dim = 32
        self.embed = nn.Embedding(64, dim)
        self.layers = [
            Recurrent(dim) if kind == "state" else Attention(dim, 2, head_dim, kind == "sinks", kind == "latent")
            for kind in kinds
        ]
        self.kinds = kinds

    def __call__(self, tokens, cache):
        x = self.embed(tokens)
        for layer, entry in zip(self.layers, cache, strict=True):
            x = layer(x, entry)
        return self.embed.as_linear(x)

    def make_cache(self):
        made = {"state": lambda: ArraysCache(1), "sliding": lambda: RotatingKVCache(max_size=24),
                "list": lambda: CacheList(KVCache())}  # fmt: skip
        return [made.get(kind, KVCache)() for kind in self.kinds]


def kinds(plan):
    return [slot.kind for slot in plan.slots]


def test_without_options_every_cache_is_the_models_own():
    model = Mixed("full", "sliding", "state", "list")
    plan = plan_cache(model)
    assert kinds(plan) == ["full", "sliding", "state", "mixed"]
    assert [type(c) for c in plan.make()] == [type(c) for c in make_prompt_cache(model)]
    assert plan.make()[0] is not plan.make()[0]


@pytest.mark.parametrize(
    ("width", "asked", "size"), [(64, 64, 64), (96, 64, 32), (128, 64, 64), (128, 128, 128), (64, 128, 64)]
)
def test_group_size_follows_the_head_width(width, asked, size):
    (slot,) = plan_cache(Mixed("full", head_dim=width), kv_bits=8, kv_group_size=asked).slots
    assert (slot.kind, slot.bits, slot.group_size) == ("quantized", 8, size)


def test_head_width_80_stays_float_and_says_so():
    plan = plan_cache(Mixed("full", head_dim=80), kv_bits=4)
    assert kinds(plan) == ["full"]
    assert "head width 80" in plan.slots[0].reason
    assert "changes nothing" in plan.notes[0]


def test_only_the_layers_that_can_are_quantized_and_the_model_runs():
    model = Mixed("full", "sliding", "state", "sinks", "latent", "list", "full")
    plan = plan_cache(model, kv_bits=4)
    assert kinds(plan) == ["quantized", "sliding", "state", "full", "full", "mixed", "quantized"]
    assert "cannot read it quantized" in plan.slots[3].reason
    assert plan.notes == ()
    run = generate(model, list(range(40)), plan.make(), max_tokens=5, prefill_step=16)
    assert len(list(run)) == 5


def test_max_kv_size_reaches_models_that_make_their_own_cache(folders):
    model = load_model(folders["llama"]).model
    assert hasattr(model, "make_cache"), "stock mlx-lm ignores max_kv_size then"
    plan = plan_cache(model, max_kv_size=64)
    assert kinds(plan) == ["rotating", "rotating"]
    assert plan.bounded
    assert plan.held_bytes(1000) == plan.held_bytes(64) == 2 * plan.held_bytes(32) > 0
    cache = plan.make()
    list(generate(model, list(range(200)), cache, max_tokens=100, prefill_step=32))
    assert [c.nbytes for c in cache] == [64 * slot.bytes_per_token for slot in plan.slots]


def test_max_kv_size_and_kv_bits_together_say_what_wins():
    plan = plan_cache(Mixed("full"), max_kv_size=64, kv_bits=4)
    assert kinds(plan) == ["rotating"]
    assert "cannot be quantized" in plan.slots[0].reason
    assert "--kv-bits 4 changes nothing" in plan.notes[0]


def test_table_joins_layers_that_are_alike():
    plan = plan_cache(Mixed("sliding", "full", "full", "state", "full"), kv_bits=8)
    rows = plan.table()
    assert [(row[0], row[1]) for row in rows] == [("0", "sliding"), ("1-2, 4", "quantized"), ("3", "state")]
    # Two heads of 64, keys and values: 8-bit codes, and per group of 64 a scale and a bias in float32.
    assert rows[1][3] == 3 * 2 * 2 * (64 + 2 * 4)
    assert rows[0][3] == 2 * 2 * 64 * 4


@pytest.mark.parametrize("wrong", [{"kv_bits": 3}, {"kv_bits": 4, "kv_group_size": 48}, {"max_kv_size": 2}])
def test_settings_that_no_cache_has(wrong):
    with pytest.raises(UsageError):
        plan_cache(Mixed("full"), **wrong)


RUNS = [(1, 1, 8), (5, 3, 8), (256, 2, 64), (257, 300, 100), (300, 1, 300), (513, 20, 2048), (70, 200, 7)]


@pytest.mark.parametrize(("prompt", "new", "step"), RUNS)
def test_planned_bytes_are_allocated_bytes(prompt, new, step):
    """The growth rules against mlx-lm's caches, in every kind and after every push."""
    model = Mixed("full", "sliding", "state", "list", "full")
    for options in ({}, {"kv_bits": 4}, {"max_kv_size": 48}):
        plan = plan_cache(model, **options)
        cache, before, seen = plan.make(), [], []
        for count in [size for size, times in fed(prompt, new, step) for _ in range(times)]:
            model(mx.zeros((1, count), dtype=mx.int32), cache=cache)
            before.append((count, 1))
            found = [entry.nbytes for entry in cache]
            assert found == [sum(g.final_bytes(before) for g in slot.growths) for slot in plan.slots]
            seen.append(sum(found))
        assert plan.peak_bytes(prompt, new, step) == max(seen)


def test_tracing_reads_no_weights(folders):
    before = mx.get_active_memory()
    loaded = load_model(folders["llama"], lazy=True)
    plan = plan_cache(loaded.model, kv_bits=8)
    assert plan.slots
    assert mx.get_active_memory() - before < 10_000, "nothing was evaluated"
