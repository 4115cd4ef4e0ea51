"""What prefill holds beside weights and cache, from widths alone: how MLX keeps arrays until the GPU is done with them.

Every term is a rule of mlx 0.32 (mlx/backend/metal, mlx/transforms.cpp) or of mlx-lm 0.32 (mlx_lm/models); none was
fitted. benchmarks/peaks.py holds the sum to published peaks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.shape import ModelShape
from mlxquant.machine import Machine

# scaled_dot_product_attention.cpp: kernels for prompts. 192 and 256 have one too, which is used on an M5 alone (NAX),
# for 256, a plain causal mask and this many queries.
FUSED_WIDTHS = (64, 72, 80, 96, 128)
NAX_WIDTH, NAX_TOKENS, NAX_GENERATION = 256, 1024, 5
# Ten command buffers may wait (transforms.cpp, MAX_ACTIVE_TASKS) while one more is filled; what they read and write is
# kept until they are done. One is closed beyond 40 (base, Pro) or 50 (Max, Ultra) Mi elements of input or as many
# kernels (device.cpp), which are about two layers of a short prompt.
BUFFERS, BUFFER_ELEMENTS, BUFFER_LAYERS = 11, 50 * 2**20, 2
# An array is read 1.6 times: a llama layer writes 4 hidden + 4 q + 3 k + 2 ffn columns a token and reads 11, 5, 6, 3.
READS = 1.6
# Product, mask, softmax, product: each reads the scores, or keys or values of the whole context. Before them keys and
# values each are copied to a longer array.
SCORE_KERNELS, LONGER_KERNELS = 4, 2
# ssm.py works in squares of 256 tokens: six of them a head, in float32.
SSM_STEP, SSM_SQUARES = 256, 6


@dataclass(frozen=True)
class Attention:
    """Layers whose attention is alike. width: of a head's keys; values may have another. keys: columns of keys and
    values of one position. expanded: whether they are made anew of the whole context (MLA as deepseek_v3 has it)."""

    count: int
    heads: int
    width: int
    value_width: int
    keys: int
    window: int | None = None
    expanded: bool = False


@dataclass(frozen=True)
class Activations:
    """What scratch depends on. written: columns that one token's way through a layer leaves, on average. widest: of one
    array. held: columns kept until the chunk is done, all layers. state: elements of one recurrent layer's state.
    """

    layers: int
    written: int
    widest: int
    held: int
    state: int
    attention: tuple[Attention, ...]

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Activations:
        """From config.json. Of a family that mlxquant does not know only what most configs say, as of a llama."""
        try:
            return activations(ModelShape.from_config(config))
        except (SourceError, UnsupportedError):
            return _unknown(config)

    def within(self, window: int | None) -> Activations:
        """With attention that looks no further back than `window`; itself where that is None."""
        if window is None:
            return self
        shorter = tuple(replace(kind, window=min(kind.window or window, window)) for kind in self.attention)
        return replace(self, attention=shorter)


@lru_cache(maxsize=64)
def activations(shape: ModelShape) -> Activations:
    """The columns that a model of that shape makes, as mlx_lm/models/<module>.py makes them."""
    written = sum(4 * shape.hidden_size + _mixer(shape, m) + _ffn(shape, f) for m, f in _layers(shape))
    recurrent = sum(mixer in ("linear", "ssm") for mixer in shape.mixers)
    return Activations(
        layers=shape.layers,
        written=written // shape.layers,
        widest=max(shape.hidden_size, shape.conv_channels, *(_widest(shape, f) for f in set(shape.ffns))),
        # The last inputs of each convolution are cut out of a copy of all of them. Nothing but the cache needs that
        # cut, and MLX computes such ends of a graph last: until then every layer's copy stays (transforms.cpp).
        held=recurrent * shape.conv_channels,
        state=shape.state_heads * shape.state_key * shape.state_value,
        attention=_attention(shape),
    )


def _layers(shape: ModelShape) -> list[tuple[str, str]]:
    return list(zip(shape.mixers, shape.ffns, strict=True))


def _mixer(shape: ModelShape, mixer: str) -> int:
    """Columns beside the two norms, the projection back and the sum."""
    if mixer == "none":
        return 0
    if mixer in ("linear", "ssm"):
        # Projected, with the state before it, convolved; gate, values, output, normed, gated.
        columns = 3 * shape.conv_channels + 5 * shape.state_heads * shape.state_value
        return columns + (2 * SSM_SQUARES * SSM_STEP * shape.state_heads if mixer == "ssm" else 0)
    kv_heads, (width, _) = _heads(shape, mixer)
    # Queries projected and rotated, output and its transpose; keys projected and rotated, values.
    return 4 * shape.heads * width + 3 * kv_heads * width


def _ffn(shape: ModelShape, ffn: str) -> int:
    """Gate and up; of experts (switch_layers.py) also what goes in, comes out and is sorted back, once for each."""
    dense = 2 * shape.intermediate_size
    if ffn != "moe":
        return dense if ffn == "dense" else 0
    experts = shape.experts_per_token * (3 * shape.hidden_size + 2 * shape.moe_intermediate_size)
    return experts + (dense if shape.module.startswith("gemma4") else 2 * shape.shared_intermediate_size)


def _widest(shape: ModelShape, ffn: str) -> int:
    if ffn == "moe":
        return shape.experts_per_token * max(shape.hidden_size, shape.moe_intermediate_size)
    return shape.intermediate_size if ffn == "dense" else 0


def _attention(shape: ModelShape) -> tuple[Attention, ...]:
    kinds = Counter(mixer for mixer in shape.mixers if mixer in ("full", "sliding"))
    found = []
    for mixer, count in kinds.items():
        kv_heads, (width, value_width) = _heads(shape, mixer)
        latent = _is_latent(shape)
        keys = shape.heads * (shape.qk_nope_head_dim + value_width) if latent else kv_heads * (width + value_width)
        window = shape.sliding_window if mixer == "sliding" else None
        found.append(Attention(count, shape.heads, width, value_width, keys, window, latent))
    return tuple(found)


def _heads(shape: ModelShape, mixer: str) -> tuple[int, tuple[int, int]]:
    """(heads of keys, (width of a key, width of a value)) as attention sees them."""
    if shape.kv_lora_rank:
        width = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        return 1 if _is_latent(shape) else shape.heads, (width, shape.v_head_dim)
    if mixer == "full" and shape.global_head_dim:
        return shape.global_kv_heads or shape.kv_heads, (shape.global_head_dim, shape.global_head_dim)
    return shape.kv_heads, (shape.head_dim, shape.head_dim)


def _is_latent(shape: ModelShape) -> bool:
    """Whether the cache holds what keys and values are unpacked from; deepseek_v2.py alone keeps them unpacked."""
    return bool(shape.kv_lora_rank) and shape.module != "deepseek_v2"


def _unknown(config: Mapping[str, Any]) -> Activations:
    nested = config.get("text_config")
    own = {**config, **nested} if isinstance(nested, Mapping) else config

    def number(name: str) -> int:
        value = own.get(name)
        return value if type(value) is int and 0 < value < 2**31 else 0

    layers, heads, hidden = number("num_hidden_layers") or 1, number("num_attention_heads"), number("hidden_size")
    width, ffn = number("head_dim") or (hidden // heads if heads else 0), number("intermediate_size")
    kv_heads = number("num_key_value_heads") or heads
    columns = 4 * hidden + (4 * heads + 3 * kv_heads) * width + 2 * ffn
    attention = (Attention(layers, heads, width, width, 2 * kv_heads * width),) if heads and width else ()
    return Activations(layers, columns, max(hidden, ffn), 0, 0, attention)


@dataclass(frozen=True)
class Prefill:
    """The last chunk of a prompt of `context_tokens`, where most is held. weight_bytes: of all layers, which are read
    too. quantized: whether keys and values are, for then attention is never fused (base.py)."""

    made: Activations
    context_tokens: int
    chunk_tokens: int
    machine: Machine
    weight_bytes: int
    quantized: bool = False

    @property
    def tokens(self) -> int:
        """Of the chunk: the prompt's last token is fed by itself (generate.py)."""
        return max(1, min(self.chunk_tokens, self.context_tokens - 1))

    @property
    def item_bytes(self) -> int:
        """2 in bfloat16 and float16; on a CPU the model runs in float32."""
        return 2 if self.machine.device == "gpu" else 4

    def scratch_bytes(self, cache_token_bytes: int = 0) -> int:
        """Everything beside weights and cache. cache_token_bytes: of one position in all layers whose cache grows."""
        if self.machine.device != "gpu":
            return self._cpu_bytes()
        parts = self.layers_in_flight * self._layer_bytes + self.held_bytes + self._scores_bytes + self._expanded_bytes
        return int(parts) + self.regrown_bytes(cache_token_bytes)

    def fused(self, attention: Attention) -> bool:
        """Whether no scores are made: never on a CPU, for MLA or for quantized keys."""
        if self.machine.device != "gpu" or self.quantized or attention.expanded:
            return False
        if attention.width != attention.value_width:
            return False
        causal = attention.window is None or self.context_tokens <= attention.window
        on_nax = attention.width == NAX_WIDTH and self.tokens >= NAX_TOKENS and causal and _has_nax(self.machine)
        return attention.width in FUSED_WIDTHS or on_nax

    @property
    def largest_scores_bytes(self) -> int:
        """The largest array of scores: heads x chunk x context, of a window no more than it holds in prefill."""
        return self.item_bytes * max((self._scores(kind) for kind in self._unfused), default=0)

    @property
    def layers_in_flight(self) -> float:
        """So many layers' arrays wait for the GPU at a time."""
        return min(self.made.layers, BUFFERS / self._buffers_per_layer)

    @property
    def held_bytes(self) -> int:
        """Inputs of convolutions, until the chunk is done."""
        return self.item_bytes * self.made.held * self.tokens

    def regrown_bytes(self, cache_token_bytes: int) -> int:
        """Keys and values as they were before this chunk made room for itself, of layers in flight: at least of one."""
        growing = sum(kind.count for kind in self.made.attention if kind.window is None)
        if not growing or self.context_tokens <= self.chunk_tokens:
            return 0
        share = min(1.0, max(1 / growing, self.layers_in_flight / self.made.layers))
        return int(share * cache_token_bytes * (self.context_tokens - self.tokens))

    @property
    def _layer_bytes(self) -> int:
        return self.item_bytes * self.made.written * self.tokens

    @property
    def _unfused(self) -> list[Attention]:
        return [kind for kind in self.made.attention if not self.fused(kind)]

    def _positions(self, kind: Attention) -> int:
        """Whose keys the chunk meets: a window holds the chunk and what its first token sees (cache.py)."""
        return min(self.context_tokens, self.context_tokens if kind.window is None else kind.window - 1 + self.tokens)

    def _scores(self, kind: Attention) -> int:
        return kind.heads * self.tokens * self._positions(kind)

    @property
    def _limit(self) -> float:
        """Elements in a command buffer: it is closed after the array that exceeds it, half of that later."""
        return BUFFER_ELEMENTS + self.made.widest * self.tokens / 2

    @property
    def _buffers_per_layer(self) -> float:
        attention = sum(kind.count * self._attention_buffers(kind) for kind in self.made.attention)
        return max(1 / BUFFER_LAYERS, self._read / self._limit + attention / self.made.layers)

    @property
    def _read(self) -> float:
        """Elements that a layer's kernels read, but for attention. Packed weights are stored in elements of 4 bytes."""
        return READS * self.made.written * self.tokens + self.weight_bytes / 4 / self.made.layers

    def _attention_buffers(self, kind: Attention) -> float:
        """For what is as long as the context, of which one kernel fills no more than one buffer: keys and values are
        read to be made longer (cache.py), then by attention, which reads scores as well."""
        positions = self._positions(kind)
        longer = LONGER_KERNELS * min(1.0, kind.keys * (positions - self.tokens) / LONGER_KERNELS / self._limit)
        if self.fused(kind):
            return longer + min(1.0, kind.keys * positions / self._limit)
        return longer + min(SCORE_KERNELS, 3 * self._scores(kind) / self._limit)

    @property
    def _scores_bytes(self) -> int:
        """Of all layers with scores that are in flight together. mask and softmax work in place; MLA makes two arrays,
        one for the rotated part of the key."""
        count = sum(kind.count for kind in self._unfused)
        if not count:
            return 0
        # Buffers from one layer's scores to the next's, at a long context. Scores stay until BUFFERS later.
        between = self._read / self._limit * self.made.layers / count + SCORE_KERNELS + LONGER_KERNELS
        together = min(count, 1 + int((BUFFERS + SCORE_KERNELS - 1) / between))
        return self.largest_scores_bytes * max(together, 2 if self._expanded_bytes else 1)

    @property
    def _expanded_bytes(self) -> int:
        columns = max((kind.keys for kind in self.made.attention if kind.expanded), default=0)
        return self.item_bytes * columns * self.context_tokens

    def _cpu_bytes(self) -> int:
        """A CPU is hardly behind: two layers at most, one array of scores and its mask. Delta nets have no kernel
        there, and their loop leaves a state (float32) for every token (gated_delta.py)."""
        mask = self.tokens * self.context_tokens if self.made.attention else 0
        states = 4 * self.made.state * self.tokens if self.made.held else 0
        scores = self.largest_scores_bytes * (2 if self._expanded_bytes else 1)
        return 2 * self._layer_bytes + self.held_bytes + scores + mask + self._expanded_bytes + states


def _has_nax(machine: Machine) -> bool:
    """M5 and later (device.cpp, is_nax_available: from macOS 26.2, which is taken for granted)."""
    generation = machine.generation or ""
    return generation[:1] == "M" and int(generation[1:]) >= NAX_GENERATION
