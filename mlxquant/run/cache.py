"""What each layer's cache is, decided before the first token and printable.

mlx-lm quantizes caches in the middle of a run, and crashes there on sliding-window layers, attention sinks,
MLA and head widths that no group size divides. Here the model is first *traced*: called with a few tokens and
never evaluated. That reads no weights, gives the exact shape and dtype of every cache whatever the family,
and raises where a kind of cache does not work, so no list of model names is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from mlxquant.fit.cache import (
    KEEP_TOKENS,
    Cache,
    Kind,
    Layers,
    check_settings,
    fitting_group_size,
    quantized_growth,
)
from mlxquant.fit.growth import Growth


@dataclass(frozen=True)
class Slot:
    """One entry of the cache. kind: 'full', 'quantized', 'sliding' (the model's own window), 'rotating'
    (--max-kv-size), 'state' (of fixed size) or 'mixed'. group_size and bits belong to 'quantized'."""

    kind: Kind
    reason: str
    growths: tuple[Growth, ...]
    bits: int = 0
    group_size: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Of one more token of context, before the window is full."""
        return sum(growth.position_bytes for growth in self.growths)


@dataclass(frozen=True)
class CachePlan:
    """`make()` gives a fresh cache as decided; the rest says what it costs."""

    slots: tuple[Slot, ...]
    make: Callable[[], list[Any]]
    notes: tuple[str, ...] = ()

    @cached_property
    def cost(self) -> Cache:
        """What it costs, as the planner reckons it from a config (fit/cache.py)."""
        alike = Counter((slot.kind, growth) for slot in self.slots for growth in slot.growths)
        quantizable = any(slot.kind == "quantized" for slot in self.slots)
        return Cache(
            tuple(Layers(kind, count, growth) for (kind, growth), count in alike.items()), self.notes, quantizable
        )

    def peak_bytes(self, prompt_tokens: int, new_tokens: int, prefill_step: int) -> int:
        """The most that all layers hold at one moment of such a run."""
        return self.cost.peak_bytes(prompt_tokens, new_tokens, prefill_step)

    @property
    def bytes_per_token(self) -> int:
        return self.cost.bytes_per_token

    def held_bytes(self, tokens: int) -> int:
        """What attention reads at a depth of `tokens`; a window reads no more than itself."""
        return self.cost.read_bytes(tokens)

    @property
    def bounded(self) -> bool:
        """Whether the cache stops growing at some length."""
        return self.cost.bounded

    def table(self) -> list[tuple[str, str, str, int]]:
        """(layers, kind, reason, bytes per token of them all), one row for all layers that are alike."""
        alike: dict[Slot, list[int]] = {}
        for layer, slot in enumerate(self.slots):
            alike.setdefault(slot, []).append(layer)
        return [
            (ranges(layers), slot.kind, slot.reason, slot.bytes_per_token * len(layers))
            for slot, layers in alike.items()
        ]


def ranges(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    # Neighbours have the same distance from their place in the list.
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def plan_cache(
    model: Any, *, max_kv_size: int | None = None, kv_bits: int | None = None, kv_group_size: int = 64
) -> CachePlan:
    """Decides every layer's cache for an mlx-lm model, loaded or lazy. Raises UsageError for settings no
    cache has.

    max_kv_size: keep only so many positions (and the first 4) in layers that have no window of their own.
    kv_bits, kv_group_size: quantize keys and values of the layers that can be; the group is made smaller
    where the head width asks for it.
    """
    check_settings(max_kv_size, kv_bits, kv_group_size)
    from mlx_lm.models.cache import make_prompt_cache

    traced = make_prompt_cache(model)
    trace(model, traced)
    slots = [_decide(entry, max_kv_size, kv_bits, kv_group_size) for entry in traced]
    if any(slot.kind == "quantized" for slot in slots):
        slots = _keep_what_works(model, traced, slots)
    notes = []
    if kv_bits and not any(slot.kind == "quantized" for slot in slots):
        notes.append(f"no layer's cache can be quantized, so --kv-bits {kv_bits} changes nothing")
    if max_kv_size and not any(slot.kind == "rotating" for slot in slots):
        notes.append(f"no layer's cache can be shortened, so --max-kv-size {max_kv_size} changes nothing")
    return CachePlan(tuple(slots), lambda: _build(make_prompt_cache(model), slots), tuple(notes))


def trace(model: Any, cache: list[Any]) -> None:
    """Calls the model with two tokens and then one, without evaluating: fills `cache` with unevaluated
    arrays.
    """
    import mlx.core as mx

    for count in (2, 1):
        model(mx.zeros((1, count), dtype=mx.int32), cache=cache)


def _decide(entry: Any, max_kv_size: int | None, kv_bits: int | None, kv_group_size: int) -> Slot:
    """From one traced cache. Only a plain KVCache can become another kind."""
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    growths = tuple(_growths(entry))
    if type(entry) is RotatingKVCache:
        return Slot("sliding", f"the model's window of {entry.max_size} tokens, stays float", growths)
    if type(entry) is not KVCache:
        grows = any(growth.position_bytes for growth in growths)
        return Slot("mixed" if grows else "state", f"{type(entry).__name__}, stays as the model makes it", growths)
    if not growths:
        return Slot("state", "the model does not use it", growths)
    if max_kv_size:
        reason = f"--max-kv-size {max_kv_size}" + (", which cannot be quantized" if kv_bits else "")
        return Slot("rotating", reason, (replace(growths[0], window=max_kv_size, keep=KEEP_TOKENS),))
    if kv_bits:
        return _quantized(entry, growths[0], kv_bits, kv_group_size)
    return Slot("full", _dtype(entry), growths)


def _growths(entry: Any) -> list[Growth]:
    """What a traced cache costs; a cache made of caches is the sum of them, one of unknown kind its present
    bytes.
    """
    from mlx_lm.models.cache import CacheList, RotatingKVCache

    if isinstance(entry, CacheList):
        return [growth for inner in entry.caches for growth in _growths(inner)]
    keys, values = getattr(entry, "keys", None), getattr(entry, "values", None)
    if keys is not None and values is not None and hasattr(keys, "shape"):
        rows = [array.nbytes // array.shape[-2] for array in (keys, values)]
        if isinstance(entry, RotatingKVCache):
            return [Growth(sum(rows), window=entry.max_size, keep=entry.keep, array_bytes=max(rows))]
        return [Growth(sum(rows), array_bytes=max(rows))]
    if entry.empty():
        return []
    states = [state.nbytes for state in getattr(entry, "cache", ()) if state is not None]
    return [Growth(fixed_bytes=entry.nbytes, array_bytes=max(states, default=entry.nbytes))]


def _quantized(entry: Any, growth: Growth, bits: int, asked: int) -> Slot:
    widths = (entry.keys.shape[-1], entry.values.shape[-1])
    size = fitting_group_size(widths, asked)
    if size is None:
        wide = " and ".join(str(width) for width in dict.fromkeys(widths))
        return Slot("full", f"{_dtype(entry)}: no group size divides the head width {wide}", (growth,))
    reason = f"{bits} bit, group size {size}" + (
        f", as {asked} does not divide the head width" if size != asked else ""
    )
    quantized = quantized_growth(entry.keys.shape[1], widths, bits, size, entry.keys.dtype.size)
    return Slot("quantized", reason, (quantized,), bits, size)


def _keep_what_works(model: Any, traced: list[Any], slots: Sequence[Slot]) -> list[Slot]:
    """Traces with quantized caches; where the model cannot use them, those layers stay float and say why."""
    from mlx_lm.models.cache import make_prompt_cache

    def fails(trial: Sequence[Slot]) -> bool:
        # Whatever the family's code does with a tuple it did not expect: any exception means "does not work".
        try:
            trace(model, _build(make_prompt_cache(model), trial))
        except Exception:
            return True
        return False

    if not fails(slots):
        return list(slots)
    plain = [_decide(entry, None, None, 64) for entry in traced]

    def works(chosen: Sequence[int]) -> bool:
        return not fails([slots[i] if i in chosen else slot for i, slot in enumerate(plain)])

    kept = list(plain)
    asked = [i for i, slot in enumerate(slots) if slot.kind == "quantized"]
    for kind in dict.fromkeys(slots[i] for i in asked):
        alike = [i for i in asked if slots[i] == kind]
        # Layers with equal caches nearly always have equal attention: one trace settles them, unless it
        # fails.
        fine = alike if works(alike) else [i for i in alike if works([i])]
        for i in alike:
            unable = replace(plain[i], reason=f"{plain[i].reason}: this attention cannot read it quantized")
            kept[i] = slots[i] if i in fine else unable
    if not fails(kept):
        return kept
    return [replace(slot, reason=f"{slot.reason}: the model cannot mix kinds") for slot in plain]


def _build(fresh: list[Any], slots: Sequence[Slot]) -> list[Any]:
    from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache

    cache = list(fresh)
    for i, slot in enumerate(slots):
        if slot.kind == "quantized":
            cache[i] = QuantizedKVCache(group_size=slot.group_size, bits=slot.bits)
        elif slot.kind == "rotating":
            cache[i] = RotatingKVCache(max_size=slot.growths[0].window, keep=KEEP_TOKENS)
    return cache


def _dtype(entry: Any) -> str:
    return str(entry.keys.dtype).removeprefix("mlx.core.")
