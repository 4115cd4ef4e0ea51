"""What stock mlx-lm quantizes, and how, when it is asked for one format everywhere: the law of `--recipe
uniform`.

Facts of mlx-lm 0.32: `quantize_model` in utils.py and the `quant_predicate` of mlx_lm/models/<module>.py.
"""

from __future__ import annotations

from mlxquant.codecs.spec import KEEP, Codec, affine
from mlxquant.families.known import REMAPPING
from mlxquant.families.layout import Target

# Weights that no module with `to_quantized` holds: MoEGate and LayerNorm2D keep raw arrays. Ends of MLX
# names.
_RAW = {
    "deepseek_v2": ("mlp.gate.weight",),
    "deepseek_v3": ("mlp.gate.weight",),
    "glm4_moe": ("mlp.gate.weight",),
    "glm4_moe_lite": ("mlp.gate.weight",),
    "nemotron_h": ("mixer.gate.weight",),
    "cohere": ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
}

# quant_predicate: module paths that end in one of these get 8 bits in groups of 64. The granite rules are
# mlx-lm's own, and "mlp.down_proj" catches granitemoe's "switch_mlp.down_proj" there too.
_PRESET = affine(8, 64)
_EIGHT_BITS = {
    "qwen3_moe": ("mlp.gate",),
    "qwen3_next": ("mlp.gate", "shared_expert_gate"),
    "qwen3_5": ("mlp.gate", "shared_expert_gate"),
    "qwen3_5_moe": ("mlp.gate", "shared_expert_gate"),
    "gemma4": ("router.proj",),
    "gemma4_text": ("router.proj",),
    "lfm2_moe": ("feed_forward.gate",),
    "gpt_oss": ("router",),
    "granite": ("self_attn.o_proj", "mlp.down_proj"),
    "granitemoe": ("block_sparse_moe.router.layer", "self_attn.o_proj", "mlp.down_proj"),
}
_EIGHT_BIT_HEADS = ("granite", "granitemoe")


def quantizable(model_type: str, name: str, shape: tuple[int, ...]) -> bool:
    """Whether mlx-lm's module for this MLX tensor can be quantized at all: Linear, Embedding, SwitchLinear,
    MultiLinear."""
    if not name.endswith(".weight") or len(shape) < 2 or (len(shape) == 3 and shape[-1] == 1):
        return False  # vectors, biases, and convolutions (C, K, 1)
    return not name.endswith(_RAW.get(REMAPPING.get(model_type, model_type), ()))


def preset(model_type: str, name: str) -> Codec | None:
    """The format mlx-lm itself sets for this tensor whatever was asked for, or None."""
    module, path = REMAPPING.get(model_type, model_type), name.removesuffix(".weight")
    if path.endswith(_EIGHT_BITS.get(module, ())) or (path == "lm_head" and module in _EIGHT_BIT_HEADS):
        return _PRESET
    return None


def mlx_lm_codec(model_type: str, target: Target) -> Codec | None:
    """What stock mlx-lm does with this target: KEEP where it has no quantized module for it, a codec where
    the family sets one of its own, None where it takes the format it was asked for.

    With `quantize_model`, the width rule comes first: what the asked-for group size does not divide stays
    float, even where the family sets a codec of its own. And `convert` with a mixed recipe does not ask the
    family at all.
    """
    return preset(model_type, target.name) if quantizable(model_type, target.name, target.shape) else KEEP
