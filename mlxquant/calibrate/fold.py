"""Factors per channel, divided out of what feeds linear layers and multiplied into the columns that read it.

What the layer computes stays the same, and no runtime has to know: y = W (g * x) = (W s) (g / s * x) for a norm's
weight g, and likewise for rows of a linear layer that others read as they are. AWQ (arXiv 2306.00978, section 3.2)
chooses such factors so that columns with large inputs are rounded less. Where it holds is told by wiring.py and, since
a table can be wrong, tried by `check`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxquant.calibrate.wiring import Product, Values, Wiring
from mlxquant.codecs.floats import narrow, widen
from mlxquant.families.shape import ModelShape

if TYPE_CHECKING:
    from mlxquant.calibrate.layered import Layered

Array = np.ndarray[Any, Any]

# Norms that multiply by 1 + w, of which the MLX file keeps w (mlx_lm/models/<module>.py, RMSNorm).
_ONE_PLUS = ("gemma", "gemma2", "gemma3_text", "gemma3")
# Of a layer's own output: what `check` lets factors change. Float32 rounding is a hundredth of it.
TOLERANCE = 1e-4
# The factors of `check`: from a tenth to ten.
_DECADES = 1.0


@dataclass(frozen=True)
class Feed:
    """A norm or linear layer whose channels others read. feeder: the weight that is divided, of a matrix (of each
    matrix of a stack) rows start..stop. readers: all weights whose columns are multiplied. shape: of the factors,
    (channels,), or (experts, channels). head_dim, shares: each head_dim channels are read so many times in a row, by
    the query heads that share them. offset: what the runtime adds to the feeder.
    """

    feeder: str
    readers: tuple[str, ...]
    shape: tuple[int, ...]
    start: int = 0
    head_dim: int = 0
    shares: int = 1
    offset: float = 0.0

    @property
    def bias(self) -> str:
        """The vector that is divided, too, where the layer has it."""
        return self.feeder.removesuffix("weight") + "bias"

    def columns(self, factor: Array) -> Array:
        """The factor of each column of a reader."""
        if self.shares == 1:
            return factor
        return np.repeat(factor.reshape(-1, 1, self.head_dim), self.shares, axis=1).reshape(-1)


def feeds(wired: Wiring, weights: Mapping[str, Array], model: ModelShape) -> tuple[Feed, ...]:
    """All of one layer, in the order of its forward pass. A norm is left out where something in the layer is unknown,
    which might read it.
    """
    offset = 1.0 if model.module in _ONE_PLUS else 0.0
    norms = [Feed(n, names, weights[n].shape, offset=offset) for n, names in wired.reads.items() if not wired.unknown]
    values = [_of_values(wired.values)] if wired.values else []
    found = [*norms[:1], *values, *norms[1:], *map(_of_product, wired.products)]
    return tuple(feed for feed in found if feed.feeder in weights and set(feed.readers) <= weights.keys())


def _of_values(v: Values) -> Feed:
    return Feed(v.name, (v.output,), (v.stop - v.start,), v.start, v.head_dim, v.shares)


def _of_product(p: Product) -> Feed:
    shape = (p.experts, p.stop - p.start) if p.experts else (p.stop - p.start,)
    return Feed(p.name, (p.down,), shape, p.start)


def stored_factor(weights: Mapping[str, Array], feed: Feed, factor: Array, dtype_code: str) -> Array:
    """float64: the factor that `fold` uses when it is asked for this one."""
    kept = _kept(weights, feed)
    return _divided(*kept, np.asarray(factor, np.float64), dtype_code)[1] if kept else np.asarray(factor, np.float64)


def fold(
    weights: Mapping[str, Array], feed: Feed, factor: Array, dtype_code: str = "F32"
) -> tuple[dict[str, Array], Array]:
    """The layer's weights with a factor (feed.shape, > 0) folded in, and the factor that was used, float64.

    A norm's weight, and a bias, are stored as dtype_code rounds them. So the rounded one is taken, and the factor by
    which it really became smaller: the product stays what it was. (A LayerNorm has both, and its bias is rounded.)
    Channels that this rounds to nothing keep the factor 1.
    """
    stop, made = feed.start + feed.shape[-1], dict(weights)
    factor = np.asarray(factor, np.float64)
    vector = weights[feed.feeder].ndim == 1
    if kept := _kept(weights, feed):
        rounded, factor = _divided(*kept, factor, dtype_code)
        name = feed.feeder if vector else feed.bias
        made[name] = _with_rows(weights[name], feed.start, rounded, axis=-1)
    if vector and feed.bias in weights:
        made[feed.bias] = _rounded(weights[feed.bias] / factor, dtype_code)
    if not vector:
        rows = weights[feed.feeder][..., feed.start : stop, :] / factor[..., None]
        made[feed.feeder] = _with_rows(weights[feed.feeder], feed.start, rows, axis=-2)
    columns = feed.columns(factor)
    for name in feed.readers:
        made[name] = (made[name] * (columns[:, None, :] if len(feed.shape) > 1 else columns)).astype(np.float32)
    return made, factor


def _kept(weights: Mapping[str, Array], feed: Feed) -> tuple[Array, float] | None:
    """What of the feeder is stored as floats, and what the runtime adds to it: a norm's weight, or a bias."""
    if weights[feed.feeder].ndim == 1:
        return weights[feed.feeder], feed.offset
    stop = feed.start + feed.shape[-1]
    return (weights[feed.bias][..., feed.start : stop], 0.0) if feed.bias in weights else None


def _divided(own: Array, offset: float, factor: Array, dtype_code: str) -> tuple[Array, Array]:
    """own / factor as it is stored, and the factor that is true of it."""
    whole = own.astype(np.float64) + offset
    rounded = _rounded(whole / factor - offset, dtype_code)
    left = rounded.astype(np.float64) + offset
    alive = (whole != 0) & (left != 0) & np.isfinite(left) & (np.sign(whole) == np.sign(left))
    true = np.divide(whole, left, out=np.ones_like(whole), where=alive)
    dead = (whole == 0) & (left == 0)  # nothing comes through: any factor is true
    return np.where(alive | dead, rounded, own), np.where(dead, factor, true)


def _rounded(values: Array, dtype_code: str) -> Array:
    return widen(narrow(values.astype(np.float32), dtype_code), dtype_code)


def _with_rows(whole: Array, start: int, rows: Array, axis: int) -> Array:
    made = whole.copy()
    made[(..., slice(start, start + rows.shape[axis])) + (slice(None),) * (-axis - 1)] = rows
    return made


def check(
    layered: Layered, layer: int, weights: Mapping[str, Array], found: Sequence[Feed], hidden_BLH: Array, seed: int = 0
) -> tuple[tuple[Feed, ...], tuple[str, ...]]:
    """(feeds that hold, a line for each that does not): with random factors folded in, what the layer adds to
    hidden_BLH (a few tokens that enter it) may change by TOLERANCE of its norm. One more run of the layer for each.
    """
    rng = np.random.default_rng(seed)
    before = layered.open(layer, weights).run(hidden_BLH)
    own = float(np.linalg.norm(before - hidden_BLH))
    hold, refused = [], []
    for feed in found:
        folded, _ = fold(weights, feed, 10.0 ** rng.uniform(-_DECADES, _DECADES, feed.shape))
        change = float(np.linalg.norm(layered.open(layer, folded).run(hidden_BLH) - before)) / max(own, 1e-30)
        if change <= TOLERANCE:
            hold.append(feed)
        else:
            refused.append(
                f"{feed.feeder}: no factors are folded into it: they change the layer's output by {change:.1e}"
            )
    return tuple(hold), tuple(refused)
