"""Factors that make room for columns with large inputs, chosen by the error of what is computed from them.

AWQ (Lin et al. 2023, arXiv 2306.00978, section 3.2): a column multiplied by s, and its input divided by it, is rounded
in steps that are s times finer, while the group's step grows only where s makes it the largest. Factors are the root
mean square of each column's input to the power of a, also over the columns' own size to the power of 1 - a (AutoAWQ,
quantizer.py, duo_scaling); a is tried on a grid, and no factor at all is always among the tried. AWQ takes mean
magnitudes; mean squares are at hand here, since the error is measured by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxquant.calibrate.fold import Feed, fold, stored_factor
from mlxquant.calibrate.statistics import Moments
from mlxquant.codecs.encode import decode, encode
from mlxquant.codecs.search import search
from mlxquant.codecs.spec import Codec

Array = np.ndarray[Any, Any]
Quantize = Callable[[Array, str, str, Codec, Array], tuple[Array, ...]]

# Powers are tried on a grid of this many steps: every fourth, then the nearest to the best.
STEPS = 20
_COARSE = 4
# Rows of a weight, and experts, whose error decides: spread evenly over all there are.
_ROWS, _EXPERTS = 256, 8
# Below this part of the error without factors nothing is folded: what a sample of rows cannot tell is no gain.
_WORTH = 0.99
# Of the mean input: what is smaller counts as this.
_LEAST = 1e-4


@dataclass(frozen=True)
class Scaled:
    """weights: the layer's, factors folded in. columns: by what the columns of a reader were multiplied, (I,) or
    (experts, I) float64; what enters it is divided by that. note: what was folded, and what it does.
    """

    weights: dict[str, Array]
    columns: dict[str, Array]
    note: str


@dataclass(frozen=True)
class _Sample:
    """Some rows of one matrix, and moments of what enters it: (I, I), or (I,) when only squares are known."""

    rows_OI: Array
    moments: Array
    codec: Codec

    @property
    def squares(self) -> Array:
        return self.moments if self.moments.ndim == 1 else np.asarray(np.diagonal(self.moments))

    def size(self, change_OI: Array) -> float:
        """Mean square over tokens of what these rows give, summed over rows."""
        weighed = change_OI * self.moments if self.moments.ndim == 1 else change_OI @ self.moments
        return float(np.einsum("oi,oi->", weighed, change_OI, dtype=np.float64))


def awq(
    weights: Mapping[str, Array],
    found: Sequence[Feed],
    moments: Mapping[str, Moments],
    codec_of: Callable[[str], Codec],
    dtype_code: str,
    *,
    searched: bool = True,
) -> Scaled:
    """Factors for each of a layer's feeds. moments: of the inputs of each reader, kind hessian, or squares (which sees
    no correlations). codec_of: the format of each reader; those kept float say nothing. searched: judged by scales that
    are searched for, else by min/max rounding. dtype_code: of norms, biases and scales in the file.

    Feeds have nothing to do with one another: dividing rows of a weight divides its error in them, and each column has
    one feeder. The error of a feed: of each reader's output, squared, over that output squared, summed over readers.
    """
    made, columns, notes = dict(weights), dict[str, Array](), list[str]()
    for feed in found:
        readers = [name for name in feed.readers if name in moments and codec_of(name).quantized]
        if not readers:
            continue
        trials = [
            _Trial(weights, feed, [list(_samples(weights[n], moments[n], codec_of(n), e)) for n in readers], dtype_code,
                   search if searched else _rounded)
            for e in (range(feed.shape[0]) if len(feed.shape) > 1 else (None,))
        ]  # fmt: skip
        found_best = [trial.best() for trial in trials]
        factor = np.stack([factor for factor, _, _ in found_best]).reshape(feed.shape)
        before, after = (sum(errors) for errors in zip(*((b, a) for _, b, a in found_best), strict=True))
        if after < before:
            made, used = fold(made, feed, factor, dtype_code)
            columns |= {name: feed.columns(used) for name in feed.readers}
            notes.append(f"{feed.feeder.removesuffix('.weight')} {100 * (after / before - 1):+.0f} %")
    return Scaled(made, columns, "factors folded into " + ", ".join(notes) if notes else "")


def _rounded(raw: Array, source_code: str, dtype_code: str, codec: Codec, weight: Array) -> tuple[Array, ...]:
    return encode(raw, source_code, dtype_code, codec)


def _samples(weight: Array, moments: Moments, codec: Codec, expert: int | None) -> Iterator[_Sample]:
    """Of a matrix; of one expert's; or of some experts, where all share their factors."""
    if weight.ndim == 2:
        yield _Sample(_spread(weight, _ROWS), moments.mean().astype(np.float32), codec)
        return
    for e in _spread(np.arange(len(weight)), _EXPERTS).tolist() if expert is None else (expert,):
        yield _Sample(_spread(weight[e], _ROWS // _EXPERTS), moments.for_expert(e)[0].astype(np.float32), codec)


def _spread(array: Array, count: int) -> Array:
    return np.asarray(array[np.unique(np.linspace(0, len(array) - 1, min(count, len(array))).round().astype(int))])


@dataclass(frozen=True)
class _Trial:
    """Factors of one feed (of one expert of it), tried. groups: the samples of each reader."""

    weights: Mapping[str, Array]
    feed: Feed
    groups: list[list[_Sample]]
    dtype_code: str
    quantize: Quantize

    def best(self) -> tuple[Array, float, float]:
        """(factors, error without, error with them)."""
        ones = np.ones(self.feed.shape[-1])
        x, w, plain = self._inputs(), self._columns(), self.error(ones)
        least, factor = _search(lambda power, duo: self._tried(_factor(x, w, power, duo)))
        return (factor, plain, least) if least < _WORTH * plain else (ones, plain, plain)

    def _tried(self, factor: Array) -> tuple[float, Array]:
        if len(self.feed.shape) == 1:  # no expert's weights come with vectors that would be rounded
            factor = stored_factor(self.weights, self.feed, factor, self.dtype_code)
        return self.error(factor), factor

    def error(self, factor: Array) -> float:
        """Of each reader's output, over its output, summed."""
        columns = self.feed.columns(factor).astype(np.float32)
        total = 0.0
        for group in self.groups:
            wrong = whole = 0.0
            for sample in group:
                weight = (sample.squares / columns**2).astype(np.float32)
                parts = self.quantize(sample.rows_OI * columns, "F32", self.dtype_code, sample.codec, weight)
                wrong += sample.size(decode(parts, self.dtype_code, sample.codec) / columns - sample.rows_OI)
                whole += sample.size(sample.rows_OI)
            total += wrong / whole if whole > 0 else 0.0
        return total

    def _inputs(self) -> Array:
        """Root mean square of what enters each channel: all readers of a feed are given the same."""
        squares = np.mean([s.squares.astype(np.float64) for group in self.groups for s in group], axis=0)
        x = np.sqrt(self._per_channel(squares))
        mean = float(x.mean())
        return np.maximum(x, _LEAST * mean) if mean > 0 else np.ones_like(x)

    def _columns(self) -> Array:
        """Size of each channel's columns, against the largest of their group of columns in each row."""
        sizes = []
        for sample in (s for group in self.groups for s in group):
            size = np.abs(sample.rows_OI).reshape(len(sample.rows_OI), -1, sample.codec.group_size)
            size = size / np.maximum(size.max(axis=-1, keepdims=True), 1e-30)
            sizes.append(size.reshape(sample.rows_OI.shape).mean(axis=0, dtype=np.float64))
        return np.maximum(self._per_channel(np.mean(sizes, axis=0)), _LEAST)

    def _per_channel(self, columns: Array) -> Array:
        """The mean over the columns that read one channel."""
        if self.feed.shares == 1:
            return columns
        return np.asarray(columns.reshape(-1, self.feed.shares, self.feed.head_dim).mean(axis=1).reshape(-1))


def _search(attempt: Callable[[int, bool], tuple[float, Array]]) -> tuple[float, Array]:
    """(least error, its factors): both kinds coarsely, then what lies around the better one."""
    tried = {(p, duo): attempt(p, duo) for duo in (False, True) for p in range(_COARSE, STEPS + 1, _COARSE)}
    step = _COARSE // 2
    while step:
        power, duo = min(tried, key=lambda key: tried[key][0])
        for near in (power - step, power + step):
            if 0 < near <= STEPS and (near, duo) not in tried:
                tried[near, duo] = attempt(near, duo)
        step //= 2
    return min(tried.values(), key=lambda pair: pair[0])


def _factor(x: Array, w: Array, power: int, duo: bool) -> Array:
    """Balanced: the largest is as far above 1 as the least is below."""
    a = power / STEPS
    made = x**a / w ** (1 - a) if duo else x**a
    return np.asarray(made / np.sqrt(made.max() * made.min()))
