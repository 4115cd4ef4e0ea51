"""What the tables of mlx_modules.py and mlx_nested.py are written in: rows, families, and the parts that many share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

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


def linear(name: str, dims: str, bias: str = "", when: str = "") -> tuple[Row, ...]:
    """A weight, and a bias where the flag `bias` is set ("yes" always is)."""
    weight = Row(f"{name}.weight", dims, when)
    return (weight, Row(f"{name}.bias", dims.split()[0], f"{when} {bias}")) if bias else (weight,)


def vectors(*names: str, dims: str = "h", when: str = "", bias: str = "", how: How = "same") -> tuple[Row, ...]:
    rows = tuple(Row(f"{name}.weight", dims, when, how) for name in names)
    return rows + tuple(Row(f"{name}.bias", dims, f"{when} {bias}") for name in names if bias)


def attention(
    bias: str = "", o_bias: str = "", at: str = "self_attn", o: str = "o_proj", when: str = "", q: str = "q"
) -> tuple[Row, ...]:
    return (
        *linear(f"{at}.q_proj", f"{q} h", bias, when),
        *linear(f"{at}.k_proj", "kv h", bias, when),
        *linear(f"{at}.v_proj", "kv h", bias, when),
        *linear(f"{at}.{o}", "h q", o_bias, when),
    )


def mlp(bias: str = "", at: str = "mlp", width: str = "f", when: str = "") -> tuple[Row, ...]:
    return (
        *linear(f"{at}.gate_proj", f"{width} h", bias, when),
        *linear(f"{at}.up_proj", f"{width} h", bias, when),
        *linear(f"{at}.down_proj", f"h {width}", bias, when),
    )


def experts(at: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Row, ...]:
    """SwitchGLU from one module per expert; an MLX folder has them stacked already."""
    names = (("gate_proj", gate, "e m h"), ("up_proj", up, "e m h"), ("down_proj", down, "e h m"))
    return tuple(
        Row(f"{at}.switch_mlp.{mlx}.weight", dims, "moe", "stack", f"{at}.experts.{{e}}.{theirs}.weight")
        for mlx, theirs, dims in names
    )


def fused_experts(at: str, source: str, when: str = "moe") -> tuple[Row, ...]:
    """SwitchGLU from two tensors for all experts: gate and up, one after the other, and down."""
    return (
        *(
            Row(f"{at}.{name}_proj.weight", "e m h", when, "half", f"{source}.gate_up_proj", part)
            for part, name in enumerate(("gate", "up"))
        ),
        Row(f"{at}.down_proj.weight", "e h m", when, source=f"{source}.down_proj"),
    )


def root(norm: str = "norm", at: str = "model", bias: str = "", embed: str = "embed_tokens") -> tuple[Row, ...]:
    return (
        Row(f"{at}.{embed}.weight", "v h"),
        *vectors(f"{at}.{norm}", bias=bias),
        Row("lm_head.weight", "v h", "head"),
        Row("lm_head.weight", "v h", "copied_head", "embedding", f"{at}.{embed}.weight"),
    )


PRE = vectors("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*PRE, *vectors("pre_feedforward_layernorm", "post_feedforward_layernorm"))
QK_NORM = vectors("self_attn.q_norm", "self_attn.k_norm", dims="hd")
WIDE_QK_NORM = (*vectors("self_attn.q_norm", dims="q"), *vectors("self_attn.k_norm", dims="kv"))
SHARED_GATED = (
    *mlp(at="mlp.shared_expert", width="s", when="moe"),
    Row("mlp.shared_expert_gate.weight", "1 h", "moe"),
)
ROUTER = Row("mlp.gate.weight", "e h", "moe")
MTP = "multi-token prediction, which mlx-lm does not run"
VISION = "vision: only the text part is converted"
AUDIO = "audio: only the text part is converted"


def below(family: Family, at: str, drops: tuple[tuple[str, str], ...]) -> Family:
    """The same model one level deeper, as gemma3 keeps its text part under language_model."""
    rows = tuple(replace(r, name=f"{at}.{r.name}", source=r.source and f"{at}.{r.source}") for r in family.root)
    return replace(family, root=rows, prefix=f"{at}.{family.prefix}", drops=drops)
