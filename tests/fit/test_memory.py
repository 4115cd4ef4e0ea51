"""What a run takes against limits; advice that helps; llama.cpp's buffers against what it logs."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxquant.families.shape import ModelShape
from mlxquant.fit import llamacpp
from mlxquant.fit.cache import cache_of
from mlxquant.fit.memory import advice, limit_bytes, longest_context, need, verdict
from mlxquant.fit.values import Asked, Level, Need
from mlxquant.machine import described
from mlxquant.units import GIB
from tests.run import gguf_models

GB = 10**9
LLAMA = ModelShape.from_config({
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
})  # fmt: skip
GEMMA = ModelShape.from_config({
    "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
    "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 1024,
})  # fmt: skip
M2, M2_8 = described("M2 16GB"), described("M2 8GB")


def run(context_tokens=8192, kv_bits=None, chunk_tokens=2048):
    return Asked(context_tokens, kv_bits, chunk_tokens)


def level(weight_bytes, form="mlx", largest=500_000_000):
    return Level("4-bit", form, (), weight_bytes, weight_bytes, largest, weight_bytes, 8 * GB)


def advised(at, shape, machine, asked):
    cache = cache_of(shape, kv_bits=asked.kv_bits)
    now = need(at, cache, shape, machine, asked.context_tokens, asked.chunk_tokens)
    return advice(at, now, cache, shape, machine, asked)


def needing(total, largest=0):
    return Need(1, 1, total, 0, 0, largest)


def test_verdicts_stand_at_nine_tenths_and_95_hundredths_of_the_working_set():
    working = M2.working_set_bytes
    assert limit_bytes(M2) == int(0.95 * working)
    assert verdict(needing(int(0.899 * working)), M2) == "fits"
    assert verdict(needing(int(0.901 * working)), M2) == "tight"
    assert verdict(needing(int(0.9499 * working)), M2) == "tight"
    assert verdict(needing(int(0.951 * working)), M2) == "no"
    assert verdict(needing(GB, M2.max_buffer_bytes), M2) == "fits"
    assert verdict(needing(GB, M2.max_buffer_bytes + 1), M2) == "no"


def test_a_limit_raised_by_hand_leaves_the_system_its_share():
    """iogpu.wired_limit_mb may be set up to RAM and beyond: the process and the system still need theirs."""
    raised = replace(M2, working_set_bytes=16 * GIB)
    assert limit_bytes(raised) == 16 * GIB - int(0.2 * 16 * GIB) - 500_000_000
    large = replace(described("M3 Ultra 512GB"), working_set_bytes=512 * GIB)
    assert limit_bytes(large) == int(0.95 * 512 * GIB)  # 5 % of it are more than the system's 5 GiB
    assert limit_bytes(replace(raised, device="cpu")) == int(0.95 * 16 * GIB)


@pytest.mark.parametrize("mac", ["M1 8GB", "M2 16GB", "M4 24GB", "M4 32GB", "M4 Pro 48GB", "M4 Max 128GB"])
def test_a_limit_as_macos_sets_it_is_what_binds(mac):
    machine = described(mac)
    assert limit_bytes(machine) == int(0.95 * machine.working_set_bytes)


def test_parts_of_a_need():
    found = need(level(4_500_000_000), cache_of(LLAMA), LLAMA, M2, 8192, 2048)
    assert (found.context_tokens, found.chunk_tokens) == (8192, 2048)
    assert found.weight_bytes == 4_500_000_000
    assert found.cache_bytes == 131072 * 8192
    assert found.largest_buffer_bytes == 500_000_000
    # Keys of 8 heads and 128 columns in two bytes are the largest array of a million tokens.
    longer = need(level(4_500_000_000), cache_of(LLAMA), LLAMA, M2, 2**20, 2048)
    assert longer.largest_buffer_bytes == 2**20 * 8 * 128 * 2
    # Quantized, attention makes scores: heads x chunk x context in two bytes.
    small = need(level(4_500_000_000), cache_of(LLAMA, kv_bits=8), LLAMA, M2, 2**20, 2048)
    assert small.largest_buffer_bytes == 32 * 2048 * 2**20 * 2


@given(
    weights=st.integers(1, 40), ram=st.sampled_from([8, 16, 32, 64, 128]), chunk=st.sampled_from([256, 512, 2048]),
    form=st.sampled_from(["mlx", "gguf"]), bits=st.sampled_from([None, 8]), shape=st.sampled_from([LLAMA, GEMMA]),
)  # fmt: skip
def test_the_longest_context_fits_and_no_longer_one(weights, ram, chunk, form, bits, shape):
    machine, cache = described(ram=f"{ram}GB"), cache_of(shape, kv_bits=bits)
    stored = level(weights * GB, form)

    def fits(tokens):
        return verdict(need(stored, cache, shape, machine, tokens, chunk), machine) != "no"

    longest = longest_context(stored, cache, shape, machine, chunk, 2**20)
    assert longest == 0 or fits(longest)
    assert longest == 2**20 or not fits(longest + 1)


def test_advice_helps_by_its_numbers():
    lines = advised(level(8 * GB), LLAMA, M2, run(32768))
    assert verdict(need(level(8 * GB), cache_of(LLAMA), LLAMA, M2, 32768, 2048), M2) == "no"
    context = int(next(line for line in lines if line.startswith("--context")).split()[1])
    assert verdict(need(level(8 * GB), cache_of(LLAMA), LLAMA, M2, context, 2048), M2) != "no"
    raised = next(line for line in lines if "iogpu.wired_limit_mb=" in line)
    assert "panic" in raised
    assert "reboot" in raised
    mib = int(re.search(r"mb=([0-9]+)", raised)[1])
    after = replace(M2, working_set_bytes=mib * 2**20, max_buffer_bytes=mib * 2**20)
    assert verdict(need(level(8 * GB), cache_of(LLAMA), LLAMA, after, 32768, 2048), after) != "no"
    weights = next(line for line in lines if line.startswith("a level of"))
    room = float(re.search(r"at most ([0-9.]+) GB", weights)[1])
    assert verdict(need(level(int((room - 0.01) * GB)), cache_of(LLAMA), LLAMA, M2, 32768, 2048), M2) != "no"
    # Float keys are read by a fused kernel; quantized ones make scores, which only a smaller chunk makes small.
    bits = next(line for line in lines if line.startswith("--kv-bits 8 --prefill-step"))
    chunk = int(bits.split()[3])
    eight = need(level(8 * GB), cache_of(LLAMA, kv_bits=8), LLAMA, M2, 32768, chunk)
    assert bits.endswith({"fits": "then it fits", "tight": "then it is tight"}[verdict(eight, M2)])


def test_advice_says_why_bits_do_not_help():
    many = replace(LLAMA, kv_heads=1)  # a cache so small that scores outweigh it in any chunk
    (line,) = [a for a in advised(level(11_600_000_000), many, M2, run(4096, chunk_tokens=256)) if "--kv-bits" in a]
    assert line.startswith("--kv-bits 8 does not help: ")
    assert "scores" in line
    mla = ModelShape.from_config({"model_type": "deepseek_v3", "vocab_size": 1000})
    assert "--kv-bits 8 does not help: no layer's cache can be quantized" in advised(level(12 * GB), mla, M2, run())
    # llama.cpp's flash attention reads quantized keys: there it saves what it saves.
    gguf = advised(level(10 * GB, "gguf"), LLAMA, M2, run(16384))
    assert [line for line in gguf if line.startswith("--kv-bits 8 saves")]
    assert not [line for line in gguf if "--prefill-step" in line]


def test_advice_offers_a_smaller_chunk_where_scores_are_large():
    """Heads of 256 columns: scores of the whole context, as long as the chunk."""
    (line,) = [a for a in advised(level(10 * GB), GEMMA, M2, run(32768)) if "--prefill-step" in a]
    chunk = int(line.split()[1])
    before = need(level(10 * GB), cache_of(GEMMA), GEMMA, M2, 32768, 2048)
    after = need(level(10 * GB), cache_of(GEMMA), GEMMA, M2, 32768, chunk)
    assert chunk in (1024, 512, 256)
    assert f"saves {(before.total_bytes - after.total_bytes) / GB:.1f}"[:9] in line


def test_a_buffer_that_is_too_large_is_named():
    big = level(5 * GB, largest=M2.max_buffer_bytes + 1)
    lines = advised(big, LLAMA, M2, run())
    assert lines[0].startswith("one buffer takes "), lines
    assert not any("wired_limit" in line for line in lines), "it does not grow with the limit"


def test_nothing_is_advised_that_does_not_help():
    """Weights alone are beyond RAM: neither context, chunk nor a raised limit helps, only fewer weights."""
    (line,) = advised(level(40 * GB), LLAMA, M2, run(512))
    assert line.startswith("a level of at most 11")
    assert not advised(level(4 * GB), LLAMA, M2, run(512, kv_bits=8))


def test_older_macos_is_named_where_the_answer_differs():
    """16 GB: 11.84 GiB under macOS 26, 10.67 GiB under macOS 15."""
    assert advised(level(9_900_000_000), LLAMA, M2, run(4096)) == ["under macOS 15 or before: it does not fit"]
    assert not advised(level(8 * GB), LLAMA, M2, run(4096))
    assert not [a for a in advised(level(10 * GB), LLAMA, M2_8, run(4096)) if a.startswith("under macOS")]


SERVER = """
import os, sys, urllib.request, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.port, p.verbosity = sys.argv[1], int(sys.argv[2]), 1, 0, 4
p.warmup = p.fit_params = False
p.cpuparams.n_threads, p.n_gpu_layers, p.no_op_offload = 1, 0, True
if sys.argv[3] == "8":
    p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_Q8_0
server = xllamacpp.Server(p)
urllib.request.urlopen(server.listening_address + "/slots", timeout=120).read()
os._exit(0)
"""


def logged(path, context, bits):
    """(MiB of all caches, MiB of the compute buffer), as llama.cpp says in its log."""
    command = [sys.executable, "-c", SERVER, str(path), str(context), str(bits)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    sizes = re.findall(r"(KV|RS|compute) buffer size = +([0-9.]+) MiB", done.stdout + done.stderr)
    caches = sum(float(mib) for kind, mib in sizes if kind != "compute")
    return caches, sum(float(mib) for kind, mib in sizes if kind == "compute")


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "qwen3_next", "mixtral"])
def test_what_llama_cpp_logs(family, tmp_path):
    """Caches to the digit that is logged, whole or with windows, quantized, and states. The compute buffer at most a
    quarter off; of logits llama-server keeps those of few tokens, which are none in so small a vocabulary."""
    folder = gguf_models.make(tmp_path / family, gguf_models.MODELS[family])
    path = gguf_models.write(folder, tmp_path / "model.gguf", "F16")
    shape = ModelShape.from_config(json.loads((folder / "config.json").read_text()))
    for context, bits in ((1000, None), (4096, 8)):
        caches, compute = logged(path, context, bits)
        assert llamacpp.cache_bytes(shape, context, bits) / 2**20 == pytest.approx(caches, abs=0.011)
        assert llamacpp.compute_bytes(shape, context) / 2**20 == pytest.approx(compute, rel=0.25)


def test_a_gguf_level_needs_what_llama_cpp_takes():
    """A mask over 8192 tokens and the logits of 512, as llama-perplexity keeps them."""
    found = need(level(4_900_000_000, "gguf"), cache_of(LLAMA), LLAMA, M2, 8192, 2048)
    assert found.scratch_bytes == 2 * 512 * 8192 + 4 * 512 * 128256
    assert found.cache_bytes == 8192 * 131072
    assert found.chunk_tokens == 512
    small = need(level(4_900_000_000, "gguf"), cache_of(LLAMA, kv_bits=8), LLAMA, M2, 8192, 2048)
    assert small.cache_bytes == 8192 * 131072 * 17 // 32
    four = need(level(4_900_000_000, "gguf"), cache_of(LLAMA, kv_bits=4), LLAMA, M2, 8192, 2048)
    assert four.cache_bytes == 8192 * 131072 * 9 // 32
