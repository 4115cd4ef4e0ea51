"""What prefill holds beside weights and cache, from widths alone: how MLX keeps arrays until the GPU is done with them.

Every term is a rule of mlx 0.32 (mlx/backend/metal, mlx/transforms.cpp) or of mlx-lm 0.32 (mlx_lm/models), every
constant read there or counted. benchmarks/peaks.py holds the sum to published peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxquant.fit.activations import SSM_STEP, Activations, Attention
from mlxquant.machine import Machine

# scaled_dot_product_attention.cpp: kernels for prompts. 192 and 256 have one too, which is used on an M5 alone (NAX),
# for 256, a plain causal mask and this many queries.
FUSED_WIDTHS = (64, 72, 80, 96, 128)
NAX_WIDTH, NAX_TOKENS, NAX_GENERATION = 256, 1024, 5
# Ten command buffers may wait (transforms.cpp, MAX_ACTIVE_TASKS) while one more is filled; what they read and write is
# kept until they are done. One is closed beyond 40 (base, Pro) or 50 (Max, Ultra) Mi elements of input or as many
# kernels (device.cpp), which are about two layers of a short prompt.
BUFFERS, BUFFER_ELEMENTS, BUFFER_LAYERS = 11, 50 * 2**20, 2
# An array is read 1.7 times: a llama layer writes 4 hidden + 4 q + 3 k + 2 ffn columns a token and reads 11, 5, 6, 3.
READS = 1.7
# Product, mask, softmax, product: each reads the scores, or keys or values of the whole context. Before them keys and
# values each are copied to a longer array.
SCORE_KERNELS, LONGER_KERNELS = 4, 2


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
        """A CPU is hardly behind: two layers at most, one array of scores and its mask, another with sinks before it.
        Delta nets have no kernel there, and their loop leaves a state (float32) for every token (gated_delta.py)."""
        mask = self.tokens * self.context_tokens if self.made.attention else 0
        scores = self.largest_scores_bytes * (2 if self._expanded_bytes or self.made.sinks else 1)
        layers = 2 * self.item_bytes * max(0, self.made.written - self.made.squares) * self.tokens
        squares = 2 * self.made.squares * min(self.tokens, SSM_STEP)
        return (
            layers
            + squares
            + self.held_bytes
            + scores
            + mask
            + self._expanded_bytes
            + 4 * self.made.state * self.tokens
        )


def _has_nax(machine: Machine) -> bool:
    """M5 and later (device.cpp, is_nax_available: from macOS 26.2, which is taken for granted)."""
    generation = machine.generation or ""
    return generation[:1] == "M" and int(generation[1:]) >= NAX_GENERATION
