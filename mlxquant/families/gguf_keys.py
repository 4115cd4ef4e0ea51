"""config.json -> the key-value pairs of a GGUF file: the same keys, in the same order and of the same types, as
llama.cpp's convert_hf_to_gguf.py writes.

What each architecture says stands in tables; source: conversion/base.py (TextModel.set_gguf_parameters) and the class
of the family in conversion/*.py. Values are numpy scalars of their GGUF type, strings, booleans or arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf_general import general_keys
from mlxquant.families.gguf_hparams import Hparams, longrope_attention_factor, read_hparams, real, whole
from mlxquant.families.gguf_table import ARCHS, module_of_config

__all__ = ["architecture", "file_keys", "general_keys", "model_keys", "quantized_keys"]

Pairs = Iterator[tuple[str, Any]]
# Of the block formats; llama-quantize and the script both write it (gguf.GGML_QUANT_VERSION).
QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class Key:
    """`key` (below the architecture's name) = the config's `name` as a number of `kind`. Left out where the config
    has no such entry, and where `when` is "not zero" for a zero too."""

    key: str
    name: str
    kind: Literal["uint32", "float32"] = "uint32"
    when: Literal["given", "not zero"] = "given"

    def __call__(self, hparams: Hparams) -> Pairs:
        value = hparams.values.get(self.name)
        if value is None or (self.when == "not zero" and not value):
            return
        if self.kind == "uint32":
            yield self.key, np.uint32(hparams.integer(self.name))
        else:
            yield self.key, np.float32(hparams.number(self.name))


Maker = Callable[[Hparams], Pairs]
_YARN = {
    "extrapolation_factor": "yarn_ext_factor", "attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}  # fmt: skip


def _rope(hparams: Hparams) -> Pairs:
    """What is no key here is a tensor (llama3; gguf_rope.py), or is not there for llama.cpp (dynamic)."""
    kind, factor = hparams.rope["rope_type"], hparams.rope.get("factor")
    if kind in ("linear", "yarn") and factor is not None:
        yield "rope.scaling.type", kind
        yield "rope.scaling.factor", np.float32(real("rope_scaling factor", factor))
    if kind == "yarn" and factor is not None:
        name = "original_max_position_embeddings"
        yield "rope.scaling.original_context_length", np.uint32(whole(name, hparams.rope.get(name), 1))
        rope = {"attention_factor": hparams.rope.get("attn_factor"), **hparams.rope}
        for name, key in _YARN.items():
            if rope.get(name) is not None:
                yield f"rope.scaling.{key}", np.float32(real(name, rope[name]))
    if kind in ("longrope", "su"):
        yield "rope.scaling.type", "longrope"
    yield from _theta(hparams)
    if hparams.local_theta is not None:
        yield "rope.freq_base_swa", np.float32(hparams.local_theta)


def _theta(hparams: Hparams) -> Pairs:
    yield "rope.freq_base", np.float32(real("rope_theta", hparams.rope["rope_theta"]))


def _rope_dimensions(hparams: Hparams) -> Pairs:
    yield "rope.dimension_count", np.uint32(hparams.head_dim)


def _partial_rope_dimensions(hparams: Hparams) -> Pairs:
    part = real("partial_rotary_factor", hparams.rope.get("partial_rotary_factor", 1.0))
    if not 0 <= part <= 1:
        raise SourceError(f"config.json: partial_rotary_factor is {part!r:.60}, expected a number from 0 to 1")
    if hparams.model_type == "phi3":  # as conversion/phi.py rounds
        dims = int(part * hparams.integer("hidden_size", 1)) // hparams.integer("num_attention_heads", 1)
    else:
        dims = int(hparams.head_dim * part)
    yield "rope.dimension_count", np.uint32(dims)


def _longrope_factor(hparams: Hparams) -> Pairs:
    if hparams.rope.get("long_factor"):
        yield "rope.scaling.attn_factor", np.float32(longrope_attention_factor(hparams))


def _trained_context(hparams: Hparams) -> Pairs:
    name = "original_max_position_embeddings"
    yield "rope.scaling.original_context_length", np.uint32(whole(name, hparams.rope[name], 1))


def _window_or_zero(hparams: Hparams) -> Pairs:
    """Zero is how llama.cpp tells Phi-4 from Phi-3."""
    yield "attention.sliding_window", np.uint32(whole("sliding_window", hparams.values.get("sliding_window") or 0))


def _gemma3_window(hparams: Hparams) -> Pairs:
    if hparams.values.get("sliding_window_pattern") != 1:
        yield "attention.sliding_window", np.uint32(hparams.integer("sliding_window"))


def _olmo_window(hparams: Hparams) -> Pairs:
    """Of Olmo3, whose checkpoints go by the same name in llama.cpp; every fourth layer sees everything."""
    if hparams.values.get("sliding_window") is None:
        return
    yield "attention.sliding_window", np.uint32(hparams.integer("sliding_window"))
    layers = hparams.integer("num_hidden_layers", 1)
    kinds = hparams.values.get("layer_types") or [i % 4 != 3 and "sliding_attention" for i in range(min(layers, 4096))]
    yield "attention.sliding_window_pattern", [kind == "sliding_attention" for kind in kinds]


def _recurrent(hparams: Hparams) -> Pairs:
    """Gated delta nets under Mamba's names (conversion/qwen.py, Qwen3NextModel, with --no-mtp)."""
    heads, width = hparams.integer("linear_num_value_heads", 1), hparams.integer("linear_value_head_dim", 1)
    every = hparams.values.get("full_attention_interval", 4)
    layers = min(hparams.integer("num_hidden_layers", 1), 4096)
    whole("full_attention_interval", every, 1)
    kinds = hparams.values.get("layer_types") or [(i + 1) % every and "linear_attention" for i in range(layers)]
    yield "ssm.inner_size", np.uint32(whole("linear_num_value_heads * linear_value_head_dim", heads * width))
    yield "attention.recurrent_layers", [kind == "linear_attention" for kind in kinds]
    yield "full_attention_interval", np.uint32(every)


_FILE_TYPE = Key("", "file_type")  # marks the place of general.file_type
_HEAD_DIMS: tuple[Maker, ...] = (Key("attention.key_length", "head_dim"), Key("attention.value_length", "head_dim"))
_EPSILON = Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", "float32")
_BLOCKS = Key("block_count", "num_hidden_layers")
_SIZES = (Key("context_length", "max_position_embeddings"), Key("embedding_length", "hidden_size"))
_FFN = Key("feed_forward_length", "intermediate_size")
_HEADS = (Key("attention.head_count", "num_attention_heads"), Key("attention.head_count_kv", "num_key_value_heads"))
_WINDOW = Key("attention.sliding_window", "sliding_window")
_FINAL_CAP = Key("final_logit_softcapping", "final_logit_softcapping", "float32", "not zero")

# TextModel.set_gguf_parameters
_BASE: tuple[Maker, ...] = (
    _BLOCKS, *_SIZES, _FFN, *_HEADS, _rope, _EPSILON,
    Key("expert_count", "num_experts"), Key("expert_count", "num_local_experts"),
    Key("expert_used_count", "num_experts_per_tok"), *_HEAD_DIMS, _FILE_TYPE,
)  # fmt: skip
_LLAMA: tuple[Maker, ...] = (*_BASE, Key("vocab_size", "vocab_size"), _rope_dimensions)
_MOE: tuple[Maker, ...] = (
    *_BASE, Key("expert_feed_forward_length", "moe_intermediate_size"),
    Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
)  # fmt: skip
_GEMMA: tuple[Maker, ...] = (*_SIZES, _BLOCKS, _FFN, *_HEADS, _EPSILON, *_HEAD_DIMS, _FILE_TYPE)
_GEMMA2_CAP = Key("attn_logit_softcapping", "attn_logit_softcapping", "float32")

ARCH_KEYS: dict[str, tuple[Maker, ...]] = {
    "llama": _LLAMA,
    "smollm3": _LLAMA,
    "granite": (
        *(maker for maker in _LLAMA if maker not in _HEAD_DIMS),
        Key("attention.scale", "attention_multiplier", "float32", "not zero"),
        Key("embedding_scale", "embedding_multiplier", "float32", "not zero"),
        Key("residual_scale", "residual_multiplier", "float32", "not zero"),
        Key("logit_scale", "logits_scaling", "float32", "not zero"),
    ),
    "qwen2": _BASE,
    "qwen3": _BASE,
    "qwen2moe": _MOE,
    "qwen3moe": _MOE,
    "qwen3next": (
        *_MOE, Key("ssm.conv_kernel", "linear_conv_kernel_dim"), Key("ssm.state_size", "linear_key_head_dim"),
        Key("ssm.group_count", "linear_num_key_heads"), Key("ssm.time_step_rank", "linear_num_value_heads"),
        _recurrent, _partial_rope_dimensions,
    ),
    "gemma": _GEMMA,
    "gemma2": (*_GEMMA, _GEMMA2_CAP, Key("final_logit_softcapping", "final_logit_softcapping", "float32"), _WINDOW),
    "gemma3": (*_BASE, _FINAL_CAP, _gemma3_window),
    "phi3": (
        _longrope_factor, _SIZES[0], _trained_context, _SIZES[1], _FFN, _BLOCKS, *_HEADS, _EPSILON,
        _partial_rope_dimensions, _theta, _FILE_TYPE, _window_or_zero,
    ),
    "olmo2": (*_BASE, _olmo_window),
    "gpt-oss": (*_BASE, _WINDOW, Key("expert_feed_forward_length", "intermediate_size")),
}  # fmt: skip

# architectures[0] -> general.architecture: what the script goes by, and we only compare with model_type.
CLASSES = {
    "LlamaForCausalLM": "llama", "LLaMAForCausalLM": "llama", "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama", "SmolLM3ForCausalLM": "smollm3", "GraniteForCausalLM": "granite",
    "Qwen2ForCausalLM": "qwen2", "Qwen2MoeForCausalLM": "qwen2moe", "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe", "Qwen3NextForCausalLM": "qwen3next", "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3", "Gemma3ForConditionalGeneration": "gemma3",
    "Phi3ForCausalLM": "phi3", "Olmo2ForCausalLM": "olmo2", "GptOssForCausalLM": "gpt-oss",
}  # fmt: skip


def architecture(config: Mapping[str, Any]) -> str:
    """general.architecture of config.json's model.

    Raises UnsupportedError for a family that has no place in GGUF, and for a class that is no language model of it
    (an embedder, a classifier): llama.cpp would run it as something else."""
    arch = ARCHS[module_of_config(config)].name
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name is not None and CLASSES.get(name if isinstance(name, str) else "") != arch:
        fitting = ", ".join(known for known, made in CLASSES.items() if made == arch)
        raise UnsupportedError(f"config.json: architectures is {name!r:.60}, which is no {arch} (known: {fitting})")
    return arch


def model_keys(config: Mapping[str, Any], file_type: int) -> dict[str, Any]:
    """The architecture's keys, general.file_type among them and general.quantization_version at the end.

    `file_type`: the number of the LlamaFileType. Raises UnsupportedError as `architecture` does, SourceError for an
    entry of config.json that is no number where GGUF keeps one."""
    arch = architecture(config)
    hparams = read_hparams(config, module_of_config(config))
    keys: dict[str, Any] = {}
    for maker in ARCH_KEYS[arch]:
        if maker is _FILE_TYPE:
            keys["general.file_type"] = np.uint32(file_type)
        else:
            keys |= {f"{arch}.{key}": value for key, value in maker(hparams)}
    keys["general.quantization_version"] = np.uint32(QUANTIZATION_VERSION)
    return keys


def file_keys(
    config: Mapping[str, Any],
    sidecars: Mapping[str, bytes],
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    file_type: int,
) -> dict[str, Any]:
    """All that stands before the tokenizer in a file by convert_hf_to_gguf.py, in its order.

    `sidecars`: README.md and generation_config.json, where the model has them. `name`: of the model's folder.
    `shapes`: of the GGUF tensors by name, rope factors included: they are counted into general.size_label."""
    arch, model = architecture(config), model_keys(config, file_type)
    # Phi-3's comes while its tensors are made, before everything else.
    early = {key: model.pop(key) for key in [f"{arch}.rope.scaling.attn_factor"] if key in model}
    first = {"general.architecture": arch, **early, "general.type": "model"}
    return first | general_keys(config, sidecars, name, shapes) | model


def quantized_keys(keys: Mapping[str, Any], file_type: int) -> dict[str, Any]:
    """A whole file's keys as llama-quantize leaves them (src/llama-quant.cpp): these two last, of the new type."""
    last = {"general.quantization_version": np.uint32(QUANTIZATION_VERSION), "general.file_type": np.uint32(file_type)}
    return {key: value for key, value in keys.items() if key not in last} | last
