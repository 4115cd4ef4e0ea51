"""Names, shapes and metadata of real architectures, for files without weights (scripts/oracle_types.py).

`MODELS[name]()` -> (metadata, shapes): what llama.cpp's loader asks of the architecture and no more, and
{GGUF name: shape, outermost first}. Widths are real ones where a rule looks at widths, small ones elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

Model = tuple[dict[str, Any], dict[str, tuple[int, ...]]]
VOCAB = 1024


def keys(
    arch: str, layers: int, width: int, heads: int, kv_heads: int | list[int], ffn: int, **more: Any
) -> dict[str, Any]:
    """`more`: keys below the architecture's name, with __ for a dot."""
    own: dict[str, Any] = {
        "block_count": layers,
        "context_length": 4096,
        "embedding_length": width,
        "feed_forward_length": ffn,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in own.items()}}


def root(width: int, tied: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, width), "output_norm.weight": (width,)}
    return shapes if tied else {**shapes, "output.weight": (VOCAB, width)}


def blocks(layers: Iterable[int], *parts: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Each layer's tensors; names without an ending are weights."""
    return {
        f"blk.{layer}.{name if '.' in name else name + '.weight'}": shape
        for layer in layers
        for part in parts
        for name, shape in part.items()
    }


def norms(width: int, *names: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (width,))


def attention(width: int, q: int, kv: int, bias: bool = False) -> dict[str, tuple[int, ...]]:
    shapes = {"attn_q": (q, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, q)}
    biases = {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)} if bias else {}
    return {**shapes, **biases}


def mlp(width: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {"ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}


def experts(count: int, width: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_gate_inp": (count, width),
        "ffn_gate_exps": (count, ffn, width),
        "ffn_up_exps": (count, ffn, width),
        "ffn_down_exps": (count, width, ffn),
    }


def shared_expert(width: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_gate_shexp": (ffn, width),
        "ffn_up_shexp": (ffn, width),
        "ffn_down_shexp": (width, ffn),
    }


def dense(
    arch: str,
    layers: int,
    heads: int,
    kv_heads: int,
    width: int = 256,
    ffn: int = 512,
    tied: bool = False,
    bias: bool = False,
    more_norms: tuple[str, ...] = (),
    **more: Any,
) -> Model:
    kv = width // heads * kv_heads
    each = blocks(
        range(layers),
        attention(width, width, kv, bias),
        mlp(width, ffn),
        norms(width, "attn_norm", "ffn_norm", *more_norms),
    )
    return keys(arch, layers, width, heads, kv_heads, ffn, **more), root(width, tied) | each


def mixture(
    arch: str, layers: int, heads: int, kv_heads: int, count: int, ffn: int = 256, shared: bool = False
) -> Model:
    width = 512
    metadata = keys(
        arch,
        layers,
        width,
        heads,
        kv_heads,
        1024,
        expert_count=count,
        expert_used_count=2,
        expert_feed_forward_length=ffn,
    )
    # The gate of the shared expert is a matrix of one row.
    extra = shared_expert(width, 768) | {"ffn_gate_inp_shexp": (1, width)} if shared else {}
    each = blocks(
        range(layers),
        attention(width, width, width // heads * kv_heads, bias=shared),
        experts(count, width, ffn),
        extra,
        norms(width, "attn_norm", "ffn_norm"),
    )
    return metadata, root(width) | each


def phi3() -> Model:
    width, ffn, layers = 3072, 8192, 32
    each = blocks(
        range(layers),
        {"attn_qkv": (3 * width, width), "attn_output": (width, width)},
        {"ffn_up": (2 * ffn, width), "ffn_down": (width, ffn)},
        norms(width, "attn_norm", "ffn_norm"),
    )
    factors = {"rope_factors_long.weight": (48,), "rope_factors_short.weight": (48,)}
    return keys("phi3", layers, width, 32, 32, ffn), root(width) | each | factors


def falcon(layers: int = 32, kv_heads: int = 1) -> Model:
    width = 512
    each = blocks(
        range(layers),
        {"attn_qkv": (width + 128 * kv_heads, width), "attn_output": (width, width)},
        {"ffn_up": (4 * width, width), "ffn_down": (width, 4 * width)},
        {"attn_norm": (width,), "attn_norm.bias": (width,)},
    )
    return keys("falcon", layers, width, 8, kv_heads, 4 * width, attention__layer_norm_epsilon=1e-5), root(width) | each


def gpt_oss() -> Model:
    """Widths of 2880 are no multiple of 256: nothing but attn_output gets the K types it asks for."""
    width, layers, count, q, kv = 2880, 24, 32, 4096, 512
    expert_biases = {f"ffn_{part}_exps.bias": (count, width) for part in ("gate", "up", "down")}
    each = blocks(
        range(layers),
        attention(width, q, kv, bias=True),
        {"attn_output.bias": (width,), "attn_sinks": (64,), "ffn_gate_inp.bias": (count,)},
        experts(count, width, width),
        expert_biases,
        norms(width, "attn_norm", "post_attention_norm"),
    )
    metadata = keys(
        "gpt-oss",
        layers,
        width,
        64,
        8,
        width,
        attention__key_length=64,
        attention__value_length=64,
        attention__sliding_window=128,
        expert_count=count,
        expert_used_count=4,
        expert_feed_forward_length=width,
    )
    return metadata, root(width) | each


def qwen3next() -> Model:
    width, layers, count, ffn = 2048, 48, 512, 512
    full = [layer for layer in range(layers) if layer % 4 == 3]
    linear = {
        "attn_qkv": (8192, width),
        "attn_gate": (4096, width),
        "ssm_ba": (64, width),
        "ssm_conv1d": (8192, 4),
        "ssm_a": (32,),
        "ssm_dt.bias": (32,),
        "ssm_norm": (128,),
        "ssm_out": (width, 4096),
    }
    gated = {"attn_q": (8192, width), "attn_k": (512, width), "attn_v": (512, width), "attn_output": (width, 4096)}
    each = blocks(
        range(layers),
        experts(count, width, ffn),
        shared_expert(width, ffn),
        {"ffn_gate_inp_shexp": (1, width)},
        norms(width, "attn_norm", "post_attention_norm"),
    )
    each |= blocks(full, gated, norms(256, "attn_q_norm", "attn_k_norm"))
    each |= blocks([layer for layer in range(layers) if layer not in full], linear)
    metadata = keys(
        "qwen3next",
        layers,
        width,
        16,
        2,
        5120,
        expert_count=count,
        expert_used_count=10,
        expert_feed_forward_length=ffn,
        expert_shared_feed_forward_length=ffn,
        ssm__conv_kernel=4,
        ssm__inner_size=4096,
        ssm__state_size=128,
        ssm__time_step_rank=32,
        ssm__group_count=16,
    )
    return metadata, root(width) | each


def deepseek2(split: bool) -> Model:
    """V2-Lite: a dense first layer, then 64 experts; `split`: kv_b as two tensors, as newer files have it."""
    width, layers, count, ffn, heads = 2048, 27, 64, 1408, 16
    kv_b = {"attn_k_b": (heads, 512, 128), "attn_v_b": (heads, 128, 512)} if split else {"attn_kv_b": (4096, 512)}
    latent = {"attn_q": (3072, width), "attn_kv_a_mqa": (576, width), "attn_output": (width, 2048), **kv_b}
    each = blocks(range(layers), latent, norms(width, "attn_norm", "ffn_norm"), norms(512, "attn_kv_a_norm"))
    each |= blocks(range(1), mlp(width, 10944))
    each |= blocks(range(1, layers), experts(count, width, ffn), shared_expert(width, 2 * ffn))
    metadata = keys(
        "deepseek2",
        layers,
        width,
        heads,
        1 if split else heads,
        10944,
        attention__kv_lora_rank=512,
        attention__key_length=576 if split else 192,
        attention__value_length=512 if split else 128,
        leading_dense_block_count=1,
        expert_count=count,
        expert_used_count=6,
        expert_feed_forward_length=ffn,
        expert_shared_count=2,
    )
    return metadata, root(width) | each


def lfm2() -> Model:
    """Layer 0 is a convolution: no key heads, so no GQA as the rules see it."""
    width, layers, attending = 1024, 16, (2, 5, 8, 10, 12, 14)
    each = blocks(range(layers), mlp(width, 4608), norms(width, "attn_norm", "ffn_norm"))
    each |= blocks(attending, attention(width, width, 512), norms(64, "attn_q_norm", "attn_k_norm"))
    conv = {"shortconv.conv.weight": (width, 3), "shortconv.in_proj.weight": (3 * width, width)}
    others = [layer for layer in range(layers) if layer not in attending]
    each |= blocks(others, conv, {"shortconv.out_proj.weight": (width, width)})
    kv_heads = [8 if layer in attending else 0 for layer in range(layers)]
    shapes = root(width, tied=True) | {"token_embd_norm.weight": (width,)} | each
    return keys("lfm2", layers, width, 16, kv_heads, 4608, shortconv__l_cache=3), shapes


def deci() -> Model:
    """Heads differ from layer to layer: the rules look at the first."""
    layers = 80
    metadata, shapes = dense("deci", layers, 8, 2)
    metadata["deci.attention.head_count"] = [8] * layers
    metadata["deci.attention.head_count_kv"] = [2] + [8] * (layers - 1)
    return metadata, shapes


def gemma3n() -> Model:
    """Small matrices that stay as they are, and a second table of embeddings."""
    width, layers, ffn = 2048, 30, 8192
    small = {
        "altup_correct_coef": (4, 4),
        "altup_predict_coef": (16, 4),
        "altup_router": (4, width),
        "laurel_l": (64, width),
        "laurel_r": (width, 64),
        "inp_gate": (256, width),
        "proj": (width, 256),
    }
    each = blocks(
        range(layers), attention(width, 2048, 512), mlp(width, ffn), small, norms(width, "attn_norm", "ffn_norm")
    )
    extra = {
        "per_layer_token_embd.weight": (VOCAB, 256 * layers),
        "per_layer_model_proj.weight": (256 * layers, width),
        "per_layer_proj_norm.weight": (256,),
        "altup_proj.weight": (3, width, width),
    }
    metadata = keys(
        "gemma3n",
        layers,
        width,
        8,
        2,
        ffn,
        attention__key_length=256,
        attention__value_length=256,
        attention__sliding_window=512,
        attention__shared_kv_layers=10,
        embedding_length_per_layer_input=256,
    )
    return metadata, root(width, tied=True) | extra | each


MODELS: dict[str, Callable[[], Model]] = {
    "llama-32-gqa4": partial(dense, "llama", 32, 8, 2),
    "llama-32-gqa1": partial(dense, "llama", 32, 8, 8),
    "llama-16-tied": partial(dense, "llama", 16, 8, 2, tied=True),
    "llama-80-gqa8": partial(dense, "llama", 80, 8, 1),
    "llama-80-gqa1": partial(dense, "llama", 80, 8, 8),
    "llama-576": partial(dense, "llama", 30, 9, 3, width=576, ffn=1536, tied=True),
    "llama-288": partial(dense, "llama", 6, 6, 6, width=288, ffn=768),
    "llama-208": partial(dense, "llama", 3, 4, 4, width=208, ffn=1000),
    "llama-1-layer": partial(dense, "llama", 1, 4, 1, width=256, ffn=1000),
    "mixtral-16": partial(mixture, "llama", 16, 8, 2, 8),
    "mixtral-80": partial(mixture, "llama", 80, 8, 2, 8),
    "qwen2-28": partial(dense, "qwen2", 28, 12, 2, width=1536, ffn=8960, tied=True, bias=True),
    "qwen2-80": partial(dense, "qwen2", 80, 8, 1, bias=True),
    "qwen2moe-24": partial(mixture, "qwen2moe", 24, 16, 16, 60, 1408, shared=True),
    "qwen3moe-48": partial(mixture, "qwen3moe", 48, 32, 4, 128, 768),
    "gemma2-26": partial(
        dense, "gemma2", 26, 8, 4, tied=True, more_norms=("post_attention_norm", "post_ffw_norm"), width=2304, ffn=9216
    ),
    "gemma3-26": partial(
        dense, "gemma3", 26, 4, 1, tied=True, more_norms=("attn_q_norm", "attn_k_norm"), width=1152, ffn=6912
    ),
    "phi3": phi3,
    "falcon-32": falcon,
    "falcon-40-kv8": partial(falcon, 40, 8),
    "gpt-oss": gpt_oss,
    "qwen3next": qwen3next,
    "deepseek2": partial(deepseek2, split=False),
    "deepseek2-split": partial(deepseek2, split=True),
    "lfm2": lfm2,
    "deci-80": deci,
    "llama-embed-80": partial(dense, "llama-embed", 80, 8, 1),
    "olmo-80": partial(dense, "olmo", 80, 8, 8, attention__layer_norm_epsilon=1e-5),
    "jais2-68": partial(dense, "jais2", 68, 8, 8, attention__layer_norm_epsilon=1e-5),
    "gemma3n": gemma3n,
}
