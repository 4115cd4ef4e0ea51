"""MLX's affine format: in each group of consecutive weights, w = scale * code + bias.

The law, after `quantize` of mlx/backend/cpu/quantized.cpp, all in float32, for a group with extremes lo and
hi and n = 2**bits - 1:

    edge   the extreme that is larger in size; hi when they tie
    step   max((hi - lo) / n, 1e-7), negated unless edge is lo: codes count from the edge inwards
    q0     rint(edge / step)
    scale, bias = (edge / q0, edge) if q0 != 0 else (step, 0)       zero thus falls on a whole code
    code   min(max(rint((w - bias) / scale), 0), n)

Codes are made with the unrounded scale; scale and bias are then rounded to the model's dtype. Moving the step
so that zero is a code may leave n steps shorter than hi - lo, so weights at the far end can be off by a whole
step.
"""

from __future__ import annotations

import numpy as np

from mlxquant.codecs import kernels
from mlxquant.codecs.blocks import as_bits, as_bytes, each_block
from mlxquant.codecs.floats import Array, NonFiniteError, widen
from mlxquant.tensors import DTYPES


def encode_affine(raw_OI: Array, source_code: str, dtype_code: str, bits: int, group_size: int) -> tuple[Array, ...]:
    """Raw rows (O, I) -> codes (O, I * bits / 32) uint32, raw scales and biases (O, I / group_size).

    Raises NonFiniteError for NaN, infinity, or a group whose range no float32 holds (MLX stores an infinite
    scale).
    """
    rows, width = raw_OI.shape
    flat, source = as_bits(raw_OI, source_code)
    codes = np.empty((rows, width * bits // 32), np.uint32)
    scales = np.empty((rows, width // group_size), DTYPES[dtype_code].numpy)
    biases = np.empty_like(scales)
    unsigned = np.uint32 if dtype_code == "F32" else np.uint16
    given = flat, source, kernels.KINDS[dtype_code], bits, group_size
    out = codes.view(np.uint8).ravel(), scales.view(unsigned).ravel(), biases.view(unsigned).ravel()

    def work(start: int, stop: int) -> int:
        return int(kernels.encode_affine(*given, *out, start, stop))

    bad = each_block(work, flat.size)
    if bad >= 0:
        raise NonFiniteError(bad // width, f"NaN, infinity, or numbers too far apart for {dtype_code}")
    return codes, scales, biases


def decode_affine(codes: Array, scales: Array, biases: Array, dtype_code: str, bits: int, group_size: int) -> Array:
    """The float32 rows (O, I) that the stored arrays stand for: code * scale, rounded, + bias, rounded.

    Equal to mx.dequantize with scales and biases widened to float32. mx.dequantize of float16 or bfloat16
    scales takes the same two steps but rounds each to that dtype.
    """
    rows, width = codes.shape[0], codes.shape[1] * 32 // bits
    out = np.empty((rows, width), np.float32)
    packed = as_bytes(codes)
    scale, bias = widen(scales, dtype_code).reshape(-1), widen(biases, dtype_code).reshape(-1)
    flat = out.reshape(-1)

    def work(start: int, stop: int) -> int:
        return int(kernels.decode_affine(packed, scale, bias, bits, group_size, flat, start, stop))

    each_block(work, flat.size)
    return out
