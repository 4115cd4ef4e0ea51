"""The compiled half of `search.py`: for each group the scale and bias of least weighted squared error.

The groups of a tile stand side by side, one a lane, and the innermost loops run over lanes, which LLVM vectorizes
without leave to reorder sums: the same bytes on every machine. It does so only where it can tell that arrays do not
overlap. Therefore all that belongs to LANES groups stands in two flat arrays at constant distances: `tile`, turned
round (weight of the group, lane), and `lanes`, one number a group.

Numbers in both are those of the group times a power of two that brings its largest weight to 1..2, so that no square
overflows or vanishes; scale and bias are rounded to the dtype at their real size. The search itself is in float32; what
it finds is held against encode's own result in float64, as decode() would give either.

Compiled by itself and called from Python: numba's cache does not notice an edit in another file than the caller's.
That is why rounding to a dtype stands here once more.
"""

# mypy: disallow-untyped-defs=False
# Types are numba's to find; the tests hold what comes out against encode() and a slow search in float64.
from __future__ import annotations

import numpy as np

from mlxquant.codecs.kernels import E2M1, jit

LANES = 64
_SECTION = 128 * LANES
# Sections of `tile`: weights, how much each counts, encode's codes (as floats).
X, U, Q = range(0, 3 * _SECTION, _SECTION)
_TILE_FLOATS = 3 * _SECTION
# Sections of `lanes`. LO, HI: extremes of the weights that count. UP, DOWN: the power of two that brings a number to
# its real size, and its inverse. MASS: sum of U. SCALE and BIAS are tried; MIDDLE: what they give for the middle code.
# RR, R, RC, C, CC: sums of u * r * r and so on, r being what is missing to x and c the code less the middle one.
(LO, HI, UP, DOWN, MASS, SCALE, BIAS, MIDDLE, INVERSE, RR, R, RC, C, CC,
 BEST, BEST_SCALE, BEST_BIAS, OWN_SCALE, OWN_BIAS) = range(0, 19 * LANES, LANES)  # fmt: skip
_LANE_FLOATS = 19 * LANES

_BF16, _F16 = 0, 1
_ZERO, _HALF, _ONE, _INF = np.float32(0), np.float32(0.5), np.float32(1), np.float32(np.inf)
_TWO, _FOUR, _FIVE, _SIX = np.float32(2), np.float32(4), np.float32(5), np.float32(6)
_LEAST_POWER = np.float32(2.0**-127)  # of E8M0
_NAN, _EPS = np.float32(np.nan), np.float32(1e-7)  # _EPS: the least step of MLX
_WIDE = np.float32(64)  # a range, where the largest weight that counts is 1..2
# Added to a float below 2**22 this leaves the nearest integer, ties to even.
_MAGIC = np.float32(12582912.0)
_U0, _U1, _U13, _U16, _U23 = np.uint32(0), np.uint32(1), np.uint32(13), np.uint32(16), np.uint32(23)


@jit
def search_affine(x, first, weight, kind, bits, group, starts, moves, codes, scales, biases):
    """Codes (a byte each), scales and biases (float32, as dtype `kind` holds them) of the groups of x.

    x: float32, flat, whole groups. weight: float32, flat, one row or all; x begins at its place `first`, counted round.
    starts (S, 2): shares of a group's range to cut off below and above. moves (M, 2): factor on the scale, less 1, and
    shift of the middle in steps, of the best that is known by then. Returns where a group begins that is not finite,
    or -1.
    """
    tile, lanes = np.zeros(_TILE_FLOATS, np.float32), np.zeros(_LANE_FLOATS, np.float32)
    n = np.float32((1 << bits) - 1)
    for start in range(0, x.size, group * LANES):
        part = x[start : start + group * LANES]
        bad = _load(part, first + start, weight, group, tile, lanes)
        if bad >= 0:
            return start + bad
        _own(group, tile, lanes, n, kind)
        _weigh(group, tile, lanes)
        _search(group, tile, lanes, n, kind, starts, moves)
        g0, g1 = start // group, (start + part.size) // group
        _choose(group, tile, lanes, n, codes[start : start + part.size], scales[g0:g1], biases[g0:g1])
    return -1


@jit
def search_mxfp4(x, first, weight, group, codes, scales):
    """Replaces codes and scale (E8M0) of a group by better ones. x, first, weight: as above; codes and scales are
    encode's before, so x is finite.

    The usual scale is the least power of two that clips nothing. All it could gain from larger ones is lost, for E2M1
    times two has no value in reach that E2M1 lacks; so the search goes down, until what is clipped alone costs more
    than the best.
    """
    tile, lanes = np.zeros(_TILE_FLOATS, np.float32), np.zeros(_LANE_FLOATS, np.float32)
    for start in range(0, x.size, group * LANES):
        part = x[start : start + group * LANES]
        _load(part, first + start, weight, group, tile, lanes)
        _weigh(group, tile, lanes)
        _descend_powers(group, tile, lanes)
        g0, g1 = start // group, (start + part.size) // group
        _choose_power(part, group, tile, lanes, codes[start : start + part.size], scales[g0:g1])


@jit
def _bits(single):
    return np.float32(single).view(np.uint32)


@jit
def _single(bits):
    return np.uint32(bits).view(np.float32)


@jit
def _power(single):
    """The power of two below, 2**-126 or more."""
    exponent = _bits(single) & np.uint32(0x7F800000)
    return _single(exponent if exponent > _U0 else np.uint32(_U1 << _U23))


@jit
def _clip(value, lo, hi):
    value = value if value > lo else lo
    return value if value < hi else hi


@jit
def rounded(value, kind):
    """The nearest number of dtype `kind` (kernels.KINDS), ties to even; beyond its largest, infinity. No NaN."""
    bits = _bits(value)
    if kind == _BF16:
        odd = np.uint32(bits >> _U16) & _U1
        return _single(np.uint32(bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000))
    if kind == _F16:
        sign, size = bits & np.uint32(0x80000000), bits & np.uint32(0x7FFFFFFF)
        # One unit of 0.5's last place is the smallest F16: adding 0.5 rounds a denormal there.
        tiny = _bits((_single(size) + _HALF) - _HALF)
        odd = np.uint32(size >> _U13) & _U1
        usual = np.uint32(size + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000)
        half = tiny if size < np.uint32(0x38800000) else usual
        half = half if size < np.uint32(0x477FF000) else np.uint32(0x7F800000)
        return _single(half | sign)
    return value


@jit
def _load(x, first, weight, group, tile, lanes):
    """X, U, and LO and HI of all weights. Returns where the first group begins that is not finite, or -1."""
    groups = x.size // group
    for lane in range(groups):
        at = (first + lane * group) % weight.size
        values, counts = x[lane * group : (lane + 1) * group], weight[at : at + group]
        for i in range(group):
            tile[X + i * LANES + lane] = values[i]
            tile[U + i * LANES + lane] = counts[i]
    for i in range(group):
        for lane in range(groups, LANES):
            tile[X + i * LANES + lane] = _ZERO
            tile[U + i * LANES + lane] = _ZERO
    _extremes(group, tile, lanes)
    for lane in range(groups):
        if not lanes[HI + lane] - lanes[LO + lane] + lanes[R + lane] < _INF:
            return lane * group
    return -1


@jit
def _extremes(group, tile, lanes):
    """LO and HI, and 0 in R, or NaN where a weight is NaN or infinite."""
    for lane in range(LANES):
        lanes[LO + lane] = _INF
        lanes[HI + lane] = -_INF
        lanes[R + lane] = _ZERO
    for i in range(group):
        row = tile[X + i * LANES :]
        for lane in range(LANES):
            lo, hi, value = lanes[LO + lane], lanes[HI + lane], row[lane]
            lanes[LO + lane] = value if value < lo else lo
            lanes[HI + lane] = value if value > hi else hi
            lanes[R + lane] += value * _ZERO


@jit
def _own(group, tile, lanes, n, kind):
    """encode's scale, bias and codes: the law is in affine.py."""
    for lane in range(LANES):
        lo, hi = lanes[LO + lane], lanes[HI + lane]
        step = (hi - lo) / n
        step = step if step > _EPS else _EPS
        from_lo = abs(lo) > abs(hi)
        step = step if from_lo else -step
        edge = lo if from_lo else hi
        q0 = np.float32(np.rint(edge / step))
        scale = edge / q0 if q0 != _ZERO else step
        bias = edge if q0 != _ZERO else _ZERO
        lanes[SCALE + lane] = scale
        lanes[BIAS + lane] = bias
        lanes[OWN_SCALE + lane] = rounded(scale, kind)
        lanes[OWN_BIAS + lane] = rounded(bias, kind)
    for i in range(group):
        row = tile[i * LANES :]
        for lane in range(LANES):
            q = _clip((row[X + lane] - lanes[BIAS + lane]) / lanes[SCALE + lane], _ZERO, n)
            row[Q + lane] = (q + _MAGIC) - _MAGIC


@jit
def _weigh(group, tile, lanes):
    """U to at most 2, X to at most 2, LO and HI of the weights that count; the others are clipped to them, so that
    they cannot overflow. Where none counts, all count alike.
    """
    for lane in range(LANES):
        lanes[C + lane] = _ZERO
        lanes[MASS + lane] = _ZERO
        lanes[LO + lane] = _INF
        lanes[HI + lane] = -_INF
    for i in range(group):
        row = tile[U + i * LANES :]
        for lane in range(LANES):
            most = lanes[C + lane]
            lanes[C + lane] = row[lane] if row[lane] > most else most
    for lane in range(LANES):
        lanes[R + lane] = _ONE / _power(lanes[C + lane])
    for i in range(group):
        row = tile[i * LANES :]
        for lane in range(LANES):
            u = row[U + lane] * lanes[R + lane] if lanes[C + lane] > _ZERO else _ONE
            lo, hi, value = lanes[LO + lane], lanes[HI + lane], row[X + lane]
            row[U + lane] = u
            lanes[MASS + lane] += u
            lanes[LO + lane] = value if (value < lo) & (u > _ZERO) else lo
            lanes[HI + lane] = value if (value > hi) & (u > _ZERO) else hi
    _normalise(group, tile, lanes)


@jit
def _normalise(group, tile, lanes):
    for lane in range(LANES):
        lo, hi = abs(lanes[LO + lane]), abs(lanes[HI + lane])
        lanes[UP + lane] = _power(hi if hi > lo else lo)
        lanes[DOWN + lane] = _ONE / lanes[UP + lane]
        lanes[LO + lane] *= lanes[DOWN + lane]
        lanes[HI + lane] *= lanes[DOWN + lane]
    for i in range(group):
        row = tile[X + i * LANES :]
        for lane in range(LANES):
            row[lane] = _clip(row[lane] * lanes[DOWN + lane], lanes[LO + lane], lanes[HI + lane])


@jit
def _search(group, tile, lanes, n, kind, starts, moves):
    """From encode's own scale and bias, from each start, and by each move away from the best so far.

    encode's range may be so much wider than that of the weights that count that float32 loses them in it: then it is no
    place to start from.
    """
    for lane in range(LANES):
        own = lanes[OWN_SCALE + lane] * lanes[DOWN + lane]
        lanes[BEST + lane] = _INF
        lanes[BEST_SCALE + lane] = _ZERO
        lanes[BEST_BIAS + lane] = _ZERO
        lanes[SCALE + lane] = own if abs(own) * n < _WIDE else _NAN
        lanes[BIAS + lane] = lanes[OWN_BIAS + lane] * lanes[DOWN + lane]
    _descend(group, tile, lanes, n, kind, 2)
    for s in range(len(starts)):
        _start(lanes, n, kind, starts[s, 0], starts[s, 1])
        _descend(group, tile, lanes, n, kind, 2)
    for m in range(len(moves)):
        _move(lanes, n, kind, moves[m, 0], moves[m, 1])
        _descend(group, tile, lanes, n, kind, 1)


@jit
def _start(lanes, n, kind, below, above):
    for lane in range(LANES):
        lo, hi, up, down = lanes[LO + lane], lanes[HI + lane], lanes[UP + lane], lanes[DOWN + lane]
        spread = hi - lo
        lo, hi = lo + below * spread, hi - above * spread
        lanes[SCALE + lane] = rounded((hi - lo) / n * up, kind) * down
        lanes[BIAS + lane] = rounded(lo * up, kind) * down


@jit
def _move(lanes, n, kind, wider, shifted):
    middle = n * _HALF
    for lane in range(LANES):
        was, up, down = lanes[BEST_SCALE + lane], lanes[UP + lane], lanes[DOWN + lane]
        scale = rounded((was + was * wider) * up, kind) * down
        bias = lanes[BEST_BIAS + lane] + was * (middle + shifted) - scale * middle
        lanes[SCALE + lane] = scale
        lanes[BIAS + lane] = rounded(bias * up, kind) * down


@jit
def _descend(group, tile, lanes, n, kind, refits):
    """Codes to scale and bias, keep what is better, scale and bias to codes, and again. An infinite or NaN scale or
    bias has a misfit of NaN, which is not less than the best.
    """
    for step in range(refits + 1):
        _misfit(group, tile, lanes, n)
        for lane in range(LANES):
            better = lanes[RR + lane] < lanes[BEST + lane]
            lanes[BEST + lane] = lanes[RR + lane] if better else lanes[BEST + lane]
            lanes[BEST_SCALE + lane] = lanes[SCALE + lane] if better else lanes[BEST_SCALE + lane]
            lanes[BEST_BIAS + lane] = lanes[BIAS + lane] if better else lanes[BEST_BIAS + lane]
        if step < refits:
            _refit(lanes, n, kind)


@jit
def _misfit(group, tile, lanes, n):
    """Sums over the codes nearest to SCALE and BIAS. Four weights at a time: LLVM unrolls them, and the sums stay in
    registers meanwhile.
    """
    middle = n * _HALF
    for lane in range(LANES):
        scale = lanes[SCALE + lane]
        lanes[MIDDLE + lane] = lanes[BIAS + lane] + scale * middle
        lanes[INVERSE + lane] = _ONE / scale if scale != _ZERO else _ZERO
        lanes[RR + lane] = _ZERO
        lanes[R + lane] = _ZERO
        lanes[RC + lane] = _ZERO
        lanes[C + lane] = _ZERO
        lanes[CC + lane] = _ZERO
    for first in range(0, group, 4):
        four = tile[first * LANES :]
        for lane in range(LANES):
            scale, centre, inverse = lanes[SCALE + lane], lanes[MIDDLE + lane], lanes[INVERSE + lane]
            rr, r1, rc, c1, cc = lanes[RR + lane], lanes[R + lane], lanes[RC + lane], lanes[C + lane], lanes[CC + lane]
            for i in range(4):
                at = i * LANES + lane
                x, u = four[X + at] - centre, four[U + at]
                c = ((_clip(x * inverse + middle, _ZERO, n) + _MAGIC) - _MAGIC) - middle
                r = x - scale * c
                ur, uc = u * r, u * c
                rr += ur * r
                r1 += ur
                rc += ur * c
                c1 += uc
                cc += uc * c
            lanes[RR + lane] = rr
            lanes[R + lane] = r1
            lanes[RC + lane] = rc
            lanes[C + lane] = c1
            lanes[CC + lane] = cc


@jit
def _refit(lanes, n, kind):
    """Weighted least squares with the codes as they are, from the sums of what is missing: those of x itself would
    cancel at 6 and 8 bits. The bias is fitted to the scale as the dtype holds it.
    """
    middle = n * _HALF
    for lane in range(LANES):
        mass, c, r = lanes[MASS + lane], lanes[C + lane], lanes[R + lane]
        det = mass * lanes[CC + lane] - c * c
        step = (mass * lanes[RC + lane] - c * r) / det
        step = step if det > _ZERO else _ZERO
        up, down, was = lanes[UP + lane], lanes[DOWN + lane], lanes[SCALE + lane]
        scale = rounded((was + step) * up, kind) * down
        bias = lanes[MIDDLE + lane] + (r - (scale - was) * c) / mass - scale * middle
        lanes[SCALE + lane] = scale
        lanes[BIAS + lane] = rounded(bias * up, kind) * down


@jit
def _choose(group, tile, lanes, n, codes, scales, biases):
    """What was found, unless encode's own is as good. Both as decode() gives them: float32, at their real size."""
    for lane in range(scales.size):
        up, down = lanes[UP + lane], np.float64(lanes[DOWN + lane])
        scale, bias = lanes[BEST_SCALE + lane] * up, lanes[BEST_BIAS + lane] * up
        own_scale, own_bias = lanes[OWN_SCALE + lane], lanes[OWN_BIAS + lane]
        found, own = 0.0, 0.0
        for i in range(group):
            at = i * LANES + lane
            x, u, q = tile[X + at] * up, np.float64(tile[U + at]), tile[Q + at]
            p = (x - bias) / scale if scale != _ZERO else _ZERO
            p = (_clip(p, _ZERO, n) + _MAGIC) - _MAGIC
            missing = (np.float64(x) - np.float64(p * scale + bias)) * down
            found += u * missing * missing
            missing = (np.float64(x) - np.float64(q * own_scale + own_bias)) * down
            own += u * missing * missing
            codes[lane * group + i] = np.uint8(p)
        better = found < own
        scales[lane] = scale if better else own_scale
        biases[lane] = bias if better else own_bias
        if not better:
            for i in range(group):
                codes[lane * group + i] = np.uint8(tile[Q + i * LANES + lane])


@jit
def _e2m1(size):
    """The E2M1 value nearest to a magnitude."""
    half = ((size * _TWO + _MAGIC) - _MAGIC) * _HALF
    one = (size + _MAGIC) - _MAGIC
    value = half if size < _TWO else one
    return value if size <= _FOUR else (_SIX if size > _FIVE else _FOUR)


@jit
def _descend_powers(group, tile, lanes):
    """BEST_SCALE: the best power of two below the largest weight. R: what is clipped by one."""
    for lane in range(LANES):
        lanes[BEST + lane] = _INF
        lanes[SCALE + lane] = _HALF
    alive = True
    while alive:
        _misfit_power(group, tile, lanes)
        alive = False
        for lane in range(LANES):
            scale = lanes[SCALE + lane]
            better = (lanes[RR + lane] < lanes[BEST + lane]) & (scale * lanes[UP + lane] >= _LEAST_POWER)
            lanes[BEST + lane] = lanes[RR + lane] if better else lanes[BEST + lane]
            lanes[BEST_SCALE + lane] = scale if better else lanes[BEST_SCALE + lane]
            lanes[SCALE + lane] = scale * _HALF
            alive |= (lanes[R + lane] < lanes[BEST + lane]) & (scale * lanes[UP + lane] > _LEAST_POWER)


@jit
def _misfit_power(group, tile, lanes):
    for lane in range(LANES):
        lanes[INVERSE + lane] = _ONE / lanes[SCALE + lane]
        lanes[RR + lane] = _ZERO
        lanes[R + lane] = _ZERO
    for i in range(group):
        row = tile[i * LANES :]
        for lane in range(LANES):
            scale, u, size = lanes[SCALE + lane], row[U + lane], abs(row[X + lane])
            missing = size - _e2m1(size * lanes[INVERSE + lane]) * scale
            clipped = size - _SIX * scale
            clipped = clipped if clipped > _ZERO else _ZERO
            lanes[RR + lane] += u * missing * missing
            lanes[R + lane] += u * clipped * clipped


@jit
def _choose_power(x, group, tile, lanes, codes, scales):
    for lane in range(scales.size):
        down = np.float64(lanes[DOWN + lane])
        scale, own_scale = lanes[BEST_SCALE + lane] * lanes[UP + lane], _power_of(scales[lane])
        found, own = 0.0, 0.0
        for i in range(group):
            at = lane * group + i
            u, size = np.float64(tile[U + i * LANES + lane]), abs(x[at])
            if u > 0.0:
                missing = np.float64(size) - np.float64(_e2m1(size / scale)) * np.float64(scale)
                found += u * (missing * down) * (missing * down)
                missing = np.float64(x[at]) - np.float64(E2M1[codes[at]]) * np.float64(own_scale)
                own += u * (missing * down) * (missing * down)
        if found < own:
            scales[lane] = np.uint8(_bits(scale) >> _U23)
            for i in range(group):
                value = x[lane * group + i]
                codes[lane * group + i] = _e2m1_code(abs(value) / scale, value < _ZERO)


@jit
def _power_of(byte):
    return _single(np.uint32(byte) << _U23) if byte > 0 else _LEAST_POWER


@jit
def _e2m1_code(size, negative):
    nearest, code = _e2m1(size), 0
    for k in range(8):
        code = k if E2M1[k] == nearest else code
    return np.uint8(code + 8 if negative and code > 0 else code)
