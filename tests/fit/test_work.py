"""What a token costs, against parameter counts that were published and models that mlx-lm builds."""

from __future__ import annotations

import pytest

from mlxquant.families.checkpoint import checkpoint
from mlxquant.fit.subject import Subject
from mlxquant.fit.work import work

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = LLAMA | {
    "model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "norm_topk_prob": True, "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "vocab_size": 129280, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False,
    "max_position_embeddings": 163840, "attention_bias": False,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 2880, "num_hidden_layers": 24,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880,
    "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088, "sliding_window": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 150000, "tie_word_embeddings": False, "max_position_embeddings": 131072,
}  # fmt: skip


def subject(config) -> Subject:
    return Subject("x", config, checkpoint(config))


# Active parameters as the model cards give them, in billions: Llama 3.1 8.03 in all, Mixtral 12.9 and Qwen3 3.3 with
# both vocabulary matrices, DeepSeek-V3 37 with one, gpt-oss 3.61 with one (its card, Table 1).
@pytest.mark.parametrize(
    ("config", "published", "embeddings"),
    [(LLAMA, 8.03, 1), (MIXTRAL, 12.9, 1), (QWEN3_30B, 3.3, 1), (DEEPSEEK_V3, 37, 0), (GPT_OSS, 3.61, 0)],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_active_weights_are_those_of_the_model_card(config, published, embeddings):
    """The head counts, an input embedding only where the card counts it as well."""
    found = work(subject(config)).active_weights + embeddings * config["vocab_size"] * config["hidden_size"]
    assert found / 1e9 == pytest.approx(published, rel=0.02)


def test_published_mxfp4_weighs_as_the_floats_do():
    mxfp4 = GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}}
    assert any(spec.dtype == "U8" for spec in checkpoint(mxfp4).values())
    assert work(subject(mxfp4)) == work(subject(GPT_OSS))


def test_a_tied_embedding_counts_once_as_the_head():
    """As many weights as the untied model, but for the row that a token reads there."""
    tied = work(subject(LLAMA | {"tie_word_embeddings": True}))
    assert tied.active_weights == work(subject(LLAMA)).active_weights - 4096


def test_attention_of_one_position():
    """2 flops for each number of each head's key, and of its value."""
    assert work(subject(LLAMA)).attention_flops == 32 * 32 * 2 * (128 + 128)
    assert work(subject(DEEPSEEK_V3)).attention_flops == 61 * 128 * 2 * (128 + 64 + 128)
    assert work(subject(GPT_OSS)).attention_flops == 12 * 64 * 2 * (64 + 64)  # the other half slides


def test_layers_and_experts():
    assert (work(subject(MIXTRAL)).layers, work(subject(MIXTRAL)).moe) == (32, True)
    assert (work(subject(LLAMA)).layers, work(subject(LLAMA)).moe) == (32, False)
