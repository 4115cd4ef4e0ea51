"""The families that have a place in GGUF: architecture, tensor names, and what llama.cpp's converter changes in them.

A tensor's MLX (mostly Hugging Face) name, shape and condition stand in mlx_modules.py, its GGUF name here, so each fact
stands in one place and serves both directions. The names are those of gguf's own TensorNameMap, which
convert_hf_to_gguf.py asks and tests compare with; they are spelled here because `inspect` of a GGUF file needs them
and importing gguf takes 0.2 s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import UnsupportedError
from mlxquant.families.gguf_metadata import Metadata
from mlxquant.families.known import REMAPPING


@dataclass(frozen=True)
class Arch:
    """`name`: general.architecture. `rotary`: q and k are in llama.cpp's rotary order (conversion/llama.py, permute).
    `shifted`: norms are w in Hugging Face's folder and in MLX's, 1 + w in GGUF (conversion/gemma.py). `post_norm`:
    post_attention_layernorm is what it says, not the norm before the feed-forward part. `lacks`: what mlx-lm's model
    may have and llama.cpp's architecture has no place for."""

    name: str
    rotary: bool = False
    shifted: bool = False
    post_norm: bool = False
    lacks: tuple[str, ...] = ()


_HEAD = ("output",)
_DENSE = ("ffn_gate", "ffn_up", "ffn_down")

# mlx-lm's module -> what llama.cpp makes of it.
ARCHS: dict[str, Arch] = {
    "llama": Arch("llama", rotary=True),
    "mixtral": Arch("llama", rotary=True),
    "smollm3": Arch("smollm3", rotary=True),
    "granite": Arch("granite", rotary=True),
    "qwen2": Arch("qwen2"),
    "qwen2_moe": Arch("qwen2moe"),
    "qwen3": Arch("qwen3"),
    "qwen3_moe": Arch("qwen3moe", lacks=_DENSE),
    "qwen3_next": Arch("qwen3next", post_norm=True, lacks=_DENSE),
    "gemma": Arch("gemma", shifted=True, lacks=_HEAD),
    "gemma2": Arch("gemma2", shifted=True, post_norm=True, lacks=_HEAD),
    "gemma3_text": Arch("gemma3", shifted=True, post_norm=True),
    "gemma3": Arch("gemma3", shifted=True, post_norm=True),
    "phi3": Arch("phi3"),
    "olmo2": Arch("olmo2", post_norm=True),
    "gpt_oss": Arch("gpt-oss", post_norm=True),
}
# Llama by another name in mlx-lm, but an architecture of its own in llama.cpp.
_OTHERS = ("xverse",)
MODEL_TYPES: tuple[str, ...] = tuple(
    sorted({*ARCHS, *(t for t, module in REMAPPING.items() if module in ARCHS and t not in _OTHERS)})
)

# general.architecture -> module; a llama with experts is a mixtral.
_MODULES = {arch.name: module for module, arch in ARCHS.items() if module not in ("mixtral", "gemma3")}

# Computed from config.json, not stored in a Hugging Face checkpoint.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# MLX's module -> GGUF's; the endings .weight and .bias stay.
_ROOT = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    **dict.fromkeys(("mlp.gate", "mlp.router", "block_sparse_moe.gate"), "ffn_gate_inp"),
    **{
        f"{at}.{part}_proj": f"ffn_{part}_exps"
        for at in ("mlp.switch_mlp", "mlp.experts", "block_sparse_moe.switch_mlp")
        for part in ("gate", "up", "down")
    },
    **{f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
# Parameters of their own, without an ending: whole names.
_BARE = {"self_attn.sinks": "attn_sinks.weight", "linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"}
_NAME = re.compile(r"(?:language_model\.)?(?:model\.layers\.(\d+)\.)?(.+?)(\.weight|\.bias)?")


def module_of_config(config: Mapping[str, Any]) -> str:
    """The module of config.json's model_type. Raises UnsupportedError for a family that has no place here."""
    model_type = str(config.get("model_type"))
    if model_type not in MODEL_TYPES:
        raise UnsupportedError(
            f"config.json: model_type {model_type!r:.60} is not a family that mlxquant writes as GGUF",
            hint=f"known are {', '.join(MODEL_TYPES)}",
        )
    return REMAPPING.get(model_type, model_type)


def module_of_gguf(meta: Metadata) -> str:
    """The module of general.architecture. Raises UnsupportedError for a family that has no place here."""
    name = meta.text("general.architecture")
    if name not in _MODULES:
        raise UnsupportedError(
            f"GGUF architecture {name!r:.60} is not supported (supported: {', '.join(_MODULES)})",
            hint="give the model's Hugging Face folder instead",
        )
    return "mixtral" if name == "llama" and meta.integer("llama.expert_count", 0) else _MODULES[name]


def gguf_name(arch: Arch, name: str) -> str:
    """GGUF name of the tensor that MLX (and mostly Hugging Face) calls `name`: token_embd.weight, blk.3.attn_q.weight.

    Raises UnsupportedError where llama.cpp's architecture has no such tensor.
    """
    layer, module, ending = _NAME.fullmatch(name).groups()  # type: ignore[union-attr]
    if module in _BARE and layer and not ending:
        return f"blk.{layer}.{_BARE[module]}"
    found = (_LAYER if layer else _ROOT).get(module)
    if found == "ffn_norm" and arch.post_norm and module == "post_attention_layernorm":
        found = "post_attention_norm"
    if not found or not ending or found in arch.lacks:
        raise UnsupportedError(f"{name}: llama.cpp has no such tensor in its architecture {arch.name}")
    return f"blk.{layer}.{found}{ending}" if layer else f"{found}{ending}"


def layer_of(name: str) -> int:
    """3 for blk.3.attn_q.weight, -1 for what belongs to no layer."""
    layer = re.match(r"blk\.(\d+)", name)
    return int(layer[1]) if layer else -1


def order(name: str) -> tuple[int, str]:
    """Sort key of a GGUF file's tensors: those without a layer, then by layer, then by name (src/llama-model-loader.h,
    weight_name_comparer; llama-quantize writes and counts in this order)."""
    return layer_of(name), name
