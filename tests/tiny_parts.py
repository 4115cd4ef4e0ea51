"""What the tiny checkpoints of tests/tiny_families.py and tests/tiny_nested.py are put together from."""

from __future__ import annotations

import numpy as np

VOCAB = 512
HEADS, KV, HEAD_DIM = 4, 2, 32
EXPERTS, PER_TOKEN = 4, 2


def weight(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Heavy tails, as real weights have: rounding errors show."""
    return rng.standard_t(4, size=shape).astype(np.float32) * 0.05


def norm(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (1 + 0.1 * rng.normal(size=shape)).astype(np.float32)


class Tiny:
    """One model in the making: tensors by name, and the config entries that every family has."""

    def __init__(self, rng, width, layers, tied, model_type, architecture):
        self.rng, self.width, self.layers, self.tied, self.ffn = rng, width, layers, tied, 2 * width
        self.t: dict[str, np.ndarray] = {}
        self.config = {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_size": width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 0,
        }

    def linear(self, name, rows, cols, bias=False):
        self.t[f"{name}.weight"] = weight(self.rng, rows, cols)
        if bias:
            self.t[f"{name}.bias"] = weight(self.rng, rows)

    def norms(self, at, *names, size=None, bias=False):
        for name in names:
            self.t[f"{at}{name}.weight"] = norm(self.rng, size or self.width)
            if bias:
                self.t[f"{at}{name}.bias"] = weight(self.rng, size or self.width)

    def root(self, at="model.", embed="embed_tokens", last="norm", bias=False, head="lm_head"):
        self.t[f"{at}{embed}.weight"] = weight(self.rng, VOCAB, self.width)
        self.norms(at, last, bias=bias)
        if not self.tied and head:
            self.t[f"{head}.weight"] = weight(self.rng, VOCAB, self.width)

    def attention(self, p, bias=False, o_bias=False, o="o_proj", head_dim=HEAD_DIM, q=1):
        for name, heads in (("q", q * HEADS), ("k", KV), ("v", KV)):
            self.linear(f"{p}{name}_proj", heads * head_dim, self.width, bias)
        self.linear(f"{p}{o}", self.width, HEADS * head_dim, o_bias)

    def mlp(self, p, width=None, bias=False):
        width = width or self.ffn
        self.linear(f"{p}gate_proj", width, self.width, bias)
        self.linear(f"{p}up_proj", width, self.width, bias)
        self.linear(f"{p}down_proj", self.width, width, bias)

    def experts(self, p, width, names=("gate_proj", "up_proj", "down_proj")):
        for e in range(EXPERTS):
            for name, down in zip(names, (False, False, True), strict=False):
                shape = (self.width, width) if down else (width, self.width)
                self.linear(f"{p}experts.{e}.{name}", *shape)

    def recurrent(self, p, channels, heads, inner, projection, out, bias=False, conv_bias=True, gated="norm"):
        self.linear(f"{p}{projection}", inner + channels + heads, self.width, bias)
        self.state(p, channels, heads, conv_bias)
        self.norms(p, gated, size=inner)
        self.linear(f"{p}{out}", self.width, inner, bias)
        self.t[f"{p}D"] = weight(self.rng, heads)

    def state(self, p, channels, heads, conv_bias):
        self.t[f"{p}conv1d.weight"] = weight(self.rng, channels, 1, 4)
        if conv_bias:
            self.t[f"{p}conv1d.bias"] = weight(self.rng, channels)
        self.t[f"{p}A_log"], self.t[f"{p}dt_bias"] = weight(self.rng, heads), weight(self.rng, heads)

    def around_zero(self):
        """Norms as gemma and qwen3_next keep them: w - 1. The gated norm of a delta net is not one of them."""
        for name, value in self.t.items():
            if name.endswith("norm.weight") and ".linear_attn." not in name:
                self.t[name] = value - 1

    def done(self, **config):
        """(config, tensors); a config value of None takes the key out."""
        merged = self.config | config
        return {k: v for k, v in merged.items() if v is not None}, self.t


PRE = ("input_layernorm", "post_attention_layernorm")
AROUND_FFN = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
