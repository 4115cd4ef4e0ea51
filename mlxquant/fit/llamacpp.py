"""What llama.cpp takes for a GGUF file, from shapes: weights as they are mapped, a cache made whole at the start, and
the buffer its graph is computed in.

llama-kv-cache.cpp, llama-kv-cache-iswa.cpp, llama-memory-recurrent.cpp and llama-context.cpp of 2026, with flash
attention, which it chooses by itself. tests/fit/test_memory.py holds this to what it logs.
"""

from __future__ import annotations

from mlxquant.families.shape import ModelShape
from mlxquant.fit.cache import Cache
from mlxquant.fit.values import Level, Need

UBATCH_TOKENS = 512  # of -ub, llama.cpp's chunk
_CELLS = 256  # contexts are rounded up to it
# Bytes of 32 values: f16, and --cache-type-k/v q8_0 and q4_0: codes and one scale.
_BLOCK_BYTES = {None: 64, 8: 34, 4: 18}


def need(level: Level, cache: Cache, shape: ModelShape, context_tokens: int) -> Need:
    """As memory.need. `cache` says only in how many bits keys and values were asked for."""
    bits = _bits(cache, shape)
    chunk = min(UBATCH_TOKENS, context_tokens)
    one = max((_cells(shape, mixer, context_tokens) * row for mixer, row in _rows(shape, bits)), default=0)
    return Need(
        context_tokens,
        UBATCH_TOKENS,
        level.loaded_bytes,
        cache_bytes(shape, context_tokens, bits),
        compute_bytes(shape, context_tokens),
        max(level.largest_bytes, one, 4 * chunk * shape.vocab_size),
    )


def cache_bytes(shape: ModelShape, context_tokens: int, kv_bits: int | None = None) -> int:
    """Of all layers, allocated before the first token. Layers with a window hold it and one chunk; recurrent ones keep
    their state and the inputs of their convolution in float32; of MLA the latents alone."""
    rows = dict(_rows(shape, kv_bits))
    first_shared = shape.layers - shape.shared_kv_layers
    total = 0
    for mixer in shape.mixers[:first_shared]:
        if mixer in rows:
            total += _cells(shape, mixer, context_tokens) * rows[mixer] * (1 if shape.kv_lora_rank else 2)
        elif mixer != "none":
            conv = max(0, shape.conv_kernel - 1) * shape.conv_channels
            total += 4 * (conv + shape.state_heads * shape.state_key * shape.state_value)
    return total


def compute_bytes(shape: ModelShape, context_tokens: int) -> int:
    """The graph's buffer: a chunk's masks in float16, over the context and over windows, and in float32 either a
    layer's arrays or the logits of the whole chunk, whichever is more.

    llama-server of late keeps logits of single tokens only and then takes less: layer_bytes and the mask.
    """
    chunk = min(UBATCH_TOKENS, context_tokens)
    logits = 4 * chunk * shape.vocab_size
    return max(layer_bytes(shape, chunk), logits) + mask_bytes(shape, context_tokens)


def mask_bytes(shape: ModelShape, context_tokens: int) -> int:
    """Of one chunk, for each kind of attention."""
    kinds = {mixer for mixer in shape.mixers if mixer in ("full", "sliding")}
    return sum(2 * min(UBATCH_TOKENS, context_tokens) * _cells(shape, mixer, context_tokens) for mixer in kinds)


def layer_bytes(shape: ModelShape, chunk_tokens: int) -> int:
    """Of the arrays alive together at the widest place, the feed-forward part: three as wide as it, five as the model;
    with experts three of each expert's."""
    dense = 3 * shape.intermediate_size if "dense" in shape.ffns else 0
    experts = 3 * shape.experts_per_token * max(shape.moe_intermediate_size, shape.hidden_size)
    return 4 * chunk_tokens * (max(dense, experts if "moe" in shape.ffns else 0) + 5 * shape.hidden_size)


def _rows(shape: ModelShape, kv_bits: int | None) -> list[tuple[str, int]]:
    """(mixer, bytes of one position's keys): values take the same, MLA keeps none."""
    block = _BLOCK_BYTES[kv_bits]
    rows: list[tuple[str, int]] = []
    for mixer in dict.fromkeys(shape.mixers):
        if mixer not in ("full", "sliding"):
            continue
        columns = shape.kv_heads * shape.head_dim
        if shape.kv_lora_rank:
            columns = shape.kv_lora_rank + shape.qk_rope_head_dim
        elif mixer == "full" and shape.global_head_dim:
            columns = (shape.global_kv_heads or shape.kv_heads) * shape.global_head_dim
        rows.append((mixer, columns * block // 32))
    return rows


def _cells(shape: ModelShape, mixer: str, context_tokens: int) -> int:
    cells = _padded(context_tokens)
    if mixer == "sliding" and shape.sliding_window:
        return _padded(min(cells, shape.sliding_window + min(UBATCH_TOKENS, cells)))
    return cells


def _padded(tokens: int) -> int:
    return -(-tokens // _CELLS) * _CELLS


def _bits(cache: Cache, shape: ModelShape) -> int | None:
    """8 or 4 where the cache was asked for in so many bits; a layer's bytes tell them apart."""
    for kind, _, growth in cache.layers:
        if kind == "quantized":
            return 8 if growth.position_bytes >= 2 * shape.kv_heads * shape.head_dim else 4
    return None
