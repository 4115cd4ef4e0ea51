"""Families of which variants lie under language_model, beside towers that are not converted, and their relatives.

Written as mlx_modules.py says; facts of mlx-lm 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mlxquant.families.mlx_rows import (
    AUDIO,
    GEMMA_NORMS,
    MTP,
    PRE,
    QK_NORM,
    ROUTER,
    SHARED_GATED,
    VISION,
    Family,
    Row,
    attention,
    below,
    experts,
    fused_experts,
    mlp,
    root,
    vectors,
)  # fmt: skip

GEMMA3 = Family((*attention(), *QK_NORM, *mlp(), *GEMMA_NORMS), root())
_GEMMA3_DROPS = ((r"(model\.)?vision_tower\..*", VISION), (r"(model\.)?multi_modal_projector\..*", VISION))
GEMMA3_NESTED = below(GEMMA3, "language_model", _GEMMA3_DROPS)


def _gemma4_attention(kind: str, q: str, kv: str, width: str) -> tuple[Row, ...]:
    return (
        Row("self_attn.q_proj.weight", f"{q} h", kind),
        Row("self_attn.k_proj.weight", f"{kv} h", f"{kind} own_k"),
        Row("self_attn.v_proj.weight", f"{kv} h", f"{kind} own_v"),
        Row("self_attn.o_proj.weight", f"h {q}", kind),
        Row("self_attn.q_norm.weight", width, kind),
        Row("self_attn.k_norm.weight", width, f"{kind} own_k"),
    )


_PER_LAYER = (
    Row("per_layer_input_gate.weight", "pl h", "per_layer"),
    Row("per_layer_projection.weight", "h pl", "per_layer"),
    Row("post_per_layer_input_norm.weight", "h", "per_layer"),
)
_PER_LAYER_ROOT = (
    Row("model.embed_tokens_per_layer.weight", "plv pls", "per_layer"),
    Row("model.per_layer_model_projection.weight", "pls h", "per_layer"),
    Row("model.per_layer_projection_norm.weight", "pl", "per_layer"),
)
GEMMA4 = Family(
    (
        *_gemma4_attention("sliding", "q", "kv", "hd"),
        *_gemma4_attention("full", "gq", "gkv", "ghd"),
        *mlp(when="narrow"),
        *mlp(when="wide", width="2f"),
        *GEMMA_NORMS,
        Row("router.proj.weight", "e h", "moe"),
        Row("router.scale", "h", "moe"),
        Row("router.per_expert_scale", "e", "moe"),
        *fused_experts("experts.switch_glu", "experts"),
        *vectors("pre_feedforward_layernorm_2", when="moe"),
        *vectors("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", when="moe"),
        *_PER_LAYER,
        Row("layer_scalar", "1"),
    ),
    (
        *root(),
        *_PER_LAYER_ROOT,
    ),
)
GEMMA4_NESTED = below(
    GEMMA4,
    "language_model",
    (
        (r"(model\.)?(vision_tower|multi_modal_projector|vision_embedder|embed_vision)\..*", VISION),
        (r"(model\.)?(audio_tower|embed_audio)\..*", AUDIO),
    ),
)


def _delta_net(projections: Mapping[str, str], stacks: tuple[Row, ...], keep_a: bool = False) -> Family:
    """Attention with a gate in q_proj beside gated delta nets, into which `projections` (name: dims) lead."""
    return Family(
        (
            *attention("attention_bias", "attention_bias", when="full", q="2q"),
            *vectors("self_attn.q_norm", "self_attn.k_norm", dims="hd", when="full", how="add_one"),
            *(Row(f"linear_attn.{name}.weight", dims, "linear") for name, dims in projections.items()),
            Row("linear_attn.conv1d.weight", "cc k 1", "linear", "conv"),
            Row("linear_attn.A_log", "sh", "linear", cast=not keep_a),
            Row("linear_attn.dt_bias", "sh", "linear"),
            Row("linear_attn.norm.weight", "sv", "linear"),
            Row("linear_attn.out_proj.weight", "h so", "linear"),
            *mlp(when="dense"),
            ROUTER,
            *stacks,
            *SHARED_GATED,
            *vectors("input_layernorm", "post_attention_layernorm", how="add_one"),
        ),
        tuple(replace(r, how="add_one") if r.name == "model.norm.weight" else r for r in root()),
        drops=((r"mtp\..*", MTP),),
    )


_QWEN_VISION = ((r"(vision_tower|model\.visual|visual)\..*", VISION),)
QWEN3_NEXT = _delta_net({"in_proj_qkvz": "qkvz h", "in_proj_ba": "2sh h"}, experts())
QWEN3_5 = below(
    _delta_net(
        {"in_proj_qkv": "cc h", "in_proj_z": "so h", "in_proj_b": "sh h", "in_proj_a": "sh h"},
        fused_experts("mlp.switch_mlp", "mlp.experts"),
        keep_a=True,
    ),
    "language_model",
    (*_QWEN_VISION, (r"language_model\.mtp\..*", MTP)),
)
QWEN3 = Family((*attention(), *QK_NORM, *mlp(), *PRE), root())
QWEN3_VL = below(QWEN3, "language_model", _QWEN_VISION)
MISTRAL3 = below(
    Family((*attention("attention_bias", "attention_bias"), *mlp("mlp_bias"), *PRE), root()),
    "language_model",
    ((r"(model\.)?(vision_tower|multi_modal_projector)\..*", VISION),),
)
# model.language_model in MLX as in the checkpoint.
GEMMA3N = Family(
    (
        *attention(),
        *QK_NORM,
        *mlp(),
        *GEMMA_NORMS,
        *_PER_LAYER,
        Row("altup.correct_output_scale", "h"),
        Row("altup.correction_coefs.weight", "a a"),
        Row("altup.prediction_coefs.weight", "aa a"),
        Row("altup.modality_router.weight", "a h"),
        Row("altup.router_norm.weight", "h"),
        Row("laurel.linear_left.weight", "lr h"),
        Row("laurel.linear_right.weight", "h lr"),
        Row("laurel.post_laurel_norm.weight", "h"),
    ),
    tuple(
        replace(row, name=row.name.replace("model.", "model.language_model.", 1))
        for row in (
            *root(),
            *_PER_LAYER_ROOT,
            Row("model.altup_projections.{n}.weight", "h h", repeat="altups"),
            Row("model.altup_unembed_projections.{n}.weight", "h h", repeat="altups"),
        )
    ),
    prefix="model.language_model.layers",
    drops=(
        (r"model\.(vision_tower|embed_vision)\..*", VISION),
        (r"model\.(audio_tower|embed_audio)\..*", AUDIO),
    ),
)
