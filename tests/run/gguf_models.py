"""Tiny models of every family that GGUF has a place for, with settings that a wrong key, norm or window would show in.

Beside tests/tiny.py's, made for reading and writing, these are made for running: more layers than a pattern is long,
windows shorter than the prompt, an epsilon, soft caps and scales that count, a vocabulary whose tokens all end at a
character (llama.cpp's server leaves out the probabilities of a token that does not), and an end token that is never
the likeliest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from mlxquant.convert.gguf_job import open_job
from mlxquant.convert.to_gguf import to_gguf
from mlxquant.files.imatrix import Imatrix
from mlxquant.plan.gguf_types import type_settings
from tests import tiny
from tests.families.gguf_checkpoints import gpt_oss_mxfp4
from tests.tiny_families import SPARSE, VOCAB, moe, qwen3_next, weight

PROMPT = [int(i) for i in np.random.default_rng(1).integers(1, VOCAB, 48)]
EPSILON = 0.1
SHARPENED = ("q_proj.weight", "k_proj.weight", "qkv_proj.weight")


@dataclass(frozen=True)
class Model:
    """`config`: what the checkpoint says beside the family's own. `matters`: other values for entries of config.json,
    each of which must show in the logits, or agreement would prove nothing about it. `bound`: nats that llama.cpp may
    be away from our log-probabilities. `build`: what makes the tensors, where it is not the family's own."""

    family: str
    layers: int = 2
    config: dict[str, Any] = field(default_factory=dict)
    matters: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    bound: float = 5e-5
    build: tiny.Build | None = None


ROPE = {"rope_theta": 2e4}
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 32}
GELU_BOUND = 5e-3  # ggml looks gelu up in a table of float16
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LONG = {
    "type": "longrope",
    "long_factor": [1.0 + i / 4 for i in range(16)],
    "short_factor": [1.0] * 16,
}


def published_gpt_oss(rng: np.random.Generator, width: int, layers: int, tied: bool) -> Any:
    """As OpenAI publishes it: codes and scales, gate and up interleaved."""
    config, tensors = gpt_oss_mxfp4(rng, width, layers, tied)
    for name, like in tensors.items():
        if name.endswith("_blocks"):
            tensors[name] = rng.integers(0, 256, like.shape, np.uint8)
        elif name.endswith("_scales"):
            tensors[name] = rng.integers(120, 124, like.shape, np.uint8)
        elif name.endswith("proj_bias"):
            tensors[name] = weight(rng, *like.shape)
    return config, tensors


GEMMA3: dict[str, Any] = {
    "tied": True,
    "config": GEMMA | {"sliding_window": 16, "rope_theta": 1e6, "rope_local_base_freq": 5e4},
    "matters": {"sliding_window": 64, "rope_theta": 2e4, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 64},
    "bound": GELU_BOUND,
}
MODELS = {
    "llama": Model("llama", config={"rope_theta": 5e4}, matters=ROPE),
    "llama-tied": Model("llama", tied=True),
    "llama-llama3": Model("llama", config={"rope_scaling": LLAMA3}, matters={"rope_scaling": None}),
    "llama-linear": Model("llama", config={"rope_scaling": LINEAR}, matters={"rope_scaling": None}),
    "llama-yarn": Model("llama", config={"rope_scaling": YARN}, matters={"rope_scaling": None}),
    "mistral": Model("mistral", matters=ROPE),
    "mixtral": Model("mixtral", config={"rope_theta": 5e4}, matters=ROPE | {"num_experts_per_tok": 1}),
    "qwen2": Model("qwen2", tied=True, config={"rope_theta": 1e6}, matters=ROPE),
    "qwen2-yarn": Model("qwen2", config={"rope_scaling": YARN}, matters={"rope_scaling": None}),
    "qwen2_moe": Model(
        "qwen2_moe",
        config={"norm_topk_prob": False},
        matters=ROPE | {"num_experts_per_tok": 1},  # stock mlx-lm never normalizes
    ),
    "qwen3": Model("qwen3", tied=True, matters=ROPE),
    "qwen3-yarn": Model("qwen3", config={"rope_scaling": YARN}, matters={"rope_scaling": None}),
    "qwen3_moe": Model(
        "qwen3_moe",
        matters=ROPE | {"norm_topk_prob": False, "num_experts_per_tok": 1},
        # llama.cpp has experts in every layer.
        build=moe("qwen3_moe", "Qwen3MoeForCausalLM", qk_norm="head", mlp_only_layers=[], **SPARSE),
    ),
    "qwen3_next": Model(
        "qwen3_next",
        4,
        config={"rms_norm_eps": 1e-6},  # llama.cpp normalizes q and k of a delta net with it too, others with 1e-6
        matters=ROPE | {"num_experts_per_tok": 1, "partial_rotary_factor": 0.5},
        build=partial(qwen3_next, key=32),  # llama.cpp's keys are as wide as its values
    ),
    "gemma": Model("gemma", config=GEMMA, bound=GELU_BOUND),
    "gemma2": Model(
        "gemma2",
        4,
        # Stock mlx-lm has no windows here: no agreement beyond one.
        config=GEMMA | {"sliding_window": 4096, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0},
        matters={
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 64,
        },
        bound=GELU_BOUND,
    ),
    "gemma3_text": Model("gemma3_text", 7, **GEMMA3),
    "gemma3": Model("gemma3", 7, **GEMMA3),
    "gemma3-linear": Model(
        "gemma3_text", 7, GEMMA3["config"] | {"rope_scaling": LINEAR}, {"rope_scaling": None}, True, GELU_BOUND
    ),
    "phi3": Model("phi3", config={"original_max_position_embeddings": 2048}, matters=ROPE),
    "phi3-long": Model(
        "phi3",
        config={"rope_scaling": LONG, "original_max_position_embeddings": 64, "max_position_embeddings": 512},
        matters={"rope_scaling": None},
    ),
    "phi3-partial": Model(
        "phi3",
        config={"partial_rotary_factor": 0.5, "original_max_position_embeddings": 2048},
        matters={"partial_rotary_factor": 1.0},
    ),
    "smollm3": Model(
        "smollm3", 5, tied=True, config={"no_rope_layer_interval": 4}, matters=ROPE | {"no_rope_layer_interval": 2}
    ),
    "olmo2": Model("olmo2", matters=ROPE),
    "granite": Model(
        "granite",
        matters=ROPE
        | {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0},
    ),
    "gpt_oss": Model(
        "gpt_oss",
        4,
        config={"sliding_window": 16, "rope_theta": 150000.0, "rope_scaling": YARN | {"truncate": False}},
        matters=ROPE | {"sliding_window": 64, "num_experts_per_tok": 1, "rope_scaling": None},
    ),
}  # Its experts are quantized in the checkpoint itself.
MXFP4 = replace(MODELS["gpt_oss"], build=published_gpt_oss)


def make(folder: Path, model: Model, **options: Any) -> Path:
    """The checkpoint, in float32."""
    made = {"layers": model.layers, "tied": model.tied, "dtype": "float32", "build": model.build}
    tiny.make(folder, model.family, **made | options)
    configure(folder, {"rms_norm_eps": EPSILON} | model.config)
    plain_tokenizer(folder)
    sharpen(folder)
    return folder


def changed(folder: Path, to: Path, **config: Any) -> Path:
    """The same weights under another config.json; an entry of None is taken out."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).symlink_to(file)
    (to / "config.json").unlink()
    (to / "config.json").write_text((folder / "config.json").read_text())
    configure(to, config)
    return to


def configure(folder: Path, entries: Mapping[str, Any]) -> None:
    """Sets entries of config.json, or of its text_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    at = config.get("text_config", config)
    at |= entries
    for key in [key for key, value in at.items() if value is None]:
        del at[key]
    path.write_text(json.dumps(config))


def write(folder: Path, out: Path, type_name: str = "F32", imatrix: Imatrix | None = None) -> Path:
    """The folder as a GGUF file, as `mlxquant convert --type` writes it."""
    job = open_job(folder, None, type_settings(type_name), imatrix=imatrix, pre="gpt-2")
    return to_gguf(job.rows, job.plan, job.metadata, out)[0]


def plain_tokenizer(folder: Path) -> None:
    """Every token is two letters; the first is the end of a text."""
    letters = [chr(ord("A") + i) for i in range(26)] + [chr(ord("a") + i) for i in range(26)]
    pairs = [a + b for a in letters for b in letters]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:1]
    end = tokenizer["added_tokens"][0]["content"]
    vocabulary = [end, *letters, *pairs][:VOCAB]
    tokenizer["model"] |= {"vocab": {token: i for i, token in enumerate(vocabulary)}, "merges": ["A A"]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def sharpen(folder: Path) -> None:
    """Attention that looks at few places, so that positions show; and a logit of 0 for token 0, which is never the
    highest, so that answers are as long as was asked."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(SHARPENED):
            tensors[name] *= 3
    heads = [n for n in tensors if n.endswith("lm_head.weight")] or [n for n in tensors if "embed_tokens" in n]
    for name in heads:
        tensors[name][0] = 0
    save_file(tensors, path, metadata={"format": "pt"})
