"""What each family's config.json says beyond what all have, read from a GGUF file's keys.

What a file leaves unsaid is what llama.cpp takes for granted (load_arch_hparams of each src/models/*.cpp); what stock
mlx-lm cannot run as the file says is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf_metadata import Metadata
from mlxquant.families.gguf_rope import long_rope

Shape = tuple[int, ...]
HINT = "give the model's Hugging Face folder instead"


@dataclass(frozen=True)
class File:
    """What is asked of one file. Keys are named below the architecture."""

    meta: Metadata
    arch: str
    shapes: Mapping[str, Shape]
    rope_freqs: Sequence[float] | None
    rope_factors: tuple[Sequence[float], Sequence[float]] | None

    def integer(self, key: str, default: int | None = None, least: int = 0) -> int:
        return self.meta.integer(f"{self.arch}.{key}", default, least)

    def number(self, key: str, default: float | None = None) -> float:
        return self.meta.number(f"{self.arch}.{key}", default)

    def each_layer(self, key: str, default: int | None = None) -> int:
        return self.meta.each_layer(f"{self.arch}.{key}", default)

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"GGUF: {what} in a {self.arch} model is not supported", hint=HINT)


Extra = Callable[[File, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """A family's class and what it has beyond the common entries (`extra` is given those).

    own_head_dim: heads may be wider or narrower than hidden_size / heads. scaled: stock mlx-lm carries out its rope
    scaling. partial: it rotates a part of each head. experts: it has expert layers. head: it always has an output head
    of its own.
    """

    class_name: str
    extra: Extra
    own_head_dim: bool = True
    scaled: bool = True
    partial: bool = False
    experts: bool = False
    head: bool = False
    activation: str = "silu"


def _llama(file: File, config: dict[str, Any]) -> dict[str, Any]:
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    return {name: tensor in file.shapes for name, tensor in biases.items()}


def _nothing(file: File, config: dict[str, Any]) -> dict[str, Any]:
    return {}


def _smollm3(file: File, config: dict[str, Any]) -> dict[str, Any]:
    """Every fourth layer has no rope (src/models/smollm3.cpp): no key says so."""
    layers = min(config["num_hidden_layers"], 4096)
    pattern = {"no_rope_layer_interval": 4, "no_rope_layers": [int(i % 4 != 3) for i in range(layers)]}
    return _llama(file, config) | pattern


def _granite(file: File, config: dict[str, Any]) -> dict[str, Any]:
    if not file.meta.flag("granite.rope.scaling.finetuned", True):
        raise file.unsupported("attention without rotary embeddings")
    return _llama(file, config) | {
        "attention_multiplier": file.number("attention.scale", 0.0) or config["head_dim"] ** -0.5,
        "embedding_multiplier": file.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": file.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": file.number("logit_scale"),
    }


def _olmo2(file: File, config: dict[str, Any]) -> dict[str, Any]:
    if file.integer("attention.sliding_window", 0):
        raise file.unsupported("a sliding window (OLMo 3)")
    return {"attention_bias": False}


def _mixtral(file: File, config: dict[str, Any]) -> dict[str, Any]:
    return {"num_local_experts": file.integer("expert_count"), **_used(file)}


def _used(file: File) -> dict[str, Any]:
    return {"num_experts_per_tok": file.each_layer("expert_used_count")}


def _qwen_moe(file: File, config: dict[str, Any]) -> dict[str, Any]:
    """Files made before there was a key for it have a dense layer's width, spread over the experts that are used."""
    used = _used(file)
    width = file.meta.values.get(f"{file.arch}.expert_feed_forward_length") is not None
    shared = {}
    if file.arch != "qwen3moe":
        shared["shared_expert_intermediate_size"] = (
            file.integer("expert_shared_feed_forward_length", 0) or config["intermediate_size"]
        )
    return {
        "num_experts": file.integer("expert_count"),
        **used,
        "moe_intermediate_size": file.each_layer("expert_feed_forward_length")
        if width
        else config["intermediate_size"] // used["num_experts_per_tok"],
        **shared,
        # As llama.cpp runs them (src/models/qwen2moe.cpp, qwen3moe.cpp, qwen3next.cpp: build_moe_ffn's norm_w).
        "norm_topk_prob": file.arch != "qwen2moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen3_next(file: File, config: dict[str, Any]) -> dict[str, Any]:
    if file.meta.text("qwen3next.rope.scaling.type", "none") != "none":
        raise file.unsupported("rope scaling")
    heads, inner = file.integer("ssm.time_step_rank", least=1), file.integer("ssm.inner_size", least=1)
    if inner % heads:
        raise SourceError(f"GGUF: {inner} inner channels are no multiple of {heads} heads")
    every, recurrent = file.integer("full_attention_interval", 4, 1), f"{file.arch}.attention.recurrent_layers"
    if recurrent in file.meta:
        expected = [bool((i + 1) % every) for i in range(min(config["num_hidden_layers"], 4096))]
        if [bool(x) for x in file.meta.values[recurrent]][: len(expected)] != expected:
            raise file.unsupported(f"full attention in other layers than every {every}th")
    return _qwen_moe(file, config) | {
        "linear_conv_kernel_dim": file.integer("ssm.conv_kernel", least=1),
        "linear_key_head_dim": file.integer("ssm.state_size", least=1),
        "linear_num_key_heads": file.integer("ssm.group_count", least=1),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": inner // heads,
        "full_attention_interval": every,
        "partial_rotary_factor": file.integer("rope.dimension_count", config["head_dim"]) / config["head_dim"],
    }


def _gpt_oss(file: File, config: dict[str, Any]) -> dict[str, Any]:
    """Windows in every other layer, from the first (src/models/openai-moe.cpp)."""
    layers = min(config["num_hidden_layers"], 4096)
    return {
        "intermediate_size": file.each_layer("expert_feed_forward_length"),
        "num_local_experts": file.integer("expert_count"),
        **_used(file),
        "attention_bias": True,
        "sliding_window": file.integer("attention.sliding_window", least=1),
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
        "swiglu_limit": 7.0,
    }


def _query_scale(config: Mapping[str, Any], layers_27b: int) -> float:
    """llama.cpp knows the 27B model by its number of layers (src/models/gemma2.cpp, gemma3.cpp)."""
    if config["num_hidden_layers"] == layers_27b:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config["head_dim"])


def _gemma2(file: File, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": _query_scale(config, 46),
        "attn_logit_softcapping": file.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.number("final_logit_softcapping", 30.0),
        "sliding_window": file.integer("attention.sliding_window", 4096),
    }


def _gemma3(file: File, config: dict[str, Any]) -> dict[str, Any]:
    if file.number("final_logit_softcapping", 0.0):
        raise file.unsupported("final_logit_softcapping")
    window = file.integer("attention.sliding_window", 0)
    return {
        "query_pre_attn_scalar": _query_scale(config, 62),
        "sliding_window": window or config["max_position_embeddings"],
        "sliding_window_pattern": 6 if window else 1,
        "rope_local_base_freq": file.number("rope.freq_base_swa", 10000.0),
    }


def _phi3(file: File, config: dict[str, Any]) -> dict[str, Any]:
    rotated = file.integer("rope.dimension_count", config["head_dim"], least=2)
    context = config["max_position_embeddings"]
    original = file.integer("rope.scaling.original_context_length", context, least=1)
    made: dict[str, Any] = {
        "original_max_position_embeddings": original,
        "partial_rotary_factor": rotated / config["head_dim"],
    }
    if window := file.integer("attention.sliding_window", 0):
        made["sliding_window"] = window
    if scaling := long_rope(file.meta, file.shapes, file.rope_factors, rotated // 2, context / original, original):
        made["rope_scaling"] = scaling
    return made


_GELU = "gelu_pytorch_tanh"
# mlx-lm's module (gguf_table.py) -> how its config.json is made.
MODELS: dict[str, Model] = {
    "llama": Model("LlamaForCausalLM", _llama),
    "mixtral": Model("MixtralForCausalLM", _mixtral, own_head_dim=False, scaled=False, experts=True),
    "qwen2": Model("Qwen2ForCausalLM", _nothing, own_head_dim=False),
    "qwen2_moe": Model("Qwen2MoeForCausalLM", _qwen_moe, own_head_dim=False, scaled=False, experts=True, head=True),
    "qwen3": Model("Qwen3ForCausalLM", _nothing),
    "qwen3_moe": Model("Qwen3MoeForCausalLM", _qwen_moe, scaled=False, experts=True),
    "qwen3_next": Model("Qwen3NextForCausalLM", _qwen3_next, partial=True, experts=True),
    "gemma": Model("GemmaForCausalLM", _nothing, scaled=False, activation=_GELU),
    "gemma2": Model("Gemma2ForCausalLM", _gemma2, scaled=False, activation=_GELU),
    "gemma3_text": Model("Gemma3ForCausalLM", _gemma3, activation=_GELU),
    "phi3": Model("Phi3ForCausalLM", _phi3, own_head_dim=False, partial=True),
    "smollm3": Model("SmolLM3ForCausalLM", _smollm3),
    "olmo2": Model("Olmo2ForCausalLM", _olmo2),
    "granite": Model("GraniteForCausalLM", _granite, own_head_dim=False),
    "gpt_oss": Model("GptOssForCausalLM", _gpt_oss, experts=True, head=True),
}
