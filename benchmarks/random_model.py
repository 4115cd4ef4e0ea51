"""A Hugging Face folder with a real model's shapes and random weights, for benchmarks that time bytes and not answers.

python benchmarks/random_model.py qwen OUT      Qwen2.5-1.5B's shapes, untied, bfloat16, 3.6 GB
python benchmarks/random_model.py smol OUT      SmolLM2-135M's shapes, untied, bfloat16, 0.3 GB
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

SHAPES = {
    "qwen": {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "rope_theta": 1e6},
    "smol": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 1e5},
}  # fmt: skip


def make(name: str, folder: Path) -> Path:
    """Writes the folder unless it is there, tensor by tensor, so that 3.6 GB never lie in memory at once."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[name]
    tensors = dict(tensor_shapes(shape))
    header, offset = {}, 0
    for key, dims in tensors.items():
        nbytes = 2 * int(np.prod(dims))
        header[key] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dims in tensors.values():
            values = rng.standard_normal(int(np.prod(dims)), dtype=np.float32) * np.float32(0.02)
            (values.view(np.uint32) >> 16).astype(np.uint16).tofile(file)
    config = {**shape, "architectures": ["ForCausalLM"], "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
              "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
              "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer(folder)
    return folder


def tensor_shapes(c: dict[str, int]):
    d, ffn, head = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
    kv = c["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (d,)
        yield p + "post_attention_layernorm.weight", (d,)
        for n, rows in (("q", d), ("k", kv), ("v", kv)):
            yield f"{p}self_attn.{n}_proj.weight", (rows, d)
            if c["model_type"] == "qwen2":
                yield f"{p}self_attn.{n}_proj.bias", (rows,)
        yield p + "self_attn.o_proj.weight", (d, d)
        yield p + "mlp.gate_proj.weight", (ffn, d)
        yield p + "mlp.up_proj.weight", (ffn, d)
        yield p + "mlp.down_proj.weight", (d, ffn)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (c["vocab_size"], d)


def tokenizer(folder: Path) -> None:
    """mlx-lm insists on one; a byte-level vocabulary without merges is enough to be loaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
