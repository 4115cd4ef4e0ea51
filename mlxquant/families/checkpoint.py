"""The Hugging Face checkpoint that a config.json stands for: every tensor's name, shape and dtype, without a download.

The tables of mlx_modules.py say what each tensor of the MLX model is made of. layout() reads them towards the model;
here they are read the other way, so that no name is written twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mlxquant.errors import SourceError
from mlxquant.families.mlx_config import is_mxfp4, stated_dtype, text_config
from mlxquant.families.mlx_layout import all_flags, expected, published
from mlxquant.families.mlx_modules import dimensions, made_of, sizes
from mlxquant.families.shape import ModelShape
from mlxquant.tensors import TensorSpec

_MXFP4_GROUP = 32
# DeepSeek-V3 has 45,000 tensors; ten times as many take seconds, layers and experts at their most would take hours.
_MOST_TENSORS = 500_000

# What one array adds to a safetensors header beside its name, bytes, and one tensor to a GGUF header.
_ENTRY_BYTES, _INFO_BYTES = 74, 40
# What one token adds to a GGUF header, bytes: its text and its length, its kind, its merge or its score. Of 19
# vocabularies those with merges take 35 to 61 (some list more than two merges a token), those without 20 to 27.
_TOKEN_BYTES_WITH_MERGES, _TOKEN_BYTES = 39, 23
_PIECES = ("llama", "mistral", "mixtral", "phi3")  # with the vocabulary of Llama 2 and its like: 32,000 to 32,768
_MOST_PIECES = 33_000
_KEYS_BYTES = 4_000  # the architecture's keys, special tokens, a chat template


def checkpoint(config: Mapping[str, Any], dtype: str | None = None) -> dict[str, TensorSpec]:
    """{name: spec} of all that the text model is made of, in its order, as make_plan and plan_checkpoint take it.

    `dtype`: a dtype code for all tensors; None: config.json's, else BF16. What a conversion leaves out (vision towers,
    multi-token prediction, tied heads stored twice) is not listed. A checkpoint published in FP8 is listed as the
    floats that it stands for; gpt-oss's experts as MXFP4 where config.json says so, else as floats in MLX's layout.

    Raises SourceError (a key is missing or wrong) and UnsupportedError (an unknown family).
    """
    shape, code = ModelShape.from_config(config), dtype or stated_dtype(config) or "BF16"
    numbers = dimensions(shape)
    specs: dict[str, TensorSpec] = {}
    for row, _, source in expected(shape, _flags(config, shape), numbers):
        names, size = made_of(row, source, numbers)
        for name in (published(shape.module, name) for name in names):
            specs[name] = TensorSpec(name, size, code)
        if len(specs) > _MOST_TENSORS:
            found = f"{shape.layers} layers of {shape.experts} experts"
            raise SourceError(f"config.json: {found} are more than {_MOST_TENSORS:,} tensors, which no model has")
    return _with_mxfp4(specs) if shape.module == "gpt_oss" and is_mxfp4(config) else specs


def parameters(config: Mapping[str, Any]) -> int:
    """How many weights checkpoint(config) has, without naming each expert's."""
    shape = ModelShape.from_config(config)
    numbers = dimensions(shape)
    rows = expected(shape, _flags(config, shape), numbers)
    return sum(math.prod(sizes(row.dims, numbers)) for row, _, _ in rows if row.how != "embedding")


def header_bytes(form: str, vocab_size: int, names: Iterable[str], merges: bool = True) -> int:
    """What a model's files hold beside tensors, about.

    `form`: 'mlx' (`names`: all stored arrays, scales and biases among them) or 'gguf'. `merges`: see has_merges().

    Within 4 % for MLX. For GGUF within 1 % where the vocabulary has one merge a token, as Qwen's; up to 36 % too
    low where it lists more: 3 MB for Llama 3, 5 for gpt-oss, 6 for Gemma 4.
    """
    if form == "mlx":
        return sum(len(name) + _ENTRY_BYTES for name in names)
    per_token = _TOKEN_BYTES_WITH_MERGES if merges else _TOKEN_BYTES
    return vocab_size * per_token + sum(len(name) + _INFO_BYTES for name in names) + _KEYS_BYTES


def has_merges(config: Mapping[str, Any]) -> bool:
    """Whether the tokenizer is a byte-level BPE, as most are, rather than SentencePiece's pieces with scores: a guess,
    since config.json does not say. Gemma to 3 and small vocabularies of the first Llamas have pieces."""
    family, vocab = str(config.get("model_type")), text_config(config).get("vocab_size")
    small = family in _PIECES and type(vocab) is int and vocab <= _MOST_PIECES
    return not small and (not family.startswith("gemma") or family.startswith("gemma4"))


def _flags(config: Mapping[str, Any], shape: ModelShape) -> set[str]:
    stated = text_config(config).get("tie_word_embeddings")
    return all_flags(config, shape, head_present=not shape.tied and stated is not True)


def _with_mxfp4(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """gpt-oss as OpenAI published it: gate and up in one, codes and scales of 32 weights: see fused_experts.py."""
    made: dict[str, TensorSpec] = {}
    for spec in specs.values():
        at, _, part = spec.name.partition(".mlp.experts.")
        for one in _published(at + ".mlp.experts.", part, spec) if part else (spec,):
            made[one.name] = one
    return made


def _published(at: str, part: str, spec: TensorSpec) -> tuple[TensorSpec, ...]:
    """`part`: gate_proj.weight, ... up_proj adds nothing: it lies in gate_up_proj."""
    which, _, kind = part.partition("_proj.")
    if which == "up":
        return ()
    name, (experts, rows, *width) = at + {"gate": "gate_up_proj"}.get(which, f"{which}_proj"), spec.shape
    rows *= 2 if which == "gate" else 1
    if kind == "bias":
        return (TensorSpec(f"{name}_bias", (experts, rows), spec.dtype),)
    groups = width[0] // _MXFP4_GROUP
    return (
        TensorSpec(f"{name}_blocks", (experts, rows, groups, _MXFP4_GROUP // 2), "U8"),
        TensorSpec(f"{name}_scales", (experts, rows, groups), "U8"),
    )
