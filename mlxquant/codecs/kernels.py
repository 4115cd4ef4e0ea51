"""The compiled loops: loading weights, packing codes, the affine and the mx formats.

All of them stand in this one file because numba's cache notices a change only in the file of the function it
compiled, not in those that function calls: split over files, an edit would leave old machine code in use.

Written so that LLVM vectorizes each loop: one thing a loop, slices instead of index arithmetic, `a if a < b
else b` instead of min(), shifts in uint32. No fastmath anywhere: the bytes are promised, so a division stays
a division and a multiplication followed by an addition is rounded twice.

Kernels take flat arrays, whole groups, and a part first..stop of them; `blocks.py` deals the parts out to
threads.
"""

# mypy: disallow-untyped-defs=False
# Types are numba's to find; the tests hold every kernel against reference.py and MLX, bit for bit.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

BF16, F16, F32 = 0, 1, 2
KINDS = {"BF16": BF16, "F16": F16, "F32": F32}
# Weights a kernel works on at a time: as float32 they fit a first-level cache. A multiple of every group
# size.
TILE = 4096
# FP4: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats v1.0, table 5).
_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array([*_SIZES, *(-size for size in _SIZES)], np.float32)

_MIN_GROUP = 32
_U1, _U13, _U16 = np.uint32(1), np.uint32(13), np.uint32(16)
_INF = np.uint32(0x7F800000)
_TINIEST = np.uint32(0x00400000)  # 2**-127, the least E8M0
_MOST = np.uint32(0x7F600000)  # 3.5 * 2**126: more, and an mx code times its scale can be 2**128, infinity
_ZERO = np.float32(0)
_EPS = np.float32(1e-7)
_TWO_112 = np.float32(2.0**112)
# Between 2**23 and 2**24 float32 has the integers and nothing else, so adding this rounds to nearest even
# and leaves the integer in the lowest bits.
_TWO_23 = np.float32(2.0**23)
# From 2**25 on float32 does not tell x - 4 from x - 6.
_TIES = np.float32(2.0**24)
# Half-way between neighbours of E2M1, as float32 bits.
_MIDDLES = (E2M1[:7] + E2M1[1:8]) / np.float32(2)
_M1, _M2, _M3, _M4, _M5, _M6, _M7 = _MIDDLES.view(np.int32)


def jit(function: Callable[..., Any]) -> Any:
    """Compiled once and kept on disk: beside the package or, where that is read-only, in the user's cache.

    Where neither can be written numba refuses to decorate; then the kernel is compiled in each process.
    """
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        return numba.njit(nogil=True, error_model="numpy")(function)


@jit
def _single(bits):
    return np.uint32(bits).view(np.float32)


@jit
def _bits(single):
    return np.float32(single).view(np.uint32)


@jit
def half_to_single(half):
    """F16 bits -> F32 bits. Times 2**112 moves the exponent's bias and makes denormals normal, exactly."""
    moved = _bits(_single((half & np.uint32(0x7FFF)) << _U13) * _TWO_112)
    bits = np.uint32(moved | ((half & np.uint32(0x8000)) << _U16))
    finite = (half & np.uint32(0x7C00)) != np.uint32(0x7C00)
    return bits if finite else np.uint32(bits | _INF)


@jit
def single_to_half(bits):
    """F32 bits -> F16 bits, to nearest even; NaN becomes infinity, which every caller refuses as well."""
    sign = np.uint32(bits >> _U16) & np.uint32(0x8000)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # One unit of 0.5's last place is the smallest F16: adding 0.5 rounds a denormal there.
    tiny = np.uint32(_bits(_single(size) + np.float32(0.5)) - np.uint32(0x3F000000))
    odd = np.uint32(size >> _U13) & _U1
    usual = np.uint32(np.uint32(size + np.uint32(0xFFF) + odd - np.uint32(112 << 23)) >> _U13)
    half = tiny if size < np.uint32(0x38800000) else usual
    half = half if size < np.uint32(0x47800000) else np.uint32(0x7C00)
    return np.uint32(half | sign)


@jit
def single_to_bf16(bits):
    """F32 bits -> BF16 bits, to nearest even."""
    odd = np.uint32(bits >> _U16) & _U1
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> _U16)
    return rounded if np.uint32(bits & np.uint32(0x7FFFFFFF)) <= _INF else np.uint32(0x7FC0)


@jit
def round_bits(bits, kind):
    """F32 bits of the nearest number that dtype `kind` has."""
    if kind == BF16:
        return np.uint32(single_to_bf16(bits) << _U16)
    if kind == F16:
        return half_to_single(single_to_half(bits))
    return bits


@jit
def load(raw, source, target, out):
    """Raw bits of dtype `source` -> float32 bits of the same numbers rounded to dtype `target`."""
    if source == BF16:
        for i in range(raw.size):
            out[i] = np.uint32(raw[i]) << _U16
    elif source == F16:
        for i in range(raw.size):
            out[i] = half_to_single(np.uint32(raw[i]))
    else:
        for i in range(raw.size):
            out[i] = raw[i]
    if target != source:
        _round(out[: raw.size], target)


@jit
def _round(bits, kind):
    """F32 bits -> those of the nearest numbers that dtype `kind` has, in place."""
    if kind == BF16:
        for i in range(bits.size):
            bits[i] = single_to_bf16(bits[i]) << _U16
    elif kind == F16:
        for i in range(bits.size):
            bits[i] = half_to_single(single_to_half(bits[i]))


@jit
def store(bits, target, out):
    """float32 bits -> raw bits of dtype `target` (out: uint16, or uint32 for F32)."""
    if target == BF16:
        for i in range(out.size):
            out[i] = single_to_bf16(bits[i])
    elif target == F16:
        for i in range(out.size):
            out[i] = single_to_half(bits[i])
    else:
        for i in range(out.size):
            out[i] = bits[i]


@jit
def _low(ones, apart):
    """A mask of `ones` set bits at the bottom of every `apart` bits of 64."""
    mask = (np.uint64(1) << np.uint64(ones)) - np.uint64(1)
    for shift in range(apart, 64, apart):
        mask |= mask << np.uint64(shift)
    return mask


@jit
def pack(codes, bits, out):
    """Codes, a byte each (overwritten) -> MLX's stream of `bits`-bit codes, the first in the lowest bits.

    Eight codes in a 64-bit word are pushed together as ones, pairs and fours; they then fill its `bits`
    lowest bytes.
    """
    if bits == 8:
        for i in range(codes.size):  # out[:] = codes takes two seconds to compile
            out[i] = codes[i]
        return
    eights = codes.view(np.uint64)
    shift, width = np.uint64(8 - bits), np.uint64(bits)
    ones, pairs, fours = _low(bits, 16), _low(2 * bits, 32), _low(4 * bits, 64)
    for i in range(eights.size):
        x = eights[i]
        x = (x & ones) | ((x >> shift) & (ones << width))
        x = (x & pairs) | ((x >> (np.uint64(2) * shift)) & (pairs << (np.uint64(2) * width)))
        eights[i] = (x & fours) | ((x >> (np.uint64(4) * shift)) & (fours << (np.uint64(4) * width)))
    if bits == 4:
        words = out.view(np.uint32)
        for i in range(eights.size):
            words[i] = eights[i]
    elif bits == 2:
        half_words = out.view(np.uint16)
        for i in range(eights.size):
            half_words[i] = eights[i]
    else:
        for byte in range(bits):
            for i in range(eights.size):
                out[i * bits + byte] = eights[i] >> np.uint64(8 * byte)


@jit
def unpack(packed, bits, codes):
    """The way back: a stream of `bits`-bit codes -> codes, a byte each."""
    if bits == 8:
        for i in range(codes.size):
            codes[i] = packed[i]
        return
    eights = codes.view(np.uint64)
    if bits == 4:
        words = packed.view(np.uint32)
        for i in range(eights.size):
            eights[i] = words[i]
    elif bits == 2:
        half_words = packed.view(np.uint16)
        for i in range(eights.size):
            eights[i] = half_words[i]
    else:
        for i in range(eights.size):
            x = np.uint64(0)
            for byte in range(bits):
                x |= np.uint64(packed[i * bits + byte]) << np.uint64(8 * byte)
            eights[i] = x
    shift = np.uint64(8 - bits)
    ones, pairs, fours = _low(bits, 16), _low(2 * bits, 32), _low(4 * bits, 64)
    for i in range(eights.size):
        x = eights[i]
        x = (x & fours) | ((x << (np.uint64(4) * shift)) & (fours << np.uint64(32)))
        x = (x & pairs) | ((x << (np.uint64(2) * shift)) & (pairs << np.uint64(16)))
        eights[i] = (x & ones) | ((x << shift) & (ones << np.uint64(8)))


@jit
def encode_affine(raw, source, target, bits, group, packed, scales, biases, first, stop):
    """Weights first..stop of the flat rows. Returns a weight of the first that fails, or -1."""
    tile = np.empty(TILE, np.uint32)
    codes = np.empty(TILE, np.uint8)
    lo, hi, scale, bias = np.empty((4, TILE // _MIN_GROUP), np.float32)
    n = np.float32((1 << bits) - 1)
    for start in range(first, stop, TILE):
        count = min(TILE, stop - start)
        groups, g0 = count // group, start // group
        load(raw[start : start + count], source, target, tile)
        for g in range(groups):
            lo[g], hi[g] = _extremes(tile[g * group : (g + 1) * group].view(np.int32))
        bad = _choose(lo, hi, n, scale, bias, groups)
        if bad >= 0:
            return start + bad * group
        for g in range(groups):
            _quantize(tile[g * group : (g + 1) * group].view(np.float32), scale[g], bias[g], n)
        for i in range(count):
            codes[i] = tile[i]
        pack(codes[:count], bits, packed[start * bits // 8 : (start + count) * bits // 8])
        store(scale.view(np.uint32), target, scales[g0 : g0 + groups])
        store(bias.view(np.uint32), target, biases[g0 : g0 + groups])
    return -1


@jit
def _extremes(group):
    """The least and the greatest float32 of a group that is given as int32 bits.

    Bits with the magnitude of negative numbers inverted are ordered as the numbers are, and integers have a
    minimum that vectorizes. NaN lies beyond the infinities, so it comes out as an extreme and is seen by
    _choose.
    """
    lo, hi = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(group.size):
        value = group[i]
        key = np.int32(value ^ np.int32(np.int32(value >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        lo = key if key < lo else lo
        hi = key if key > hi else hi
    return _unkey(lo), _unkey(hi)


@jit
def _unkey(key):
    return np.int32(key ^ np.int32(np.int32(key >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@jit
def _choose(lo, hi, n, scale, bias, groups):
    """Scale and bias of each group. Returns the first group whose range is not finite, or -1."""
    for g in range(groups):
        spread = np.float32(hi[g] - lo[g])
        if not spread < np.float32(np.inf):
            return g
        step = np.float32(spread / n)
        step = step if step > _EPS else _EPS
        from_lo = abs(lo[g]) > abs(hi[g])
        step = step if from_lo else -step
        edge = lo[g] if from_lo else hi[g]
        q0 = np.float32(np.rint(np.float32(edge / step)))
        scale[g] = np.float32(edge / q0) if q0 != _ZERO else step
        bias[g] = edge if q0 != _ZERO else _ZERO
    return -1


@jit
def _quantize(part, scale, bias, n):
    """Weights -> in place, float32 numbers whose low bits are the codes. Clipped first, which is the same."""
    for i in range(part.size):
        x = (part[i] - bias) / scale
        x = x if x > _ZERO else _ZERO
        x = x if x < n else n
        part[i] = x + _TWO_23


@jit
def decode_affine(packed, scale, bias, bits, group, out, first, stop):
    codes = np.empty(TILE, np.uint8)
    for start in range(first, stop, TILE):
        count = min(TILE, stop - start)
        unpack(packed[start * bits // 8 : (start + count) * bits // 8], bits, codes[:count])
        for g in range(count // group):
            s, b = scale[start // group + g], bias[start // group + g]
            into, of = out[start + g * group : start + (g + 1) * group], codes[g * group : (g + 1) * group]
            for i in range(group):
                into[i] = np.float32(of[i]) * s + b
    return -1


@jit
def encode_mx(raw, source, target, bits, group, packed, scales, first, stop):
    """Weights first..stop of the flat rows. Returns a weight of the first that fails, or -1."""
    tile = np.empty(TILE, np.uint32)
    codes = np.empty(TILE, np.uint8)
    for start in range(first, stop, TILE):
        count = min(TILE, stop - start)
        load(raw[start : start + count], source, target, tile)
        common = True
        for at in range(0, count, group):
            part = tile[at : at + group]
            peak = _peak(part.view(np.int32))
            if peak > _MOST:
                return start + at
            byte, scale = _nv_scale(peak, target) if group == 16 else _power_scale(peak, bits, target)
            scales[(start + at) // group] = byte
            if scale == _ZERO:
                part.fill(np.uint32(0))
            else:
                _divide(part.view(np.float32), scale)
                common &= _single(peak) / scale < _TIES
        if group == 16:
            _round(tile[:count], target)
        if bits == 8:
            _e4m3_codes(tile, codes[:count])
        elif common:
            _e2m1_codes(tile, codes[:count])
        else:
            _e2m1_codes_far(tile.view(np.float32), codes[:count])
        pack(codes[:count], bits, packed[start * bits // 8 : (start + count) * bits // 8])
    return -1


@jit
def _peak(group):
    """The greatest magnitude of a group, as float32 bits; NaN counts as more than infinity."""
    peak = np.int32(0)
    for i in range(group.size):
        size = np.int32(group[i] & np.int32(0x7FFFFFFF))
        peak = size if size > peak else peak
    return np.uint32(peak)


@jit
def _power_scale(peak, bits, kind):
    """E8M0: (exponent + 127, 2**exponent), the least power of two, 2**-127 or more, not below peak / most."""
    most = np.float32(448.0) if bits == 8 else np.float32(6.0)
    share = round_bits(_bits(_single(peak) / most), kind)
    if share == np.uint32(0):
        return np.uint8(127), np.float32(1.0)
    if share <= _TINIEST:
        return np.uint8(0), _single(_TINIEST)
    byte = np.uint32(np.uint32(share + np.uint32(0x7FFFFF)) >> np.uint32(23))
    return np.uint8(byte), _single(byte << np.uint32(23))


@jit
def _nv_scale(peak, kind):
    """E4M3: (code of peak / 6, its value). Zero below 2**-10, 448 at most."""
    byte = e4m3_code(round_bits(_bits(_single(peak) / np.float32(6.0)), kind))
    return byte, e4m3_size(byte)


@jit
def _divide(values, scale):
    for i in range(values.size):
        values[i] = values[i] / scale


@jit
def _e2m1_codes(bits, codes):
    """The nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 by magnitude; half-way goes towards zero; zero has no sign.

    Magnitudes are compared as int32, which orders them as floats do.
    """
    for i in range(codes.size):
        size = np.int32(bits[i] & np.uint32(0x7FFFFFFF))
        code = np.int32(0)
        code += np.int32(size > _M1)
        code += np.int32(size > _M2)
        code += np.int32(size > _M3)
        code += np.int32(size > _M4)
        code += np.int32(size > _M5)
        code += np.int32(size > _M6)
        code += np.int32(size > _M7)
        sign = np.int32(np.uint32(bits[i] >> np.uint32(28)) & np.uint32(8))
        codes[i] = code | (sign if code > 0 else np.int32(0))


@jit
def _e2m1_codes_far(x, codes):
    """The same as MLX finds it, first of the least |x - value|: for x so large that the differences tie."""
    for i in range(codes.size):
        least = np.float32(np.inf)
        codes[i] = 0
        for code in range(16):
            distance = abs(np.float32(x[i] - E2M1[code]))
            if distance < least:
                least = distance
                codes[i] = code


@jit
def _e4m3_codes(part, codes):
    for i in range(codes.size):
        codes[i] = e4m3_code(part[i])


@jit
def e4m3_code(bits):
    """F32 bits -> E4M3 code, to nearest even, at most 448; the sign of zero stays."""
    sign = np.uint32(bits >> np.uint32(24)) & np.uint32(0x80)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # One unit of 2**14's last place is 2**-9, the smallest E4M3: adding 2**14 rounds a denormal there.
    tiny = np.uint32(_bits(_single(size) + np.float32(2.0**14)) - np.uint32(141 << 23))
    odd = np.uint32(size >> np.uint32(20)) & _U1
    usual = np.uint32(np.uint32(size + np.uint32(0x7FFFF) + odd - np.uint32(120 << 23)) >> np.uint32(20))
    code = tiny if size < np.uint32(121 << 23) else usual
    code = code if code < np.uint32(0x7E) else np.uint32(0x7E)
    return np.uint8(code | sign)


@jit
def e4m3_size(code):
    """E4M3 code up to 0x7E, that is without sign and not NaN -> float32: an F16 with another bias."""
    return _single(half_to_single(np.uint32(np.uint32(code) << np.uint32(7)))) * np.float32(256.0)


@jit
def decode_mx(packed, scale, values, bits, group, out, first, stop):
    """values: what each code stands for; scale: float32, one a group."""
    codes = np.empty(TILE, np.uint8)
    for start in range(first, stop, TILE):
        count = min(TILE, stop - start)
        unpack(packed[start * bits // 8 : (start + count) * bits // 8], bits, codes[:count])
        for g in range(count // group):
            s = scale[start // group + g]
            into, of = out[start + g * group : start + (g + 1) * group], codes[g * group : (g + 1) * group]
            for i in range(group):
                into[i] = values[of[i]] * s
    return -1
