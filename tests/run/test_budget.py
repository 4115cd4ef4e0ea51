from __future__ import annotations

from functools import partial

import pytest

from mlxquant.errors import MemoryBudgetError
from mlxquant.fit.growth import Growth
from mlxquant.machine import Machine
from mlxquant.run.budget import Budget, Shape, check, longest_context, reckon, scratch_bytes
from mlxquant.run.cache import CachePlan, Slot
from mlxquant.run.device import Blas, Device
from mlxquant.run.ready import CacheOptions, make_ready

GB = 10**9


def machine(working_set: int) -> Machine:
    return Machine("test", 10, 8, 2 * working_set, working_set, working_set, None, "gpu", "test")


def device(working_set: int, kind: str = "cpu") -> Device:
    return Device(kind, Blas("OpenBLAS"), machine(working_set), working_set, 0, 0)


def plan(layers: int, heads: int, width: int) -> CachePlan:
    """Keys and values in 2 bytes, as bfloat16 models have them."""
    return CachePlan((Slot("full", "bfloat16", (Growth(2 * heads * width * 2),)),) * layers, list)


# Peaks of mlx-lm's own BENCHMARKS.md (M4 Max, prompt of 2048, 128 tokens), in GB.
QWEN3_4B = Shape(heads=32, head_width=128, hidden=2560, ffn=9728)


@pytest.mark.parametrize(("weights", "peak"), [(8.04, 9.02), (4.27, 5.254), (3.27, 4.25), (2.26, 3.35)])
def test_gpu_peaks_that_were_published(weights, peak):
    budget = reckon(int(weights * GB), plan(36, 8, 128), QWEN3_4B, machine(96 * GB), "gpu", 2048 + 128, 2048)
    assert budget.total_bytes / GB == pytest.approx(peak, rel=0.06)
    assert budget.limit_bytes == 91_200_000_000


def test_cache_of_llama_8b_is_128_kib_a_token():
    assert plan(32, 8, 128).bytes_per_token == 131072
    assert plan(32, 8, 128).peak_bytes(8192, 1, 2048) == 131072 * 8192


def test_attention_that_is_not_fused_makes_scores():
    """Qwen3.5-4B on an M2 Pro: 65.5 KB of scores for each token of context, at 16 heads and a chunk of 2048."""
    shape = Shape(heads=16, head_width=256, hidden=2560, ffn=9216)
    slope = scratch_bytes(shape, 65536, 2048, "gpu") - scratch_bytes(shape, 32768, 2048, "gpu")
    assert slope / 32768 == 65536
    fused = Shape(heads=16, head_width=128, hidden=2560, ffn=9216)
    assert scratch_bytes(fused, 65536, 2048, "gpu") == scratch_bytes(fused, 32768, 2048, "gpu")


def test_refusal_says_the_numbers_and_what_would_fit():
    big = partial(reckon, 4 * GB, plan(32, 8, 128), QWEN3_4B, machine(8 * GB), "gpu", prefill_step=2048)
    small = partial(reckon, 4 * GB, plan(32, 8, 34), QWEN3_4B, machine(8 * GB), "gpu", prefill_step=2048)
    with pytest.raises(MemoryBudgetError, match="weights 4 GB") as caught:
        check(big, 32768, alternatives={"--kv-bits 4": small})
    longest = longest_context(big, 32768)
    assert f"--context {longest}" in caught.value.hint
    assert "--kv-bits 4" in caught.value.hint
    assert big(longest).fits
    assert not big(longest + 256).fits
    assert check(big, 32768, force=True).total_bytes > 8 * GB
    assert check(big, 1024).fits


def test_weights_alone_too_large():
    def reckoned(tokens: int) -> Budget:
        return Budget(tokens, 9 * GB, 0, 0, 8 * GB)

    assert longest_context(reckoned, 100) == 0
    with pytest.raises(MemoryBudgetError) as caught:
        check(reckoned, 100)
    assert "fewer bits" in caught.value.hint


def test_a_run_that_does_not_fit_is_refused_before_weights_are_read(folders, text):
    import mlx.core as mx

    before = mx.get_active_memory()
    with pytest.raises(MemoryBudgetError):
        make_ready(folders["llama"], device(60_000_000), text, context_tokens=2048)
    assert mx.get_active_memory() - before < 10_000
    ready = make_ready(folders["llama"], device(60_000_000), text, context_tokens=2048, force=True)
    assert not ready.budget.fits


def test_ready_says_what_was_decided(folders, text):
    ready = make_ready(folders["llama"], device(GB), text, options=CacheOptions(kv_bits=8, kv_group_size=32))
    assert ready.context_tokens == 2048
    assert ready.loaded.expanded
    assert [slot.kind for slot in ready.plan.slots] == ["quantized", "quantized"]
    longer = make_ready(folders["llama"], device(10 * GB), text, context_tokens=4096)
    assert "made for 2048 tokens" in longer.notes[-1]


def test_measured_peak_stays_below_the_reckoned(folders, text):
    """On this machine, with the real allocator: weights, cache and scratch of a long prompt."""
    import mlx.core as mx

    from mlxquant.run.generate import generate

    ready = make_ready(folders["llama"], device(10 * GB), text, context_tokens=1024)
    mx.clear_cache()
    # Other tests' models are alive too: what counts is what this run adds.
    others = mx.get_active_memory() - ready.loaded.weight_bytes
    mx.reset_peak_memory()
    list(generate(ready.loaded.model, list(range(300)) * 3, ready.plan.make(), max_tokens=4))
    assert mx.get_peak_memory() - others <= ready.budget.total_bytes
