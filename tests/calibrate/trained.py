"""Tiny models that have learned a little: for what does not show on random weights.

Trained for a few seconds on the built-in text, on the CPU, and saved as Hugging Face folders. Some channels are then
made outliers as those of grown models are: a norm's weight is larger there, and the columns that read it smaller, which
changes no output. Every test of this folder has the fixtures `trained_dense` and `trained_experts` (conftest.py), and
others import them from here. They are trained once a session, and must be left as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlxquant.measure.corpus import load_corpus
from mlxquant.measure.windows import encode
from mlxquant.run.text import Text
from tests import tiny

WIDTH, FFN, EXPERTS, EXPERT_FFN, STEPS, BATCH, LENGTH = 128, 256, 8, 64, 100, 8, 64
WARMUP, OUTLIERS, FACTOR = 20, 4, 4.0

CONFIG: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "vocab_size": tiny.VOCAB, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "max_position_embeddings": 2048, "torch_dtype": "bfloat16", "hidden_act": "silu",
    "bos_token_id": 0, "eos_token_id": 0, "attention_bias": False,
}  # fmt: skip
DENSE = CONFIG | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
MOE = CONFIG | {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": EXPERTS,
    "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_FFN, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def trained_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3 of two layers, 128 wide, in bfloat16."""
    return train(tmp_path_factory.getbasetemp() / "trained-dense", DENSE)


@pytest.fixture(scope="session")
def trained_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_moe of two layers, 128 wide, with eight experts of 64, two for each token, in bfloat16."""
    return train(tmp_path_factory.getbasetemp() / "trained-experts", MOE)


def train(folder: Path, config: dict[str, Any]) -> Path:
    """A Hugging Face folder, the same on each run on one machine. One that is there already is not trained again."""
    from mlx_lm.utils import _get_classes

    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    tiny.tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({}, folder / "model.safetensors")
    tokens = np.array(encode(Text.load(folder), load_corpus("builtin").text[:300_000]), np.int32)
    mx.random.seed(0)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    _learn(model, tokens)
    _save(model, folder)
    return folder


def _learn(model: nn.Module, tokens: np.ndarray) -> list[float]:
    rng, losses = np.random.default_rng(0), []
    rate = optim.join_schedules([optim.linear_schedule(0, 3e-3, WARMUP), optim.cosine_decay(3e-3, STEPS)], [WARMUP])
    optimizer = optim.AdamW(learning_rate=rate, betas=[0.9, 0.95], weight_decay=0.1)
    for layer in model.layers:
        if "gate" in layer.mlp:  # a router that learns without a second loss soon asks the same two experts
            layer.mlp.gate.freeze()

    def loss(model: nn.Module, batch_BL: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(batch_BL[:, :-1]), batch_BL[:, 1:]).mean()

    step = nn.value_and_grad(model, loss)
    for _ in range(STEPS):
        starts = rng.integers(0, len(tokens) - LENGTH - 1, BATCH)
        value, grads = step(model, mx.array(tokens[starts[:, None] + np.arange(LENGTH + 1)]))
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    return losses


def _save(model: nn.Module, folder: Path) -> None:
    from mlx.utils import tree_flatten

    tensors = {name: np.array(values) for name, values in tree_flatten(model.parameters())}
    for name in [name for name in tensors if ".switch_mlp." in name]:
        for expert, values in enumerate(tensors.pop(name)):
            tensors[name.replace("switch_mlp", f"experts.{expert}")] = values
    stand_out(tensors)
    save_file({name: np.ascontiguousarray(w).astype(tiny.NUMPY["bfloat16"]) for name, w in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip


def stand_out(tensors: dict[str, np.ndarray]) -> None:
    """Makes outliers of some channels behind each norm."""
    readers = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}
    for norm in [name for name in tensors if name.split(".")[-2] in readers]:
        channels = np.random.default_rng(len(norm)).choice(WIDTH, OUTLIERS, replace=False)
        at, part = norm.rsplit(".", 2)[:2]
        tensors[norm][channels] *= FACTOR
        for name in tensors:
            if name.startswith(f"{at}.{readers[part]}.") and tensors[name].ndim == 2 and not _is_last(name):
                tensors[name][:, channels] /= FACTOR


def _is_last(name: str) -> bool:
    return name.endswith(("o_proj.weight", "down_proj.weight"))
