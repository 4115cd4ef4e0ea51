"""Encoders of ggml's formats with a scale and a minimum, x = d * q + m: Q4_1, Q5_1, Q2_K, Q4_K, Q5_K.

Byte for byte what ggml's reference encoder writes on x86-64 (ggml/src/ggml-quants.c: quantize_row_*_ref
without importance, quantize_*_impl with), several times as fast: the sub-blocks of a tile are searched side
by side. x_NL holds weight n of sub-block l, a lane; inner loops run over lanes, which do not depend on one
another, so LLVM vectorizes them while the sums inside a sub-block keep ggml's order.

Bytes are promised, so every float32 operation stands in ggml's order, double is never used, and a branch of
ggml becomes a select. Overflow, 0/0 and out-of-range codes come out as on x86-64.
"""

# mypy: disallow-untyped-defs=False
# Types are numba's to find; the tests hold every kernel against ggml's own encoder, byte for byte.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlxquant.codecs.kernels import TILE, half_to_single, jit, single_to_half

_BLOCK = 256  # weights of a K-quant's block
_SHARES = 5  # rounds of coordinate descent in _share
_UNROLL = 2  # weights a lane takes at a time: less traffic for its sums; LLVM gives up on 8
_0, _1, _15, _31, _63 = np.float32(0), np.float32(1), np.float32(15), np.float32(31), np.float32(63)
_HALF = np.float32(0.5)
_EPS = np.float32(1e-15)  # GROUP_MAX_EPS
_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to nearest even into the lowest bits
_NAN = np.float32(np.nan)
_I0 = np.int32(0)


# --- numbers


@jit
def _nearest(x):
    """ggml's nearest_int. Beyond 2**22, and for infinities and NaN, it is what the bits happen to say."""
    bits = np.float32(x + _MAGIC).view(np.uint32)
    return np.int32(np.int32(bits & np.uint32(0x7FFFFF)) - np.int32(0x400000))


@jit
def _clipped(x, top):
    """nearest_int, then 0..top."""
    code = _nearest(x)
    code = code if code < top else top
    return code if code > _I0 else _I0


@jit
def _half(x):
    """GGML_FP32_TO_FP16. A NaN can only be the one that x86 makes of inf / inf or 0 * inf: it is negative."""
    half = single_to_half(np.float32(x).view(np.uint32))
    return np.uint16(half if x == x else np.uint32(0xFE00))


@jit
def _single(half):
    return np.uint32(half_to_single(np.uint32(half))).view(np.float32)


@jit
def _put_half(out, at, half):
    out[at] = np.uint8(half & np.uint16(0xFF))
    out[at + 1] = np.uint8(half >> np.uint16(8))


# --- the search for one scale and minimum a sub-block: make_qkx2_quants, make_qkx3_quants


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
        lo[lane] = _0 if lo[lane] > _0 else lo[lane]


@jit
def _assign(x_NL, w_NL, iscale, base, top, q_NL, sum_q, sum_qq, sum_xq):
    """Codes by a trial scale, and the sums that a least-squares fit to them needs."""
    sum_q.fill(_0)
    sum_qq.fill(_0)
    sum_xq.fill(_0)
    for i in range(0, len(x_NL), _UNROLL):
        x, w, q = x_NL[i : i + _UNROLL], w_NL[i : i + _UNROLL], q_NL[i : i + _UNROLL]
        for lane in range(iscale.size):
            a, b, c = sum_q[lane], sum_qq[lane], sum_xq[lane]
            times, less = iscale[lane], base[lane]
            for k in range(_UNROLL):
                value = x[k, lane]
                code = np.float32(_clipped(times * (value - less), top))
                q[k, lane] = code
                wq = w[k, lane] * code
                a += wq
                b += wq * code
                c += wq * value
            sum_q[lane], sum_qq[lane], sum_xq[lane] = a, b, c


@jit
def _fit(sum_w, sum_x, sum_q, sum_qq, sum_xq, scale, least):
    """Least squares: q * scale + least, with least <= 0. Where it has no answer the scale is NaN."""
    for lane in range(scale.size):
        w, x, q, qq, xq = sum_w[lane], sum_x[lane], sum_q[lane], sum_qq[lane], sum_xq[lane]
        det = w * qq - q * q
        s = (w * xq - x * q) / det
        m = (qq * x - q * xq) / det
        through_0 = xq / qq
        s = through_0 if m > _0 else s
        m = _0 if m > _0 else m
        scale[lane] = s if det > _0 else _NAN
        least[lane] = m


@jit
def _misfit(x_NL, w_NL, q_NL, scale, least, absolute, error):
    error.fill(_0)
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
def _keep(better, old, new):
    for lane in range(old.size):
        old[lane] = new[lane] if better[lane] else old[lane]


@jit
def _search(x_NL, w_NL, top, first, step, steps, absolute):
    """The scale and minimum of each lane: (scale, least, sum_w, iscale, base).

    The codes ggml found along are those of iscale * (x - base). A lane whose weights are all the same ends up
    with scale 0 and codes 0 without a branch: 1 / (top / 0), and inf * 0 is code 0.
    """
    n, lanes = x_NL.shape
    q_NL = np.empty((n, lanes), np.float32)
    better = np.empty(lanes, np.bool_)
    f = np.empty((15, lanes), np.float32)
    least, hi, sum_w, sum_x, scale, error, iscale, base = f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7]
    sum_q, sum_qq, sum_xq, new_scale, new_least, new_error, new_iscale = f[8], f[9], f[10], f[11], f[12], f[13], f[14]
    _totals(x_NL, w_NL, least, hi, sum_w, sum_x)
    for lane in range(lanes):
        base[lane] = least[lane]
        iscale[lane] = np.float32(top) / (hi[lane] - least[lane])
        scale[lane] = _1 / iscale[lane]
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
        _keep(better, iscale, new_iscale)
        _keep(better, base, least)
        _keep(better, error, new_error)
        _keep(better, scale, new_scale)
        _keep(better, least, new_least)
    return scale, least, sum_w, iscale, base


# --- what a weight counts


@jit
def _squares(x, length, out):
    """Sums of squares of out.size runs of x. Eight sums are under way at a time, each in its own order."""
    for g in range(0, out.size, 8):
        sums = out[g : g + 8]
        part = x[g * length : (g + 8) * length]
        sums.fill(_0)
        for i in range(length):
            for run in range(sums.size):
                value = part[run * length + i]
                sums[run] += value * value


@jit
def _weigh(x, sigma2, n, importance, first, w):
    """w = importance * sqrt(sigma2 + x * x), sigma2 one a sub-block; x is where weight `first` of the rows is."""
    for s in range(x.size // n):
        at = (first + s * n) % importance.size
        qw, part, into, level = importance[at : at + n], x[s * n : (s + 1) * n], w[s * n : (s + 1) * n], sigma2[s]
        for i in range(n):
            into[i] = qw[i] * np.sqrt(level + part[i] * part[i])


@jit
def _weigh_by_size(x, n, absolute, w):
    """|x|, for Q2_K, or root mean square of the sub-block + |x|."""
    level = np.empty(x.size // n, np.float32)
    _squares(x, n, level)
    for s in range(level.size):
        part, into = x[s * n : (s + 1) * n], w[s * n : (s + 1) * n]
        rms = _0 if absolute else np.sqrt(level[s] / np.float32(n))
        for i in range(n):
            into[i] = rms + abs(part[i])


@jit
def _search_weighed(x, w, n, top, first, step, steps, absolute):
    x_NL = np.empty((n, x.size // n), np.float32)
    w_NL = np.empty((n, x.size // n), np.float32)
    _transpose(x, x_NL)
    _transpose(w, w_NL)
    return _search(x_NL, w_NL, top, first, step, steps, absolute)


# --- one scale for the scales, one for the minima of a K-quant's block


@jit
def _share(v_JL, w_JL, top, code_JL, scale):
    """make_qp_quants: codes (a byte, wrapped) and a scale for the J values of each lane."""
    J, lanes = v_JL.shape
    f = np.empty((6, lanes), np.float32)
    most, iscale, best, new, error, back = f[0], f[1], f[2], f[3], f[4], f[5]
    most.fill(_0)
    for j in range(J):
        v = v_JL[j]
        for lane in range(lanes):
            most[lane] = most[lane] if most[lane] > v[lane] else v[lane]
    for trial in range(-5, 5):  # -5 stands for 0, which goes first and whose codes have no upper limit
        is_first = trial == -5
        if trial == 0:
            continue
        levels = np.float32(top) if is_first else np.float32(0.1) * np.float32(trial) + np.float32(top)
        limit = np.int32(0x7FFFFFFF) if is_first else top
        for lane in range(lanes):
            new[lane] = levels / most[lane]
            back[lane] = _1 / new[lane]
        error.fill(_0)
        for j in range(J):
            v, w = v_JL[j], w_JL[j]
            for lane in range(lanes):
                code = _nearest(new[lane] * v[lane])
                code = code if code < limit else limit
                code = np.int32(code & np.int32(0xFF)) if is_first else code
                diff = v[lane] - back[lane] * np.float32(code)
                error[lane] += w[lane] * diff * diff
        for lane in range(lanes):
            better = is_first or error[lane] < best[lane]
            best[lane] = error[lane] if better else best[lane]
            iscale[lane] = new[lane] if better else iscale[lane]
    _descend(v_JL, w_JL, top, iscale, code_JL, scale)
    for j in range(J):
        code = code_JL[j]
        for lane in range(lanes):
            code[lane] = np.uint8(0) if most[lane] < _EPS else code[lane]
    for lane in range(lanes):
        scale[lane] = _0 if most[lane] < _EPS else scale[lane]


@jit
def _descend(v_JL, w_JL, top, iscale, code_JL, scale):
    """The second half of make_qp_quants: change one code at a time while the fit gets better."""
    lanes = iscale.size
    xq, qq = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    for j in range(len(v_JL)):
        v, w, code = v_JL[j], w_JL[j], code_JL[j]
        for lane in range(lanes):
            q = _nearest(iscale[lane] * v[lane])
            q = q if q < top else top
            code[lane] = np.uint8(q)
            xq[lane] += w[lane] * v[lane] * np.float32(q)
            qq[lane] += w[lane] * np.float32(q) * np.float32(q)
    for _ in range(_SHARES):
        for j in range(len(v_JL)):
            v, w, code = v_JL[j], w_JL[j], code_JL[j]
            for lane in range(lanes):
                old, wv = np.float32(code[lane]), w[lane] * v[lane]
                rest_xq = xq[lane] - wv * old
                rest_qq = qq[lane] - w[lane] * old * old
                q = _nearest(v[lane] * rest_qq / rest_xq)
                q = q if q < top else top
                new = np.float32(q)
                new_xq = rest_xq + wv * new
                new_qq = rest_qq + w[lane] * new * new
                better = new_xq * new_xq * qq[lane] > xq[lane] * xq[lane] * new_qq
                better = better & (rest_xq > _0) & (rest_qq > _0) & (new != old)
                code[lane] = np.uint8(q) if better else code[lane]
                xq[lane] = new_xq if better else xq[lane]
                qq[lane] = new_qq if better else qq[lane]
    for lane in range(lanes):
        ratio = xq[lane] / qq[lane]
        scale[lane] = ratio if qq[lane] > _0 else _0


@jit
def _share_fitted(scale, least, sum_w, J, top, codes, halves):
    """Scales and minima of all blocks at once, a block a lane."""
    blocks = scale.size // J
    v_JL, w_JL = np.empty((J, 2 * blocks), np.float32), np.empty((J, 2 * blocks), np.float32)
    code_JL = np.empty((J, 2 * blocks), np.uint8)
    both = np.empty(2 * blocks, np.float32)
    for j in range(J):
        for b in range(blocks):
            at = b * J + j
            v_JL[j, b], v_JL[j, blocks + b] = scale[at], -least[at]
            w_JL[j, b] = w_JL[j, blocks + b] = sum_w[at]
    _share(v_JL, w_JL, top, code_JL, both)
    for b in range(blocks):
        halves[0, b], halves[1, b] = _half(both[b]), _half(both[blocks + b])
        for j in range(J):
            codes[0, b * J + j], codes[1, b * J + j] = code_JL[j, b], code_JL[j, blocks + b]


@jit
def _share_largest(values, sign, J, top, codes, halves):
    """Codes 0..top of the J values of each block, the largest of them top; the codes wrap at a byte."""
    levels = np.float32(top)
    for b in range(halves.size):
        part, code = values[b * J : (b + 1) * J], codes[b * J : (b + 1) * J]
        most = _0
        for j in range(J):
            most = sign * part[j] if sign * part[j] > most else most
        times = levels / most if most > _0 else _0
        for j in range(J):
            code[j] = np.uint8(_nearest(times * (sign * part[j]))) if most > _0 else np.uint8(0)
        halves[b] = _half(most / levels)


@jit
def _parameters(x, importance, first, n, top, share_top, sigma_times, ref_first, ref_step, ref_steps, absolute):
    """All of a tile of K-quant blocks but its codes: (codes of scales and minima, d and dmin as F16, iscale, base)."""
    subs, J = x.size // n, _BLOCK // n
    codes, halves = np.empty((2, subs), np.uint8), np.empty((2, subs // J), np.uint16)
    w = np.empty(x.size, np.float32)
    if importance.size:
        energy, sigma2 = np.empty(subs // J, np.float32), np.empty(subs, np.float32)
        _squares(x, _BLOCK, energy)
        for s in range(subs):
            sigma2[s] = sigma_times * energy[s // J] / np.float32(_BLOCK)
        _weigh(x, sigma2, n, importance, first, w)
        scale, least, sum_w, iscale, base = _search_weighed(
            x, w, n, top, np.float32(-0.9), np.float32(0.05), 36, False
        )
        _share_fitted(scale, least, sum_w, J, share_top, codes, halves)
    else:
        _weigh_by_size(x, n, absolute, w)
        scale, least, sum_w, iscale, base = _search_weighed(x, w, n, top, ref_first, ref_step, ref_steps, absolute)
        _share_largest(scale, _1, J, share_top, codes[0], halves[0])
        _share_largest(least, -_1, J, share_top, codes[1], halves[1])
    return codes, halves, iscale, base


# --- bytes


@jit
def _recode(x, d, m, top, iscale, base, q):
    """The codes of a sub-block whose scale and minimum are rounded; with a scale of 0 those of the search stay."""
    if d == _0:
        for i in range(q.size):
            q[i] = _clipped(iscale * (x[i] - base), top)
    else:
        for i in range(q.size):
            q[i] = _clipped((x[i] + m) / d, top)


@jit
def _pack_scales(ls, lm, out):
    """Eight 6-bit scales and minima in 12 bytes; a byte that is more than 63 spills as it does in ggml."""
    for j in range(4):
        out[j] = ls[j] | np.uint8(ls[j + 4] >> 4 << 6)
        out[j + 4] = lm[j] | np.uint8(lm[j + 4] >> 4 << 6)
        out[j + 8] = np.uint8(ls[j + 4] & 15) | np.uint8((lm[j + 4] & 15) << 4)
    for j in range(4):
        ls[j], lm[j] = out[j] & 63, out[j + 4] & 63
        ls[j + 4] = np.uint8(out[j + 8] & 15) | np.uint8(out[j] >> 6 << 4)
        lm[j + 4] = np.uint8(out[j + 8] >> 4) | np.uint8(out[j + 4] >> 6 << 4)


@jit
def _encode_k(x, importance, top, ref_first, ref_step, ref_steps, clip, out):
    """Q4_K and Q5_K: d, dmin, 12 bytes of scales, then for Q5_K 32 of high bits, 128 of low ones."""
    q = np.empty(_BLOCK, np.uint8)
    five = top == np.int32(31)
    size = 176 if five else 144
    for first in range(0, x.size, TILE):
        tile = x[first : first + TILE]
        codes, halves, iscale, base = _parameters(
            tile, importance, first, 32, top, np.int32(63), np.float32(2), ref_first, ref_step, ref_steps, False
        )
        for b in range(tile.size // _BLOCK):
            at = (first // _BLOCK + b) * size
            ls, lm = codes[0, b * 8 : b * 8 + 8], codes[1, b * 8 : b * 8 + 8]
            if clip or not importance.size:
                for j in range(8):
                    ls[j], lm[j] = min(ls[j], np.uint8(63)), min(lm[j], np.uint8(63))
            _put_half(out, at, halves[0, b])
            _put_half(out, at + 2, halves[1, b])
            _pack_scales(ls, lm, out[at + 4 : at + 16])
            d, m = _single(halves[0, b]), _single(halves[1, b])
            for j in range(8):
                s = b * 8 + j
                sub = tile[s * 32 : (s + 1) * 32]
                _recode(sub, d * np.float32(ls[j]), m * np.float32(lm[j]), top, iscale[s], base[s], q[j * 32 :][:32])
            if five:
                _pack_high(q, out[at + 16 : at + 48])
            _pack_low(q, 32, out[at + size - 128 : at + size])


@jit
def _pack_low(q, apart, out):
    """Two 4-bit codes a byte, `apart` codes from one another."""
    for p in range(out.size // apart):
        low, high, into = q[2 * p * apart :][:apart], q[(2 * p + 1) * apart :][:apart], out[p * apart :][:apart]
        for i in range(apart):
            into[i] = np.uint8(low[i] & 15) | np.uint8((high[i] & 15) << 4)


@jit
def _pack_high(q, out):
    """Fifth bits: that of code 32 * j + i is bit j of byte i."""
    out.fill(np.uint8(0))
    for j in range(8):
        part = q[j * 32 : (j + 1) * 32]
        for i in range(32):
            out[i] |= np.uint8(part[i] >> 4 << j)


@jit
def _encode_q4_k(x, importance, width, out):
    _encode_k(x, importance, np.int32(15), np.float32(-1), np.float32(0.1), 20, False, out)


@jit
def _encode_q5_k(x, importance, width, out):
    _encode_k(x, importance, np.int32(31), np.float32(-0.5), np.float32(0.1), 15, True, out)


@jit
def _encode_q2_k(x, importance, width, out):
    """16 bytes of scales and minima, 64 of codes, d, dmin."""
    q = np.empty(_BLOCK, np.uint8)
    for first in range(0, x.size, TILE):
        tile = x[first : first + TILE]
        codes, halves, iscale, base = _parameters(
            tile, importance, first, 16, np.int32(3), np.int32(15), _1, -_HALF, np.float32(0.1), 15, True
        )
        for b in range(tile.size // _BLOCK):
            block = out[(first // _BLOCK + b) * 84 :][:84]
            d, m = _single(halves[0, b]), _single(halves[1, b])
            for j in range(16):
                s = b * 16 + j
                pair = np.uint8(codes[0, s] | np.uint8(codes[1, s] << 4))
                block[j] = pair
                sub = tile[s * 16 : (s + 1) * 16]
                low, high = np.float32(pair & 15), np.float32(pair >> 4)
                _recode(sub, d * low, m * high, np.int32(3), iscale[s], base[s], q[j * 16 :][:16])
            _pack_two(q, block[16:80])
            _put_half(block, 80, halves[0, b])
            _put_half(block, 82, halves[1, b])


@jit
def _pack_two(q, out):
    """Four 2-bit codes a byte, 32 codes from one another."""
    for p in range(2):
        part, into = q[p * 128 : (p + 1) * 128], out[p * 32 : (p + 1) * 32]
        for i in range(32):
            low = np.uint8(part[i] | np.uint8(part[i + 32] << 2))
            into[i] = low | np.uint8(part[i + 64] << 4) | np.uint8(part[i + 96] << 6)


# --- Q4_1 and Q5_1: blocks of 32


@jit
def _extremes(x):
    """Least and greatest weight; of two zeros that are the least, the sign of the first."""
    lo, hi = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for value in x.view(np.int32):
        # Bits with the magnitude of negatives inverted are ordered as the numbers; integers vectorize.
        key = np.int32(value ^ np.int32(np.int32(value >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        lo = key if key < lo else lo
        hi = key if key > hi else hi
    least, most = _unkey(lo), _unkey(hi)
    if least == _0:
        for value in x:
            if value == _0:
                return value, most
    return least, most


@jit
def _unkey(key):
    return np.int32(key ^ np.int32(np.int32(key >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@jit
def _encode_plain(x, levels, q):
    """quantize_row_q4_1_ref, quantize_row_q5_1_ref: from the least to the greatest weight."""
    lo, hi = _extremes(x)
    d = (hi - lo) / levels
    times = _1 / d
    times = times if d != _0 else _0
    for i in range(q.size):
        code = (x[i] - lo) * times + _HALF
        # Only where the range overflows, or 1 / d, is it more, or NaN; x86's cast then leaves a zero byte.
        code = code if code < np.float32(64) else _0
        code = code if code < levels else levels
        q[i] = np.int32(code)
    return _half(d), _half(lo)


@jit
def _encode_1(x, importance, width, top, out):
    """d, m, for Q5_1 four bytes of fifth bits, 16 of low ones."""
    five = top == np.int32(31)
    size = 24 if five else 20
    q, levels = np.empty(32, np.uint8), np.float32(top)
    energy = np.empty(x.size // width if importance.size else 0, np.float32)
    _squares(x, width, energy)
    for first in range(0, x.size, TILE):
        tile = x[first : first + TILE]
        if importance.size:
            w, sigma2 = np.empty(tile.size, np.float32), np.empty(tile.size // 32, np.float32)
            for s in range(sigma2.size):
                sigma2[s] = energy[(first + s * 32) // width] / np.float32(width)
            _weigh(tile, sigma2, 32, importance, first, w)
            scale, least, _, iscale, base = _search_weighed(
                tile, w, 32, top, np.float32(-0.9), np.float32(0.05), 36, False
            )
        for s in range(tile.size // 32):
            block = out[(first // 32 + s) * size :][:size]
            part = tile[s * 32 : (s + 1) * 32]
            if importance.size:
                _recode(part, _0, _0, top, iscale[s], base[s], q)
                d, m = _half(scale[s]), _half(least[s])
            else:
                d, m = _encode_plain(part, levels, q)
            _put_half(block, 0, d)
            _put_half(block, 2, m)
            if five:
                high = np.uint32(0)
                for i in range(32):
                    high |= np.uint32(np.uint32(q[i] >> 4) << np.uint32(i))
                block[4:8].view(np.uint32)[0] = high
            _pack_low(q, 16, block[size - 16 :])


@jit
def _encode_q4_1(x, importance, width, out):
    _encode_1(x, importance, width, np.int32(15), out)


@jit
def _encode_q5_1(x, importance, width, out):
    _encode_1(x, importance, width, np.int32(31), out)


# kernel(x_N, importance_I, width, out): x_N float32, whole rows of `width`, flat; importance_I float32 (width,)
# or of size 0, where there is none; fills `out`, flat uint8.
ENCODERS: dict[str, Callable[..., Any]] = {
    "Q4_1": _encode_q4_1,
    "Q5_1": _encode_q5_1,
    "Q2_K": _encode_q2_k,
    "Q4_K": _encode_q4_k,
    "Q5_K": _encode_q5_k,
}
