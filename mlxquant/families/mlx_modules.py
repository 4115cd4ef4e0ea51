"""Every tensor of every family's MLX model: its name, its shape, and what in a Hugging Face checkpoint it is
made of.

Facts of mlx-lm 0.32 (`mlx_lm/models/<module>.py`: the module tree and `sanitize`), written as tables. A
tensor of a checkpoint that no row takes and no drop rule names is an error, so a table that lacks a row
cannot lose a weight.

Dimensions are words, resolved by `dimensions()`: h hidden, v vocabulary, f feed-forward, q = heads * hd, kv =
kv_heads * hd, e experts, m experts' width, s shared expert's width, ... A number in front multiplies ("2f").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlxquant.families.mlx_nested import (
    GEMMA3,
    GEMMA3_NESTED,
    GEMMA3N,
    GEMMA4,
    GEMMA4_NESTED,
    MISTRAL3,
    QWEN3,
    QWEN3_5,
    QWEN3_NEXT,
    QWEN3_VL,
)
from mlxquant.families.mlx_rows import (
    GEMMA_NORMS,
    MTP,
    PRE,
    QK_NORM,
    ROUTER,
    SHARED_GATED,
    WIDE_QK_NORM,
    Family,
    Row,
    attention,
    experts,
    linear,
    mlp,
    root,
    vectors,
)  # fmt: skip
from mlxquant.families.shape import ModelShape, flags

_LLAMA = Family((*attention("attention_bias", "attention_bias"), *mlp("mlp_bias"), *PRE), root())
_QWEN2 = Family((*attention("yes"), *mlp(), *PRE), root())
_GEMMA = Family((*attention(), *mlp(), *PRE), root())
_COHERE = Family(
    (
        *attention("attention_bias", "attention_bias"),
        *mlp(),
        *vectors("input_layernorm", bias="layer_norm_bias"),
    ),
    root(bias="layer_norm_bias"),
)


_OLMO2 = Family(
    (
        *attention("attention_bias", "attention_bias"),
        *WIDE_QK_NORM,
        *mlp("mlp_bias"),
        *vectors("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    root(),
)


def _deepseek(latents: tuple[Row, ...], gate: tuple[Row, ...]) -> Family:
    latent_attention = (
        Row("self_attn.q_proj.weight", "qb h", "q_full"),
        *linear("self_attn.q_a_proj", "ql h", "attention_bias", "q_lora"),
        Row("self_attn.q_a_layernorm.weight", "ql", "q_lora"),
        Row("self_attn.q_b_proj.weight", "qb ql", "q_lora"),
        *linear("self_attn.kv_a_proj_with_mqa", "kva h", "attention_bias"),
        Row("self_attn.kv_a_layernorm.weight", "kvl"),
        *latents,
        *linear("self_attn.o_proj", "h ov", "attention_bias"),
    )
    shared = mlp(at="mlp.shared_experts", width="s", when="moe shared")
    return Family((*latent_attention, *mlp(when="dense"), ROUTER, *gate, *experts(), *shared, *PRE), root())


_CORRECTION = Row("mlp.gate.e_score_correction_bias", "e", "moe", cast=False)
_KV_B = "self_attn.kv_b_proj.weight"
_DEEPSEEK_V2 = _deepseek((Row(_KV_B, "kvb kvl"),), ())
_DEEPSEEK_V3 = _deepseek(
    (
        Row("self_attn.embed_q.weight", "heads kvl nope", how="mla_q", source=_KV_B),
        Row("self_attn.unembed_out.weight", "heads vd kvl", how="mla_v", source=_KV_B),
    ),
    (_CORRECTION,),
)


def _mamba(bias: str, when: str = "", keep_a: bool = False) -> tuple[Row, ...]:
    return (
        *linear("mixer.in_proj", "si h", bias, when),
        Row("mixer.conv1d.weight", "cc k 1", when, "conv"),
        Row("mixer.conv1d.bias", "cc", f"{when} use_conv_bias"),
        Row("mixer.A_log", "sh", when, cast=not keep_a),
        Row("mixer.D", "sh", when),
        Row("mixer.dt_bias", "sh", when),
        Row("mixer.norm.weight", "so", when),
        *linear("mixer.out_proj", "h so", bias, when),
    )


def _lfm2(feed_forward: tuple[Row, ...]) -> Family:
    return Family(
        (
            *attention(when="full", o="out_proj"),
            *vectors("self_attn.q_layernorm", "self_attn.k_layernorm", dims="hd", when="full"),
            *linear("conv.in_proj", "3h h", "conv_bias", "linear"),
            Row("conv.conv.weight", "h k 1", "linear", "conv"),
            Row("conv.conv.bias", "h", "linear conv_bias"),
            *linear("conv.out_proj", "h h", "conv_bias", "linear"),
            *feed_forward,
            *vectors("operator_norm", "ffn_norm"),
        ),
        root("embedding_norm"),
    )


_W132 = {"w1": "f h", "w3": "f h", "w2": "h f"}
_LFM2 = _lfm2(tuple(Row(f"feed_forward.{name}.weight", dims) for name, dims in _W132.items()))
_LFM2_MOE = _lfm2(
    (
        *(
            replace(row, source=f"feed_forward.{name}.weight")
            for row, name in zip(mlp(at="feed_forward", when="dense"), _W132, strict=True)
        ),
        Row("feed_forward.gate.weight", "e h", "moe"),
        Row("feed_forward.expert_bias", "e", "moe use_expert_bias", cast=False),
        *experts("feed_forward", "w1", "w3", "w2"),
    )
)


def _nemotron_moe() -> tuple[Row, ...]:
    """Experts without a gate, on the hidden state or on a narrower latent of it."""
    names = (("fc1", "up_proj", "e m x"), ("fc2", "down_proj", "e x m"))
    return (
        *(
            Row(f"mixer.switch_mlp.{mlx}.weight", dims, "moe", "stack", f"mixer.experts.{{e}}.{theirs}.weight")
            for mlx, theirs, dims in names
        ),
        Row("mixer.gate.weight", "e h", "moe"),
        Row("mixer.gate.e_score_correction_bias", "e", "moe", cast=False),
        *linear("mixer.shared_experts.up_proj", "s h", "mlp_bias", "moe shared"),
        *linear("mixer.shared_experts.down_proj", "h s", "mlp_bias", "moe shared"),
        *linear("mixer.fc1_latent_proj", "x h", "mlp_bias", "moe latent"),
        *linear("mixer.fc2_latent_proj", "h x", "mlp_bias", "moe latent"),
    )


FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": QWEN3,
    "qwen3_vl": QWEN3_VL,
    "ministral3": Family((*attention(), *mlp(), *PRE), root()),
    "mistral3": MISTRAL3,
    "mixtral": Family(
        (
            *attention(),
            Row("block_sparse_moe.gate.weight", "e h"),
            *experts("block_sparse_moe", "w1", "w3", "w2"),
            *PRE,
        ),
        root(),
    ),
    "qwen2_moe": Family((*attention("yes"), ROUTER, *experts(), *SHARED_GATED, *PRE), root()),
    "qwen3_moe": Family(
        (*attention(), *QK_NORM, *mlp(when="dense"), ROUTER, *experts(), *PRE),
        root(),
    ),
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5,
    "gemma": _GEMMA,
    "gemma2": Family((*attention(), *mlp(), *GEMMA_NORMS), root()),
    "gemma3_text": GEMMA3,
    "gemma4_text": GEMMA4,
    "gemma4": GEMMA4_NESTED,
    "gemma3": GEMMA3_NESTED,
    "phi3": Family(
        (
            Row("self_attn.qkv_proj.weight", "qkv h"),
            Row("self_attn.o_proj.weight", "h q"),
            Row("mlp.gate_up_proj.weight", "2f h"),
            Row("mlp.down_proj.weight", "h f"),
            *PRE,
        ),
        root(),
    ),
    "phi": Family(
        (
            *attention("yes", "yes", o="dense"),
            *linear("mlp.fc1", "f h", "yes"),
            *linear("mlp.fc2", "h f", "yes"),
            *vectors("input_layernorm", bias="yes"),
        ),
        (*root("final_layernorm", bias="yes"), Row("lm_head.bias", "v")),
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, layer=tuple(r for r in _OLMO2.layer if "mlp" not in r.name or "bias" not in r.name)),
    "olmoe": Family(
        (*attention("attention_bias", "attention_bias"), *WIDE_QK_NORM, ROUTER, *experts(), *PRE),
        root(),
    ),
    "granitemoe": Family(
        (
            *attention("attention_bias", "attention_bias"),
            Row("block_sparse_moe.router.layer.weight", "e h"),
            *(
                Row(f"block_sparse_moe.switch_mlp.{name}_proj.weight", "e m h", "", "half",
                    "block_sparse_moe.input_linear.weight", part)
                for part, name in enumerate(("gate", "up"))
            ),
            Row("block_sparse_moe.switch_mlp.down_proj.weight", "e h m",
                source="block_sparse_moe.output_linear.weight"),
            *PRE,
        ),
        root(),
    ),
    "starcoder2": Family(
        (
            *attention("yes", "yes"),
            *linear("mlp.c_fc", "f h", "yes"),
            *linear("mlp.c_proj", "h f", "yes"),
            *vectors("input_layernorm", "post_attention_layernorm", bias="yes"),
        ),
        root(bias="yes"),
    ),
    "cohere": replace(_COHERE, layer=(
        *_COHERE.layer,
        Row("self_attn.q_norm.weight", "heads hd", "use_qk_norm"),
        Row("self_attn.k_norm.weight", "kv_heads hd", "use_qk_norm"),
    )),
    "cohere2": _COHERE,
    "stablelm": Family(
        (
            *attention("use_qkv_bias"),
            Row("self_attn.q_layernorm.norms.{n}.weight", "hd", "qk_layernorm", repeat="heads"),
            Row("self_attn.k_layernorm.norms.{n}.weight", "hd", "qk_layernorm", repeat="kv_heads"),
            *mlp(),
            *vectors("input_layernorm", bias="yes"),
            *vectors("post_attention_layernorm", bias="yes", when="sequential"),
        ),
        root(bias="yes"),
    ),
    "glm4": Family(
        (
            *attention("attention_bias"),
            Row("mlp.gate_up_proj.weight", "2f h"),
            Row("mlp.down_proj.weight", "h f"),
            *PRE,
            *vectors("post_self_attn_layernorm", "post_mlp_layernorm"),
        ),
        root(),
    ),
    "gpt_oss": Family(
        (
            *attention("yes", "yes"),
            Row("self_attn.sinks", "heads"),
            *linear("mlp.router", "e h", "yes"),
            *(
                row
                for name, dims in (("gate", "e m h"), ("up", "e m h"), ("down", "e h m"))
                for row in (
                    Row(f"mlp.experts.{name}_proj.weight", dims),
                    Row(f"mlp.experts.{name}_proj.bias", dims.rpartition(" ")[0]),
                )
            ),
            *PRE,
        ),
        root(),
        refuses=((r".*\.experts\.(gate_up|down)_proj(_bias|_blocks|_scales)?",
                  "experts in Hugging Face's transposed layout, which stock mlx-lm cannot read as floats"),),
    ),
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "glm4_moe_lite": _DEEPSEEK_V3,
    "glm4_moe": Family(
        (
            *attention("attention_bias"),
            *vectors("self_attn.q_norm", "self_attn.k_norm", dims="hd", when="use_qk_norm"),
            *mlp(when="dense"),
            ROUTER,
            _CORRECTION,
            *experts(),
            *mlp(at="mlp.shared_experts", width="s", when="moe shared"),
            *PRE,
        ),
        root(),
    ),
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2_MOE,
    "gemma3n": GEMMA3N,
    "mamba2": Family(
        (*_mamba("use_bias"), *vectors("norm")),
        root("norm_f", "backbone", embed="embeddings"),
        prefix="backbone.layers",
    ),
    "nemotron_h": Family(
        (
            *vectors("norm"),
            *_mamba("mamba_proj_bias", "ssm", keep_a=True),
            *attention("attention_bias", "attention_bias", at="mixer", when="full"),
            *linear("mixer.up_proj", "f h", "mlp_bias", "dense"),
            *linear("mixer.down_proj", "h f", "mlp_bias", "dense"),
            *_nemotron_moe(),
        ),
        root("norm_f", "backbone", embed="embeddings"),
        prefix="backbone.layers",
        drops=((r"mtp\..*", MTP),),
    ),
}  # fmt: skip

_FLAGS = (
    "attention_bias", "mlp_bias", "use_qk_norm", "layer_norm_bias", "qk_layernorm", "use_qkv_bias",
    "use_bias", "use_conv_bias", "mamba_proj_bias", "use_parallel_residual", "conv_bias",
    "use_expert_bias",
)  # fmt: skip


def model_flags(config: Mapping[str, Any], shape: ModelShape) -> set[str]:
    """The words of `when` that hold for the whole model."""
    found = {"yes", *flags(config, _FLAGS)}
    found |= {"q_lora" if shape.q_lora_rank else "q_full"}
    found |= {word for word, holds in (
        ("shared", shape.shared_intermediate_size > 0),
        ("sequential", "use_parallel_residual" not in found),
        ("latent", shape.moe_latent_size > 0),
        ("per_layer", shape.per_layer_size > 0),
    ) if holds}  # fmt: skip
    return found


def layer_flags(shape: ModelShape, index: int) -> set[str]:
    """The words of `when` that hold for one layer beside those of the model."""
    mixer, shared = shape.mixers[index], index >= shape.layers - shape.shared_kv_layers
    found: set[str] = {mixer, shape.ffns[index], "wide" if shared and shape.wide_shared_ffn else "narrow"}
    if not shared:
        found |= {"own_k"} if mixer == "full" and shape.keys_are_values else {"own_k", "own_v"}
    return found


def sizes(dims: str, numbers: Mapping[str, int]) -> tuple[int, ...]:
    """'2f h 1' -> (2 * f, h, 1)."""
    found = []
    for word in dims.split():
        digits = word[: len(word) - len(word.lstrip("0123456789"))]
        key = word.removeprefix(digits)
        found.append(int(digits or 1) * (numbers[key] if key else 1))
    return tuple(found)


def made_of(row: Row, source: str, numbers: Mapping[str, int]) -> tuple[list[str], tuple[int, ...]]:
    """The names of the tensors that a Hugging Face checkpoint has for a row, and the one shape of them all."""
    out = sizes(row.dims, numbers)
    if row.how == "stack":
        return [source.format(e=e) for e in range(out[0])], out[1:]
    if row.how == "half":
        return [source], (out[0], 2 * out[1], out[2])
    if row.how in ("mla_q", "mla_v"):
        return [source], (numbers["kvb"], numbers["kvl"])
    if row.how == "conv":
        return [source], (out[0], 1, out[1])
    return [source], out


def dimensions(shape: ModelShape) -> dict[str, int]:
    """The words of `dims`, as numbers."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner = shape.state_heads * shape.state_value
    return {
        "h": shape.hidden_size, "v": shape.vocab_size, "f": shape.intermediate_size, "q": q, "kv": kv,
        "qkv": q + 2 * kv, "hd": shape.head_dim, "heads": shape.heads, "kv_heads": shape.kv_heads,
        "e": shape.experts, "m": shape.moe_intermediate_size, "s": shape.shared_intermediate_size,
        "x": shape.moe_latent_size or shape.hidden_size, "ql": shape.q_lora_rank, "kvl": shape.kv_lora_rank,
        "kva": shape.kv_lora_rank + shape.qk_rope_head_dim,
        "qb": shape.heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim),
        "kvb": shape.heads * (shape.qk_nope_head_dim + shape.v_head_dim),
        "ov": shape.heads * shape.v_head_dim, "nope": shape.qk_nope_head_dim, "vd": shape.v_head_dim,
        "cc": shape.conv_channels, "k": shape.conv_kernel, "sh": shape.state_heads, "sv": shape.state_value,
        "so": inner, "si": inner + shape.conv_channels + shape.state_heads,
        "gq": shape.heads * shape.global_head_dim, "gkv": shape.global_kv_heads * shape.global_head_dim,
        "ghd": shape.global_head_dim, "pl": shape.per_layer_size, "plv": shape.per_layer_vocab_size,
        "a": shape.altup_inputs, "aa": shape.altup_inputs**2, "altups": shape.altup_inputs - 1, "lr": shape.laurel_rank,
        "pls": shape.layers * shape.per_layer_size,
        "qkvz": shape.conv_channels + inner,
    }  # fmt: skip
