"""What a forward pass makes of every token, in columns: as mlx_lm/models/<module>.py of mlx-lm 0.32 does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.shape import Mixer, ModelShape
from mlxquant.fit.cache import heads_and_widths, is_latent

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
    array. held: columns kept until the chunk is done, all layers. state: elements of a delta net's state. squares: of
    columns written, those of mamba's squares of tokens, in layers that have them. sinks: attention has them (gpt_oss).
    """

    layers: int
    written: int
    widest: int
    held: int
    state: int
    squares: int
    sinks: bool
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
        state=shape.state_heads * shape.state_key * shape.state_value if "linear" in shape.mixers else 0,
        squares=_squares(shape) if "ssm" in shape.mixers else 0,
        sinks=shape.module == "gpt_oss",
        attention=_attention(shape),
    )


def _layers(shape: ModelShape) -> list[tuple[Mixer, str]]:
    return list(zip(shape.mixers, shape.ffns, strict=True))


def _mixer(shape: ModelShape, mixer: Mixer) -> int:
    """Columns beside the two norms, the projection back and the sum."""
    if mixer == "none":
        return 0
    if mixer in ("linear", "ssm"):
        # Projected, with the state before it, convolved; gate, values, output, normed, gated.
        columns = 3 * shape.conv_channels + 5 * shape.state_heads * shape.state_value
        return columns + (_squares(shape) if mixer == "ssm" else 0)
    kv_heads, (width, _) = _heads(shape, mixer)
    # Queries projected and rotated, output and its transpose; keys projected and rotated, values.
    return 4 * shape.heads * width + 3 * kv_heads * width


def _squares(shape: ModelShape) -> int:
    """Columns of two bytes."""
    return 2 * SSM_SQUARES * SSM_STEP * shape.state_heads


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
        latent = is_latent(shape)
        keys = shape.heads * (shape.qk_nope_head_dim + value_width) if latent else kv_heads * (width + value_width)
        window = shape.sliding_window if mixer == "sliding" else None
        found.append(Attention(count, shape.heads, width, value_width, keys, window, latent))
    return tuple(found)


def _heads(shape: ModelShape, mixer: Mixer) -> tuple[int, tuple[int, int]]:
    """(heads of keys, (width of a key, width of a value)) as attention sees them: latents unpacked."""
    if is_latent(shape):
        return 1, (shape.qk_nope_head_dim + shape.qk_rope_head_dim, shape.v_head_dim)
    return heads_and_widths(shape, mixer)


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
    return Activations(layers, columns, max(hidden, ffn), 0, 0, 0, False, attention)
