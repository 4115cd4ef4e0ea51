"""Tiny real checkpoints with random weights: what tests convert, run and break. Seconds to make, no network.

`make(folder, family)` writes a Hugging Face folder (config, safetensors, tokenizer, template) that stock mlx-lm loads.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

VOCAB = 512
NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make(
    folder: Path,
    family: str = "llama",
    *,
    width: int = 128,
    layers: int = 2,
    dtype: str = "bfloat16",
    tied: bool = False,
    seed: int = 0,
    **config: object,
) -> Path:
    """A folder with `layers` layers of `width` columns; `config` overrides entries of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    base, tensors = FAMILIES[family](rng, width, layers, tied)
    base |= {"torch_dtype": dtype, "vocab_size": VOCAB, "tie_word_embeddings": tied} | config
    save_file({k: v.astype(NUMPY[dtype]) for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(base, indent=2))
    tokenizer(folder)
    return folder


def tokenizer(folder: Path) -> None:
    """A byte-level BPE of VOCAB tokens trained on what every Python ships, with ChatML turns."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(topics.values(), trainer)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|endoftext|>",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "clean_up_tokenization_spaces": False,
                "chat_template": TEMPLATE,
            },
            indent=2,
        )
    )
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}))


def weight(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Heavy tails, as real weights have: rounding errors show."""
    return rng.standard_t(4, size=shape).astype(np.float32) * 0.05


def norm(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (1 + 0.1 * rng.normal(size=shape)).astype(np.float32)


def _attention(rng, tensors, p, width, heads, kv, hd, bias=False, qk_norm=False):
    for n, out in (("q", heads), ("k", kv), ("v", kv)):
        tensors[f"{p}self_attn.{n}_proj.weight"] = weight(rng, out * hd, width)
        if bias:
            tensors[f"{p}self_attn.{n}_proj.bias"] = weight(rng, out * hd)
    tensors[f"{p}self_attn.o_proj.weight"] = weight(rng, width, heads * hd)
    if qk_norm:
        tensors |= {f"{p}self_attn.{n}_norm.weight": norm(rng, hd) for n in "qk"}


def _dense(model_type: str, architecture: str, bias: bool = False, qk_norm: bool = False):
    def build(rng, width, layers, tied):
        heads, kv, hd, ffn = 4, 2, 32, 2 * width
        t = {"model.embed_tokens.weight": weight(rng, VOCAB, width), "model.norm.weight": norm(rng, width)}
        if not tied:
            t["lm_head.weight"] = weight(rng, VOCAB, width)
        for i in range(layers):
            p = f"model.layers.{i}."
            _attention(rng, t, p, width, heads, kv, hd, bias, qk_norm)
            for n, shape in (("gate", (ffn, width)), ("up", (ffn, width)), ("down", (width, ffn))):
                t[f"{p}mlp.{n}_proj.weight"] = weight(rng, *shape)
            t[f"{p}input_layernorm.weight"] = norm(rng, width)
            t[f"{p}post_attention_layernorm.weight"] = norm(rng, width)
        config = {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_size": width,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": hd,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        return config, t

    return build


FAMILIES = {
    "llama": _dense("llama", "LlamaForCausalLM"),
    "qwen2": _dense("qwen2", "Qwen2ForCausalLM", bias=True),
    "qwen3": _dense("qwen3", "Qwen3ForCausalLM", qk_norm=True),
}
