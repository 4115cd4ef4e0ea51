"""Small repos for the stand-in Hub: real safetensors files of random numbers, no tokenizer training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    width, ffn, kv = 64, 128, 32
    shapes = {
        "model.embed_tokens.weight": (256, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (256, width),
    }
    for i in range(2):
        p = f"model.layers.{i}."
        shapes |= {f"{p}self_attn.{n}_proj.weight": (kv if n in "kv" else width, width) for n in "qkvo"}
        shapes |= {f"{p}mlp.{n}_proj.weight": (ffn, width) for n in ("gate", "up")}
        shapes |= {f"{p}mlp.down_proj.weight": (width, ffn)}
        shapes |= {f"{p}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    return {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


def _beside(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def single(folder: Path, seed: int = 0) -> Path:
    _beside(folder)
    save_file(tensors(seed), folder / "model.safetensors")
    return folder


def sharded(folder: Path, seed: int = 0) -> Path:
    """Two shards and an index."""
    _beside(folder)
    everything = tensors(seed)
    names = sorted(everything)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({n: everything[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in everything.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
