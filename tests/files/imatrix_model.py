"""A tiny mixture of experts whose importance matrix llama-imatrix has computed: tests/fixtures/imatrix.

Weights come from integers, so they are the same bits everywhere: scripts/oracle_imatrix.py writes the model, and the
tests encode its rows again.
"""

from __future__ import annotations

import zlib

import numpy as np

WIDTH, LAYERS, HEADS, KV_HEADS, EXPERTS, VOCAB = 64, 2, 4, 2, 4, 512


def shapes() -> dict[str, tuple[int, ...]]:
    """{GGUF name: shape, outermost first}."""
    square, kv, stack = (WIDTH, WIDTH), (WIDTH // HEADS * KV_HEADS, WIDTH), (EXPERTS, WIDTH, WIDTH)
    block = {
        "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": square, "attn_k": kv, "attn_v": kv,
        "attn_output": square, "ffn_gate_inp": (EXPERTS, WIDTH), "ffn_gate_exps": stack, "ffn_up_exps": stack,
        "ffn_down_exps": stack,
    }  # fmt: skip
    root = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,), "output.weight": (VOCAB, WIDTH)}
    return root | {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in block.items()}


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float16 matrices, float32 norms and routers. The last expert lies between the others: it is never the first."""
    if name.endswith("_norm.weight"):
        return np.ones(shape, np.float32)
    steps = np.arange(np.prod(shape), dtype=np.uint64) * 2654435761 + zlib.crc32(name.encode())
    values = (((steps * steps >> np.uint64(7)) % 2**20).astype(np.float64) / 2**20 - 0.5).reshape(shape)
    if "ffn_gate_inp" in name:
        values[-1] = values[:-1].mean(0)
        return values.astype(np.float32)
    return values.astype(np.float16)
