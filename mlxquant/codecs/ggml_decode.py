"""Decoders of the ggml types we also encode: blocks -> float32, in threads.

All of them are one law, scale * (code - offset) - minimum, where types without a minimum have +0: taking that away
changes no number, not even -0. A decoder takes a block apart into codes, scales and minimums; the rounding is that
of dequantize_row_* in ggml/src/ggml-quants.c, and the layouts are ggml/src/ggml-common.h's. Damaged blocks decode to
what their bits say, NaN included.
"""

# mypy: disallow-untyped-defs=False
# Types are numba's to find; the tests hold every kernel against ggml's own code and `gguf.quants`.
from __future__ import annotations

import numpy as np

from mlxquant.codecs.blocks import as_bytes, each_block
from mlxquant.codecs.floats import Array
from mlxquant.codecs.ggml_iq4 import LEVELS
from mlxquant.codecs.kernels import half_to_single, jit

_LEVELS = LEVELS.astype(np.int8)
_U = np.uint8


@jit
def _half(two):
    bits = half_to_single(np.uint32(two[0]) | np.uint32(np.uint32(two[1]) << np.uint32(8)))
    return np.uint32(bits).view(np.float32)


@jit
def _scratch():
    """Codes, their high bits, scales and minimums of one block; the most that any type has."""
    return np.zeros(256, np.int8), np.zeros(256, np.int8), np.zeros(16, np.float32), np.zeros(16, np.float32)


@jit
def _apply(codes, offset, scale, minimum, group, out):
    for g in range(out.size // group):
        d, m = scale[g], minimum[g]
        part, of = out[g * group : (g + 1) * group], codes[g * group : (g + 1) * group]
        for i in range(group):
            part[i] = d * np.float32(np.int32(of[i]) - offset) - m


@jit
def _nibbles(packed, codes):
    """The low halves of all bytes, then the high halves."""
    half = packed.size
    low, high = codes[:half], codes[half : 2 * half]
    for i in range(half):
        low[i] = packed[i] & _U(15)
        high[i] = packed[i] >> _U(4)


@jit
def _fifth_bits(four, codes):
    """Four bytes -> bit 4 of 32 codes."""
    word = np.uint32(four[0]) | np.uint32(four[1]) << 8 | np.uint32(four[2]) << 16 | np.uint32(four[3]) << 24
    for i in range(32):
        codes[i] |= np.int8(np.uint32(np.uint32(np.uint32(word) >> np.uint32(i)) & np.uint32(1)) << np.uint32(4))


@jit
def _plane_bits(packed, bits):
    """32 bytes -> 256 bits: the lowest of all bytes, then the second..."""
    for k in range(8):
        part = bits[32 * k : 32 * k + 32]
        for i in range(32):
            part[i] = (packed[i] >> _U(k)) & _U(1)


@jit
def _join(codes, high, place):
    """The high bits of 256 codes were written apart: LLVM does not vectorize 8 loops that change codes in place."""
    for i in range(256):
        codes[i] |= high[i] << place


@jit
def _crumbs(packed, codes):
    """64 bytes -> 256 codes of two bits: four times 32 of each half."""
    for n in range(2):
        of = packed[32 * n : 32 * n + 32]
        for k in range(4):
            part = codes[128 * n + 32 * k : 128 * n + 32 * k + 32]
            for i in range(32):
                part[i] = (of[i] >> _U(2 * k)) & _U(3)


@jit
def decode_q4_0(blocks, out):
    codes, _, scale, minimum = _scratch()
    for b in range(out.size // 32):
        block = blocks[18 * b : 18 * b + 18]
        scale[0] = _half(block)
        _nibbles(block[2:18], codes)
        _apply(codes, 8, scale, minimum, 32, out[32 * b : 32 * b + 32])


@jit
def decode_q4_1(blocks, out):
    codes, _, scale, minimum = _scratch()
    for b in range(out.size // 32):
        block = blocks[20 * b : 20 * b + 20]
        scale[0], minimum[0] = _half(block), -_half(block[2:])
        _nibbles(block[4:20], codes)
        _apply(codes, 0, scale, minimum, 32, out[32 * b : 32 * b + 32])


@jit
def decode_q5_0(blocks, out):
    codes, _, scale, minimum = _scratch()
    for b in range(out.size // 32):
        block = blocks[22 * b : 22 * b + 22]
        scale[0] = _half(block)
        _nibbles(block[6:22], codes)
        _fifth_bits(block[2:6], codes)
        _apply(codes, 16, scale, minimum, 32, out[32 * b : 32 * b + 32])


@jit
def decode_q5_1(blocks, out):
    codes, _, scale, minimum = _scratch()
    for b in range(out.size // 32):
        block = blocks[24 * b : 24 * b + 24]
        scale[0], minimum[0] = _half(block), -_half(block[2:])
        _nibbles(block[8:24], codes)
        _fifth_bits(block[4:8], codes)
        _apply(codes, 0, scale, minimum, 32, out[32 * b : 32 * b + 32])


@jit
def decode_q8_0(blocks, out):
    _, _, scale, minimum = _scratch()
    for b in range(out.size // 32):
        block = blocks[34 * b : 34 * b + 34]
        scale[0] = _half(block)
        _apply(block[2:].view(np.int8), 0, scale, minimum, 32, out[32 * b : 32 * b + 32])


@jit
def decode_q2_k(blocks, out):
    """16 bytes of scale and minimum, 64 of codes, d, dmin."""
    codes, _, scale, minimum = _scratch()
    for b in range(out.size // 256):
        block = blocks[84 * b : 84 * b + 84]
        d, dmin = _half(block[80:]), _half(block[82:])
        for g in range(16):
            scale[g] = d * np.float32(block[g] & _U(15))
            minimum[g] = dmin * np.float32(block[g] >> _U(4))
        _crumbs(block[16:80], codes)
        _apply(codes, 0, scale, minimum, 16, out[256 * b : 256 * b + 256])


@jit
def decode_q3_k(blocks, out):
    """32 bytes of third bits (set: no 4 is taken away), 64 of codes, 12 of 6-bit scales, d."""
    codes, high, scale, minimum = _scratch()
    for b in range(out.size // 256):
        block = blocks[110 * b : 110 * b + 110]
        d, packed = _half(block[108:]), block[96:108]
        for g in range(16):
            low = packed[g] & _U(15) if g < 8 else packed[g - 8] >> _U(4)
            top = (packed[8 + g % 4] >> _U(2 * (g // 4))) & _U(3)
            scale[g] = d * np.float32(np.int32(low | _U(top << 4)) - 32)
        _crumbs(block[32:96], codes)
        _plane_bits(block[:32], high)
        _join(codes, high, 2)
        _apply(codes, 4, scale, minimum, 16, out[256 * b : 256 * b + 256])


@jit
def _scales_k4(block, scale, minimum):
    """d, dmin and 12 bytes of 6-bit numbers -> 8 scales and minimums: get_scale_min_k4."""
    d, dmin, packed = _half(block), _half(block[2:]), block[4:16]
    for g in range(4):
        scale[g] = d * np.float32(packed[g] & _U(63))
        minimum[g] = dmin * np.float32(packed[g + 4] & _U(63))
        scale[g + 4] = d * np.float32((packed[g + 8] & _U(15)) | _U(_U(packed[g] >> _U(6)) << _U(4)))
        minimum[g + 4] = dmin * np.float32((packed[g + 8] >> _U(4)) | _U(_U(packed[g + 4] >> _U(6)) << _U(4)))


@jit
def decode_q4_k(blocks, out):
    codes, _, scale, minimum = _scratch()
    for b in range(out.size // 256):
        block = blocks[144 * b : 144 * b + 144]
        _scales_k4(block, scale, minimum)
        for k in range(4):
            _nibbles(block[16 + 32 * k : 48 + 32 * k], codes[64 * k :])
        _apply(codes, 0, scale, minimum, 32, out[256 * b : 256 * b + 256])


@jit
def decode_q5_k(blocks, out):
    codes, high, scale, minimum = _scratch()
    for b in range(out.size // 256):
        block = blocks[176 * b : 176 * b + 176]
        _scales_k4(block, scale, minimum)
        for k in range(4):
            _nibbles(block[48 + 32 * k : 80 + 32 * k], codes[64 * k :])
        _plane_bits(block[16:48], high)
        _join(codes, high, 4)
        _apply(codes, 0, scale, minimum, 32, out[256 * b : 256 * b + 256])


@jit
def decode_q6_k(blocks, out):
    """128 bytes of low halves, 64 of high pairs of bits, 16 scales, d."""
    codes, high, scale, minimum = _scratch()
    for b in range(out.size // 256):
        block = blocks[210 * b : 210 * b + 210]
        d, scales = _half(block[208:]), block[192:208].view(np.int8)
        for g in range(16):
            scale[g] = d * np.float32(scales[g])
        for n in range(2):
            _nibbles(block[64 * n : 64 * n + 64], codes[128 * n :])
        _crumbs(block[128:192], high)
        _join(codes, high, 4)
        _apply(codes, 32, scale, minimum, 16, out[256 * b : 256 * b + 256])


@jit
def _levels(packed, codes):
    for i in range(16):
        codes[i] = _LEVELS[packed[i] & _U(15)]
        codes[i + 16] = _LEVELS[packed[i] >> _U(4)]


@jit
def decode_iq4_nl(blocks, out):
    codes, _, scale, minimum = _scratch()
    for b in range(out.size // 32):
        block = blocks[18 * b : 18 * b + 18]
        scale[0] = _half(block)
        _levels(block[2:], codes)
        _apply(codes, 0, scale, minimum, 32, out[32 * b : 32 * b + 32])


@jit
def decode_iq4_xs(blocks, out):
    codes, _, scale, minimum = _scratch()
    for b in range(out.size // 256):
        block = blocks[136 * b : 136 * b + 136]
        d = _half(block)
        for g in range(8):
            low = (block[4 + g // 2] >> _U(4 * (g % 2))) & _U(15)
            top = (block[2 + g // 4] >> _U(2 * (g % 4))) & _U(3)
            scale[g] = d * np.float32(np.int32(low | _U(top << 4)) - 32)
            _levels(block[8 + 16 * g : 24 + 16 * g], codes[32 * g :])
        _apply(codes, 0, scale, minimum, 32, out[256 * b : 256 * b + 256])


@jit
def _digits(packed, count, codes):
    """Each byte's `count` leading ternary digits: the byte is a fraction, the digit what times three carries over."""
    for n in range(count):
        power, part = np.uint32(3**n), codes[n * packed.size : (n + 1) * packed.size]
        for i in range(packed.size):
            fraction = np.uint32(np.uint32(packed[i]) * power) & np.uint32(255)
            part[i] = np.uint32(fraction * np.uint32(3)) >> np.uint32(8)


@jit
def decode_tq1_0(blocks, out):
    codes, _, scale, minimum = _scratch()
    for b in range(out.size // 256):
        block = blocks[54 * b : 54 * b + 54]
        scale[0] = _half(block[52:])
        _digits(block[:32], 5, codes)
        _digits(block[32:48], 5, codes[160:])
        _digits(block[48:52], 4, codes[240:])
        _apply(codes, 1, scale, minimum, 256, out[256 * b : 256 * b + 256])


@jit
def decode_tq2_0(blocks, out):
    codes, _, scale, minimum = _scratch()
    for b in range(out.size // 256):
        block = blocks[66 * b : 66 * b + 66]
        scale[0] = _half(block[64:])
        _crumbs(block[:64], codes)
        _apply(codes, 1, scale, minimum, 256, out[256 * b : 256 * b + 256])


DECODERS = {
    **{"Q4_0": decode_q4_0, "Q4_1": decode_q4_1, "Q5_0": decode_q5_0, "Q5_1": decode_q5_1, "Q8_0": decode_q8_0},
    **{"Q2_K": decode_q2_k, "Q3_K": decode_q3_k, "Q4_K": decode_q4_k, "Q5_K": decode_q5_k, "Q6_K": decode_q6_k},
    **{"IQ4_NL": decode_iq4_nl, "IQ4_XS": decode_iq4_xs, "TQ1_0": decode_tq1_0, "TQ2_0": decode_tq2_0},
}


def decode(raw: Array, type_name: str, width: int) -> Array:
    """What `ggml.decode_rows` promises, for arguments that it has checked: whole rows, dealt to all cores."""
    out = np.empty((len(raw), width), np.float32)
    blocks, flat, row_bytes = as_bytes(raw), out.reshape(-1), raw.shape[1]

    def work(start: int, stop: int) -> int:
        DECODERS[type_name](blocks[start // width * row_bytes : stop // width * row_bytes], flat[start:stop])
        return -1

    each_block(work, flat.size, width)
    return out
