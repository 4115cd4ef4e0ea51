"""The model families we convert, and what stock mlx-lm takes for granted when config.json is silent.

Facts of mlx-lm 0.32 (`mlx_lm/models/<module>.py`, the fields of ModelArgs; `MODEL_REMAPPING` in utils.py).
tests/families/test_shape.py compares this table with the installed mlx-lm, so an upgrade that moves a default
is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# model_type -> mlx-lm's module, where they differ.
REMAPPING = {"mistral": "llama", "iquestcoder": "llama", "xverse": "llama", "kimi_k2": "deepseek_v3",
             "gemma4_unified": "gemma4"}  # fmt: skip

# derived  always hidden_size // num_attention_heads, whatever the config says
# either   config's head_dim where it is set, else derived
# own      config's head_dim (or its default)
HeadDim = Literal["derived", "either", "own"]

# config   tie_word_embeddings decides      always  there is no output head of its own
# never    there always is one              present lm_head.weight in the source decides
Tie = Literal["config", "always", "never", "present"]


@dataclass(frozen=True)
class Facts:
    """`required`: the keys mlx-lm has no default for (beyond BASE); `defaults`: those of the keys we read
    that it has."""

    head_dim: HeadDim = "derived"
    tie: Tie = "config"
    required: tuple[str, ...] = ()
    defaults: Mapping[str, int | bool | None] = field(default_factory=dict)


# Every family reads these; they are required where the family has no default for them.
BASE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

_GRANITE = (
    "rms_norm_eps", "logits_scaling", "attention_multiplier", "embedding_multiplier", "residual_multiplier",
    "max_position_embeddings", "num_key_value_heads", "attention_bias", "rope_theta",
)  # fmt: skip
_MOE3 = (
    "num_experts", "num_experts_per_tok", "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size",
    "rms_norm_eps", "num_key_value_heads", "head_dim", "rope_theta", "max_position_embeddings",
)  # fmt: skip
_DEEPSEEK: dict[str, int | bool | None] = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
    "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "moe_layer_freq": 1, "first_k_dense_replace": 0, "max_position_embeddings": 2048,
}  # fmt: skip
# TextModelArgs of qwen3_5.py, for the text_config of both modules.
_QWEN3_5: dict[str, int | bool | None] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 151936, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "linear_num_value_heads": 64, "linear_num_key_heads": 16, "linear_key_head_dim": 192,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "tie_word_embeddings": False,
    "full_attention_interval": 4, "num_experts": 0, "num_experts_per_tok": 0,
    "shared_expert_intermediate_size": 0, "moe_intermediate_size": 0,
}  # fmt: skip
_GEMMA4: dict[str, int | bool | None] = {
    "hidden_size": 1536, "num_hidden_layers": 35, "intermediate_size": 6144, "num_attention_heads": 8,
    "head_dim": 256, "global_head_dim": 512, "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
    "num_key_value_heads": 1, "num_global_key_value_heads": None, "num_kv_shared_layers": 20,
    "hidden_size_per_layer_input": 256, "sliding_window": 512, "sliding_window_pattern": 5,
    "max_position_embeddings": 131072, "attention_k_eq_v": False, "use_double_wide_mlp": True,
    "enable_moe_block": False, "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None,
    "tie_word_embeddings": True,
}  # fmt: skip
_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}

FACTS: dict[str, Facts] = {
    "llama": Facts("either", "config", ("rms_norm_eps",), _TIED),
    "smollm3": Facts("either", "config", ("rms_norm_eps",), _TIED),
    "mixtral": Facts("derived", "config", (), _UNTIED | {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    }),
    "qwen2": Facts("derived", "config", ("rms_norm_eps", "num_key_value_heads"),
                   _TIED | {"max_position_embeddings": 32768}),
    "qwen2_moe": Facts("derived", "never", (
        "num_experts_per_tok", "num_experts", "moe_intermediate_size", "shared_expert_intermediate_size",
        "rms_norm_eps",
    )),
    "qwen3": Facts("own", "config", (
        "rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "head_dim", "tie_word_embeddings",
    )),
    # qwen3 under `language_model.`
    "qwen3_vl": Facts("own", "config", (
        "rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "head_dim", "tie_word_embeddings",
    )),
    "qwen3_moe": Facts("own", "config", (*_MOE3, "tie_word_embeddings", "norm_topk_prob")),
    "qwen3_next": Facts("own", "config", (
        *_MOE3, "linear_num_value_heads", "linear_num_key_heads", "linear_key_head_dim",
        "linear_value_head_dim", "linear_conv_kernel_dim", "shared_expert_intermediate_size",
        "partial_rotary_factor",
    ), _UNTIED | {"full_attention_interval": 4}),
    "qwen3_5": Facts("either", "config", (), _QWEN3_5),
    "qwen3_5_moe": Facts("either", "config", (), _QWEN3_5),
    "gemma": Facts("own", "always", ("head_dim", "rms_norm_eps", "num_key_value_heads")),
    "gemma2": Facts("own", "always", ("head_dim", "rms_norm_eps", "num_key_value_heads")),
    "gemma3_text": Facts("own", "present", (), {
        "hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912, "num_attention_heads": 4,
        "head_dim": 256, "vocab_size": 262144, "num_key_value_heads": 1, "sliding_window": 512,
        "sliding_window_pattern": 6, "max_position_embeddings": 32768,
    }),
    # gemma3 is gemma3_text under `language_model.`, with three defaults of its own (gemma3.py,
    # __post_init__).
    "gemma3": Facts("own", "present", ("text_config",), {
        "hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912, "num_attention_heads": 8,
        "head_dim": 256, "vocab_size": 262208, "num_key_value_heads": 4, "sliding_window": 512,
        "sliding_window_pattern": 6, "max_position_embeddings": 32768,
    }),
    "gemma3n": Facts("own", "always", (
        "head_dim", "rms_norm_eps", "num_key_value_heads", "num_kv_shared_layers", "vocab_size_per_layer_input",
        "sliding_window", "max_position_embeddings", "rope_local_base_freq", "rope_theta", "final_logit_softcapping",
        "layer_types", "activation_sparsity_pattern", "hidden_size_per_layer_input", "altup_num_inputs",
        "altup_coef_clip", "altup_correct_scale", "altup_active_idx", "laurel_rank", "text_config",
    )),
    # gemma4 is gemma4_text under `language_model.`; its vocab_size counts, not text_config's.
    "gemma4_text": Facts("own", "config", (), _GEMMA4),
    "gemma4": Facts("own", "config", (), _GEMMA4),
    "phi3": Facts("derived", "config", ("rms_norm_eps",), _UNTIED | {"max_position_embeddings": 131072}),
    "phi": Facts("derived", "never", (), {
        "max_position_embeddings": 2048, "vocab_size": 51200, "hidden_size": 2560, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "intermediate_size": 10240,
    }),
    "olmo2": Facts("either", "config", ("rms_norm_eps",), _TIED),
    "olmo3": Facts("either", "config", ("rms_norm_eps", "max_position_embeddings", "sliding_window", "rope_theta"),
                   _UNTIED),
    # mlx-lm has no default for rope_parameters that its own attention could run with.
    "ministral3": Facts("either", "config", ("rms_norm_eps", "rope_parameters"), _TIED),
    # ministral3, or llama for older ones, under `language_model.`; untied where text_config does not say.
    "mistral3": Facts("either", "config", ("rms_norm_eps", "text_config"), _UNTIED),
    "olmoe": Facts("either", "config", ("rms_norm_eps", "num_experts", "num_experts_per_tok"), _TIED),
    "granite": Facts("derived", "config", (*_GRANITE, "mlp_bias"), _TIED),
    "granitemoe": Facts("derived", "config", (*_GRANITE, "num_local_experts", "num_experts_per_tok"), _TIED),
    "starcoder2": Facts("derived", "config", ("num_key_value_heads",), _TIED | {"vocab_size": 49152}),
    "cohere": Facts("derived", "always", (), {
        "hidden_size": 8192, "num_hidden_layers": 40, "intermediate_size": 22528, "num_attention_heads": 64,
        "num_key_value_heads": 64, "vocab_size": 256000,
    }),
    "cohere2": Facts("own", "always", (), {
        "hidden_size": 4096, "head_dim": 128, "num_hidden_layers": 32, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 256000, "sliding_window": 4096,
        "sliding_window_pattern": 4,
    }),
    "stablelm": Facts("derived", "never", (
        "num_key_value_heads", "rope_theta", "use_qkv_bias", "partial_rotary_factor", "layer_norm_eps",
    )),
    "glm4": Facts("own", "never", (
        "attention_bias", "head_dim", "rms_norm_eps", "num_key_value_heads", "partial_rotary_factor",
        "rope_theta",
    ), {"max_position_embeddings": 32768}),
    "glm4_moe": Facts("own", "never", (
        "max_position_embeddings", "moe_intermediate_size", "norm_topk_prob", "n_group", "head_dim", "topk_group",
        "n_shared_experts", "n_routed_experts", "routed_scaling_factor", "num_experts_per_tok",
        "first_k_dense_replace", "num_key_value_heads", "rms_norm_eps", "rope_theta", "use_qk_norm",
        "tie_word_embeddings", "attention_bias", "partial_rotary_factor",
    )),
    "glm4_moe_lite": Facts("derived", "never", (), {
        "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "moe_intermediate_size": 1536,
        "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20, "n_shared_experts": 1,
        "n_routed_experts": 64, "kv_lora_rank": 512, "q_lora_rank": 768, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 192, "v_head_dim": 256, "num_experts_per_tok": 4, "moe_layer_freq": 1,
        "first_k_dense_replace": 1, "max_position_embeddings": 202752,
    }),
    "lfm2": Facts("derived", "always", (
        "num_key_value_heads", "max_position_embeddings", "norm_eps", "conv_bias", "conv_L_cache", "block_dim",
        "block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim",
    )),
    "lfm2_moe": Facts("derived", "always", (
        "num_key_value_heads", "max_position_embeddings", "norm_eps", "conv_bias", "conv_L_cache", "num_experts",
        "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "use_expert_bias", "num_dense_layers",
    )),
    "gpt_oss": Facts("own", "never", (), {
        "num_hidden_layers": 36, "num_local_experts": 128, "num_experts_per_tok": 4, "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64,
        "num_key_value_heads": 8, "sliding_window": 128,
    }),
    # rope_scaling has a default there, which its own attention cannot run with.
    "deepseek_v2": Facts("derived", "never", ("rope_scaling",), _DEEPSEEK),
    "deepseek_v3": Facts("derived", "never", (), _DEEPSEEK | {"num_experts_per_tok": 1}),
    "mamba2": Facts("own", "config", (
        "num_heads", "head_dim", "state_size", "layer_norm_epsilon", "conv_kernel", "n_groups", "use_bias",
        "use_conv_bias", "tie_word_embeddings", "time_step_limit", "time_step_rank",
    ), {"max_position_embeddings": 2056}),
    "nemotron_h": Facts("either", "never", (
        "max_position_embeddings", "num_key_value_heads", "attention_bias", "mamba_num_heads",
        "mamba_head_dim", "mamba_proj_bias", "ssm_state_size", "conv_kernel", "n_groups", "mlp_bias",
        "layer_norm_epsilon", "use_bias", "use_conv_bias",
    )),
}  # fmt: skip

KNOWN_TYPES: tuple[str, ...] = tuple(sorted({*FACTS, *REMAPPING}))
