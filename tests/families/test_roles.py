"""Roles are told by shape and neighbours: what matters keeps its role under nonsense names."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mlxquant.families.layout import Target
from mlxquant.families.mlx_layout import layout
from mlxquant.families.roles import SENSITIVE, VOCABULARY, Role, assign_roles
from mlxquant.families.shape import ModelShape
from tests import tiny
from tests.families import checkpoints

# What each name of a family means, written down by hand; the last match counts.
EXPECTED = [
    (r"embed_tokens_per_layer\.weight$", Role.LAYER_EMBEDDING),
    (r"per_layer_(input_gate|projection|model_projection)\.weight$", Role.OTHER),
    (r"embed(_tokens|dings)\.weight$", Role.EMBEDDING),
    (r"lm_head\.weight$", Role.HEAD),
    (r"(norm|norm_f|layernorm|layernorm_\d|norms\.\d)\.weight$", Role.NORM),
    (r"\.q_proj\.weight$", Role.ATTN_Q),
    (r"\.k_proj\.weight$", Role.ATTN_K),
    (r"\.v_proj\.weight$", Role.ATTN_V),
    (r"\.(o_proj|dense)\.weight$", Role.ATTN_O),
    (r"\.qkv_proj\.weight$", Role.ATTN_QKV),
    (r"\.(gate_proj|w1)\.weight$", Role.FFN_GATE),
    (r"\.(up_proj|w3|fc1|c_fc)\.weight$", Role.FFN_UP),
    (r"\.(down_proj|w2|fc2|c_proj)\.weight$", Role.FFN_DOWN),
    (r"\.gate_up_proj\.weight$", Role.FFN_GATE_UP),
    (r"\.(switch_mlp|switch_glu|experts)\.gate_proj\.weight$", Role.EXPERT_GATE),
    (r"\.(switch_mlp|switch_glu|experts)\.(up_proj|fc1)\.weight$", Role.EXPERT_UP),
    (r"\.(switch_mlp|switch_glu|experts)\.(down_proj|fc2)\.weight$", Role.EXPERT_DOWN),
    (r"\.(linear_left|linear_right|(altup|altup_unembed)_projections\.\d)\.weight$", Role.OTHER),
    (r"\.altup\.(modality_router|correction_coefs|prediction_coefs)\.weight$", Role.ROUTER),
    (r"\.(gate|router|router\.layer|router\.proj)\.weight$", Role.ROUTER),
    (r"\.shared_expert_gate\.weight$", Role.SHARED_GATE),
    (r"\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|embed_q|unembed_out)\.weight$", Role.MLA_LATENT),
    (r"\.(in_proj|out_proj|in_proj_qkvz|in_proj_ba|in_proj_qkv|in_proj_[zab])\.weight$", Role.SSM),
    (r"\.(A_log|D|dt_bias)$", Role.SSM),
    (r"self_attn\.out_proj\.weight$", Role.ATTN_O),
    (r"\.(conv1d|conv\.conv)\.weight$", Role.CONV),
    (r"\.(bias|expert_bias|e_score_correction_bias)$", Role.BIAS),
    (r"\.(sinks|scale|per_expert_scale|layer_scalar|correct_output_scale)$", Role.OTHER),
]


def targets_of(family: str) -> tuple[tuple[Target, ...], ModelShape]:
    path = checkpoints.folder(family, family in tiny.ALWAYS_TIED)
    config = checkpoints.config(path)
    return layout(config, checkpoints.specs(path)).targets, ModelShape.from_config(config)


def expected(name: str) -> Role:
    return [role for pattern, role in EXPECTED if re.search(pattern, name)][-1]


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_tensor_of_every_family_has_its_role(family):
    targets, shape = targets_of(family)
    roles = assign_roles(targets, shape)
    assert roles == {t.name: expected(t.name) for t in targets}


# Words of a path that only this family's people know; what they name must keep its role under any other word.
WORDS = {
    "qwen2_moe": ("gate", "shared_expert_gate", "switch_mlp", "mlp"),
    "qwen3_moe": ("gate", "switch_mlp", "mlp"),
    "mixtral": ("gate", "switch_mlp", "block_sparse_moe"),
    "granitemoe": ("router", "layer", "switch_mlp", "block_sparse_moe"),
    "gpt_oss": ("router", "experts", "mlp"),
    "deepseek_v2": ("gate", "kv_a_proj_with_mqa", "kv_b_proj", "self_attn", "mlp"),
    "deepseek_v3": ("gate", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "embed_q", "unembed_out",
                    "self_attn", "mlp"),
    "qwen3_next": ("linear_attn", "in_proj_qkvz", "in_proj_ba", "conv1d", "A_log", "dt_bias", "out_proj",
                   "gate", "shared_expert_gate"),
    "qwen3_5_moe": ("linear_attn", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "conv1d", "A_log", "out_proj",
                    "gate", "shared_expert_gate"),
    "gemma4_text": ("router", "proj", "experts", "switch_glu", "per_expert_scale"),
    "mamba2": ("mixer", "in_proj", "out_proj", "conv1d", "A_log", "D", "dt_bias"),
    "nemotron_h": ("mixer", "in_proj", "out_proj", "conv1d", "A_log", "gate"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "word"), [(f, w) for f, words in WORDS.items() for w in (*words, "all")])
def test_sensitive_roles_survive_nonsense_names(family, word):
    targets, shape = targets_of(family)
    words = WORDS[family] if word == "all" else (word,)
    nonsense = {w: f"blorp{i}" for i, w in enumerate(words)}
    new = {t.name: ".".join(nonsense.get(part, part) for part in t.name.split(".")) for t in targets}
    assert len(set(new.values())) == len(targets)
    before = assign_roles(targets, shape)
    after = assign_roles([replace(t, name=new[t.name]) for t in targets], shape)
    sensitive = [name for name, role in before.items() if role in SENSITIVE]
    assert sensitive
    assert any(new[name] != name for name in new)
    assert {name: after[new[name]] for name in sensitive} == {name: before[name] for name in sensitive}
    assert not [name for name, role in before.items() if role not in SENSITIVE and after[new[name]] in SENSITIVE]


def test_a_projection_of_the_routers_shape_is_no_router():
    """Qwen3-Next: 512 experts, and 2 key heads of 256 make k_proj (512, hidden) too."""
    targets, shape = targets_of("qwen3_next")
    shape = replace(shape, experts=64, experts_per_token=2)  # k_proj is (64, 128)
    stacked = [replace(t, shape=(64, *t.shape[1:])) if ".switch_mlp." in t.name else t for t in targets]
    stacked = [replace(t, shape=(64, 128)) if t.name.endswith("mlp.gate.weight") else t for t in stacked]
    roles = assign_roles(stacked, shape)
    assert {roles[t.name] for t in stacked if "k_proj" in t.name} == {Role.ATTN_K}
    assert {roles[t.name] for t in stacked if t.name.endswith("mlp.gate.weight")} == {Role.ROUTER}


def test_vocabulary_matrices_without_telling_names():
    targets, shape = targets_of("llama")
    first, last = (replace(targets[0], name=name) for name in ("model.xyz.weight", "zyx.weight"))
    assert assign_roles([first, last], shape) == {first.name: Role.EMBEDDING, last.name: Role.HEAD}
    assert assign_roles([first], shape) == {first.name: Role.EMBEDDING}


def test_nothing_sensitive_in_a_plain_model():
    for family in ("llama", "gemma2", "phi3", "cohere"):
        targets, shape = targets_of(family)
        assert not set(assign_roles(targets, shape).values()) & SENSITIVE
    assert not SENSITIVE & VOCABULARY
