from __future__ import annotations

from functools import partial

import pytest

from mlxquant.errors import MemoryBudgetError
from mlxquant.fit.activations import Activations
from mlxquant.fit.growth import Growth
from mlxquant.machine import Machine
from mlxquant.run.budget import Budget, check, longest_context, reckon
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
QWEN3_4B = Activations.of_config({
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": True,
})  # fmt: skip


@pytest.mark.parametrize(("weights", "peak"), [(8.04, 9.02), (4.27, 5.254), (3.27, 4.25), (2.26, 3.35)])
def test_gpu_peaks_that_were_published(weights, peak):
    budget = reckon(int(weights * GB), plan(36, 8, 128), QWEN3_4B, machine(96 * GB), "gpu", 2048 + 128, 2048)
    assert budget.total_bytes / GB == pytest.approx(peak, rel=0.05)
    assert budget.limit_bytes == 91_200_000_000


def test_cache_of_llama_8b_is_128_kib_a_token():
    assert plan(32, 8, 128).bytes_per_token == 131072
    assert plan(32, 8, 128).peak_bytes(8192, 1, 2048) == 131072 * 8192


def test_a_family_that_is_not_known_is_reckoned_like_a_llama():
    said = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128,
            "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
    for config in ({"model_type": "of next year", **said}, {"text_config": said}):
        assert Activations.of_config(config) == QWEN3_4B
    # Whatever else stands there: nothing is sized by it, and nothing raises.
    for config in ({}, {"hidden_size": "wide", "num_attention_heads": -1}, {"text_config": [1]}):
        budget = reckon(GB, plan(2, 2, 8), Activations.of_config(config), machine(2 * GB), "gpu", 4096, 2048)
        assert budget.fits


def test_a_shortened_cache_shortens_the_scores():
    """--max-kv-size: attention of a quantized or wide-headed model is not asked for scores over the whole context."""
    wide = Activations.of_config({"hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 8,
                                  "head_dim": 256, "num_attention_heads": 16, "num_key_value_heads": 4})  # fmt: skip
    growth = Growth(4096, window=4096, keep=4)
    short = CachePlan((Slot("rotating", "", (growth,)),) * 8, list)
    at = partial(reckon, GB, short, wide, machine(64 * GB), "gpu", prefill_step=2048)
    assert at(65536).total_bytes == at(131072).total_bytes
    assert (
        reckon(GB, plan(8, 4, 256), wide, machine(64 * GB), "gpu", 65536, 2048).scratch_bytes > at(65536).scratch_bytes
    )


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
        make_ready(folders["llama"], device(20_000_000), text, context_tokens=2048)
    assert mx.get_active_memory() - before < 10_000
    ready = make_ready(folders["llama"], device(20_000_000), text, context_tokens=2048, force=True)
    assert not ready.budget.fits


def test_ready_says_what_was_decided(folders, text):
    ready = make_ready(folders["llama"], device(GB), text, options=CacheOptions(kv_bits=8, kv_group_size=32))
    assert ready.context_tokens == 2048
    assert ready.loaded.expanded
    assert [slot.kind for slot in ready.plan.slots] == ["quantized", "quantized"]
    longer = make_ready(folders["llama"], device(10 * GB), text, context_tokens=4096)
    assert "made for 2048 tokens" in longer.notes[-1]


def test_measured_peak_is_near_the_reckoned(folders, text):
    """On this machine, with the real allocator: weights, cache and scratch of a prompt that fills the context."""
    import mlx.core as mx

    from mlxquant.run.generate import generate

    ready = make_ready(folders["llama"], device(10 * GB), text, context_tokens=1024)
    mx.clear_cache()
    # Other tests' models are alive too: what counts is what this run adds.
    others = mx.get_active_memory() - ready.loaded.weight_bytes
    mx.reset_peak_memory()
    prompt = (list(range(300)) * 4)[:1024]
    list(generate(ready.loaded.model, prompt, ready.plan.make(), max_tokens=1, prefill_step=ready.prefill_step))
    measured = mx.get_peak_memory() - others
    assert 0.6 * ready.budget.total_bytes < measured <= ready.budget.total_bytes
