"""Prefill's scratch against real peaks: of stock mlx-lm's models on this CPU, and of Macs as they were published."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import make_prompt_cache

from mlxquant.families.shape import ModelShape
from mlxquant.fit.activations import Activations, Attention, activations
from mlxquant.fit.cache import cache_of
from mlxquant.fit.memory import mlx_need
from mlxquant.fit.scratch import Prefill
from mlxquant.machine import Machine, described
from mlxquant.run.generate import generate
from tests.fit.test_cache import config_of, made

CPU = Machine("test", None, 2, 2**36, 2**35, 2**35, None, "cpu", "Linux")
# Rows of benchmarks/peaks/published.csv beyond their bound: (model, machine, prompt) -> the error they have.
MISSES = {("Qwen2.5-14B", "M3 Ultra 256GB", 2048): 0.055}


def benchmark(name):
    path = Path(__file__).parent.parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = benchmark("peaks")
PEAKS = list(PAGE.peaks())


def peak_of(model, tokens, chunk):
    """Bytes above the weights at the largest moment of a real prefill."""
    mx.eval(model.parameters())
    cache = make_prompt_cache(model)
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    list(generate(model, [i % 60 for i in range(tokens)], cache, max_tokens=1, prefill_step=chunk))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "mixtral", "deepseek_v3", "qwen3_5", "mamba2"])
@pytest.mark.parametrize(("tokens", "chunk"), [(513, 256), (385, 512)])
def test_real_peaks_on_this_cpu(family, tokens, chunk):
    """Cache and scratch: never far below what is taken, and at most about twice."""
    model, shape = made(config_of(family), mx.float32)
    need = mlx_need(0, cache_of(shape, item_bytes=4), activations(shape), CPU, tokens, chunk)
    assert 0.85 < need.total_bytes / peak_of(model, tokens, chunk) < 2.2


def test_inputs_of_convolutions_stay_until_the_chunk_is_done():
    """What each further delta net adds to a peak, beside its cache, is its convolution's whole input."""

    def measured(layers):
        config = {
            "model_type": "qwen3_5", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": layers,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64,
            "linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 64,
            "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
            "tie_word_embeddings": True, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        }  # fmt: skip
        model = qwen3_5.TextModel(qwen3_5.TextModelArgs.from_dict(config))
        model.eval()
        shape = ModelShape.from_config(config)
        held = Prefill(activations(shape), 129, 128, CPU, 0).held_bytes
        return peak_of(model, 129, 128) - cache_of(shape, item_bytes=4).peak_bytes(129, 1, 128), held

    (few, held_of_few), (many, held_of_many) = measured(8), measured(24)
    assert many - few == pytest.approx(held_of_many - held_of_few, rel=0.1)


@pytest.mark.parametrize("peak", PEAKS, ids=lambda p: f"{p.model}-{p.level}-{p.machine}-{p.prompt_tokens}-{p.minus}")
def test_published_peaks(peak):
    missed = MISSES.get((peak.model, peak.machine, peak.prompt_tokens))
    assert abs(peak.error) <= missed if missed else peak.within
    assert peak.source


def test_the_page_has_these_rows():
    page = (Path(__file__).parents[2] / "docs" / "fit.md").read_text().splitlines()
    assert [line for line in PAGE.markdown(PEAKS) if line not in page] == []


def test_the_issues_table_is_whole_and_has_no_miss():
    table = [peak for peak in PEAKS if peak.set == "table"]
    assert len(table) == 49
    assert all(peak.within for peak in table)


def prefill(attention, context, chunk=2048, mac="M2 16GB", **options):
    made = Activations(32, 50_000, 10_000, 0, 0, 0, False, (attention,))
    return Prefill(made, context, chunk, described(mac), 4 * 10**9, **options)


@pytest.mark.parametrize(
    ("width", "mac", "context", "window", "fused"),
    [
        (128, "M2 16GB", 8192, None, True),
        (64, "M2 16GB", 8192, 128, True),
        (256, "M2 16GB", 8192, None, False),
        (192, "M5 16GB", 8192, None, False),
        (512, "M5 16GB", 8192, None, False),
        (256, "M5 16GB", 8192, None, True),
        (256, "M5 16GB", 1000, None, False),  # a chunk of less than 1024
        (256, "M5 16GB", 8192, 1024, False),  # a window is an array of a mask
        (256, "M5 16GB", 4000, 4096, True),  # that is not needed yet
    ],
)
def test_which_attention_makes_scores(width, mac, context, window, fused):
    kind = Attention(32, 16, width, width, 2048, window)
    at = prefill(kind, context, mac=mac)
    assert at.fused(kind) is fused
    assert (at.largest_scores_bytes == 0) is fused
    assert not replace(at, quantized=True).fused(kind)
    assert not replace(at, machine=CPU).fused(kind)


def test_scores_are_as_long_as_what_is_looked_at():
    """Heads x chunk x context in two bytes; of a window no more than it holds in prefill."""
    assert prefill(Attention(8, 16, 256, 256, 2048), 65536).largest_scores_bytes == 16 * 2048 * 65536 * 2
    assert prefill(Attention(8, 16, 256, 256, 2048, 1024), 65536).largest_scores_bytes == 16 * 2048 * 3071 * 2
    # The last token of a prompt is fed by itself.
    assert prefill(Attention(8, 16, 256, 256, 2048), 100).largest_scores_bytes == 16 * 99 * 100 * 2


def test_of_keys_before_the_chunk_those_in_flight_are_held_twice():
    kind = Attention(32, 32, 128, 128, 2048)
    assert prefill(kind, 2048).regrown_bytes(131072) == 0
    at = prefill(kind, 8192)
    assert at.regrown_bytes(131072) == int(at.layers_in_flight / 32 * 131072 * (8192 - 2048))
    assert prefill(replace(kind, window=512), 8192).regrown_bytes(0) == 0


def test_layers_in_flight_by_hand():
    kind = Attention(32, 32, 128, 128, 2048)
    at = prefill(kind, 8192)
    # Of a layer 1.7 x 50,000 x 2048 elements and 31 million of weights are read, 62.7 million a buffer: 3.28 buffers;
    # 0.20 make keys and values longer and 0.27 are attention's. Eleven buffers wait.
    assert at.layers_in_flight == pytest.approx(11 / 3.745, rel=1e-3)
    assert replace(at, context_tokens=24, weight_bytes=0).layers_in_flight == 11 * 2  # two a buffer, and no more
    # Chunks so large that less than a layer is in flight: one layer's keys are copied whole all the same.
    large = prefill(kind, 65536, chunk=16384)
    assert large.layers_in_flight < 1
    assert large.regrown_bytes(131072) == 131072 * (65536 - 16384) // 32
