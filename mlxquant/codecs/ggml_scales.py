"""The searches behind ggml's formats without a minimum, x = scale * code: Q4_0, Q5_0, Q3_K, Q6_K.

They are what costs: 19 trial scales for each group of 16 or 32 weights, or five rounds over its codes, with sums whose
order ggml promises. So LANES groups stand side by side, one a lane, and the innermost loops run over lanes, which LLVM
vectorizes. It does so only where it can tell that arrays do not overlap. Therefore what belongs to a tile of LANES
groups stands in two flat arrays at constant distances: `tile`, weights turned round (weight of the group, lane), and
`lanes`, one number a group.

The laws are those of ggml/src/ggml-quants.c built for plain x86-64: float32 throughout, no fused multiplication, and
what overflows gives the garbage that it gives there.

Compiled by itself and called from Python: numba's cache does not notice an edit in another file than the caller's.
"""

# mypy: disallow-untyped-defs=False
# Types are numba's to find; the tests hold the encoders against ggml's own, byte for byte.
from __future__ import annotations

import numpy as np

from mlxquant.codecs.kernels import jit

LANES = 64
# Rows of what is found: the scale of a group; the inverse and the middle that its codes come from, which are
# nearest(inverse * x) + middle; and the sum of its weights' importance.
SCALES, INVERSES, MIDDLES, MASSES = range(4)

# Sections of `tile`: weights, their importance, the product of both, codes (as floats).
_SECTION = 32 * LANES
X, W, WX, Q = range(0, 4 * _SECTION, _SECTION)
# Sections of `lanes`. TOP: the first weight of the greatest magnitude. FIT_X, FIT_Q: sums of w*x*q and w*q*q.
TOP, TRIED, FIT_X, FIT_Q, BEST, SCALE, INVERSE = range(0, 7 * LANES, LANES)

_FEW = 8  # rows whose squares are summed side by side
_GROUP = 16  # weights of a group of Q3_K
_ROUNDS = 5
_EPS = np.float32(1e-15)  # GROUP_MAX_EPS: a group whose largest weight is less counts as zero
_ZERO, _ONE, _INF = np.float32(0), np.float32(1), np.float32(np.inf)
# Added to a float below 2**22 this leaves the nearest integer, ties to even, in the lowest bits.
_MAGIC = np.float32(12582912.0)
# make_qx_quants tries -(n + 0.1 * step) / top: the plain scale first, the others against it.
_STEPS = np.array([0, *range(-9, 0), *range(1, 10)], np.float32)


@jit
def _bits(single):
    return np.float32(single).view(np.int32)


@jit
def nearest(single):
    """nearest_int of ggml-quants.c without its assertion: beyond 2**22 the bits are garbage, and NaN gives 0."""
    return np.int32(np.int32(_bits(single + _MAGIC) & np.int32(0x7FFFFF)) - np.int32(0x400000))


@jit
def clamp(value, low, high):
    value = value if value > low else low
    return value if value < high else high


@jit
def search(x, importance_I, span, times, n, most, found):
    """make_qx_quants, rmse_type 1: found (4, groups) of groups of n weights with codes -most..most - 1.

    x: flat, rows as wide as importance_I. A weight counts importance * sqrt(sigma2 + x**2), sigma2 being `times` the
    mean square of the `span` weights it is among; for span 0 its importance; where importance_I is empty x**2. A group
    that counts as zero has scale, inverse and middle 0, so that all its codes are 0, as in C.
    """
    tile, lanes = np.empty(4 * _SECTION, np.float32), np.empty(7 * LANES, np.float32)
    sigma2 = _mean_squares(x, importance_I, span, times)
    for start in range(0, x.size, n * LANES):
        part = x[start : start + n * LANES]
        _turn(part, n, tile[X:])
        if importance_I.size:
            weights = tile[Q : Q + part.size]
            _weigh(part, start, importance_I, sigma2, span, n, weights)
            _turn(weights, n, tile[W:])
        else:
            _weigh_by_squares(n, tile)
        _prepare(n, tile, lanes)
        _try_scales(n, tile, most, lanes)
        _store(n, tile, most, lanes, found[:, start // n : start // n + LANES])


@jit
def _store(n, tile, most, lanes, found):
    for g in range(found.shape[1]):
        empty = abs(lanes[TOP + g]) < _EPS
        found[SCALES, g] = _ZERO if empty else lanes[SCALE + g]
        found[INVERSES, g] = _ZERO if empty else lanes[INVERSE + g]
        found[MIDDLES, g] = _ZERO if empty else most
        found[MASSES, g] = _ZERO
    for i in range(n):
        for g in range(found.shape[1]):
            found[MASSES, g] += tile[W + i * LANES + g]


@jit
def found_codes(x, n, found, most, codes):
    """The codes (uint8) that a search found, of groups of n weights."""
    low, high = -most, most - _ONE
    for g in range(x.size // n):
        values, into = x[g * n : (g + 1) * n], codes[g * n : (g + 1) * n]
        inverse, middle = found[INVERSES, g], np.int32(found[MIDDLES, g])
        for i in range(values.size):
            q = clamp(values[i] * inverse, low, high) + _MAGIC
            into[i] = np.uint8(np.int32(_bits(q) + middle) & np.int32(0xFF))


@jit
def _mean_squares(x, importance_I, span, times):
    """times * the mean square (sigma2) of each `span` weights; empty where nobody asks."""
    sums = np.zeros(x.size // span if importance_I.size and span else 0, np.float32)
    for first in range(0, sums.size, _FEW):
        # Side by side, because in one sum each addition waits for the one before.
        few = sums[first : first + _FEW]
        rows = x[first * span : (first + _FEW) * span]
        for i in range(span):
            for r in range(few.size):
                few[r] += rows[r * span + i] * rows[r * span + i]
    for i in range(sums.size):
        sums[i] = times * sums[i] / np.float32(span)
    return sums


@jit
def _weigh(x, start, importance_I, sigma2, span, n, weights):
    """importance * sqrt(sigma2 + x**2), for span 0 importance alone, of weights start.. of the flat rows."""
    for at in range(0, x.size, n):
        column = (start + at) % importance_I.size
        known, values, into = importance_I[column : column + n], x[at : at + n], weights[at : at + n]
        if span:
            spread = sigma2[(start + at) // span]
            for i in range(values.size):
                into[i] = known[i] * np.sqrt(spread + values[i] * values[i])
        else:
            for i in range(values.size):
                into[i] = known[i]


@jit
def _turn(values, n, section):
    """Groups of n weights, one after the other -> n * LANES, turned round. Lanes without a group are 0."""
    groups = values.size // n
    for lane in range(groups):
        group = values[lane * n : (lane + 1) * n]
        for i in range(n):
            section[i * LANES + lane] = group[i]
    for i in range(n):
        for lane in range(groups, LANES):
            section[i * LANES + lane] = _ZERO


@jit
def _weigh_by_squares(n, tile):
    for i in range(n * LANES):
        tile[W + i] = tile[X + i] * tile[X + i]


@jit
def _prepare(n, tile, lanes):
    """Products of weight and importance, and tops; then what is not finite becomes 0.

    Weights are finite, but their scales, when these are searched in turn, can be infinite or NaN. Their code is then 0:
    nearest_int of NaN is 0, and infinity as the top has an inverse of 0, which times infinity is NaN.
    """
    for i in range(n * LANES):
        tile[WX + i] = tile[W + i] * tile[X + i]
    for lane in range(LANES):
        lanes[TOP + lane] = _ZERO
    for i in range(n):
        row = tile[i * LANES :]
        for lane in range(LANES):
            value, top = row[lane], lanes[TOP + lane]
            lanes[TOP + lane] = value if abs(value) > abs(top) else top
    for i in range(n * LANES):
        tile[X + i] = tile[X + i] if abs(tile[X + i]) < _INF else _ZERO


@jit
def _try_scales(n, tile, most, lanes):
    for step in _STEPS:
        share = -(most + np.float32(0.1) * step)
        for lane in range(LANES):
            lanes[TRIED + lane] = share / lanes[TOP + lane]
        _fit(n, tile, -most, most - _ONE, lanes)
        if step == _ZERO:
            _keep_first(lanes)
        else:
            _keep_better(lanes)


@jit
def _fit(n, tile, low, high, lanes):
    """Sums of w*x*q and w*q*q for q = the integer nearest to TRIED * x, n weights a lane.

    |TRIED * x| is at most high + 2, so that the integer can stay a float. Eight weights at a time: LLVM unrolls
    them, and the sums stay in registers meanwhile.
    """
    for lane in range(LANES):
        lanes[FIT_X + lane] = _ZERO
        lanes[FIT_Q + lane] = _ZERO
    for first in range(0, n, 8):
        eight = tile[first * LANES :]
        for lane in range(LANES):
            scale, fit_x, fit_q = lanes[TRIED + lane], lanes[FIT_X + lane], lanes[FIT_Q + lane]
            for i in range(8):
                at = i * LANES + lane
                q = (clamp(scale * eight[X + at], low, high) + _MAGIC) - _MAGIC
                fit_x += eight[WX + at] * q
                fit_q += eight[W + at] * q * q
            lanes[FIT_X + lane] = fit_x
            lanes[FIT_Q + lane] = fit_q


@jit
def _keep_first(lanes):
    for lane in range(LANES):
        fit_x, fit_q = lanes[FIT_X + lane], lanes[FIT_Q + lane]
        scale = fit_x / fit_q if fit_q != _ZERO else _ZERO
        lanes[SCALE + lane] = scale
        lanes[BEST + lane] = scale * fit_x
        lanes[INVERSE + lane] = lanes[TRIED + lane]


@jit
def _keep_better(lanes):
    for lane in range(LANES):
        fit_x, fit_q, best = lanes[FIT_X + lane], lanes[FIT_Q + lane], lanes[BEST + lane]
        better = (fit_q > _ZERO) & (fit_x * fit_x > best * fit_q)
        scale = fit_x / fit_q
        lanes[SCALE + lane] = scale if better else lanes[SCALE + lane]
        lanes[BEST + lane] = scale * fit_x if better else best
        lanes[INVERSE + lane] = lanes[TRIED + lane] if better else lanes[INVERSE + lane]


@jit
def descend(x, scale, codes):
    """make_q3_quants: scale (groups) and codes (uint8) of groups of 16 weights with codes -4..3, each counting x**2."""
    tile, lanes = np.empty(4 * _SECTION, np.float32), np.empty(7 * LANES, np.float32)
    for start in range(0, x.size, _GROUP * LANES):
        part = x[start : start + _GROUP * LANES]
        _turn(part, _GROUP, tile[X:])
        _weigh_by_squares(_GROUP, tile)
        _prepare(_GROUP, tile, lanes)
        _descend(tile, lanes)
        groups = part.size // _GROUP
        _turn_codes_back(groups, tile, lanes, codes[start : start + part.size])
        for g in range(groups):
            scale[start // _GROUP + g] = lanes[SCALE + g]


@jit
def _descend(tile, lanes):
    """From the plain codes on, each weight in turn takes the code that fits best with the others.

    Five rounds, or until no lane changes: a round without a change would only repeat itself.
    """
    low, high = np.float32(-4), np.float32(3)
    for lane in range(LANES):
        lanes[TRIED + lane] = low / lanes[TOP + lane]
        lanes[FIT_X + lane] = _ZERO
        lanes[FIT_Q + lane] = _ZERO
    for i in range(_GROUP):
        row = tile[i * LANES :]
        for lane in range(LANES):
            q = (clamp(lanes[TRIED + lane] * row[X + lane], low, high) + _MAGIC) - _MAGIC
            row[Q + lane] = q
            lanes[FIT_X + lane] += row[WX + lane] * q
            lanes[FIT_Q + lane] += row[W + lane] * q * q
    for _ in range(_ROUNDS):
        changed = np.int32(0)
        for i in range(_GROUP):
            changed |= _improve(tile[i * LANES :], lanes)
        if changed == np.int32(0):
            break
    for lane in range(LANES):
        some = (abs(lanes[TOP + lane]) >= _EPS) & (lanes[FIT_Q + lane] > _ZERO)
        lanes[SCALE + lane] = lanes[FIT_X + lane] / lanes[FIT_Q + lane] if some else _ZERO


@jit
def _improve(row, lanes):
    changed = np.int32(0)
    for lane in range(LANES):
        x, w, wx, q = row[X + lane], row[W + lane], row[WX + lane], row[Q + lane]
        fit_x, fit_q = lanes[FIT_X + lane], lanes[FIT_Q + lane]
        rest_x, rest_q = fit_x - wx * q, fit_q - w * q * q
        other = np.float32(clamp(nearest(x * rest_q / rest_x), np.int32(-4), np.int32(3)))
        new_x, new_q = rest_x + wx * other, rest_q + w * other * other
        better = (rest_x > _ZERO) & (other != q) & (new_q > _ZERO)
        better &= new_x * new_x * fit_q > fit_x * fit_x * new_q
        row[Q + lane] = other if better else q
        lanes[FIT_X + lane] = new_x if better else fit_x
        lanes[FIT_Q + lane] = new_q if better else fit_q
        changed |= np.int32(better)
    return changed


@jit
def _turn_codes_back(groups, tile, lanes, codes):
    for g in range(groups):
        empty = abs(lanes[TOP + g]) < _EPS
        for i in range(_GROUP):
            q = np.uint8(np.int32(_bits(tile[Q + i * LANES + g] + _MAGIC) + np.int32(4)) & np.int32(7))
            codes[g * _GROUP + i] = np.uint8(0) if empty else q
