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
from dataclasses import dataclass, replace
from typing import Any, Literal

from mlxquant.families.shape import ModelShape, flags

# same      the source tensor of the same name and shape
# stack     one source per expert ({e} in `source`), stacked on a new first axis
# half      rows of one half of every expert's fused matrix: e x (2 * rows) x width; `part` says which
# add_one   + 1 (only where the checkpoint is Hugging Face's, not an MLX folder that has it already)
# conv      (C, 1, K) -> (C, K, 1): a reshape
# mla_q, mla_v   the two halves of kv_b_proj
# embedding      a copy of the embedding (a family that always has an output head, and a tied checkpoint)
How = Literal["same", "stack", "half", "add_one", "conv", "mla_q", "mla_v", "embedding"]


@dataclass(frozen=True)
class Row:
    """`name` is below the layer (or the root). `when`: flags that must all be set. `repeat`: one tensor for
    each {n}."""

    name: str
    dims: str
    when: str = ""
    how: How = "same"
    source: str = ""
    part: int = 0
    repeat: str = ""
    cast: bool = True


@dataclass(frozen=True)
class Family:
    """`layer` rows exist once per layer under `prefix`; `drops` are (regex on the source's name, reason)."""

    layer: tuple[Row, ...]
    root: tuple[Row, ...]
    prefix: str = "model.layers"
    drops: tuple[tuple[str, str], ...] = ()
    refuses: tuple[tuple[str, str], ...] = ()


def _linear(name: str, dims: str, bias: str = "", when: str = "") -> tuple[Row, ...]:
    """A weight, and a bias where the flag `bias` is set ("yes" always is)."""
    weight = Row(f"{name}.weight", dims, when)
    return (weight, Row(f"{name}.bias", dims.split()[0], f"{when} {bias}")) if bias else (weight,)


def _vectors(*names: str, dims: str = "h", when: str = "", bias: str = "", how: How = "same") -> tuple[Row, ...]:
    rows = tuple(Row(f"{name}.weight", dims, when, how) for name in names)
    return rows + tuple(Row(f"{name}.bias", dims, f"{when} {bias}") for name in names if bias)


def _attention(
    bias: str = "", o_bias: str = "", at: str = "self_attn", o: str = "o_proj", when: str = "", q: str = "q"
) -> tuple[Row, ...]:
    return (
        *_linear(f"{at}.q_proj", f"{q} h", bias, when),
        *_linear(f"{at}.k_proj", "kv h", bias, when),
        *_linear(f"{at}.v_proj", "kv h", bias, when),
        *_linear(f"{at}.{o}", "h q", o_bias, when),
    )


def _mlp(bias: str = "", at: str = "mlp", width: str = "f", when: str = "") -> tuple[Row, ...]:
    return (
        *_linear(f"{at}.gate_proj", f"{width} h", bias, when),
        *_linear(f"{at}.up_proj", f"{width} h", bias, when),
        *_linear(f"{at}.down_proj", f"h {width}", bias, when),
    )


def _experts(at: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Row, ...]:
    """SwitchGLU from one module per expert; an MLX folder has them stacked already."""
    names = (("gate_proj", gate, "e m h"), ("up_proj", up, "e m h"), ("down_proj", down, "e h m"))
    return tuple(
        Row(f"{at}.switch_mlp.{mlx}.weight", dims, "moe", "stack", f"{at}.experts.{{e}}.{theirs}.weight")
        for mlx, theirs, dims in names
    )


def _fused_experts(at: str, source: str, when: str = "moe") -> tuple[Row, ...]:
    """SwitchGLU from two tensors for all experts: gate and up, one after the other, and down."""
    return (
        *(
            Row(f"{at}.{name}_proj.weight", "e m h", when, "half", f"{source}.gate_up_proj", part)
            for part, name in enumerate(("gate", "up"))
        ),
        Row(f"{at}.down_proj.weight", "e h m", when, source=f"{source}.down_proj"),
    )


def _root(norm: str = "norm", at: str = "model", bias: str = "", embed: str = "embed_tokens") -> tuple[Row, ...]:
    return (
        Row(f"{at}.{embed}.weight", "v h"),
        *_vectors(f"{at}.{norm}", bias=bias),
        Row("lm_head.weight", "v h", "head"),
        Row("lm_head.weight", "v h", "copied_head", "embedding", f"{at}.{embed}.weight"),
    )


_PRE = _vectors("input_layernorm", "post_attention_layernorm")
_GEMMA_NORMS = (*_PRE, *_vectors("pre_feedforward_layernorm", "post_feedforward_layernorm"))
_QK_NORM = _vectors("self_attn.q_norm", "self_attn.k_norm", dims="hd")
_WIDE_QK_NORM = (*_vectors("self_attn.q_norm", dims="q"), *_vectors("self_attn.k_norm", dims="kv"))
_SHARED_GATED = (
    *_mlp(at="mlp.shared_expert", width="s", when="moe"),
    Row("mlp.shared_expert_gate.weight", "1 h", "moe"),
)
_ROUTER = Row("mlp.gate.weight", "e h", "moe")
_MTP = "multi-token prediction, which mlx-lm does not run"
_VISION = "vision: only the text part is converted"
_GEMMA3_DROPS = ((r"(model\.)?vision_tower\..*", _VISION), (r"(model\.)?multi_modal_projector\..*", _VISION))

_LLAMA = Family((*_attention("attention_bias", "attention_bias"), *_mlp("mlp_bias"), *_PRE), _root())
_QWEN2 = Family((*_attention("yes"), *_mlp(), *_PRE), _root())
_GEMMA = Family((*_attention(), *_mlp(), *_PRE), _root())
_GEMMA3 = Family((*_attention(), *_QK_NORM, *_mlp(), *_GEMMA_NORMS), _root())
_COHERE = Family(
    (
        *_attention("attention_bias", "attention_bias"),
        *_mlp(),
        *_vectors("input_layernorm", bias="layer_norm_bias"),
    ),
    _root(bias="layer_norm_bias"),
)


def _below(family: Family, at: str, drops: tuple[tuple[str, str], ...]) -> Family:
    """The same model one level deeper, as gemma3 keeps its text part under language_model."""
    root = tuple(replace(r, name=f"{at}.{r.name}", source=r.source and f"{at}.{r.source}") for r in family.root)
    return replace(family, root=root, prefix=f"{at}.{family.prefix}", drops=drops)


def _delta_net(projections: Mapping[str, str], experts: tuple[Row, ...], keep_a: bool = False) -> Family:
    """Attention with a gate in q_proj beside gated delta nets, into which `projections` (name: dims) lead."""
    return Family(
        (
            *_attention("attention_bias", "attention_bias", when="full", q="2q"),
            *_vectors("self_attn.q_norm", "self_attn.k_norm", dims="hd", when="full", how="add_one"),
            *(Row(f"linear_attn.{name}.weight", dims, "linear") for name, dims in projections.items()),
            Row("linear_attn.conv1d.weight", "cc k 1", "linear", "conv"),
            Row("linear_attn.A_log", "sh", "linear", cast=not keep_a),
            Row("linear_attn.dt_bias", "sh", "linear"),
            Row("linear_attn.norm.weight", "sv", "linear"),
            Row("linear_attn.out_proj.weight", "h so", "linear"),
            *_mlp(when="dense"),
            _ROUTER,
            *experts,
            *_SHARED_GATED,
            *_vectors("input_layernorm", "post_attention_layernorm", how="add_one"),
        ),
        tuple(replace(r, how="add_one") if r.name == "model.norm.weight" else r for r in _root()),
        drops=((r"mtp\..*", _MTP),),
    )


_QWEN3_NEXT = _delta_net({"in_proj_qkvz": "qkvz h", "in_proj_ba": "2sh h"}, _experts())
_QWEN3_5 = _below(
    _delta_net(
        {"in_proj_qkv": "cc h", "in_proj_z": "so h", "in_proj_b": "sh h", "in_proj_a": "sh h"},
        _fused_experts("mlp.switch_mlp", "mlp.experts"),
        keep_a=True,
    ),
    "language_model",
    ((r"vision_tower\..*|model\.visual\..*", _VISION), (r"language_model\.mtp\..*", _MTP)),
)


def _deepseek(latents: tuple[Row, ...], gate: tuple[Row, ...]) -> Family:
    attention = (
        Row("self_attn.q_proj.weight", "qb h", "q_full"),
        *_linear("self_attn.q_a_proj", "ql h", "attention_bias", "q_lora"),
        Row("self_attn.q_a_layernorm.weight", "ql", "q_lora"),
        Row("self_attn.q_b_proj.weight", "qb ql", "q_lora"),
        *_linear("self_attn.kv_a_proj_with_mqa", "kva h", "attention_bias"),
        Row("self_attn.kv_a_layernorm.weight", "kvl"),
        *latents,
        *_linear("self_attn.o_proj", "h ov", "attention_bias"),
    )
    shared = _mlp(at="mlp.shared_experts", width="s", when="moe shared")
    return Family((*attention, *_mlp(when="dense"), _ROUTER, *gate, *_experts(), *shared, *_PRE), _root())


_KV_B = "self_attn.kv_b_proj.weight"
_DEEPSEEK_V2 = _deepseek((Row(_KV_B, "kvb kvl"),), ())
_DEEPSEEK_V3 = _deepseek(
    (
        Row("self_attn.embed_q.weight", "heads kvl nope", how="mla_q", source=_KV_B),
        Row("self_attn.unembed_out.weight", "heads vd kvl", how="mla_v", source=_KV_B),
    ),
    (Row("mlp.gate.e_score_correction_bias", "e", "moe", cast=False),),
)


def _mamba(bias: str, when: str = "", keep_a: bool = False) -> tuple[Row, ...]:
    return (
        *_linear("mixer.in_proj", "si h", bias, when),
        Row("mixer.conv1d.weight", "cc k 1", when, "conv"),
        Row("mixer.conv1d.bias", "cc", f"{when} use_conv_bias"),
        Row("mixer.A_log", "sh", when, cast=not keep_a),
        Row("mixer.D", "sh", when),
        Row("mixer.dt_bias", "sh", when),
        Row("mixer.norm.weight", "so", when),
        *_linear("mixer.out_proj", "h so", bias, when),
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
        *_linear("mixer.shared_experts.up_proj", "s h", "mlp_bias", "moe shared"),
        *_linear("mixer.shared_experts.down_proj", "h s", "mlp_bias", "moe shared"),
        *_linear("mixer.fc1_latent_proj", "x h", "mlp_bias", "moe latent"),
        *_linear("mixer.fc2_latent_proj", "h x", "mlp_bias", "moe latent"),
    )


FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": Family((*_attention(), *_QK_NORM, *_mlp(), *_PRE), _root()),
    "mixtral": Family(
        (
            *_attention(),
            Row("block_sparse_moe.gate.weight", "e h"),
            *_experts("block_sparse_moe", "w1", "w3", "w2"),
            *_PRE,
        ),
        _root(),
    ),
    "qwen2_moe": Family((*_attention("yes"), _ROUTER, *_experts(), *_SHARED_GATED, *_PRE), _root()),
    "qwen3_moe": Family(
        (*_attention(), *_QK_NORM, *_mlp(when="dense"), _ROUTER, *_experts(), *_PRE),
        _root(),
    ),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "gemma": _GEMMA,
    "gemma2": Family((*_attention(), *_mlp(), *_GEMMA_NORMS), _root()),
    "gemma3_text": _GEMMA3,
    "gemma3": _below(_GEMMA3, "language_model", _GEMMA3_DROPS),
    "phi3": Family(
        (
            Row("self_attn.qkv_proj.weight", "qkv h"),
            Row("self_attn.o_proj.weight", "h q"),
            Row("mlp.gate_up_proj.weight", "2f h"),
            Row("mlp.down_proj.weight", "h f"),
            *_PRE,
        ),
        _root(),
    ),
    "phi": Family(
        (
            *_attention("yes", "yes", o="dense"),
            *_linear("mlp.fc1", "f h", "yes"),
            *_linear("mlp.fc2", "h f", "yes"),
            *_vectors("input_layernorm", bias="yes"),
        ),
        (*_root("final_layernorm", bias="yes"), Row("lm_head.bias", "v")),
    ),
    "olmo2": Family(
        (
            *_attention("attention_bias", "attention_bias"),
            *_WIDE_QK_NORM,
            *_mlp("mlp_bias"),
            *_vectors("post_attention_layernorm", "post_feedforward_layernorm"),
        ),
        _root(),
    ),
    "olmoe": Family(
        (*_attention("attention_bias", "attention_bias"), *_WIDE_QK_NORM, _ROUTER, *_experts(), *_PRE),
        _root(),
    ),
    "granitemoe": Family(
        (
            *_attention("attention_bias", "attention_bias"),
            Row("block_sparse_moe.router.layer.weight", "e h"),
            *(
                Row(f"block_sparse_moe.switch_mlp.{name}_proj.weight", "e m h", "", "half",
                    "block_sparse_moe.input_linear.weight", part)
                for part, name in enumerate(("gate", "up"))
            ),
            Row("block_sparse_moe.switch_mlp.down_proj.weight", "e h m",
                source="block_sparse_moe.output_linear.weight"),
            *_PRE,
        ),
        _root(),
    ),
    "starcoder2": Family(
        (
            *_attention("yes", "yes"),
            *_linear("mlp.c_fc", "f h", "yes"),
            *_linear("mlp.c_proj", "h f", "yes"),
            *_vectors("input_layernorm", "post_attention_layernorm", bias="yes"),
        ),
        _root(bias="yes"),
    ),
    "cohere": replace(_COHERE, layer=(
        *_COHERE.layer,
        Row("self_attn.q_norm.weight", "heads hd", "use_qk_norm"),
        Row("self_attn.k_norm.weight", "kv_heads hd", "use_qk_norm"),
    )),
    "cohere2": _COHERE,
    "stablelm": Family(
        (
            *_attention("use_qkv_bias"),
            Row("self_attn.q_layernorm.norms.{n}.weight", "hd", "qk_layernorm", repeat="heads"),
            Row("self_attn.k_layernorm.norms.{n}.weight", "hd", "qk_layernorm", repeat="kv_heads"),
            *_mlp(),
            *_vectors("input_layernorm", bias="yes"),
            *_vectors("post_attention_layernorm", bias="yes", when="sequential"),
        ),
        _root(bias="yes"),
    ),
    "glm4": Family(
        (
            *_attention("attention_bias"),
            Row("mlp.gate_up_proj.weight", "2f h"),
            Row("mlp.down_proj.weight", "h f"),
            *_PRE,
            *_vectors("post_self_attn_layernorm", "post_mlp_layernorm"),
        ),
        _root(),
    ),
    "gpt_oss": Family(
        (
            *_attention("yes", "yes"),
            Row("self_attn.sinks", "heads"),
            *_linear("mlp.router", "e h", "yes"),
            *(
                row
                for name, dims in (("gate", "e m h"), ("up", "e m h"), ("down", "e h m"))
                for row in (
                    Row(f"mlp.experts.{name}_proj.weight", dims),
                    Row(f"mlp.experts.{name}_proj.bias", dims.rpartition(" ")[0]),
                )
            ),
            *_PRE,
        ),
        _root(),
        refuses=((r".*\.experts\.(gate_up|down)_proj(_bias|_blocks|_scales)?",
                  "experts in Hugging Face's transposed layout, which stock mlx-lm cannot read as floats"),),
    ),
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "mamba2": Family(
        (*_mamba("use_bias"), *_vectors("norm")),
        _root("norm_f", "backbone", embed="embeddings"),
        prefix="backbone.layers",
    ),
    "nemotron_h": Family(
        (
            *_vectors("norm"),
            *_mamba("mamba_proj_bias", "ssm", keep_a=True),
            *_attention("attention_bias", "attention_bias", at="mixer", when="full"),
            *_linear("mixer.up_proj", "f h", "mlp_bias", "dense"),
            *_linear("mixer.down_proj", "h f", "mlp_bias", "dense"),
            *_nemotron_moe(),
        ),
        _root("norm_f", "backbone", embed="embeddings"),
        prefix="backbone.layers",
        drops=((r"mtp\..*", _MTP),),
    ),
}  # fmt: skip

_FLAGS = (
    "attention_bias", "mlp_bias", "use_qk_norm", "layer_norm_bias", "qk_layernorm", "use_qkv_bias",
    "use_bias", "use_conv_bias", "mamba_proj_bias", "use_parallel_residual",
)  # fmt: skip


def model_flags(config: Mapping[str, Any], shape: ModelShape) -> set[str]:
    """The words of `when` that hold for the whole model; a layer adds its mixer and its feed-forward kind."""
    found = {"yes", *flags(config, _FLAGS)}
    found |= {"q_lora" if shape.q_lora_rank else "q_full"}
    found |= {word for word, holds in (
        ("shared", shape.shared_intermediate_size > 0),
        ("sequential", "use_parallel_residual" not in found),
        ("latent", shape.moe_latent_size > 0),
    ) if holds}  # fmt: skip
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
        "qkvz": shape.conv_channels + inner,
    }  # fmt: skip
