"""Encoders of IQ4_NL and IQ4_XS: 16 levels at uneven distances, one scale for 32 weights.

    IQ4_NL  32 weights: float16 d, a nibble each                           w = d * LEVELS[code]
    IQ4_XS  256 weights in 8 blocks of 32: float16 d, 6 bits of scale each w = d * (l - 32) * LEVELS[code]

Byte-equal to quantize_iq4_nl and quantize_iq4_xs of ggml/src/ggml-quants.c, which try 16 scales a block. (Its
quantize_row_iq4_nl_ref tries one and is not what llama-quantize runs.) Here 64 blocks are tried side by side, a
block a lane, each sum in C's order. A weight's square may overflow: then sums, and so scales, are infinite or
NaN, as in C.
"""

# mypy: disallow-untyped-defs=False
# Types are numba's to find; the tests hold every kernel against ggml's own code, byte for byte.
from __future__ import annotations

import numpy as np

from mlxquant.codecs.kernels import jit, single_to_half

# kvalues_iq4nl of ggml/src/ggml-common.h. Half-way points are exact in float32 and so are the distances near them:
# "nearest, the upper of two as near" is "the last whose lower half-way point is not above".
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_V0, _V1, _V2, _V3, _V4, _V5, _V6, _V7, _V8, _V9, _V10, _V11, _V12, _V13, _V14, _V15 = LEVELS
_H0, _H1, _H2, _H3, _H4, _H5, _H6, _H7, _H8, _H9, _H10, _H11, _H12, _H13, _H14 = (LEVELS[:-1] + LEVELS[1:]) / 2

_BLOCK = 32
_LANES = 64
_SUPER = 8  # blocks in a super-block of IQ4_XS, and super-blocks side by side
_TRIES = 7
_TINIEST = np.float32(1e-15)  # GROUP_MAX_EPS: a block below it is zero
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_NAN_HALF = np.uint16(0xFE00)  # as x86 makes it; arm64's NaN is positive


@jit
def _lanes():
    """Each an array of its own: LLVM does not vectorize a loop over parts of one."""
    return np.zeros(_LANES, np.float32)


@jit
def _tile():
    x_JL, weight_JL = np.zeros((_BLOCK, _LANES), np.float32), np.zeros((_BLOCK, _LANES), np.float32)
    return x_JL, weight_JL, np.empty((_BLOCK, _LANES), np.uint8), _lanes(), _lanes(), _lanes()


@jit
def _level(x):
    """The level nearest to x; NaN goes to the last, as in C."""
    q = _V0 if x < _H0 else _V1
    q = q if x < _H1 else _V2
    q = q if x < _H2 else _V3
    q = q if x < _H3 else _V4
    q = q if x < _H4 else _V5
    q = q if x < _H5 else _V6
    q = q if x < _H6 else _V7
    q = q if x < _H7 else _V8
    q = q if x < _H8 else _V9
    q = q if x < _H9 else _V10
    q = q if x < _H10 else _V11
    q = q if x < _H11 else _V12
    q = q if x < _H12 else _V13
    q = q if x < _H13 else _V14
    return q if x < _H14 else _V15


@jit
def _code(x):
    """The number of that level."""
    code = np.int32(0)
    code += np.int32(not x < _H0) + np.int32(not x < _H1) + np.int32(not x < _H2) + np.int32(not x < _H3)
    code += np.int32(not x < _H4) + np.int32(not x < _H5) + np.int32(not x < _H6) + np.int32(not x < _H7)
    code += np.int32(not x < _H8) + np.int32(not x < _H9) + np.int32(not x < _H10) + np.int32(not x < _H11)
    code += np.int32(not x < _H12) + np.int32(not x < _H13) + np.int32(not x < _H14)
    return code


@jit
def _weigh(x_JL, weight_JL, mean_L, weighted):
    """weight_JL, which holds the importance of each weight if `weighted` -> what the sums are weighted with."""
    for j in range(_BLOCK):
        x, weight = x_JL[j], weight_JL[j]
        if weighted:
            for i in range(_LANES):
                weight[i] *= np.sqrt(mean_L[i] + x[i] * x[i])
        else:
            for i in range(_LANES):
                weight[i] = x[i] * x[i]


@jit
def _peaks(x_JL, size_L, peak_L):
    """The greatest magnitude of each block, and the first weight that has it, with its sign."""
    size_L[:] = _ZERO
    peak_L[:] = _ZERO
    for j in range(_BLOCK):
        x = x_JL[j]
        for i in range(_LANES):
            size = abs(x[i])
            more = size > size_L[i]
            size_L[i] = size if more else size_L[i]
            peak_L[i] = x[i] if more else peak_L[i]


@jit
def _sums(x_JL, weight_JL, inverse_L, qx_L, qq_L):
    """Sums of weight * level * x and weight * level**2 for the levels nearest to inverse * x."""
    qx_L[:] = _ZERO
    qq_L[:] = _ZERO
    for j in range(_BLOCK):
        x, weight = x_JL[j], weight_JL[j]
        for i in range(_LANES):
            q = _level(inverse_L[i] * x[i])
            wq = weight[i] * q
            qx_L[i] += wq * x[i]
            qq_L[i] += wq * q


@jit
def _scales(x_JL, weight_JL, scale_L):
    """The best of 16 scales for each block: quantize_row_iq4_nl_impl, as far as the blocks are apart."""
    size, peak, inverse, qx, qq, best = _lanes(), _lanes(), _lanes(), _lanes(), _lanes(), _lanes()
    _peaks(x_JL, size, peak)
    for i in range(_LANES):
        inverse[i] = _ONE / (-peak[i] / _V0)
    _sums(x_JL, weight_JL, inverse, qx, qq)
    for i in range(_LANES):
        scale_L[i] = qx[i] / qq[i] if qq[i] > _ZERO else _ZERO
        best[i] = scale_L[i] * qx[i]
    for t in range(-_TRIES, _TRIES + 1):
        for i in range(_LANES):
            inverse[i] = (np.float32(t) + _V0) / peak[i]
        _sums(x_JL, weight_JL, inverse, qx, qq)
        for i in range(_LANES):
            better = (qq[i] > _ZERO) & (qx[i] * qx[i] > best[i] * qq[i])
            d = qx[i] / qq[i]
            scale_L[i] = d if better else scale_L[i]
            best[i] = d * qx[i] if better else best[i]
    for i in range(_LANES):
        scale_L[i] = _ZERO if size[i] < _TINIEST else scale_L[i]


@jit
def _codes(x_JL, inverse_L, code_JL):
    for j in range(_BLOCK):
        x, code = x_JL[j], code_JL[j]
        for i in range(_LANES):
            code[i] = _code(inverse_L[i] * x[i])


@jit
def _load(flat, lane, x_JL):
    for j in range(_BLOCK):
        x_JL[j, lane] = flat[j]


@jit
def _put_half(value, out):
    half = np.uint16(single_to_half(np.float32(value).view(np.uint32))) if value == value else _NAN_HALF
    out[0] = half & np.uint16(255)
    out[1] = half >> np.uint16(8)


@jit
def _put_codes(code_JL, lane, out):
    for j in range(_BLOCK // 2):
        out[j] = code_JL[j, lane] | np.uint8(code_JL[j + _BLOCK // 2, lane] << 4)


@jit
def _means(x_JL, mean_L, supers):
    """Twice the mean square of each super-block, at all of its lanes: b * supers + s is block b of super-block s."""
    blocks = _LANES // supers
    mean_L[:] = _ZERO
    for b in range(blocks):
        for j in range(_BLOCK):
            x = x_JL[j, b * supers : (b + 1) * supers]
            for s in range(supers):
                mean_L[s] += x[s] * x[s]
    for s in range(supers):
        mean_L[s] *= _TWO / np.float32(_BLOCK * blocks)
        for b in range(1, blocks):
            mean_L[b * supers + s] = mean_L[s]


@jit
def encode_iq4_nl(x_N, importance_I, width, out):
    """Whole rows of float32 -> blocks of 18 bytes: float16 d, codes."""
    x_JL, weight_JL, code_JL, mean, scale, inverse = _tile()
    weighted = importance_I.size > 0
    blocks = x_N.size // _BLOCK
    for first in range(0, blocks, _LANES):
        count = min(_LANES, blocks - first)
        for i in range(count):
            at = (first + i) * _BLOCK
            _load(x_N[at : at + _BLOCK], i, x_JL)
            if weighted:
                _load(importance_I[at % width : at % width + _BLOCK], i, weight_JL)
        if weighted:
            _means(x_JL, mean, _LANES)
        _weigh(x_JL, weight_JL, mean, weighted)
        _scales(x_JL, weight_JL, scale)
        for i in range(_LANES):
            inverse[i] = _ONE / scale[i] if scale[i] != _ZERO else _ZERO
        _codes(x_JL, inverse, code_JL)
        for i in range(count):
            block = out[(first + i) * 18 : (first + i + 1) * 18]
            _put_half(scale[i], block)
            _put_codes(code_JL, i, block[2:])


@jit
def encode_iq4_xs(x_N, importance_I, width, out):
    """Whole rows of float32 -> blocks of 136 bytes: float16 d, the high 2 and the low 4 bits of each l, codes."""
    x_JL, weight_JL, code_JL, mean, scale, inverse = _tile()
    weighted = importance_I.size > 0
    supers = x_N.size // (_BLOCK * _SUPER)
    for first in range(0, supers, _SUPER):
        count = min(_SUPER, supers - first)
        for s in range(count):
            for b in range(_SUPER):
                at = ((first + s) * _SUPER + b) * _BLOCK
                _load(x_N[at : at + _BLOCK], b * _SUPER + s, x_JL)
                if weighted:
                    _load(importance_I[at % width : at % width + _BLOCK], b * _SUPER + s, weight_JL)
        if weighted:
            _means(x_JL, mean, _SUPER)
        _weigh(x_JL, weight_JL, mean, weighted)
        _scales(x_JL, weight_JL, scale)
        for s in range(count):
            _put_scales(scale[s::_SUPER], inverse[s::_SUPER], out[(first + s) * 136 : (first + s) * 136 + 8])
        _codes(x_JL, inverse, code_JL)
        for s in range(count):
            for b in range(_SUPER):
                at = (first + s) * 136 + 8 + b * 16
                _put_codes(code_JL, b * _SUPER + s, out[at : at + 16])


@jit
def _put_scales(scale_B, inverse_B, out):
    """The scales of 8 blocks -> 8 bytes that say them as d * l, and what to multiply the weights with."""
    most, at_most = _ZERO, _ZERO
    for b in range(_SUPER):
        if abs(scale_B[b]) > most:
            most, at_most = abs(scale_B[b]), scale_B[b]
    d = -at_most / np.float32(32)
    inverse_d = _ONE / d if d != _ZERO else _ZERO
    _put_half(d, out)
    out[2:8] = 0
    for b in range(_SUPER):
        l_b = max(-32, min(31, _nearest(inverse_d * scale_B[b])))
        dl = d * np.float32(l_b)
        inverse_B[b] = _ONE / dl if dl != _ZERO else _ZERO
        code = np.uint8(l_b + 32)
        out[2 + b // 4] |= np.uint8((code >> 4) << (2 * (b % 4)))
        out[4 + b // 2] |= np.uint8((code & 15) << (4 * (b % 2)))


@jit
def _nearest(x):
    """nearest_int of ggml-quants.c, through the same bits: NaN gives 0."""
    bits = np.int32(np.float32(x + np.float32(12582912)).view(np.int32))
    return (bits & 0x007FFFFF) - 0x00400000


ENCODERS = {"IQ4_NL": encode_iq4_nl, "IQ4_XS": encode_iq4_xs}
