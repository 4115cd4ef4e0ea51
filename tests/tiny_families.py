"""Tiny random tensors of every family, under the names and in the layout of its Hugging Face checkpoints.

Written by hand from the published checkpoints, not from mlxquant's tables: that stock mlx-lm loads each of
them strictly is what shows that they are right.
"""

from __future__ import annotations

from tests.tiny_nested import NESTED, ministral3
from tests.tiny_parts import AROUND_FFN, EXPERTS, HEAD_DIM, HEADS, KV, PER_TOKEN, PRE, VOCAB, Tiny, norm, weight


def dense(model_type, architecture, *, bias=False, qk_norm="", norms=PRE, at="", derived=False, **config):
    """The llama pattern: q, k, v, o; gate, up, down; two norms. `derived`: heads are hidden / heads wide."""

    def build(rng, width, layers, tied):
        m = Tiny(rng, width, layers, tied, model_type, architecture)
        head_dim = width // HEADS if derived else HEAD_DIM
        m.root(f"{at}model.", head=f"{at}lm_head")
        for i in range(layers):
            p = f"{at}model.layers.{i}."
            m.attention(f"{p}self_attn.", bias, head_dim=head_dim)
            if qk_norm:
                wide = qk_norm == "wide"
                m.norms(f"{p}self_attn.", "q_norm", size=HEADS * HEAD_DIM if wide else HEAD_DIM)
                m.norms(f"{p}self_attn.", "k_norm", size=KV * HEAD_DIM if wide else HEAD_DIM)
            m.mlp(f"{p}mlp.")
            m.norms(p, *norms)
        if model_type.startswith("gemma"):
            m.around_zero()
        return m.done(**({"head_dim": None} if derived else {}) | config)

    return build


def olmo3(rng, width, layers, tied):
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    build = dense("olmo3", "Olmo3ForCausalLM", qk_norm="wide", norms=(PRE[1], AROUND_FFN[1]), sliding_window=64,
                  layer_types=kinds)  # fmt: skip
    return build(rng, width, layers, tied)


def gemma3(rng, width, layers, tied):
    """Text and vision; the vision tensors only have to be left out."""
    config, t = dense("gemma3_text", "", qk_norm="head", norms=(*PRE, *AROUND_FFN), at="language_model.")(
        rng, width, layers, True
    )
    inner = {k: v for k, v in config.items() if k not in ("architectures", "bos_token_id", "eos_token_id")}
    t["vision_tower.vision_model.embeddings.patch_embedding.weight"] = weight(rng, 8, 3, 4, 4)
    t["multi_modal_projector.mm_input_projection_weight"] = weight(rng, 8, width)
    root = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [0, 1],
    }
    return root | {"text_config": inner, "vision_config": {"hidden_size": 8}}, t


def phi3(rng, width, layers, tied):
    m = Tiny(rng, width, layers, tied, "phi3", "Phi3ForCausalLM")
    m.root()
    for i in range(layers):
        p = f"model.layers.{i}."
        m.linear(f"{p}self_attn.qkv_proj", (HEADS + 2 * KV) * width // HEADS, width)
        m.linear(f"{p}self_attn.o_proj", width, width)
        m.linear(f"{p}mlp.gate_up_proj", 2 * m.ffn, width)
        m.linear(f"{p}mlp.down_proj", width, m.ffn)
        m.norms(p, *PRE)
    return m.done(head_dim=None)


def phi(rng, width, layers, tied):
    m = Tiny(rng, width, layers, False, "phi", "PhiForCausalLM")
    m.root(last="final_layernorm", bias=True)
    m.t["lm_head.bias"] = weight(rng, VOCAB)
    for i in range(layers):
        p = f"model.layers.{i}."
        m.attention(f"{p}self_attn.", True, True, o="dense", head_dim=width // HEADS)
        m.linear(f"{p}mlp.fc1", m.ffn, width, True)
        m.linear(f"{p}mlp.fc2", width, m.ffn, True)
        m.norms(p, "input_layernorm", bias=True)
    return m.done(head_dim=None)


def starcoder2(rng, width, layers, tied):
    m = Tiny(rng, width, layers, tied, "starcoder2", "Starcoder2ForCausalLM")
    m.root(bias=True)
    for i in range(layers):
        p = f"model.layers.{i}."
        m.attention(f"{p}self_attn.", True, True, head_dim=width // HEADS)
        m.linear(f"{p}mlp.c_fc", m.ffn, width, True)
        m.linear(f"{p}mlp.c_proj", width, m.ffn, True)
        m.norms(p, *PRE, bias=True)
    return m.done(head_dim=None, use_bias=True)


def cohere(rng, width, layers, tied):
    m = Tiny(rng, width, layers, True, "cohere", "CohereForCausalLM")
    m.root()
    for i in range(layers):
        p = f"model.layers.{i}."
        m.attention(f"{p}self_attn.", head_dim=width // HEADS)
        m.t[f"{p}self_attn.q_norm.weight"] = norm(rng, HEADS, width // HEADS)
        m.t[f"{p}self_attn.k_norm.weight"] = norm(rng, KV, width // HEADS)
        m.mlp(f"{p}mlp.")
        m.norms(p, "input_layernorm")
    return m.done(head_dim=None, use_qk_norm=True, tie_word_embeddings=True)


def stablelm(rng, width, layers, tied):
    m = Tiny(rng, width, layers, False, "stablelm", "StableLmForCausalLM")
    m.root(bias=True)
    for i in range(layers):
        p = f"model.layers.{i}."
        m.attention(f"{p}self_attn.", True, head_dim=width // HEADS)
        for name, heads in (("q", HEADS), ("k", KV)):
            m.norms(f"{p}self_attn.{name}_layernorm.norms.", *map(str, range(heads)), size=width // HEADS)
        m.mlp(f"{p}mlp.")
        m.norms(p, *PRE, bias=True)
    return m.done(head_dim=None, use_qkv_bias=True, qk_layernorm=True, partial_rotary_factor=0.25, layer_norm_eps=1e-5)


def glm4(rng, width, layers, tied):
    m = Tiny(rng, width, layers, False, "glm4", "Glm4ForCausalLM")
    m.root()
    for i in range(layers):
        p = f"model.layers.{i}."
        m.attention(f"{p}self_attn.", True)
        m.linear(f"{p}mlp.gate_up_proj", 2 * m.ffn, width)
        m.linear(f"{p}mlp.down_proj", width, m.ffn)
        m.norms(p, *PRE, "post_self_attn_layernorm", "post_mlp_layernorm")
    return m.done(attention_bias=True, partial_rotary_factor=0.5)


def moe(model_type, architecture, *, at="mlp.", names=("gate_proj", "up_proj", "down_proj"), qk_norm="",
        bias=False, shared=False, derived=False, **config):  # fmt: skip
    """Softmax routing over experts with a module each."""

    def build(rng, width, layers, tied):
        m = Tiny(rng, width, layers, tied, model_type, architecture)
        m.root()
        for i in range(layers):
            p = f"model.layers.{i}."
            m.attention(f"{p}self_attn.", bias, head_dim=width // HEADS if derived else HEAD_DIM)
            if qk_norm:
                wide = qk_norm == "wide"
                m.norms(f"{p}self_attn.", "q_norm", size=HEADS * HEAD_DIM if wide else HEAD_DIM)
                m.norms(f"{p}self_attn.", "k_norm", size=KV * HEAD_DIM if wide else HEAD_DIM)
            m.norms(p, *PRE)
            if i in config.get("mlp_only_layers", ()):
                m.mlp(f"{p}mlp.")
                continue
            m.linear(f"{p}{at}gate", EXPERTS, width)
            m.experts(f"{p}{at}", config.get("moe_intermediate_size", m.ffn), names)
            if shared:
                m.mlp(f"{p}{at}shared_expert.", 64)
                m.linear(f"{p}{at}shared_expert_gate", 1, width)
        count = "num_local_experts" if model_type == "mixtral" else "num_experts"
        own = {"head_dim": None} if derived else {}
        return m.done(**{count: EXPERTS, "num_experts_per_tok": PER_TOKEN} | own | config)

    return build


def granitemoe(rng, width, layers, tied):
    m = Tiny(rng, width, layers, tied, "granitemoe", "GraniteMoeForCausalLM")
    m.root()
    for i in range(layers):
        p = f"model.layers.{i}."
        m.attention(f"{p}self_attn.", head_dim=width // HEADS)
        m.linear(f"{p}block_sparse_moe.router.layer", EXPERTS, width)
        m.t[f"{p}block_sparse_moe.input_linear.weight"] = weight(rng, EXPERTS, 2 * m.ffn, width)
        m.t[f"{p}block_sparse_moe.output_linear.weight"] = weight(rng, EXPERTS, width, m.ffn)
        m.norms(p, *PRE)
    return m.done(head_dim=None, num_local_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, **GRANITE)


def gpt_oss(rng, width, layers, tied):
    """As MLX keeps it: stock mlx-lm reads no unquantized Hugging Face checkpoint of this family."""
    m = Tiny(rng, width, layers, False, "gpt_oss", "GptOssForCausalLM")
    m.root()
    for i in range(layers):
        p = f"model.layers.{i}."
        m.attention(f"{p}self_attn.", True, True)
        m.t[f"{p}self_attn.sinks"] = weight(rng, HEADS)
        m.linear(f"{p}mlp.router", EXPERTS, width, True)
        for name, rows, cols in (("gate", m.ffn, width), ("up", m.ffn, width), ("down", width, m.ffn)):
            m.t[f"{p}mlp.experts.{name}_proj.weight"] = weight(rng, EXPERTS, rows, cols)
            m.t[f"{p}mlp.experts.{name}_proj.bias"] = weight(rng, EXPERTS, rows)
        m.norms(p, *PRE)
    return m.done(num_local_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, sliding_window=64)


def deepseek(version, model_type, architecture, q_lora=64):
    """MLA, a dense first layer, experts and a shared expert after it; v3 also has a multi-token prediction
    layer."""
    rank, rope, nope, value, hidden = 64, 16, 32, 32, 64

    def attention(m, p):
        query = HEADS * (nope + rope)
        if q_lora:
            m.linear(f"{p}q_a_proj", q_lora, m.width)
            m.norms(p, "q_a_layernorm", size=q_lora)
            m.linear(f"{p}q_b_proj", query, q_lora)
        else:
            m.linear(f"{p}q_proj", query, m.width)
        m.linear(f"{p}kv_a_proj_with_mqa", rank + rope, m.width)
        m.norms(p, "kv_a_layernorm", size=rank)
        m.linear(f"{p}kv_b_proj", HEADS * (nope + value), rank)
        m.linear(f"{p}o_proj", m.width, HEADS * value)

    def build(rng, width, layers, tied):
        m = Tiny(rng, width, layers, False, model_type, architecture)
        m.root()
        for i in range(layers):
            p = f"model.layers.{i}."
            attention(m, f"{p}self_attn.")
            m.norms(p, *PRE)
            if i == 0:
                m.mlp(f"{p}mlp.")
                continue
            m.linear(f"{p}mlp.gate", EXPERTS, width)
            if version == 3:
                m.t[f"{p}mlp.gate.e_score_correction_bias"] = weight(rng, EXPERTS)
            m.experts(f"{p}mlp.", hidden)
            m.mlp(f"{p}mlp.shared_experts.", hidden)
        latents = {
            "kv_lora_rank": rank,
            "qk_rope_head_dim": rope,
            "qk_nope_head_dim": nope,
            "v_head_dim": value,
        }
        counts = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": PER_TOKEN}
        config, t = m.done(head_dim=None, first_k_dense_replace=1, moe_intermediate_size=hidden, **latents, **counts)
        return config | {"q_lora_rank": q_lora or None, "rope_scaling": YARN if version == 2 else None}, t

    return build


def glm4_moe(rng, width, layers, tied):
    """The first layer dense; with norms of queries and keys, as GLM-4.5 has and GLM-4.5-Air has not."""
    m = Tiny(rng, width, layers, False, "glm4_moe", "Glm4MoeForCausalLM")
    m.root()
    for i in range(layers):
        p = f"model.layers.{i}."
        m.attention(f"{p}self_attn.", True)
        m.norms(f"{p}self_attn.", "q_norm", "k_norm", size=HEAD_DIM)
        m.norms(p, *PRE)
        if i == 0:
            m.mlp(f"{p}mlp.")
            continue
        m.linear(f"{p}mlp.gate", EXPERTS, width)
        m.t[f"{p}mlp.gate.e_score_correction_bias"] = weight(rng, EXPERTS)
        m.experts(f"{p}mlp.", 64)
        m.mlp(f"{p}mlp.shared_experts.", 64)
    config, t = m.done(
        moe_intermediate_size=64, norm_topk_prob=True, n_group=1, topk_group=1, n_shared_experts=1,
        n_routed_experts=EXPERTS, routed_scaling_factor=1.0, num_experts_per_tok=PER_TOKEN, first_k_dense_replace=1,
        use_qk_norm=True, attention_bias=True, partial_rotary_factor=0.5,
    )  # fmt: skip
    return config | {"rope_scaling": None}, t


def lfm2(rng, width, layers, tied, sparse=False):
    """Short convolutions and, every second layer here, attention; a feed-forward width that the config overstates."""
    m = Tiny(rng, width, layers, True, "lfm2", "Lfm2ForCausalLM")
    m.root(last="embedding_norm")
    ffn, names = 256, ("w1", "w3", "w2")  # two thirds of 360, rounded up to a multiple of 64
    for i in range(layers):
        p = f"model.layers.{i}."
        if i % 2:
            m.attention(f"{p}self_attn.", o="out_proj", head_dim=width // HEADS)
            m.norms(f"{p}self_attn.", "q_layernorm", "k_layernorm", size=width // HEADS)
        else:
            m.linear(f"{p}conv.in_proj", 3 * width, width)
            m.t[f"{p}conv.conv.weight"] = weight(rng, width, 1, 3)
            m.linear(f"{p}conv.out_proj", width, width)
        if sparse and i:
            m.linear(f"{p}feed_forward.gate", EXPERTS, width)
            m.t[f"{p}feed_forward.expert_bias"] = weight(rng, EXPERTS)
            m.experts(f"{p}feed_forward.", 64, names)
        else:
            for name in names:
                m.linear(f"{p}feed_forward.{name}", *((width, ffn) if name == "w2" else (ffn, width)))
        m.norms(p, "operator_norm", "ffn_norm")
    return m.done(
        head_dim=None, rms_norm_eps=None, norm_eps=1e-5, conv_bias=False, conv_L_cache=3, block_dim=width,
        intermediate_size=360, block_ff_dim=360, block_multiple_of=64, block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=True, layer_types=["full_attention" if i % 2 else "conv" for i in range(layers)],
    )  # fmt: skip


def lfm2_moe(rng, width, layers, tied):
    config, tensors = lfm2(rng, width, layers, tied, sparse=True)
    kept = {key: value for key, value in config.items() if not key.startswith("block_")}
    return kept | {
        "architectures": ["Lfm2MoeForCausalLM"], "model_type": "lfm2_moe", "intermediate_size": 256,
        "moe_intermediate_size": 64, "num_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN, "num_dense_layers": 1,
        "norm_topk_prob": True, "use_expert_bias": True,
    }, tensors  # fmt: skip


def qwen3_next(rng, width, layers, tied, key=16):
    """Gated delta nets and, every second layer here, attention with a gate in q_proj; norms stored as w -
    1."""
    m = Tiny(rng, width, layers, tied, "qwen3_next", "Qwen3NextForCausalLM")
    m.root()
    heads, value = 4, 32
    channels, inner = 2 * 2 * key + heads * value, heads * value
    for i in range(layers):
        p = f"model.layers.{i}."
        if i % 2:
            m.attention(f"{p}self_attn.", q=2)
            m.norms(f"{p}self_attn.", "q_norm", "k_norm", size=HEAD_DIM)
        else:
            m.linear(f"{p}linear_attn.in_proj_qkvz", channels + inner, width)
            m.linear(f"{p}linear_attn.in_proj_ba", 2 * heads, width)
            m.state(f"{p}linear_attn.", channels, heads, False)
            m.norms(f"{p}linear_attn.", "norm", size=value)
            m.linear(f"{p}linear_attn.out_proj", width, inner)
        m.norms(p, *PRE)
        m.linear(f"{p}mlp.gate", EXPERTS, width)
        m.experts(f"{p}mlp.", 64)
        m.mlp(f"{p}mlp.shared_expert.", 64)
        m.linear(f"{p}mlp.shared_expert_gate", 1, width)
    m.around_zero()
    m.t["mtp.fc.weight"] = weight(rng, width, 2 * width)
    return m.done(
        linear_num_value_heads=heads, linear_num_key_heads=2, linear_key_head_dim=key,
        linear_value_head_dim=value, linear_conv_kernel_dim=4, full_attention_interval=2, num_experts=EXPERTS,
        num_experts_per_tok=PER_TOKEN, decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=64,
        shared_expert_intermediate_size=64, partial_rotary_factor=0.25, norm_topk_prob=True,
    )  # fmt: skip


def mamba2(rng, width, layers, tied):
    m = Tiny(rng, width, layers, tied, "mamba2", "Mamba2ForCausalLM")
    m.root("backbone.", "embeddings", "norm_f")
    heads, head_dim, state = 8, 32, 16
    for i in range(layers):
        p = f"backbone.layers.{i}."
        inner = heads * head_dim
        m.recurrent(f"{p}mixer.", inner + 2 * state, heads, inner, "in_proj", "out_proj")
        m.norms(p, "norm")
    return m.done(
        num_attention_heads=None, num_key_value_heads=None, num_heads=heads, head_dim=head_dim,
        state_size=state, layer_norm_epsilon=1e-5, conv_kernel=4, n_groups=1, use_bias=False,
        use_conv_bias=True, time_step_limit=[0.0, 100.0], time_step_rank=8,
    )  # fmt: skip


def nemotron_h(rng, width, layers, tied):
    """One block of each kind, whatever `layers` says: Mamba, attention, MLP, experts."""
    m = Tiny(rng, width, layers, False, "nemotron_h", "NemotronHForCausalLM")
    m.root("backbone.", "embeddings", "norm_f")
    heads, head_dim, state, p = 8, 32, 16, "backbone.layers.{}.mixer."
    inner = heads * head_dim
    m.recurrent(p.format(0), inner + 2 * state, heads, inner, "in_proj", "out_proj")
    m.attention(p.format(1))
    m.linear(p.format(2) + "up_proj", m.ffn, width)
    m.linear(p.format(2) + "down_proj", width, m.ffn)
    last = p.format(3)
    m.linear(f"{last}gate", EXPERTS, width)
    m.t[f"{last}gate.e_score_correction_bias"] = weight(rng, EXPERTS)
    for e in range(EXPERTS):
        m.linear(f"{last}experts.{e}.up_proj", 64, width)
        m.linear(f"{last}experts.{e}.down_proj", width, 64)
    m.linear(f"{last}shared_experts.up_proj", 64, width)
    m.linear(f"{last}shared_experts.down_proj", width, 64)
    for i in range(4):
        m.norms(f"backbone.layers.{i}.", "norm")
    return m.done(
        hybrid_override_pattern="M*-E", num_hidden_layers=4, attention_bias=False, mlp_bias=False,
        use_bias=False, mamba_num_heads=heads, mamba_head_dim=head_dim, mamba_proj_bias=False,
        ssm_state_size=state, conv_kernel=4, n_groups=1, layer_norm_epsilon=1e-5, use_conv_bias=True,
        n_routed_experts=EXPERTS, n_shared_experts=1, num_experts_per_tok=PER_TOKEN, moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=64, n_group=1, topk_group=1, norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )  # fmt: skip


YARN = {
    "type": "yarn", "factor": 4, "original_max_position_embeddings": 512, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.7, "mscale_all_dim": 0.7,
}  # fmt: skip
GRANITE = {
    "logits_scaling": 8.0, "attention_multiplier": 0.1, "embedding_multiplier": 2.0,
    "residual_multiplier": 0.2, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
SPARSE = {"decoder_sparse_step": 1, "moe_intermediate_size": 64, "norm_topk_prob": True}

FAMILIES = {
    "llama": dense("llama", "LlamaForCausalLM"),
    "mistral": dense("mistral", "MistralForCausalLM", derived=True),
    "qwen2": dense("qwen2", "Qwen2ForCausalLM", bias=True, derived=True),
    "qwen3": dense("qwen3", "Qwen3ForCausalLM", qk_norm="head"),
    "smollm3": dense("smollm3", "SmolLM3ForCausalLM", derived=True, no_rope_layer_interval=2),
    "olmo2": dense("olmo2", "Olmo2ForCausalLM", qk_norm="wide", norms=(PRE[1], AROUND_FFN[1])),
    "granite": dense("granite", "GraniteForCausalLM", derived=True, **GRANITE),
    "gemma": dense("gemma", "GemmaForCausalLM"),
    "gemma2": dense("gemma2", "Gemma2ForCausalLM", norms=(*PRE, *AROUND_FFN), query_pre_attn_scalar=32),
    "gemma3_text": dense("gemma3_text", "Gemma3ForCausalLM", qk_norm="head", norms=(*PRE, *AROUND_FFN)),
    "cohere2": dense("cohere2", "Cohere2ForCausalLM", norms=PRE[:1]),
    "gemma3": gemma3,
    "phi3": phi3,
    "phi": phi,
    "starcoder2": starcoder2,
    "cohere": cohere,
    "stablelm": stablelm,
    "glm4": glm4,
    "mixtral": moe("mixtral", "MixtralForCausalLM", at="block_sparse_moe.", names=("w1", "w3", "w2"), derived=True),
    "olmoe": moe("olmoe", "OlmoeForCausalLM", qk_norm="wide"),
    "qwen2_moe": moe(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        bias=True,
        shared=True,
        derived=True,
        shared_expert_intermediate_size=64,
        **SPARSE,
    ),
    "qwen3_moe": moe("qwen3_moe", "Qwen3MoeForCausalLM", qk_norm="head", mlp_only_layers=[0], **SPARSE),
    "granitemoe": granitemoe,
    "gpt_oss": gpt_oss,
    "deepseek_v2": deepseek(2, "deepseek_v2", "DeepseekV2ForCausalLM", q_lora=0),
    "deepseek_v3": deepseek(3, "deepseek_v3", "DeepseekV3ForCausalLM"),
    "qwen3_next": qwen3_next,
    "mamba2": mamba2,
    "nemotron_h": nemotron_h,
    "olmo3": olmo3,
    "ministral3": ministral3,
    "glm4_moe": glm4_moe,
    "glm4_moe_lite": deepseek(3, "glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
    "lfm2": lfm2,
    "lfm2_moe": lfm2_moe,
    **NESTED,
}
# Families whose embedding is always the output head, or never.
ALWAYS_TIED = (
    "gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4_text", "cohere", "cohere2", "lfm2", "lfm2_moe",
)  # fmt: skip
NEVER_TIED = (
    "phi", "stablelm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_oss", "deepseek_v2", "deepseek_v3", "nemotron_h",
    "qwen2_moe",
)  # fmt: skip
