"""Tiny checkpoints for the layout of GGUF files: every family in Hugging Face's layout, with the same bits everywhere.

`make(folder, variant)` writes what scripts/oracle_layout.py gives to llama.cpp's converter and what the tests read.
Names and shapes are tests/tiny_families.py's; numbers come from integers alone (no mathematical library that could
round otherwise), are bfloat16 and span many binades, so that a wrong dtype on the way shows.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.tiny_families import EXPERTS, FAMILIES, HEADS, KV, SPARSE, VOCAB, Tiny, dense, gpt_oss, moe

WIDTH, LAYERS = 64, 2
Build = Callable[..., tuple[dict[str, Any], dict[str, np.ndarray]]]


def biased_llama(rng, width, layers, tied):
    """Biases everywhere, and heads wider than width / heads, as some Llamas have."""
    config, t = dense("llama", "LlamaForCausalLM", bias=True)(rng, width, layers, tied)
    for name in [n for n in t if ".q_" not in n and ".k_" not in n and ".v_" not in n and n.endswith("_proj.weight")]:
        t[name.replace(".weight", ".bias")] = np.zeros(t[name].shape[0], np.float32)
    return config | {"attention_bias": True, "mlp_bias": True}, t


def gpt_oss_floats(rng, width, layers, tied):
    """Gate and up interleaved in the columns of a transposed stack, as transformers dequantizes and saves gpt-oss."""
    config, t = gpt_oss(rng, width, layers, tied)
    ffn = config["intermediate_size"]
    for i in range(layers):
        at = f"model.layers.{i}.mlp.experts."
        for name in ("gate", "up", "down"):
            del t[f"{at}{name}_proj.weight"], t[f"{at}{name}_proj.bias"]
        t[f"{at}gate_up_proj"] = np.zeros((EXPERTS, width, 2 * ffn))
        t[f"{at}gate_up_proj_bias"] = np.zeros((EXPERTS, 2 * ffn))
        t[f"{at}down_proj"] = np.zeros((EXPERTS, ffn, width))
        t[f"{at}down_proj_bias"] = np.zeros((EXPERTS, width))
    return config, t


def gpt_oss_mxfp4(rng, width, layers, tied):
    """As OpenAI publishes it: codes and scales."""
    config, t = gpt_oss_floats(rng, width, layers, tied)
    for name in [n for n in t if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, out = t.pop(name).shape
        t[f"{name}_blocks"] = np.zeros((experts, out, inner // 32, 16), np.uint8)
        t[f"{name}_scales"] = np.zeros((experts, out, inner // 32), np.uint8)
    return config | {"quantization_config": {"quant_method": "mxfp4"}}, t


def fused_qwen2_moe(rng, width, layers, tied):
    """Experts as newer transformers keeps them in memory, gate above up."""
    config, t = FAMILIES["qwen2_moe"](rng, width, layers, tied)
    m = config["moe_intermediate_size"]
    for i in range(layers):
        at = f"model.layers.{i}.mlp.experts."
        for name in [n for n in t if n.startswith(at)]:
            del t[name]
        t[f"{at}gate_up_proj"] = np.zeros((EXPERTS, 2 * m, width))
        t[f"{at}down_proj"] = np.zeros((EXPERTS, width, m))
    return config, t


def phi3_narrow(rng, width, layers, tied):
    """Phi-4-mini: tied."""
    m = Tiny(rng, width, layers, True, "phi3", "Phi3ForCausalLM")
    m.root()
    for i in range(layers):
        p = f"model.layers.{i}."
        m.linear(f"{p}self_attn.qkv_proj", (HEADS + 2 * KV) * width // HEADS, width)
        m.linear(f"{p}self_attn.o_proj", width, width)
        m.linear(f"{p}mlp.gate_up_proj", 2 * m.ffn, width)
        m.linear(f"{p}mlp.down_proj", width, m.ffn)
        m.norms(p, "input_layernorm", "post_attention_layernorm")
    return m.done(head_dim=None, tie_word_embeddings=True)


_PLAIN = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_next", "gemma", "gemma2", "gemma3_text",
    "gemma3", "phi3", "smollm3", "olmo2", "granite",
)  # fmt: skip
VARIANTS: dict[str, Build] = {
    **{name: FAMILIES[name] for name in _PLAIN},
    # llama.cpp's qwen3moe has no dense layers, which tests/tiny_families.py puts into its own.
    "qwen3_moe": moe("qwen3_moe", "Qwen3MoeForCausalLM", qk_norm="head", mlp_only_layers=[], **SPARSE),
    "llama-biases": biased_llama,
    "gemma3_text-trimmed": FAMILIES["gemma3_text"],
    "phi3-tied": phi3_narrow,
    "qwen2_moe-fused": fused_qwen2_moe,
    "gpt_oss": gpt_oss_floats,
    "gpt_oss-mxfp4": gpt_oss_mxfp4,
}
TIED = ("qwen2", "smollm3", "gemma", "gemma2", "gemma3_text", "gemma3_text-trimmed", "gemma3", "phi3-tied")
TOKENS = {"gemma3_text-trimmed": VOCAB - 12}


def make(folder: Path, variant: str) -> Path:
    """config.json, model.safetensors, and as much of a tokenizer.json as says how many tokens there are."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = variant in TIED
    config, tensors = VARIANTS[variant](np.random.default_rng(0), WIDTH, LAYERS, tied)
    config = {"torch_dtype": "bfloat16", "vocab_size": VOCAB, "tie_word_embeddings": tied} | config
    save_file({n: numbers(n, v) for n, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    vocabulary = {f"t{i}": i for i in range(TOKENS.get(variant, VOCAB))}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


def numbers(name: str, like: np.ndarray) -> np.ndarray:
    """bfloat16 from 1e-5 to 2 of both signs, 1 + w of norms around 1 included; codes and scales for MXFP4."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("_scales"):
        return rng.integers(110, 130, like.shape, np.uint8)
    if like.dtype == np.uint8:
        return rng.integers(0, 256, like.shape, np.uint8)
    bits = ((0, 2), (110, 128), (0, 128))
    sign, exponent, fraction = (rng.integers(low, high, like.shape, np.uint16) for low, high in bits)
    if name.endswith("norm.weight"):  # around 0, as families that keep w of 1 + w have them: else refused as shifted
        exponent = np.minimum(exponent, 125).astype(np.uint16)
    return (sign << 15 | exponent << 7 | fraction).view(ml_dtypes.bfloat16)
