"""Encoders of TQ1_0 and TQ2_0: codes -1, 0 and 1 times one float16 for 256 weights (BitNet b1.58, TriLMs).

    TQ1_0  54 bytes: five ternary digits a byte, scaled up so that a multiplication takes them out again; float16 d
    TQ2_0  66 bytes: four codes of two bits a byte; float16 d                              w = d * (code - 1)

Byte-equal to quantize_row_tq1_0_ref and quantize_row_tq2_0_ref of ggml/src/ggml-quants.c, which take no notice of an
importance matrix. d is the greatest magnitude, so only weights that are ternary already come back as they were.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import numpy as np

from mlxquant.codecs.kernels import jit, single_to_half

_WIDTH = 256
_TQ1_BYTES, _TQ2_BYTES = 54, 66
_HALF, _ZERO, _ONE, _INF = np.float32(0.5), np.float32(0), np.float32(1), np.float32(np.inf)
_SIZE = np.uint32(0x7FFFFFFF)


@jit
def _peak(bits):
    """The greatest magnitude, as bits: ordered as the numbers are, and integers have a maximum that vectorizes."""
    top = np.uint32(0)
    for i in range(_WIDTH):
        size = np.uint32(bits[i] & _SIZE)
        top = size if size > top else top
    return top


@jit
def _digits(x, digits):
    """256 weights -> digits 0, 1, 2. Returns d as the bits of a float16."""
    top = _peak(x.view(np.uint32))
    d = np.uint32(top).view(np.float32)
    inverse = _ONE / d if d != _ZERO else _ZERO
    # Below 2**-128 it is infinite, and C's lroundf of infinity and NaN, cut to an int, is 0 on x86-64.
    inverse = inverse if inverse < _INF else _ZERO
    for i in range(_WIDTH):
        scaled = x[i] * inverse
        digits[i] = np.int32(1) + np.int32(scaled >= _HALF) - np.int32(scaled <= -_HALF)
    return np.uint16(single_to_half(top))


@jit
def _five(digits, apart, count, out):
    """Digits i, i + apart, i + 2 * apart... -> byte i, five of them (or four and a zero) as a fraction of 243."""
    for i in range(apart):
        number = np.uint16(0)
        for n in range(5):
            number = np.uint16(np.uint16(3) * number + np.uint16(digits[n * apart + i] if n < count else 0))
        out[i] = (np.uint32(number) * np.uint32(256) + np.uint32(242)) // np.uint32(243)


@jit
def _put_half(half, out):
    out[0] = half & np.uint16(255)
    out[1] = half >> np.uint16(8)


@jit
def encode_tq1_0(x_N, importance_I, width, out):
    """Whole rows of float32 -> blocks of 54 bytes: 32 + 16 bytes of five digits, 4 of four, float16 d."""
    digits = np.empty(_WIDTH, np.uint8)
    for i in range(x_N.size // _WIDTH):
        block = out[i * _TQ1_BYTES : (i + 1) * _TQ1_BYTES]
        half = _digits(x_N[i * _WIDTH : (i + 1) * _WIDTH], digits)
        _five(digits, 32, 5, block)
        _five(digits[160:], 16, 5, block[32:])
        _five(digits[240:], 4, 4, block[48:])
        _put_half(half, block[52:])


@jit
def encode_tq2_0(x_N, importance_I, width, out):
    """Whole rows of float32 -> blocks of 66 bytes: codes i, i + 32, i + 64, i + 96 in byte i, twice; float16 d."""
    digits = np.empty(_WIDTH, np.uint8)
    for i in range(x_N.size // _WIDTH):
        block = out[i * _TQ2_BYTES : (i + 1) * _TQ2_BYTES]
        half = _digits(x_N[i * _WIDTH : (i + 1) * _WIDTH], digits)
        for h in range(2):
            part, four = block[32 * h : 32 * h + 32], digits[128 * h : 128 * h + 128]
            for m in range(32):
                part[m] = four[m] | four[m + 32] << 2 | four[m + 64] << 4 | four[m + 96] << 6
        _put_half(half, block[64:])


ENCODERS = {"TQ1_0": encode_tq1_0, "TQ2_0": encode_tq2_0}
