"""ggml's encoders of x = d * q, byte for byte those of llama.cpp: Q4_0, Q5_0, Q8_0, Q3_K, Q6_K.

Where ggml searches for scales, `ggml_scales.py` does; here are the formats without a search, and the blocks. Law and
order of every operation are those of ggml/src/ggml-quants.c built for plain x86-64. Where the C code is undefined,
x86 decides: NaN becomes the negative one of F16, and a float that no int8 holds becomes 0.

Short loops over a group say `.size` instead of 16 or 32: of a constant LLVM makes scalar code.
"""

# mypy: disallow-untyped-defs=False
# Types are numba's to find; the tests hold every kernel against ggml itself, byte for byte.
from __future__ import annotations

import numpy as np

from mlxquant.codecs.floats import Array
from mlxquant.codecs.ggml_scales import MASSES, SCALES, clamp, descend, found_codes, nearest, search
from mlxquant.codecs.kernels import half_to_single, jit, single_to_half

_TILE = 4096  # weights whose tops are looked for at a time
_SUPER, _GROUP = 256, 16  # weights of a K-quant's super-block, and of its groups with a scale each
_EPS = np.float32(1e-15)  # GROUP_MAX_EPS: scales below count as zero
_ZERO, _ONE, _INF = np.float32(0), np.float32(1), np.float32(np.inf)
# roundf, half away from zero, is truncation after adding this: the next float below 0.5, because 0.5 itself would
# round 0.49999997 up. From an exact half the sum is a tie that goes to the integer.
_HALF = np.float32(0.49999997)

# Masks and shifts of eight codes in a word of 64 bits.
_1S, _3S, _15S = np.uint64(0x0101010101010101), np.uint64(0x0303030303030303), np.uint64(0x0F0F0F0F0F0F0F0F)
_S2, _S4, _S16, _S32, _S48 = (np.uint64(n) for n in (2, 4, 16, 32, 48))
# Times this, eight bytes of one bit become a byte at the top.
_GATHER, _S56 = np.uint64(0x0102040810204080), np.uint64(56)
_EIGHT, _SIXTEEN, _BYTE = np.float32(8), np.float32(16), np.int32(0xFF)


def encode_q4_0(x_N: Array, importance_I: Array, width: int, out: Array) -> None:
    """quantize_row_q4_0_ref, and with importance quantize_row_q4_0_impl."""
    d, codes = _blocks_32(x_N, importance_I, width, _EIGHT)
    _pack_q4_0(d, codes.view(np.uint64), out.view(np.uint16))


def encode_q5_0(x_N: Array, importance_I: Array, width: int, out: Array) -> None:
    """quantize_row_q5_0_ref, and with importance quantize_row_q5_0_impl."""
    d, codes = _blocks_32(x_N, importance_I, width, _SIXTEEN)
    _pack_q5_0(d, codes.view(np.uint64), out.view(np.uint16))


def encode_q8_0(x_N: Array, importance_I: Array, width: int, out: Array) -> None:
    """quantize_row_q8_0_ref; importance changes nothing, as in llama.cpp."""
    d, codes = _tops(x_N), np.empty(x_N.size, np.uint8)
    _rounded_codes(x_N, d, codes)
    _pack_q8_0(d, codes.view(np.uint64), out.view(np.uint16))


def encode_q6_k(x_N: Array, importance_I: Array, width: int, out: Array) -> None:
    """quantize_row_q6_K_ref, and with importance quantize_row_q6_K_impl, which takes it as it is."""
    most, codes = np.float32(32), np.empty(x_N.size, np.uint8)
    found = _search(x_N, importance_I, 0, _ONE, _GROUP, most)
    found_codes(x_N, _GROUP, found, most, codes)
    _pack_q6_k(x_N, found[SCALES], codes, out)


def encode_q3_k(x_N: Array, importance_I: Array, width: int, out: Array) -> None:
    """quantize_row_q3_K_ref, and with importance quantize_row_q3_K_impl, which searches for the scale of scales too."""
    codes, levels = np.empty(x_N.size, np.uint8), np.empty(x_N.size // _GROUP, np.uint8)
    if importance_I.size == 0:
        scale, d = np.empty(levels.size, np.float32), np.empty(x_N.size // _SUPER, np.float32)
        descend(x_N, scale, codes)
        _plain_levels(scale, d, levels)
    else:
        few, many = np.float32(4), np.float32(32)
        found = _search(x_N, importance_I, _SUPER, np.float32(2), _GROUP, few)
        found_codes(x_N, _GROUP, found, few, codes)
        of_scales = _search(found[SCALES], found[MASSES], 0, _ONE, _GROUP, many)
        found_codes(_finite(found[SCALES]), _GROUP, of_scales, many, levels)
        d = of_scales[SCALES]
    _pack_q3_k(x_N, d, levels, codes, out)


def _search(x_N: Array, importance_I: Array, span: int, times: np.float32, n: int, most: np.float32) -> Array:
    found = np.empty((4, x_N.size // n), np.float32)
    search(x_N, importance_I, span, times, n, most, found)
    return found


def _blocks_32(x_N: Array, importance_I: Array, width: int, most: np.float32) -> tuple[Array, Array]:
    """d and codes of blocks of 32."""
    codes = np.empty(x_N.size, np.uint8)
    if importance_I.size:
        found = _search(x_N, importance_I, width, _ONE, 32, most)
        found_codes(x_N, 32, found, most, codes)
        return found[SCALES], codes
    d = _tops(x_N)
    _plain_codes(x_N, d, most, codes)
    return d, codes


def _tops(x_N: Array) -> Array:
    tops = np.empty(x_N.size // 32, np.float32)
    _find_tops(x_N, tops)
    return tops


def _finite(scales: Array) -> Array:
    """Scales of huge weights can be infinite or NaN; nearest_int has 0 for those, as it has for 0."""
    return np.where(np.isfinite(scales), scales, _ZERO)


@jit
def _half(single):
    """GGML_FP32_TO_FP16, as bits. The NaN that 0 / 0 makes is negative on x86 and positive on ARM."""
    bits = np.uint16(single_to_half(np.float32(single).view(np.uint32)))
    return bits if single == single else np.uint16(0xFE00)


@jit
def _single(half):
    return np.uint32(half_to_single(np.uint32(half))).view(np.float32)


# --- blocks of 32 ----------------------------------------------------------------------------------------------------


@jit
def _halve(values, out):
    """Of each pair the weight of the greater magnitude, the first if they are equal."""
    for i in range(out.size):
        a, b = values[2 * i], values[2 * i + 1]
        out[i] = a if abs(a) >= abs(b) else b


@jit
def _find_tops(x, tops):
    """Of each 32 weights the first of the greatest magnitude; +0 where all are zero."""
    spare = np.empty(_TILE, np.float32)
    for start in range(0, x.size, _TILE):
        part, into = x[start : start + _TILE], tops[start // 32 : (start + _TILE) // 32]
        count, at = part.size // 2, 0
        _halve(part, spare[:count])
        while count > into.size:
            _halve(spare[at : at + count], spare[at + count : at + count + count // 2])
            at, count = at + count, count // 2
        for b in range(into.size):
            into[b] = spare[at + b] + _ZERO


@jit
def _plain_codes(x, d, most, codes):
    """Codes without a search, and d in place of the tops."""
    last = np.int32(np.int32(most) * np.int32(2) - np.int32(1))
    for b in range(d.size):
        d[b] = d[b] / -most
        inverse = _ONE / d[b] if d[b] != _ZERO else _ZERO
        # 1 / a denormal can be infinite; the products are then beyond int8, and x86 makes them 0.
        finite = abs(inverse) < _INF
        shift = most + np.float32(0.5) if finite else _ZERO
        inverse = inverse if finite else _ZERO
        values, into = x[b * 32 : (b + 1) * 32], codes[b * 32 : (b + 1) * 32]
        for i in range(values.size):
            q = np.int32(values[i] * inverse + shift)
            into[i] = np.uint8(q if q < last else last)


@jit
def _rounded_codes(x, d, codes):
    """The codes of Q8_0, and d in place of the tops."""
    for b in range(d.size):
        d[b] = abs(d[b]) / np.float32(127)
        # Of 0 and of some denormals it is infinite; beyond int8 the products are 0 on x86.
        inverse = _ONE / d[b] if _ONE / d[b] < _INF else _ZERO
        values, into = x[b * 32 : (b + 1) * 32], codes[b * 32 : (b + 1) * 32]
        for i in range(values.size):
            q = values[i] * inverse
            into[i] = np.uint8(np.int32(q + (_HALF if q >= _ZERO else -_HALF)) & _BYTE)


@jit
def _pack_q4_0(d, words, out):
    """Block: d, 16 bytes of codes."""
    halves = _halves(d)
    for b in range(d.size):
        out[b * 9] = halves[b]
        _nibbles(words, b * 4, out, b * 9 + 1)


@jit
def _pack_q5_0(d, words, out):
    """Block: d, 32 fifth bits, 16 bytes of the other four."""
    halves = _halves(d)
    for b in range(d.size):
        at, to = b * 4, b * 11
        out[to] = halves[b]
        out[to + 1] = np.uint16(_fifths(words[at]) | _fifths(words[at + 1]) << np.uint64(8))
        out[to + 2] = np.uint16(_fifths(words[at + 2]) | _fifths(words[at + 3]) << np.uint64(8))
        _nibbles(words, at, out, to + 3)


@jit
def _halves(d):
    halves = np.empty(d.size, np.uint16)
    for b in range(d.size):
        halves[b] = _half(d[b])
    return halves


@jit
def _pack_q8_0(d, words, out):
    """Block: d, 32 int8."""
    for b in range(d.size):
        block = out[b * 17 : (b + 1) * 17]
        block[0] = _half(d[b])
        for i in range(16):
            word = words[4 * b + i // 4] >> (_S16 * np.uint64(i % 4))
            block[1 + i] = np.uint16(word & np.uint64(0xFFFF))


@jit
def _fifths(word):
    return np.uint64(((word >> _S4) & _1S) * _GATHER) >> _S56


@jit
def _nibbles(words, at, out, to):
    """32 codes in 4 words -> their lower 4 bits, codes 0..15 below codes 16..31. Without loops, which cost half."""
    first = (words[at] & _15S) | ((words[at + 2] & _15S) << _S4)
    second = (words[at + 1] & _15S) | ((words[at + 3] & _15S) << _S4)
    out[to], out[to + 1] = np.uint16(first), np.uint16(first >> _S16)
    out[to + 2], out[to + 3] = np.uint16(first >> _S32), np.uint16(first >> _S48)
    out[to + 4], out[to + 5] = np.uint16(second), np.uint16(second >> _S16)
    out[to + 6], out[to + 7] = np.uint16(second >> _S32), np.uint16(second >> _S48)


# --- super-blocks of 256 ----------------------------------------------------------------------------------------------


@jit
def _pack_q6_k(x, scale, codes, out):
    block, spread = np.empty(27, np.uint64), np.empty(_SUPER, np.float32)
    for b in range(x.size // _SUPER):
        at = b * _SUPER
        scales = scale[b * 16 : (b + 1) * 16]
        _finish_q6_k(x[at : at + _SUPER], scales, spread, codes[at : at + _SUPER], block)
        _copy(block.view(np.uint8), out[b * 210 : (b + 1) * 210])


@jit
def _finish_q6_k(x, scales, spread, codes, block):
    """The scales of 16 groups as int8, and the codes again for those. Block: ql 128, qh 64, scales 16, d.

    Overwrites scales, spread and codes.
    """
    greatest = _first_of_greatest(scales)
    if abs(greatest) < _EPS:
        block.fill(np.uint64(0))
        return
    inverse = np.float32(-128) / greatest
    half = _half(_ONE / inverse)
    d = _single(half)
    stored = block.view(np.int8)[192:208]
    for j in range(16):
        level = nearest(inverse * scales[j])
        stored[j] = np.int8((level if level < np.int32(127) else np.int32(127)) & _BYTE)
        scales[j] = d * np.float32(stored[j])
    _requantize(x, scales, 32, spread, codes)
    block.view(np.uint16)[104] = half
    words = codes.view(np.uint64)
    for side in range(2):
        q, low, high = words[16 * side : 16 * side + 16], block[8 * side : 8 * side + 8], block[16 + 4 * side :]
        for i in range(4):
            q1, q2, q3, q4 = q[i], q[4 + i], q[8 + i], q[12 + i]
            low[i] = (q1 & _15S) | ((q3 & _15S) << _S4)
            low[4 + i] = (q2 & _15S) | ((q4 & _15S) << _S4)
            pairs = ((q1 >> _S4) & _3S) | (((q2 >> _S4) & _3S) << _S2)
            high[i] = pairs | ((((q3 >> _S4) & _3S) | (((q4 >> _S4) & _3S) << _S2)) << _S4)


@jit
def _pack_q3_k(x, d, levels, codes, out):
    block, spread, shares = np.empty(14, np.uint64), np.empty(_SUPER, np.float32), np.empty(16, np.float32)
    for b in range(d.size):
        at, half, level = b * _SUPER, _half(d[b]), levels[b * 16 : (b + 1) * 16]
        for j in range(16):
            shares[j] = _single(half) * np.float32(np.int32(level[j]) - np.int32(32))
        _requantize(x[at : at + _SUPER], shares, 4, spread, codes[at : at + _SUPER])
        block.view(np.uint16)[54] = half
        _pack_bits(codes[at : at + _SUPER].view(np.uint64), block)
        _pack_levels(level, block.view(np.uint8)[96:108])
        _copy(block.view(np.uint8), out[b * 110 : (b + 1) * 110])


@jit
def _pack_bits(words, block):
    """Codes of 3 bits: 32 bytes of high bits, 64 of the other two."""
    for i in range(4):
        high = np.uint64(0)
        for k in range(8):
            high |= ((words[4 * k + i] >> _S2) & _1S) << np.uint64(k)
        block[i] = high
    for side in range(2):
        for i in range(4):
            low = np.uint64(0)
            for k in range(4):
                low |= (words[16 * side + 4 * k + i] & _3S) << np.uint64(2 * k)
            block[4 + 4 * side + i] = low


@jit
def _pack_levels(levels, out):
    """16 levels of 6 bits: lower 4 of level j beside those of j + 8; upper 2 of j, j + 4, j + 8, j + 12."""
    for j in range(8):
        out[j] = np.uint8((np.int32(levels[j]) & 15) | ((np.int32(levels[j + 8]) & 15) << 4))
    for j in range(4):
        high = np.int32(0)
        for k in range(4):
            high |= np.int32(np.int32(levels[4 * k + j]) >> 4) << np.int32(2 * k)
        out[8 + j] = np.uint8(high)


@jit
def _plain_levels(scale, d, levels):
    """Scales in 6 bits, 0..63; that of the greatest magnitude is -32 of its d, level 0."""
    for b in range(d.size):
        scales = scale[b * 16 : (b + 1) * 16]
        greatest = _first_of_greatest(scales)
        inverse = np.float32(-32) / greatest
        d[b] = _ONE / inverse if greatest != _ZERO else _ZERO
        for j in range(16):
            level = np.int32(clamp(nearest(inverse * scales[j]), np.int32(-32), np.int32(31)) + np.int32(32))
            levels[b * 16 + j] = np.uint8(level if greatest != _ZERO else np.int32(0))


@jit
def _requantize(x, d, most, spread, codes):
    """Codes of a super-block for the 16 d that are stored; where d is 0, those of the search stay."""
    for j in range(16):
        for i in range(_GROUP):
            spread[j * _GROUP + i] = d[j]
    low, high = np.int32(-most), np.int32(most - 1)
    for i in range(x.size):
        code = np.int32(clamp(nearest(x[i] / spread[i]), low, high) - low)
        codes[i] = np.uint8(code & _BYTE) if spread[i] != _ZERO else codes[i]


@jit
def _first_of_greatest(scales):
    """The first scale of the greatest magnitude; NaN is none."""
    found = _ZERO
    for value in scales:
        found = value if abs(value) > abs(found) else found
    return found


@jit
def _copy(values, out):
    for i in range(out.size):
        out[i] = values[i]


ENCODERS = {
    "Q4_0": encode_q4_0,
    "Q5_0": encode_q5_0,
    "Q8_0": encode_q8_0,
    "Q3_K": encode_q3_k,
    "Q6_K": encode_q6_k,
}
