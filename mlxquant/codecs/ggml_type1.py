"""Encoders of ggml's formats with a scale and a minimum, x = d * code + m: Q4_1, Q5_1, Q2_K, Q4_K, Q5_K.

Byte for byte what ggml's reference encoder writes on x86-64 (ggml/src/ggml-quants.c: quantize_row_*_ref without
importance, quantize_*_impl with). Three steps, each compiled by itself: ggml_search.py finds a scale and a minimum
for every sub-block; the K-quants then find one scale for a block's scales and one for its minima; then codes are
packed. Every float32 operation stands in ggml's order and nothing is a double; what overflows gives x86-64's garbage.
"""

# mypy: disallow-untyped-defs=False
# Types are numba's to find; the tests hold every kernel against ggml's own encoder, byte for byte.
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mlxquant.codecs.floats import Array
from mlxquant.codecs.ggml_search import clipped, nearest, search
from mlxquant.codecs.kernels import TILE, half_to_single, jit, single_to_half

_BLOCK = 256  # weights of a K-quant's block
_LANES = 16  # blocks whose scales and minima are shared out side by side
_ROUNDS = 5  # of coordinate descent in _descend
_ZERO, _ONE, _HALF, _TENTH = np.float32(0), np.float32(1), np.float32(0.5), np.float32(0.1)
# Between 2**23 and 2**24 float32 has the integers and nothing else: there they stand in the lowest bits.
_TWO_23 = np.float32(2.0**23)
# Shifts, and masks of eight codes in a word of 64 bits.
_U16, _S4, _S8, _S16, _S24, _S32, _S56 = np.uint32(16), *(np.uint64(n) for n in (4, 8, 16, 24, 32, 56))
_1S, _15S, _GATHER = np.uint64(0x0101010101010101), np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0102040810204080)
_NO_LIMIT = np.int32(0x7FFFFFFF)
_EPS = np.float32(1e-15)  # GROUP_MAX_EPS: values whose largest is less count as zero


class _Trials(NamedTuple):
    """Trial scales of a search: (first + step * t + top) / range for t in 0..steps."""

    first: np.float32
    step: np.float32
    steps: int
    absolute: bool  # the misfit: |difference|, not its square


class _Law(NamedTuple):
    n: int  # weights of a sub-block
    top: np.int32  # greatest code of a weight
    most: np.int32  # greatest code of a block's scale or minimum
    times: np.float32  # of the mean square, in what importance is multiplied by
    plain: _Trials  # without importance


_WEIGHED = _Trials(np.float32(-0.9), np.float32(0.05), 36, False)
_Q2_K = _Law(
    16, np.int32(3), np.int32(15), np.float32(1), _Trials(np.float32(-0.5), np.float32(0.1), 15, absolute=True)
)
_Q4_K = _Law(
    32, np.int32(15), np.int32(63), np.float32(2), _Trials(np.float32(-1.0), np.float32(0.1), 20, absolute=False)
)
_Q5_K = _Law(
    32, np.int32(31), np.int32(63), np.float32(2), _Trials(np.float32(-0.5), np.float32(0.1), 15, absolute=False)
)


# --- numbers


@jit
def _half(x):
    """GGML_FP32_TO_FP16. The NaN that inf / inf makes is negative on x86, positive on ARM."""
    half = np.uint32(single_to_half(np.float32(x).view(np.uint32)))
    return np.uint16(half if x == x else np.uint32(0xFE00))


@jit
def _single(half):
    return np.uint32(half_to_single(np.uint32(half))).view(np.float32)


@jit
def _put_halves(d, m, out):
    out[0], out[1] = np.uint8(d & np.uint16(0xFF)), np.uint8(d >> np.uint16(8))
    out[2], out[3] = np.uint8(m & np.uint16(0xFF)), np.uint8(m >> np.uint16(8))


# --- K-quants: one scale for a block's scales, one for its minima


@jit
def _share_largest(found, J, most, codes, halves):
    """Without importance: the largest of a block's J values has code `most`. A code is a byte; negative ones wrap."""
    levels = np.float32(most)
    for which in range(2):
        sign = _ONE if which == 0 else -_ONE
        values, code = found[which], codes[which]
        for b in range(halves.shape[1]):
            largest = _ZERO
            for at in range(b * J, b * J + J):
                value = sign * values[at]
                largest = value if value > largest else largest
            times = levels / largest if largest > _ZERO else _ZERO
            for at in range(b * J, b * J + J):
                code[at] = np.uint8(nearest(times * (sign * values[at])))
            halves[which, b] = _half(largest / levels)


@jit
def _share_fitted(found, J, most, codes, halves):
    """With importance, as _share; v_JL is value j of block l, first the scales, then the minima."""
    blocks = halves.shape[1]
    for first in range(0, blocks, _LANES):
        lanes = min(_LANES, blocks - first)
        v_JL, w_JL = np.empty((J, 2 * lanes), np.float32), np.empty((J, 2 * lanes), np.float32)
        code_JL, scale = np.empty((J, 2 * lanes), np.uint8), np.empty(2 * lanes, np.float32)
        for b in range(lanes):
            for j in range(J):
                at = (first + b) * J + j
                v_JL[j, b], v_JL[j, lanes + b] = found[0, at], -found[1, at]
                w_JL[j, b] = w_JL[j, lanes + b] = found[2, at]
        _share(v_JL, w_JL, most, code_JL, scale)
        for b in range(lanes):
            halves[0, first + b], halves[1, first + b] = _half(scale[b]), _half(scale[lanes + b])
            for j in range(J):
                at = (first + b) * J + j
                codes[0, at], codes[1, at] = code_JL[j, b], code_JL[j, lanes + b]


@jit
def _share(v_JL, w_JL, top, code_JL, scale):
    """make_qp_quants: codes (a byte each, wrapped) and a scale for the J values of each lane."""
    lanes = scale.size
    largest, iscale = np.zeros(lanes, np.float32), np.empty(lanes, np.float32)
    for v in v_JL:
        for lane in range(lanes):
            largest[lane] = largest[lane] if largest[lane] > v[lane] else v[lane]
    _try_scales(v_JL, w_JL, top, largest, iscale)
    _descend(v_JL, w_JL, top, iscale, code_JL, scale)
    for lane in range(lanes):
        if largest[lane] < _EPS:
            code_JL[:, lane] = np.uint8(0)
            scale[lane] = _ZERO


@jit
def _try_scales(v_JL, w_JL, top, largest, iscale):
    """The best of nine: top / largest first, whose codes are bytes without a limit, so that those below 0 wrap."""
    lanes = iscale.size
    f = np.empty((4, lanes), np.float32)
    best, new, back, error = f[0], f[1], f[2], f[3]
    for trial in range(-5, 5):
        plain = trial == -5
        if trial == 0:
            continue
        levels = np.float32(top) if plain else _TENTH * np.float32(trial) + np.float32(top)
        limit, mask = (_NO_LIMIT, np.int32(0xFF)) if plain else (top, np.int32(-1))
        for lane in range(lanes):
            new[lane] = levels / largest[lane]
            back[lane] = _ONE / new[lane]
        error.fill(_ZERO)
        for j in range(len(v_JL)):
            v, w = v_JL[j], w_JL[j]
            for lane in range(lanes):
                code = nearest(new[lane] * v[lane])
                code = code if code < limit else limit
                diff = v[lane] - back[lane] * np.float32(np.int32(code & mask))
                error[lane] += w[lane] * diff * diff
        for lane in range(lanes):
            better = plain or error[lane] < best[lane]
            best[lane] = error[lane] if better else best[lane]
            iscale[lane] = new[lane] if better else iscale[lane]


@jit
def _descend(v_JL, w_JL, top, iscale, code_JL, scale):
    """The second half of make_qp_quants: change one code at a time while the fit gets better."""
    lanes = iscale.size
    vq, qq = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    for j in range(len(v_JL)):
        v, w, code = v_JL[j], w_JL[j], code_JL[j]
        for lane in range(lanes):
            q = nearest(iscale[lane] * v[lane])
            q = q if q < top else top
            code[lane] = np.uint8(q)
            vq[lane] += w[lane] * v[lane] * np.float32(q)
            qq[lane] += w[lane] * np.float32(q) * np.float32(q)
    for _ in range(_ROUNDS):
        for j in range(len(v_JL)):
            v, w, code = v_JL[j], w_JL[j], code_JL[j]
            for lane in range(lanes):
                old, wv = np.float32(code[lane]), w[lane] * v[lane]
                rest_vq = vq[lane] - wv * old
                rest_qq = qq[lane] - w[lane] * old * old
                q = nearest(v[lane] * rest_qq / rest_vq)
                q = q if q < top else top
                new = np.float32(q)
                new_vq = rest_vq + wv * new
                new_qq = rest_qq + w[lane] * new * new
                better = new_vq * new_vq * qq[lane] > vq[lane] * vq[lane] * new_qq
                better = better & (rest_vq > _ZERO) & (rest_qq > _ZERO) & (new != old)
                code[lane] = np.uint8(q) if better else code[lane]
                vq[lane] = new_vq if better else vq[lane]
                qq[lane] = new_qq if better else qq[lane]
    for lane in range(lanes):
        ratio = vq[lane] / qq[lane]
        scale[lane] = ratio if qq[lane] > _ZERO else _ZERO


# --- K-quants: codes and bytes


@jit
def _recode(x, d, m, top, iscale, base, q):
    """Codes of a sub-block whose scale and minimum are rounded; where that scale is 0, those of the search stay."""
    if d == _ZERO:
        for i in range(q.size):
            q[i] = clipped(iscale * (x[i] - base), top)
    else:
        for i in range(q.size):
            q[i] = clipped((x[i] + m) / d, top)


@jit
def _pack_scales(ls, lm, out):
    """Eight 6-bit scales and minima in 12 bytes, and what is then read from them: a code over 63 spills, as in ggml."""
    for j in range(4):
        out[j] = ls[j] | np.uint8(ls[j + 4] >> 4 << 6)
        out[j + 4] = lm[j] | np.uint8(lm[j + 4] >> 4 << 6)
        out[j + 8] = np.uint8(ls[j + 4] & 15) | np.uint8((lm[j + 4] & 15) << 4)
    for j in range(4):
        ls[j], lm[j] = out[j] & 63, out[j + 4] & 63
        ls[j + 4] = np.uint8(out[j + 8] & 15) | np.uint8(out[j] >> 6 << 4)
        lm[j + 4] = np.uint8(out[j + 8] >> 4) | np.uint8(out[j + 4] >> 6 << 4)


@jit
def _pack_low(q, apart, out):
    """The low four bits of two codes a byte, `apart` codes from one another."""
    for p in range(out.size // apart):
        low, high, into = q[2 * p * apart :][:apart], q[(2 * p + 1) * apart :][:apart], out[p * apart :][:apart]
        for i in range(apart):
            into[i] = np.uint8(low[i] & 15) | np.uint8(high[i] << 4)


@jit
def _write_k45(x, top, found, codes, halves, clip, out):
    """Q4_K: d, dmin, 12 bytes of scales and minima, 128 of low bits. Q5_K: before those, 32 of high bits."""
    q = np.empty(_BLOCK, np.uint8)
    size = 176 if top == np.int32(31) else 144
    for b in range(halves.shape[1]):
        block, ls, lm = out[b * size :][:size], codes[0, b * 8 :][:8], codes[1, b * 8 :][:8]
        for j in range(8 if clip else 0):
            ls[j], lm[j] = min(ls[j], np.uint8(63)), min(lm[j], np.uint8(63))
        _put_halves(halves[0, b], halves[1, b], block)
        _pack_scales(ls, lm, block[4:16])
        d, m = _single(halves[0, b]), _single(halves[1, b])
        for j in range(8):
            s = b * 8 + j
            sub = x[s * 32 : (s + 1) * 32]
            _recode(sub, d * np.float32(ls[j]), m * np.float32(lm[j]), top, found[3, s], found[4, s], q[j * 32 :][:32])
        _pack_low(q, 32, block[size - 128 :])
        if top == np.int32(31):
            high = block[16:48]
            for i in range(32):
                high[i] = np.uint8(q[i] >> 4)
            for j in range(1, 8):
                for i in range(32):
                    high[i] |= np.uint8(q[j * 32 + i] >> 4 << j)


@jit
def _write_k2(x, top, found, codes, halves, out):
    """Q2_K: 16 bytes of scales and minima, 64 of codes, four a byte and 32 from one another, d, dmin."""
    q = np.empty(_BLOCK, np.uint8)
    for b in range(halves.shape[1]):
        block = out[b * 84 :][:84]
        d, m = _single(halves[0, b]), _single(halves[1, b])
        for j in range(16):
            s = b * 16 + j
            pair = np.uint8(codes[0, s] | np.uint8(codes[1, s] << 4))
            low, high = np.float32(pair & 15), np.float32(pair >> 4)
            sub = x[s * 16 : (s + 1) * 16]
            _recode(sub, d * low, m * high, top, found[3, s], found[4, s], q[j * 16 :][:16])
            block[j] = pair
        for p in range(2):
            part, into = q[p * 128 : (p + 1) * 128], block[16 + p * 32 :][:32]
            for i in range(32):
                low_two = np.uint8(part[i] | np.uint8(part[i + 32] << 2))
                into[i] = low_two | np.uint8(part[i + 64] << 4) | np.uint8(part[i + 96] << 6)
        _put_halves(halves[0, b], halves[1, b], block[80:])


def _encode_k(law: _Law, x: Array, importance: Array, width: int, out: Array) -> None:
    J, blocks = _BLOCK // law.n, x.size // _BLOCK
    found = np.empty((5, x.size // law.n), np.float32)
    codes, halves = np.empty((2, blocks * J), np.uint8), np.empty((2, blocks), np.uint16)
    trials = _WEIGHED if importance.size else law.plain
    search(x, importance, _BLOCK, law.times, law.n, law.top, *trials, found)
    share = _share_fitted if importance.size else _share_largest
    share(found, J, law.most, codes, halves)
    if law is _Q2_K:
        _write_k2(x, law.top, found, codes, halves, out)
    else:  # with importance, Q4_K writes a scale's code as it is
        _write_k45(x, law.top, found, codes, halves, law is _Q5_K or not importance.size, out)


# --- Q4_1 and Q5_1: blocks of 32


@jit
def _write_1(q, d, m, size, out):
    """Blocks of d, m (F16 bits), for Q5_1 (24 bytes) four bytes of fifth bits, 16 of low bits.

    By words, each said by itself: of bytes or of a loop LLVM makes code that takes longer than finding the codes.
    """
    eights, blocks = q.view(np.uint64), out.view(np.uint32)
    words = size // 4
    for s in range(d.size):
        at, to = s * 4, s * words
        a, b, c, e = eights[at], eights[at + 1], eights[at + 2], eights[at + 3]
        first, second = (a & _15S) | ((c & _15S) << _S4), (b & _15S) | ((e & _15S) << _S4)
        blocks[to] = np.uint32(d[s]) | (np.uint32(m[s]) << _U16)
        if words == 6:
            fifths = _fifths(a) | (_fifths(b) << _S8) | (_fifths(c) << _S16) | (_fifths(e) << _S24)
            blocks[to + 1] = np.uint32(fifths)
        to += words - 4
        blocks[to], blocks[to + 1] = np.uint32(first), np.uint32(first >> _S32)
        blocks[to + 2], blocks[to + 3] = np.uint32(second), np.uint32(second >> _S32)


@jit
def _fifths(codes):
    """Bit 4 of eight codes as a byte: the product brings bit 0 of byte i to bit 56 + i."""
    return (((codes >> _S4) & _1S) * _GATHER) >> _S56


@jit
def _write_searched(x, top, found, size, out):
    q = np.empty(x.size, np.uint8)
    halves = np.empty((2, x.size // 32), np.uint16)
    for s in range(x.size // 32):
        halves[0, s], halves[1, s] = _half(found[0, s]), _half(found[1, s])
        for i in range(s * 32, s * 32 + 32):
            q[i] = clipped(found[3, s] * (x[i] - found[4, s]), top)
    _write_1(q, halves[0], halves[1], size, out)


@jit
def _write_plain(x, top, size, out):
    """quantize_row_q4_1_ref, quantize_row_q5_1_ref: from the least to the greatest weight of a block."""
    q, low, high = np.empty(TILE, np.uint8), np.empty(TILE // 2, np.float32), np.empty(TILE // 2, np.float32)
    times, halves = np.empty(TILE // 32, np.float32), np.empty((2, TILE // 32), np.uint16)
    for first in range(0, x.size, TILE):
        tile = x[first : first + TILE]
        blocks = tile.size // 32
        d, m = halves[0, :blocks], halves[1, :blocks]
        _extremes(tile, low, high)
        for s in range(blocks):
            step = (high[s] - low[s]) / np.float32(top)
            times[s] = _ONE / step
            d[s] = _half(step)
            m[s] = _half(low[s])
        for s in range(blocks):
            part, codes = tile[s * 32 :][:32], q[s * 32 :][:32]
            factor, origin = times[s], low[s]
            for i in range(32):
                # Low bits instead of a cast: those of infinity and NaN are a code of 0, which x86's cast makes of them
                # too where the range or `factor` overflows; LLVM's cast may make anything.
                whole = np.floor((part[i] - origin) * factor + _HALF)
                codes[i] = np.uint8(np.uint32(np.float32(whole + _TWO_23).view(np.uint32)))
        _write_1(q[: tile.size], d, m, size, out[first // 32 * size :])


@jit
def _extremes(x, low, high):
    """Least and greatest of each 32, folded in pairs. Of equals the first stays: F16 keeps the sign of a zero."""
    n = x.size // 2
    for i in range(n):
        a, b = x[2 * i], x[2 * i + 1]
        low[i] = b if b < a else a
        high[i] = b if b > a else a
    while n > x.size // 32:
        n //= 2
        for i in range(n):
            a, b = low[2 * i], low[2 * i + 1]
            low[i] = b if b < a else a
        for i in range(n):
            a, b = high[2 * i], high[2 * i + 1]
            high[i] = b if b > a else a


def _encode_1(top: np.int32, size: int, x: Array, importance: Array, width: int, out: Array) -> None:
    if importance.size:
        found = np.empty((5, x.size // 32), np.float32)
        search(x, importance, width, np.float32(1), 32, top, *_WEIGHED, found)
        _write_searched(x, top, found, size, out)
    else:
        _write_plain(x, top, size, out)


# encode(x_N, importance_I, width, out): x_N float32, finite, whole rows of `width`, flat; importance_I float32
# (width,), not negative, or of size 0 where there is none; fills `out`, flat uint8.
ENCODERS: dict[str, Callable[[Array, Array, int, Array], Any]] = {
    "Q4_1": partial(_encode_1, np.int32(15), 20),
    "Q5_1": partial(_encode_1, np.int32(31), 24),
    "Q2_K": partial(_encode_k, _Q2_K),
    "Q4_K": partial(_encode_k, _Q4_K),
    "Q5_K": partial(_encode_k, _Q5_K),
}
