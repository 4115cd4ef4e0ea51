"""The families that have a place in GGUF: architecture, tensor names, and what llama.cpp's converter changes in them.

A tensor's Hugging Face (or MLX) name, shape and condition stand in mlx_modules.py; its GGUF name is looked up in the
tables of the `gguf` package, which are llama.cpp's own. So each fact stands in one place and serves both directions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mlxquant.errors import UnsupportedError
from mlxquant.families.gguf_metadata import Metadata
from mlxquant.families.known import REMAPPING


@dataclass(frozen=True)
class Arch:
    """`name`: general.architecture. `rotary`: q and k are in llama.cpp's rotary order (conversion/llama.py, permute).
    `shifted`: norms are w in Hugging Face's folder and in MLX's, 1 + w in GGUF (conversion/gemma.py)."""

    name: str
    rotary: bool = False
    shifted: bool = False


# mlx-lm's module -> what llama.cpp makes of it.
ARCHS: dict[str, Arch] = {
    "llama": Arch("llama", rotary=True),
    "mixtral": Arch("llama", rotary=True),
    "smollm3": Arch("smollm3", rotary=True),
    "granite": Arch("granite", rotary=True),
    "qwen2": Arch("qwen2"),
    "qwen2_moe": Arch("qwen2moe"),
    "qwen3": Arch("qwen3"),
    "qwen3_moe": Arch("qwen3moe"),
    "qwen3_next": Arch("qwen3next"),
    "gemma": Arch("gemma", shifted=True),
    "gemma2": Arch("gemma2", shifted=True),
    "gemma3_text": Arch("gemma3", shifted=True),
    "gemma3": Arch("gemma3", shifted=True),
    "phi3": Arch("phi3"),
    "olmo2": Arch("olmo2"),
    "gpt_oss": Arch("gpt-oss"),
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

# Names of MLX's modules (and of a few parameters) as gguf's tables spell them.
_SPELLINGS = (
    (r"(block_sparse_moe|mlp)\.switch_mlp\.", "mlp.experts."),
    (r"self_attn\.sinks$", "self_attn.sinks.weight"),
    (r"linear_attn\.dt_bias$", "linear_attn.dt_proj.bias"),
)


def module_of_config(config: Mapping[str, Any]) -> str:
    """The module of config.json's model_type. Raises UnsupportedError for a family that has no place here."""
    model_type = str(config.get("model_type"))
    if model_type not in MODEL_TYPES:
        raise UnsupportedError(
            f"config.json: model_type {model_type!r:.60} has no GGUF layout (known: {', '.join(MODEL_TYPES)})"
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


@cache
def gguf_name(arch: str, name: str) -> str:
    """GGUF name of the tensor that MLX (and mostly Hugging Face) calls `name`: token_embd.weight, blk.3.attn_q.weight.

    Source: gguf's TensorNameMap, which convert_hf_to_gguf.py asks too. Raises UnsupportedError where llama.cpp has no
    such tensor.
    """
    plain = name.removeprefix("language_model.")
    layer = re.match(r"model\.layers\.(\d+)\.", plain)
    for pattern, spelling in _SPELLINGS:
        plain = re.sub(pattern, spelling, plain)
    if layer:  # gguf's map is made for block 0 alone: thousands of blocks would make it slow
        plain = plain.replace(layer[0], "model.layers.0.", 1)
    found = _name_map(arch).get_name(plain, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UnsupportedError(f"{name}: llama.cpp has no such tensor in its architecture {arch}")
    return str(found).replace("blk.0.", f"blk.{layer[1]}.", 1) if layer else str(found)


@cache
def _name_map(arch: str) -> Any:
    import gguf  # 0.2 s, for which nobody should wait who wants no GGUF

    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(number, 1)


def order(name: str) -> tuple[int, str]:
    """Sort key of a GGUF file's tensors: those without a layer, then by layer, then by name (src/llama-model-loader.h,
    weight_name_comparer; llama-quantize writes and counts in this order)."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return int(layer[1]) if layer else -1, name
