"""config.json as stock mlx-lm reads it: where it looks for a setting, and where newer transformers put it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxquant.errors import SourceError
from mlxquant.tensors import FLOAT_CODES

# Families whose text_config alone is asked whether embeddings are tied.
_TIED_INSIDE = ("qwen3_5", "qwen3_5_moe", "gemma4", "gemma4_unified", "qwen3_vl", "mistral3")
# Families whose vocabulary is as large as the root says.
_VOCABULARY_OUTSIDE = ("gemma3", "gemma4", "gemma4_unified")


def mlx_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with what stock mlx-lm would miss written where it looks; keys that are there are kept.

    transformers >= 5 writes rope_parameters = {rope_theta, rope_type, ...}, which most families of mlx-lm do
    not read: a llama would run with rope_theta 10000 without a word, a qwen3_moe would not load. gemma3 and
    gemma4 take their vocabulary from the root only. Raises SourceError for a text_config that is no object.
    """
    made = _flat_rope(config.get("rope_parameters")) | dict(config)
    if config.get("model_type") == "glm4_moe":  # null is what it takes, and transformers 5 leaves it out
        made.setdefault("rope_scaling", None)
    if (inner := _inner(config)) is not None:
        made["text_config"] = _flat_rope(inner.get("rope_parameters")) | dict(inner)
        if config.get("model_type") in _TIED_INSIDE and "tie_word_embeddings" in config:
            made["text_config"].setdefault("tie_word_embeddings", config["tie_word_embeddings"])
        if config.get("model_type") in _VOCABULARY_OUTSIDE and "vocab_size" in inner:
            made.setdefault("vocab_size", inner["vocab_size"])
    return made


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """mlx_config with text_config merged over the root: one flat mapping, whatever the source nests."""
    made = mlx_config(config)
    merged = made | dict(_inner(made) or {})
    first = ("model_type", "vocab_size") if made.get("model_type") in _VOCABULARY_OUTSIDE else ("model_type",)
    return merged | {key: made[key] for key in first if key in made}


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    inner = config.get("text_config")
    if inner is not None and not isinstance(inner, Mapping):
        raise SourceError(f"config.json: text_config is {inner!r:.60}, expected an object")
    return inner


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype code that config.json, or its text_config, names: transformers before 5 writes `torch_dtype`, since 5
    `dtype`."""
    for block in (config, _inner(config) or {}):
        for key in ("torch_dtype", "dtype"):
            named = block.get(key)
            if isinstance(named, str) and named in FLOAT_CODES:
                return FLOAT_CODES[named]
    return None


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether experts are stored as MXFP4, as gpt-oss is published: which mlx-lm and llama.cpp read as it is."""
    scheme = config.get("quantization_config")
    return isinstance(scheme, Mapping) and scheme.get("quant_method") == "mxfp4"


def _flat_rope(rope: Any) -> dict[str, Any]:
    """The flat keys that stand for rope_parameters; none when it is absent or of a kind we do not know."""
    if not isinstance(rope, Mapping):
        return {}
    if isinstance(full := rope.get("full_attention"), Mapping):  # gemma3: one set for each kind of layer
        local, extra = rope.get("sliding_attention"), {}
        if isinstance(local, Mapping) and "rope_theta" in local:
            extra = {"rope_local_base_freq": local["rope_theta"]}
        return _flat_rope({k: v for k, v in full.items() if k != "full_attention"}) | extra
    flat = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    if rope.get("rope_type", "default") != "default":
        flat["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return flat
