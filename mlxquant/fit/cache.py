"""What the cache of a model will be, from its config alone: what mlx-lm's make_prompt_cache makes, layer by layer.

run/cache.py finds the same by tracing a model it has; tests hold the two, and the bytes of real caches, together.
GGUF files run in llama.cpp, whose cache is another (memory.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from mlxquant.errors import SourceError, UsageError
from mlxquant.families.shape import Mixer, ModelShape
from mlxquant.fit.growth import Growth, fed

KV_BITS = (4, 8)
KV_GROUP_SIZES = (32, 64, 128)
# Tokens at the very beginning that a rotating cache never drops (attention sinks; Xiao et al. 2023): mlx-lm's
# number.
KEEP_TOKENS = 4
MIN_KV_SIZE = 16
# Prompt tokens fed at once. On a GPU as in mlx-lm. On a CPU attention makes its score matrix, so that smaller
# chunks need a fraction of the memory (SmolLM2-135M at 2048 tokens: 50 MB of scratch instead of 230) at no
# less speed.
PREFILL_STEP = 2048
CPU_PREFILL_STEP = 512

# full       keys and values of every position     quantized  the same in 8 or 4 bits
# sliding    of the model's own window             rotating   of --max-kv-size
# latent     MLA as it is compressed (deepseek_v3) expanded   MLA as keys and values of every head (deepseek_v2)
# linear, ssm  a state of fixed size               shared     reads what an earlier layer keeps
# none       a layer without attention             state, mixed  what run/cache.py calls caches it does not know
Kind = Literal["full", "quantized", "sliding", "rotating", "latent", "expanded",
               "linear", "ssm", "shared", "none", "state", "mixed"]  # fmt: skip

_LATENT = ("deepseek_v3", "glm4_moe_lite")
# Whose attention fails when its cache gives codes, scales and biases in place of an array (mlx-lm 0.32, the file of
# that name): stock scaled_dot_product_attention and a key of full shape are what it needs.
_UNREADABLE: Mapping[str, str] = {
    "gemma2": "attention with a soft cap reads no quantized cache",
    "gpt_oss": "attention with sinks reads no quantized cache",
    "deepseek_v3": "MLA reads no quantized cache",
    "glm4_moe_lite": "MLA reads no quantized cache",
    "phi": "phi's attention reads no quantized cache",
    "stablelm": "stablelm's attention reads no quantized cache",
}
_STATE_ITEM_BYTES = 4  # recurrent states are float32 whatever the weights: gated_delta.py; ssm.py through compute_dt


class Layers(NamedTuple):
    """Layers that are alike. Of 'shared' ones `growth` is what they read; they hold nothing."""

    kind: Kind
    number: int
    growth: Growth


@dataclass(frozen=True)
class Cache:
    """What all layers hold together. quantizable: whether --kv-bits makes any of it smaller."""

    layers: tuple[Layers, ...]
    notes: tuple[str, ...] = ()
    quantizable: bool = False

    def peak_bytes(self, prompt_tokens: int, new_tokens: int, prefill_step: int) -> int:
        """The most that is allocated at one moment of such a run; windows are largest in prefill, all others last."""
        return max(self._bytes_after(prompt_tokens, new_tokens, prefill_step), default=0)

    def final_bytes(self, prompt_tokens: int, new_tokens: int, prefill_step: int) -> int:
        """What is allocated after it."""
        return [0, *self._bytes_after(prompt_tokens, new_tokens, prefill_step)][-1]

    def read_bytes(self, depth_tokens: int) -> int:
        """What one decoded token reads at such a depth; a window no more than itself, a shared cache once a layer."""
        return sum(count * growth.read_bytes(depth_tokens) for _, count, growth in self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Of one more token of a long context, whose windows are full."""
        return sum(count * growth.position_bytes for _, count, growth in self._held if growth.window is None)

    @property
    def bounded(self) -> bool:
        """Whether it stops growing at some length."""
        return not self.bytes_per_token

    def largest_bytes(self, tokens: int, prefill_step: int = PREFILL_STEP) -> int:
        """The largest single array (keys or values of one layer, or a state) of a run over so many tokens."""
        feed = fed(tokens, 1, prefill_step)
        return max((growth.largest_bytes(feed) for _, _, growth in self._held), default=0)

    @property
    def _held(self) -> Iterator[Layers]:
        return (layers for layers in self.layers if layers.kind != "shared")

    def _bytes_after(self, prompt_tokens: int, new_tokens: int, prefill_step: int) -> list[int]:
        feed = fed(prompt_tokens, new_tokens, prefill_step)
        # Every layer holds most at the end of one kind of push, so the sum does too.
        by_layer = [[count * b for b in growth.bytes_after(feed)] for _, count, growth in self._held]
        return [sum(moment) for moment in zip(*by_layer, strict=True)]


def check_settings(max_kv_size: int | None, kv_bits: int | None, kv_group_size: int) -> None:
    """Raises UsageError for settings no cache has."""
    if max_kv_size is not None and max_kv_size < MIN_KV_SIZE:
        raise UsageError(f"a cache of {max_kv_size} positions is too short", hint=f"use {MIN_KV_SIZE} or more")
    if kv_bits is not None and kv_bits not in KV_BITS:
        raise UsageError(f"keys and values cannot be kept in {kv_bits} bits", hint="use --kv-bits 4 or 8")
    if kv_group_size not in KV_GROUP_SIZES:
        raise UsageError(f"{kv_group_size} is no group size for a cache", hint="use 32, 64 or 128")


def fitting_group_size(widths: Sequence[int], asked: int) -> int | None:
    """The largest group size, at most `asked`, that divides the widths of keys and of values."""
    sizes = [size for size in KV_GROUP_SIZES if size <= asked and not any(width % size for width in widths)]
    return max(sizes, default=None)


def quantized_growth(heads: int, widths: Sequence[int], bits: int, group_size: int, item_bytes: int) -> Growth:
    """QuantizedKVCache: codes, then a scale and a bias for each group, in the dtype of the keys."""
    position = sum(heads * (width * bits // 8 + 2 * (width // group_size) * item_bytes) for width in widths)
    return Growth(position, array_bytes=heads * max(widths) * bits // 8)


@dataclass(frozen=True)
class _Wanted:
    max_kv_size: int | None
    kv_bits: int | None
    group_size: int
    item_bytes: int


class _Layer(NamedTuple):
    """`why`: what is to be said of it when --kv-bits is asked for."""

    kind: Kind
    growth: Growth
    why: str = ""


def default_prefill_step(device_kind: str) -> int:
    """For 'cpu' or 'gpu'."""
    return CPU_PREFILL_STEP if device_kind == "cpu" else PREFILL_STEP


def cache_of(
    shape: ModelShape,
    kv_bits: int | None = None,
    group_size: int = 64,
    item_bytes: int = 2,
    *,
    max_kv_size: int | None = None,
) -> Cache:
    """The cache of a model of that shape in mlx-lm. Raises UsageError for settings no cache has, SourceError where
    the config has layers with a window but says not how wide.

    kv_bits, group_size, max_kv_size: as run/cache.py plans them. item_bytes: of one key or value: 2, or 4 where the
    model runs in float32. Keys and values have the dtype of the activations: that of the embedding's rows, or of its
    scales where it is quantized.
    """
    check_settings(max_kv_size, kv_bits, group_size)
    if ignored := _window_is_ignored(shape):
        full: Mixer = "full"
        shape = replace(shape, mixers=(full,) * shape.layers)
    if "sliding" in shape.mixers and shape.sliding_window is None:
        raise SourceError("config.json has layers with sliding attention but no sliding_window")
    wanted = _Wanted(max_kv_size, kv_bits, group_size, item_bytes)
    layers = _layers(shape, wanted)
    # Whether bits would help is a fact of the model, asked for or not.
    trial = _layers(shape, replace(wanted, kv_bits=max(KV_BITS)))
    counted = Counter((layer.kind, layer.growth) for layer in layers)
    return Cache(
        tuple(Layers(kind, count, growth) for (kind, growth), count in counted.items()),
        tuple(_notes(shape, layers, wanted, ignored)),
        any(layer.kind == "quantized" for layer in trial),
    )


def _layers(shape: ModelShape, wanted: _Wanted) -> list[_Layer]:
    """One entry for each layer of the model, with a cache or without."""
    first_shared = shape.layers - shape.shared_kv_layers
    # The layer of each kind that the shared ones read: the last that has a cache of its own (gemma4_text.py).
    source = {mixer: i for i, mixer in enumerate(shape.mixers[:first_shared])} if shape.shared_kv_layers else {}
    layers: list[_Layer] = []
    for i, mixer in enumerate(shape.mixers):
        if i < first_shared:
            layers.append(_own(shape, mixer, wanted, read_again=source.get(mixer) == i))
        elif mixer in source:
            layers.append(_Layer("shared", layers[source[mixer]].growth))
        else:
            raise SourceError(f"config.json: layer {i} shares the cache of a {mixer} layer, and there is none before")
    return layers


def _own(shape: ModelShape, mixer: Mixer, wanted: _Wanted, read_again: bool) -> _Layer:
    if mixer == "none":
        return _Layer("none", Growth())
    if mixer in ("linear", "ssm"):
        return _Layer("linear" if mixer == "linear" else "ssm", _state(shape, wanted.item_bytes))
    heads, widths = heads_and_widths(shape, mixer)
    row_bytes = heads * wanted.item_bytes
    sliding, window = mixer == "sliding", shape.sliding_window if mixer == "sliding" else wanted.max_kv_size
    keep = KEEP_TOKENS if window and not sliding else 0
    growth = Growth(row_bytes * sum(widths), window=window, keep=keep, array_bytes=row_bytes * max(widths))
    if window:
        return _Layer("sliding" if sliding else "rotating", growth, f"a window of {window} tokens cannot be quantized")
    kind: Kind = "full" if not shape.kv_lora_rank else "latent" if is_latent(shape) else "expanded"
    if not wanted.kv_bits:
        return _Layer(kind, growth)
    # gemma3n's sharing layers are given the cache itself, gemma4's only what it holds.
    if shape.module in _UNREADABLE or (read_again and shape.module != "gemma3n"):
        return _Layer(kind, growth, _UNREADABLE.get(shape.module, "layers that share it read no quantized cache"))
    size = fitting_group_size(widths, wanted.group_size)
    if size is None:
        wide = " and ".join(str(width) for width in dict.fromkeys(widths))
        return _Layer(kind, growth, f"no group size divides the head width {wide}")
    why = f"groups of {size}, as {wanted.group_size} does not divide the head width" if size < wanted.group_size else ""
    return _Layer("quantized", quantized_growth(heads, widths, wanted.kv_bits, size, wanted.item_bytes), why)


def is_latent(shape: ModelShape) -> bool:
    """Whether the cache holds what keys and values are unpacked from; deepseek_v2.py keeps them unpacked."""
    return bool(shape.kv_lora_rank) and shape.module in _LATENT


def heads_and_widths(shape: ModelShape, mixer: Mixer) -> tuple[int, tuple[int, int]]:
    """(heads, (width of a key, width of a value)) as they are cached."""
    if is_latent(shape):
        return 1, (shape.kv_lora_rank, shape.qk_rope_head_dim)
    if shape.kv_lora_rank:
        return shape.heads, (shape.qk_nope_head_dim + shape.qk_rope_head_dim, shape.v_head_dim)
    if mixer == "full":
        width = shape.global_head_dim or shape.head_dim
        return shape.global_kv_heads or shape.kv_heads, (width, width)
    return shape.kv_heads, (shape.head_dim, shape.head_dim)


def _state(shape: ModelShape, item_bytes: int) -> Growth:
    """The last inputs of the convolution in the dtype of the activations, and the state."""
    conv = (shape.conv_kernel - 1) * shape.conv_channels * item_bytes
    state = shape.state_heads * shape.state_key * shape.state_value * _STATE_ITEM_BYTES
    return Growth(fixed_bytes=conv + state, array_bytes=max(conv, state))


def _window_is_ignored(shape: ModelShape) -> bool:
    """Whether layers with a window keep the whole context all the same: these files make no cache of their own."""
    return shape.module == "gemma2" or (shape.module == "smollm3" and "sliding" in shape.mixers)


def _notes(shape: ModelShape, layers: Sequence[_Layer], wanted: _Wanted, ignored: bool) -> Iterator[str]:
    kv_bits, max_kv_size = wanted.kv_bits, wanted.max_kv_size
    kinds = {layer.kind for layer in layers}
    if ignored and not max_kv_size:
        yield f"mlx-lm keeps the whole context in every layer of {shape.module}, also in those with a window"
    if kv_bits:
        for (kind, why), count in Counter((layer.kind, layer.why) for layer in layers if layer.why).items():
            yield f"{count} of {shape.layers} layers {'in' if kind == 'quantized' else 'stay float:'} {why}"
    if kv_bits and "quantized" not in kinds:
        yield f"no layer's cache can be quantized, so --kv-bits {kv_bits} changes nothing"
    if max_kv_size and "rotating" not in kinds:
        yield f"no layer's cache can be shortened, so --max-kv-size {max_kv_size} changes nothing"
