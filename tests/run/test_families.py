"""Stock mlx-lm's own model classes, tiny and random: windows, sinks, MLA, recurrent layers and experts.

What plan_cache decides by tracing is checked by running, and what it reckons by what mlx-lm allocates.
"""

from __future__ import annotations

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.fit.growth import fed
from mlxquant.run.cache import plan_cache
from mlxquant.run.expand import expand_weights
from mlxquant.run.generate import generate

DENSE = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_attention_heads": 2, "rms_norm_eps": 1e-6}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {
    "gpt_oss": DENSE
    | {"num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64}
    | {"num_key_value_heads": 1, "sliding_window": 8, "rope_theta": 10000}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3_text": DENSE
    | {"num_hidden_layers": 6, "head_dim": 64, "num_key_value_heads": 1}
    | {"sliding_window": 8, "sliding_window_pattern": 3},
    "deepseek_v3": DENSE
    | EXPERTS
    | {"num_hidden_layers": 3, "num_key_value_heads": 2, "n_shared_experts": 1, "n_routed_experts": 4}
    | {"kv_lora_rank": 64, "q_lora_rank": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "qk_nope_head_dim": 32}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "qwen3_next": DENSE
    | EXPERTS
    | {"num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 64, "num_experts": 4, "mlp_only_layers": []}
    | {"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 32}
    | {"linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "decoder_sparse_step": 1}
    | {"shared_expert_intermediate_size": 32, "rope_theta": 10000, "partial_rotary_factor": 0.5}
    | {"max_position_embeddings": 512},
}


def build(family: str):
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": family} | CONFIGS[family]))
    model.eval()
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("gpt_oss", [("0, 2", "sliding"), ("1, 3", "full")]),
        ("gemma3_text", [("0-1, 3-4", "sliding"), ("2, 5", "quantized")]),
        ("deepseek_v3", [("0-2", "full")]),
        ("qwen3_next", [("0-2", "state"), ("3", "quantized")]),
    ],
)
def test_kv_bits_where_stock_mlx_lm_crashes(family, rows):
    plan = plan_cache(build(family), kv_bits=4)
    assert [(layers, kind) for layers, kind, _, _ in plan.table()] == rows
    assert bool(plan.notes) == ("quantized" not in [kind for _, kind in rows])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"kv_bits": 4}, {"max_kv_size": 16}])
def test_planned_caches_run_and_take_the_planned_bytes(family, options):
    model = build(family)
    plan = plan_cache(model, **options)
    cache = plan.make()
    assert len(list(generate(model, list(range(30)), cache, max_tokens=6, prefill_step=8))) == 6
    feed = fed(30, 6, 8)
    assert [entry.nbytes for entry in cache] == [sum(g.final_bytes(feed) for g in s.growths) for s in plan.slots]


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_next"])
def test_experts_and_latents_expand_to_the_same_logits(family):
    model = build(family)
    nn.quantize(model, group_size=32, bits=8)
    tokens = mx.array([[3, 1, 4, 1, 5]])
    before = np.array(model(tokens))
    assert expand_weights(model) == []
    np.testing.assert_allclose(np.array(model(tokens)), before, atol=1e-4)


def test_recurrent_layers_make_a_session_start_over(text):
    """A state cannot be cut back, so a changed beginning costs the whole prompt, and the turn says so."""
    from mlxquant.run.session import Session

    class Folded:
        """The tiny model has 64 tokens, the tokenizer 512."""

        def __init__(self, model):
            self.model = model

        def __call__(self, tokens, cache):
            return self.model(tokens % 64, cache=cache)

    model = build("qwen3_next")
    talk = Session(Folded(model), text, plan_cache(model), max_tokens=4)
    for question in ("Hello", "More"):
        "".join(talk.ask(question))
    assert talk.turns[1].recomputed is None, "going on needs no cut"
    assert talk.turns[1].reused_tokens > 0
    talk.messages[1]["content"] = "Something else"
    "".join(talk.ask("Well?"))
    assert "cannot be cut" in talk.turns[2].recomputed
    assert talk.turns[2].reused_tokens == 0
