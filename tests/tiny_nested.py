"""Tiny checkpoints of families published with other towers: the text model lies under model.language_model, its config
under text_config. Of the towers each has a tensor or two: they only have to be left out."""

from __future__ import annotations

from tests.tiny_parts import EXPERTS, HEAD_DIM, PER_TOKEN, PRE, VOCAB, Tiny, weight


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


NESTED = {
    "qwen3_5": qwen3_5("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": qwen3_5("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", experts=True),
}
