"""Tiny checkpoints of families published with other towers: the text model lies under model.language_model, its config
under text_config. Of the towers each has a tensor or two: they only have to be left out."""

from __future__ import annotations

from tests.tiny_parts import AROUND_FFN, EXPERTS, HEAD_DIM, HEADS, KV, PER_TOKEN, PRE, VOCAB, Tiny, weight


def nest(m, model_type, architecture, other, **text):
    """`other`: the towers' tensors. As transformers writes it: lm_head stays outside, the config's token ids too."""
    config, tensors = m.done(vocab_size=VOCAB, tie_word_embeddings=m.tied, **text)
    inner = {k: v for k, v in config.items() if k not in ("architectures", "bos_token_id", "eos_token_id")}
    moved = {
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: value
        for name, value in tensors.items()
    }
    root = {"architectures": [architecture], "model_type": model_type, "eos_token_id": [0, 1]}
    return root | {"text_config": inner, "vision_config": {"hidden_size": 8}}, moved | other


def qwen3_5(model_type, architecture, experts=False, key=16):
    """Delta nets whose projections are apart; experts fused into one tensor; norms stored as w - 1."""
    key_heads, heads, value = 2, 4, 32
    channels, inner = 2 * key_heads * key + heads * value, heads * value

    def delta_net(m, p):
        m.linear(f"{p}in_proj_qkv", channels, m.width)
        m.linear(f"{p}in_proj_z", inner, m.width)
        m.linear(f"{p}in_proj_a", heads, m.width)
        m.linear(f"{p}in_proj_b", heads, m.width)
        m.state(p, channels, heads, False)
        m.norms(p, "norm", size=value)
        m.linear(f"{p}out_proj", m.width, inner)

    def sparse(m, p):
        m.linear(f"{p}gate", EXPERTS, m.width)
        m.t[f"{p}experts.gate_up_proj"] = weight(m.rng, EXPERTS, 2 * 64, m.width)
        m.t[f"{p}experts.down_proj"] = weight(m.rng, EXPERTS, m.width, 64)
        m.mlp(f"{p}shared_expert.", 64)
        m.linear(f"{p}shared_expert_gate", 1, m.width)

    def build(rng, width, layers, tied):
        m = Tiny(rng, width, layers, tied, f"{model_type}_text", architecture)
        m.root()
        for i in range(layers):
            p = f"model.layers.{i}."
            if i % 2:
                m.attention(f"{p}self_attn.", q=2)
                m.norms(f"{p}self_attn.", "q_norm", "k_norm", size=HEAD_DIM)
            else:
                delta_net(m, f"{p}linear_attn.")
            (sparse if experts else Tiny.mlp)(m, f"{p}mlp.")
            m.norms(p, *PRE)
        m.around_zero()
        other = {
            "mtp.fc.weight": weight(rng, width, 2 * width),
            "mtp.layers.0.input_layernorm.weight": weight(rng, width),
            "model.visual.patch_embed.proj.weight": weight(rng, 8, 3, 2, 4, 4),
        }
        counts = {"num_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN, "moe_intermediate_size": 64}
        return nest(
            m, model_type, architecture, other, rope_theta=None, mtp_num_hidden_layers=1,
            linear_num_value_heads=heads, linear_num_key_heads=key_heads, linear_key_head_dim=key,
            linear_value_head_dim=value, linear_conv_kernel_dim=4, full_attention_interval=2,
            layer_types=["linear_attention" if i % 2 == 0 else "full_attention" for i in range(layers)],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
                             "mrope_section": [2, 1, 1], "mrope_interleaved": True},
            **(counts | {"shared_expert_intermediate_size": 64, "intermediate_size": None} if experts else {}),
        )  # fmt: skip

    return build


SLIDING, FULL = "sliding_attention", "full_attention"
GLOBAL_DIM = 64


def gemma4_text(rng, width, layers, experts=False, shared=0):
    """E2B and E4B: rows for each layer in a second embedding, the last layers without keys and values of their own and
    twice as wide. 26B and 31B: global layers without v_proj; the first of them experts beside the feed-forward part."""
    m = Tiny(rng, width, layers, True, "gemma4_text", "Gemma4ForCausalLM")
    m.root()
    per_layer, kinds = 0 if experts else 64, [FULL if i % 2 else SLIDING for i in range(layers)]
    for i, kind in enumerate(kinds):
        p, last = f"model.layers.{i}.", i >= layers - shared
        head_dim = GLOBAL_DIM if kind == FULL else HEAD_DIM
        kv = 1 if kind == FULL and experts else KV
        m.linear(f"{p}self_attn.q_proj", HEADS * head_dim, width)
        # As published, also where they are not used.
        m.linear(f"{p}self_attn.k_proj", kv * head_dim, width)
        if not (kind == FULL and experts):
            m.linear(f"{p}self_attn.v_proj", kv * head_dim, width)
        m.linear(f"{p}self_attn.o_proj", width, HEADS * head_dim)
        m.norms(f"{p}self_attn.", "q_norm", "k_norm", size=head_dim)
        m.mlp(f"{p}mlp.", m.ffn * (2 if last else 1))
        m.norms(p, *PRE, *AROUND_FFN)
        m.t[f"{p}layer_scalar"] = weight(rng, 1)
        if experts:
            m.linear(f"{p}router.proj", EXPERTS, width)
            m.t[f"{p}router.scale"], m.t[f"{p}router.per_expert_scale"] = weight(rng, width), weight(rng, EXPERTS)
            m.t[f"{p}experts.gate_up_proj"] = weight(rng, EXPERTS, 2 * 64, width)
            m.t[f"{p}experts.down_proj"] = weight(rng, EXPERTS, width, 64)
            m.norms(p, f"{AROUND_FFN[0]}_2", f"{AROUND_FFN[1]}_1", f"{AROUND_FFN[1]}_2")
        else:
            m.linear(f"{p}per_layer_input_gate", per_layer, width)
            m.linear(f"{p}per_layer_projection", width, per_layer)
            m.norms(p, "post_per_layer_input_norm")
    if per_layer:
        m.t["model.embed_tokens_per_layer.weight"] = weight(rng, VOCAB, layers * per_layer)
        m.linear("model.per_layer_model_projection", layers * per_layer, width)
        m.norms("model.", "per_layer_projection_norm", size=per_layer)
    m.config |= {
        "rope_theta": None, "layer_types": kinds, "global_head_dim": GLOBAL_DIM, "num_kv_shared_layers": shared,
        "sliding_window": 64, "hidden_size_per_layer_input": per_layer, "vocab_size_per_layer_input": VOCAB,
        "use_double_wide_mlp": shared > 0, "attention_k_eq_v": experts, "enable_moe_block": experts,
        "final_logit_softcapping": 30.0,
    }  # fmt: skip
    if experts:
        m.config |= {"num_experts": EXPERTS, "top_k_experts": PER_TOKEN, "moe_intermediate_size": 64}
        m.config |= {"num_global_key_value_heads": 1}
    return m


def gemma4_sparse(rng, width, layers, tied):
    return gemma4_text(rng, width, layers, experts=True).done()


def gemma4(rng, width, layers, tied):
    """Four layers at least, so that the last two can share."""
    m = gemma4_text(rng, width, max(layers, 4), shared=2)
    m.config["num_hidden_layers"] = max(layers, 4)
    other = {
        "model.vision_tower.patch_embedder.input_proj.weight": weight(rng, 8, 48),
        "model.vision_tower.encoder.layers.0.self_attn.k_proj.linear.weight": weight(rng, 8, 8),
        "model.vision_tower.encoder.layers.0.self_attn.k_proj.input_max": weight(rng, 1),
        "model.embed_vision.embedding_projection.weight": weight(rng, width, 8),
        "model.audio_tower.layers.0.norm_out.weight": weight(rng, 8),
        "model.embed_audio.embedding_projection.weight": weight(rng, width, 8),
    }
    config, tensors = nest(m, "gemma4", "Gemma4ForConditionalGeneration", other)
    return config | {"audio_config": {"hidden_size": 8}}, tensors


def qwen3_vl(rng, width, layers, tied):
    m = llama_like(rng, width, layers, tied, "qwen3_vl_text", qk_norm=True)
    other = {"model.visual.patch_embed.proj.weight": weight(rng, 8, 3, 2, 4, 4)}
    return nest(m, "qwen3_vl", "Qwen3VLForConditionalGeneration", other)


def llama_like(rng, width, layers, tied, model_type, qk_norm=False):
    m = Tiny(rng, width, layers, tied, model_type, "")
    m.root()
    for i in range(layers):
        p = f"model.layers.{i}."
        m.attention(f"{p}self_attn.")
        if qk_norm:
            m.norms(f"{p}self_attn.", "q_norm", "k_norm", size=HEAD_DIM)
        m.mlp(f"{p}mlp.")
        m.norms(p, *PRE)
    return m


def ministral3(rng, width, layers, tied):
    m = llama_like(rng, width, layers, tied, "ministral3")
    return m.done(architectures=["Ministral3ForCausalLM"], rope_theta=None, rope_parameters=YARN, sliding_window=None)


def mistral3(rng, width, layers, tied):
    """As published: language_model outside of model."""
    m = llama_like(rng, width, layers, tied, "ministral3")
    other = {
        "vision_tower.patch_conv.weight": weight(rng, 8, 3, 4, 4),
        "multi_modal_projector.linear_1.weight": weight(rng, width, 8),
    }
    config, tensors = nest(m, "mistral3", "Mistral3ForConditionalGeneration", other, rope_theta=None,
                           rope_parameters=YARN, sliding_window=None)  # fmt: skip
    renamed = {n.replace("model.language_model.", "language_model.model."): v for n, v in tensors.items()}
    return config, {f"language_model.{n}" if n == "lm_head.weight" else n: v for n, v in renamed.items()}


def gemma3n(rng, width, layers, tied):
    """Four layers at least, so that the last two can share; keys and values of their own all the same."""
    layers, altup, rank, per_layer = max(layers, 4), 4, 64, 64
    m = Tiny(rng, width, layers, True, "gemma3n_text", "")
    m.root()
    m.t["model.embed_tokens_per_layer.weight"] = weight(rng, VOCAB, layers * per_layer)
    m.linear("model.per_layer_model_projection", layers * per_layer, width)
    m.norms("model.", "per_layer_projection_norm", size=per_layer)
    for n in range(altup - 1):
        m.linear(f"model.altup_projections.{n}", width, width)
        m.linear(f"model.altup_unembed_projections.{n}", width, width)
    for i in range(layers):
        p = f"model.layers.{i}."
        m.attention(f"{p}self_attn.")
        m.norms(f"{p}self_attn.", "q_norm", "k_norm", size=HEAD_DIM)
        m.mlp(f"{p}mlp.")
        m.norms(p, *PRE, *AROUND_FFN, "post_per_layer_input_norm", "altup.router_norm", "laurel.post_laurel_norm")
        m.linear(f"{p}per_layer_input_gate", per_layer, width)
        m.linear(f"{p}per_layer_projection", width, per_layer)
        m.linear(f"{p}laurel.linear_left", rank, width)
        m.linear(f"{p}laurel.linear_right", width, rank)
        m.linear(f"{p}altup.modality_router", altup, width)
        m.linear(f"{p}altup.correction_coefs", altup, altup)
        m.linear(f"{p}altup.prediction_coefs", altup**2, altup)
        m.t[f"{p}altup.correct_output_scale"] = weight(rng, width)
    other = {f"model.{part}.x.weight": weight(rng, 8, 8) for part in
             ("vision_tower", "embed_vision", "audio_tower", "embed_audio")}  # fmt: skip
    return nest(
        m, "gemma3n", "Gemma3nForConditionalGeneration", other, num_hidden_layers=layers,
        intermediate_size=[m.ffn] * layers, num_kv_shared_layers=2, vocab_size_per_layer_input=VOCAB,
        sliding_window=64, rope_local_base_freq=10000.0, final_logit_softcapping=30.0,
        layer_types=[FULL if i % 2 else SLIDING for i in range(layers)], activation_sparsity_pattern=[0.0] * layers,
        hidden_size_per_layer_input=per_layer, altup_num_inputs=altup, altup_coef_clip=120.0,
        altup_correct_scale=True, altup_active_idx=0, laurel_rank=rank,
    )  # fmt: skip


YARN = {
    "type": "yarn", "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 512,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
NESTED = {
    "qwen3_vl": qwen3_vl,
    "gemma3n": gemma3n,
    "mistral3": mistral3,
    "qwen3_5": qwen3_5("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": qwen3_5("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", experts=True),
    "gemma4": gemma4,
    "gemma4_text": gemma4_sparse,
}
