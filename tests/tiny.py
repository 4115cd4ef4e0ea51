"""Tiny real checkpoints with random weights: what tests convert, run and break. Seconds to make, no network.

`make(folder, family)` writes a Hugging Face folder (config, safetensors, tokenizer, template) that stock
mlx-lm loads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.tiny_families import ALWAYS_TIED, FAMILIES, NEVER_TIED, VOCAB, norm, weight

__all__ = ["ALWAYS_TIED", "FAMILIES", "NEVER_TIED", "VOCAB", "make", "norm", "tokenizer", "weight"]

NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Build = Callable[..., tuple[dict[str, Any], dict[str, np.ndarray]]]
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
    build: Build | None = None,
    **config: object,
) -> Path:
    """A folder with `layers` layers of `width` columns; `config` overrides entries of config.json. `build`: what makes
    the tensors, where it is not the family's own."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tied = (tied or family in ALWAYS_TIED) and family not in NEVER_TIED
    base, tensors = (build or FAMILIES[family])(rng, width, layers, tied)
    base |= {"torch_dtype": dtype, "vocab_size": VOCAB, "tie_word_embeddings": tied} | config
    stored = {k: v if v.dtype == np.uint8 else v.astype(NUMPY[dtype]) for k, v in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
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
