"""config.json as convert_hf_to_gguf.py sees it: through transformers, which fills in what is not there.

The script reads AutoConfig.from_pretrained(...).to_dict() (conversion/base.py, load_hparams), so that a silent config
means what transformers' class takes for granted, and what stock mlx-lm takes for granted is another matter. Facts of
transformers 5.23 (models/*/configuration_*.py, modeling_rope_utils.py); tests/families/test_gguf_keys.py compares the
tables below with the installed transformers, and their sum with what the script wrote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import SourceError, UnsupportedError

# Only what reaches a key. A family that has no head_dim here has one only where config.json gives it.
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
}  # fmt: skip
_QWEN2 = _LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
}  # fmt: skip
_QWEN2_MOE = _QWEN2 | {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4, "num_experts": 60,
}  # fmt: skip
_GEMMA = _LLAMA | {
    "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "max_position_embeddings": 8192,
}  # fmt: skip
_GEMMA2 = _GEMMA | {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "sliding_window": 4096,
}  # fmt: skip
_MISTRAL = _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL | {"rms_norm_eps": 1e-5, "num_experts_per_tok": 2, "num_local_experts": 8},
    "qwen2": _QWEN2,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "qwen3_moe": {k: v for k, v in _QWEN2_MOE.items() if k != "shared_expert_intermediate_size"} | {
        "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4, "moe_intermediate_size": 768,
        "num_experts_per_tok": 8, "num_experts": 128,
    },
    "qwen3_next": _QWEN2_MOE | {
        "num_hidden_layers": 48, "num_key_value_heads": 2, "head_dim": 256, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 10, "num_experts": 512,
    },
    "gemma": _GEMMA,
    "gemma2": _GEMMA2 | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": _GEMMA2 | {"vocab_size": 262208, "max_position_embeddings": 131072},
    "phi3": _LLAMA | {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    },
    "smollm3": _LLAMA | {
        "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 4, "max_position_embeddings": 32768,
    },
    "olmo2": _LLAMA | {"vocab_size": 50304, "rms_norm_eps": 1e-5},
    "granite": _LLAMA | {
        "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
    },
    "gpt_oss": {
        "num_hidden_layers": 36, "num_local_experts": 128, "vocab_size": 201088, "hidden_size": 2880,
        "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
        "sliding_window": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "num_experts_per_tok": 4,
    },
}  # fmt: skip
# The classes that derive a missing head_dim (transformers' __post_init__).
_DERIVES_HEAD_DIM = ("llama", "mistral")
_THETA = {"mixtral": 1e6, "smollm3": 2e6, "gpt_oss": 150000.0, "gemma3_text": 1e6}
_YARN_OF_GPT_OSS = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Hparams:
    """config.json with defaults. `rope`: the parameters of rotary embeddings, of full attention where layers differ,
    always with rope_type and rope_theta; `local_theta`: rope_theta of sliding layers."""

    model_type: str
    values: Mapping[str, Any]
    rope: Mapping[str, Any]
    local_theta: float | None

    def integer(self, name: str, low: int = 0) -> int:
        return whole(name, self.values.get(name), low)

    def number(self, name: str) -> float:
        return real(name, self.values.get(name))

    @property
    def head_dim(self) -> int:
        """Of every family but granite, which ignores the entry (conversion/granite.py)."""
        if self.values.get("head_dim") is not None and self.model_type != "granite":
            return self.integer("head_dim", 1)
        return self.integer("hidden_size", 1) // self.integer("num_attention_heads", 1)


def whole(name: str, value: Any, low: int = 0) -> int:
    """A config entry that GGUF keeps as a uint32. Raises SourceError for anything else."""
    if type(value) is not int or not low <= value < 2**32:
        raise SourceError(f"config.json: {name} is {value!r:.60}, expected a whole number from {low}")
    return value


def real(name: str, value: Any) -> float:
    """A config entry that GGUF keeps as a float32. Raises SourceError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 3.4e38:
        raise SourceError(f"config.json: {name} is {value!r:.60}, expected a finite number")
    return float(value)


def read_hparams(config: Mapping[str, Any], module: str) -> Hparams:
    """The config of one of the families that DEFAULTS knows; `module` is mlx-lm's name of it (gguf_table.py).

    An entry that is null counts as missing. Raises SourceError for one of another type than GGUF keeps."""
    inner = config.get("text_config") or {}
    if not isinstance(inner, Mapping):
        raise SourceError(f"config.json: text_config is {inner!r:.60}, expected an object")
    model_type = "mistral" if config.get("model_type") == "mistral" else module
    model_type = "gemma3_text" if model_type == "gemma3" else model_type
    given = _set(config) | _set(inner)
    # Under text_config it is transformers' class of the text part that fills in, over the root (base.py, TextModel).
    values = _set(config) | DEFAULTS[model_type] | _set(inner) if inner else DEFAULTS[model_type] | given
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    made = Hparams(model_type, values, {}, None)
    if model_type in _DERIVES_HEAD_DIM:
        values["head_dim"] = made.head_dim
    rope = _rope(model_type, inner if inner else config, values)
    local = _local_theta(inner if inner else config) if model_type == "gemma3_text" else None
    return Hparams(model_type, values, rope, local)


def _set(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _rope(model_type: str, config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters as transformers standardizes them from its own new form and from the old one, rope_scaling."""
    rope = _settings(config, "rope_parameters")
    old = _settings(config, "rope_scaling")
    if model_type == "gemma3_text":  # for its full attention alone
        rope = {"rope_type": "default", **_settings(rope, "full_attention"), **old}
    else:
        rope = old or rope
        rope = _settings(rope, "full_attention") or rope
    if not rope and model_type == "gpt_oss":
        rope = dict(_YARN_OF_GPT_OSS)
    rope.setdefault("rope_theta", values.get("rope_theta", _THETA.get(model_type, 10000.0)))
    rope.setdefault("rope_type", rope.get("type", "default"))
    factor = values.get("partial_rotary_factor", 0.25 if model_type == "qwen3_next" else None)
    if factor is not None:
        rope.setdefault("partial_rotary_factor", factor)
    if not isinstance(rope["rope_type"], str):
        raise SourceError(f"config.json: rope_type is {rope['rope_type']!r:.60}, expected a name such as 'llama3'")
    if model_type == "phi3":
        _phi3(rope, values)
    else:
        rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    if "mrope_section" in rope:
        raise UnsupportedError("config.json: mrope_section: rotary embeddings of images are not supported")
    return rope


def _phi3(rope: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Its long rope has had three names; the length that it was trained with stands beside rope_scaling, not in it."""
    rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    if rope["rope_type"] in ("su", "yarn"):
        rope["rope_type"] = "longrope"
    if rope["rope_type"] not in ("default", "longrope"):
        raise UnsupportedError(f"config.json: rope_type {rope['rope_type']!r:.60} is no phi3's, which has longrope")


def _local_theta(config: Mapping[str, Any]) -> float:
    sliding = _settings(_settings(config, "rope_parameters"), "sliding_attention")
    theta = sliding.get("rope_theta", config.get("rope_local_base_freq"))
    return real("rope_local_base_freq", 10000.0 if theta is None else theta)


def _settings(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object of config.json as a copy; empty when it is missing or null."""
    found = config.get(name)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise SourceError(f"config.json: {name} is {found!r:.60}, expected an object")
    return _set(found)


def longrope_attention_factor(hparams: Hparams) -> float:
    """By how much phi3's long rope scales queries and keys (conversion/phi.py, generate_extra_tensors)."""
    original = whole("original_max_position_embeddings", hparams.rope["original_max_position_embeddings"], 2)
    scale = hparams.integer("max_position_embeddings", 1) / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
