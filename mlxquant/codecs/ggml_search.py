"""The search behind ggml's formats with a scale and a minimum, x = scale * code + least, code 0..top.

It is what costs: 16 to 37 trial scales for each sub-block of 16 or 32 weights, each trial with sums whose order ggml
promises. So the sub-blocks of a tile are searched side by side, one a lane: x_NL is weight n of sub-block l, and the
innermost loops run over lanes, which LLVM vectorizes. A branch of ggml becomes a select. Every float32 operation
stands in ggml's order, nothing is a double, and what overflows gives the garbage that it gives on x86-64.

Compiled by itself and called from Python: numba's cache does not notice an edit in another file than the caller's.
"""

# mypy: disallow-untyped-defs=False
# Types are numba's to find; the tests hold the encoders against ggml's own, byte for byte.
from __future__ import annotations

import numpy as np

from mlxquant.codecs.kernels import TILE, jit

_UNROLL = 2  # weights a lane takes at a time: less traffic for its sums
_ZERO, _ONE, _NAN = np.float32(0), np.float32(1), np.float32(np.nan)
_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to nearest even into the lowest bits
_NO_CODE = np.int32(0)


@jit
def nearest(x):
    """nearest_int of ggml-quants.c. Beyond 2**22, and for infinity and NaN, it is what the bits happen to say."""
    bits = np.float32(x + _MAGIC).view(np.uint32)
    return np.int32(np.int32(bits & np.uint32(0x7FFFFF)) - np.int32(0x400000))


@jit
def clipped(x, top):
    """nearest_int, then 0..top (int32)."""
    code = nearest(x)
    code = code if code < top else top
    return code if code > _NO_CODE else _NO_CODE


@jit
def search(x, importance, run, times, n, top, first, step, steps, absolute, found):
    """found[0..4, s] = scale, least, sum of w, iscale, base of sub-block s, which is x[s * n : (s + 1) * n].

    scale * code + least, with least <= 0, is the best fit that ggml finds, and its codes are those of
    iscale * (x - base): make_qkx2_quants and make_qkx3_quants of ggml/src/ggml-quants.c. x: float32, whole rows, flat.
    Trial scales: (first + step * t + top) / range for t in 0..steps.

    With importance, float32 and as wide as a row, a weight counts w = importance * sqrt(sigma2 + x * x), sigma2 being
    `times` the mean square of the `run` weights it is among. Without, of size 0, it counts |x|; where the misfit is
    squared, not absolute, the root mean square of its sub-block + |x|.
    """
    sigma2 = np.empty(x.size // run if importance.size else 0, np.float32)
    _squares(x, run, sigma2)
    for r in range(sigma2.size):
        sigma2[r] = times * sigma2[r] / np.float32(run)
    flat = np.empty((2, TILE), np.float32)
    for start in range(0, x.size, TILE):
        tile = x[start : start + TILE]
        lanes = tile.size // n
        w = np.empty(tile.size, np.float32)
        if importance.size:
            _weigh(tile, start, n, run, sigma2, importance, w)
        else:
            _weigh_by_size(tile, n, absolute, w)
        x_NL, w_NL = flat[0, : tile.size].reshape(n, lanes), flat[1, : tile.size].reshape(n, lanes)
        _transpose(tile, x_NL)
        _transpose(w, w_NL)
        _search(x_NL, w_NL, top, first, step, steps, absolute, found, start // n)


@jit
def _squares(x, run, out):
    """Sums of squares of out.size runs of x. Eight sums are under way at a time, each in its own order."""
    for r in range(0, out.size, 8):
        sums = out[r : r + 8]
        part = x[r * run : (r + 8) * run]
        sums.fill(_ZERO)
        for i in range(run):
            for k in range(sums.size):
                value = part[k * run + i]
                sums[k] += value * value


@jit
def _weigh(x, start, n, run, sigma2, importance, w):
    for at in range(0, x.size, n):
        column = (start + at) % importance.size
        level = sigma2[(start + at) // run]
        part, into, qw = x[at : at + n], w[at : at + n], importance[column : column + n]
        for i in range(n):
            into[i] = qw[i] * np.sqrt(level + part[i] * part[i])


@jit
def _weigh_by_size(x, n, absolute, w):
    level = np.empty(x.size // n, np.float32)
    _squares(x, n, level)
    for s in range(level.size):
        part, into = x[s * n : (s + 1) * n], w[s * n : (s + 1) * n]
        rms = _ZERO if absolute else np.sqrt(level[s] / np.float32(n))
        for i in range(n):
            into[i] = rms + abs(part[i])


@jit
def _transpose(x, x_NL):
    n, lanes = x_NL.shape
    for lane in range(lanes):
        part = x[lane * n : (lane + 1) * n]
        for i in range(n):
            x_NL[i, lane] = part[i]


@jit
def _totals(x_NL, w_NL, lo, hi, sum_w, sum_x):
    """Least (at most 0) and greatest weight, sum of w and of w * x, of each lane."""
    for i in range(len(x_NL)):
        x, w = x_NL[i], w_NL[i]
        if i == 0:  # not 0 + ...: that would lose the sign of a zero
            for lane in range(lo.size):
                lo[lane] = x[lane]
                hi[lane] = x[lane]
                sum_w[lane] = w[lane]
                sum_x[lane] = w[lane] * x[lane]
        else:
            for lane in range(lo.size):
                lo[lane] = x[lane] if x[lane] < lo[lane] else lo[lane]
                hi[lane] = x[lane] if x[lane] > hi[lane] else hi[lane]
                sum_w[lane] += w[lane]
                sum_x[lane] += w[lane] * x[lane]
    for lane in range(lo.size):
        lo[lane] = _ZERO if lo[lane] > _ZERO else lo[lane]


@jit
def _assign(x_NL, w_NL, iscale, base, top, q_NL, sum_q, sum_qq, sum_xq):
    """Codes by a trial scale, and the sums that a least-squares fit to them needs."""
    sum_q.fill(_ZERO)
    sum_qq.fill(_ZERO)
    sum_xq.fill(_ZERO)
    for i in range(0, len(x_NL), _UNROLL):
        x, w, q = x_NL[i : i + _UNROLL], w_NL[i : i + _UNROLL], q_NL[i : i + _UNROLL]
        for lane in range(iscale.size):
            a, b, c = sum_q[lane], sum_qq[lane], sum_xq[lane]
            factor, less = iscale[lane], base[lane]
            for k in range(_UNROLL):
                value = x[k, lane]
                code = np.float32(clipped(factor * (value - less), top))
                q[k, lane] = code
                wq = w[k, lane] * code
                a += wq
                b += wq * code
                c += wq * value
            sum_q[lane], sum_qq[lane], sum_xq[lane] = a, b, c


@jit
def _fit(sum_w, sum_x, sum_q, sum_qq, sum_xq, scale, least):
    """Least squares with least <= 0. Where it has no answer the scale is NaN, and so is then the misfit."""
    for lane in range(scale.size):
        w, x, q, qq, xq = sum_w[lane], sum_x[lane], sum_q[lane], sum_qq[lane], sum_xq[lane]
        det = w * qq - q * q
        s = (w * xq - x * q) / det
        m = (qq * x - q * xq) / det
        s_of_0 = xq / qq
        s = s_of_0 if m > _ZERO else s
        scale[lane] = s if det > _ZERO else _NAN
        least[lane] = _ZERO if m > _ZERO else m


@jit
def _misfit(x_NL, w_NL, q_NL, scale, least, absolute, error):
    error.fill(_ZERO)
    for i in range(0, len(x_NL), _UNROLL):
        x, w, q = x_NL[i : i + _UNROLL], w_NL[i : i + _UNROLL], q_NL[i : i + _UNROLL]
        for lane in range(error.size):
            total, s, m = error[lane], scale[lane], least[lane]
            for k in range(_UNROLL):
                diff = s * q[k, lane] + m - x[k, lane]
                diff = abs(diff) if absolute else diff * diff
                total += w[k, lane] * diff
            error[lane] = total


@jit
def _keep(better, new, old):
    for lane in range(old.size):
        old[lane] = new[lane] if better[lane] else old[lane]


@jit
def _search(x_NL, w_NL, top, first, step, steps, absolute, found, at):
    """One tile. A lane whose weights are all the same needs no branch: 1 / (top / 0) is 0, inf * 0 is code 0."""
    n, lanes = x_NL.shape
    q_NL = np.empty((n, lanes), np.float32)
    better = np.empty(lanes, np.bool_)
    f = np.empty((15, lanes), np.float32)
    scale, least, sum_w, iscale, base = f[0], f[1], f[2], f[3], f[4]
    hi, sum_x, error, sum_q, sum_qq, sum_xq = f[5], f[6], f[7], f[8], f[9], f[10]
    new_scale, new_least, new_error, new_iscale = f[11], f[12], f[13], f[14]
    _totals(x_NL, w_NL, least, hi, sum_w, sum_x)
    for lane in range(lanes):
        base[lane] = least[lane]
        iscale[lane] = np.float32(top) / (hi[lane] - least[lane])
        scale[lane] = _ONE / iscale[lane]
    _assign(x_NL, w_NL, iscale, base, top, q_NL, sum_q, sum_qq, sum_xq)
    _misfit(x_NL, w_NL, q_NL, scale, least, absolute, error)
    for trial in range(steps + 1):
        levels = first + step * np.float32(trial) + np.float32(top)
        for lane in range(lanes):
            new_iscale[lane] = levels / (hi[lane] - least[lane])
        _assign(x_NL, w_NL, new_iscale, least, top, q_NL, sum_q, sum_qq, sum_xq)
        _fit(sum_w, sum_x, sum_q, sum_qq, sum_xq, new_scale, new_least)
        _misfit(x_NL, w_NL, q_NL, new_scale, new_least, absolute, new_error)
        for lane in range(lanes):
            better[lane] = new_error[lane] < error[lane]
        _keep(better, new_iscale, iscale)
        _keep(better, least, base)
        _keep(better, new_error, error)
        _keep(better, new_scale, scale)
        _keep(better, new_least, least)
    for k in range(5):
        row, into = f[k], found[k, at : at + lanes]
        for lane in range(lanes):
            into[lane] = row[lane]
