"""The formats mxfp4, nvfp4 and mxfp8 as MLX has them: small floats with one shared scale for each group.

The law, after the array operations of `fp_quantize` in mlx/ops.cpp, which is what MLX runs on the CPU. r()
rounds to the dtype of the weights: those operations do.

    mxfp4   32 weights, E2M1 codes, E8M0 scale: the least power of two 2**e >= r(peak / 6), stored as e + 127
    mxfp8   32 weights, E4M3 codes, the same with 448 in place of 6
    nvfp4   16 weights, E2M1 codes, E4M3 scale: the E4M3 nearest to r(peak / 6)

A code is the value nearest to r(w / scale): E2M1 halves go towards zero, E4M3 halves to even. MLX up to
0.32.2 took the nearest power of two, which clips half the groups (ml-explore/mlx#4353); this is 0.32.4.

Two edges. Where peak / 6 is not above 2**-10 the nvfp4 scale is zero and so is the group; that is MLX's
result too. Where e is below -127 (a peak below 3e-36) MLX's CPU converts a negative float to uint8, which C++
leaves undefined and which makes 1e37 out of 1e-39; here e stays at -127, as in MLX's Metal kernel.
"""

from __future__ import annotations

import numpy as np

from mlxquant.codecs import kernels
from mlxquant.codecs.blocks import as_bits, as_bytes, each_block
from mlxquant.codecs.floats import Array, NonFiniteError
from mlxquant.codecs.spec import MX_MODES

# E4M3: the bits of an F16 with a bias of 7 instead of 15, so 2**8 too small; the last code is NaN.
_HALVES = (np.arange(128, dtype=np.uint16) << np.uint16(7)).view(np.float16)
_E4M3_SIZES = _HALVES.astype(np.float32) * np.float32(256)
_E4M3_SIZES[127] = np.nan
E4M3 = np.concatenate([_E4M3_SIZES, -_E4M3_SIZES])
E2M1 = kernels.E2M1
# 2**(byte - 127); 255 is no scale we write, and MLX reads it as infinity.
E8M0 = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.inf).astype(np.float32)


def encode_mx(raw_OI: Array, source_code: str, dtype_code: str, mode: str) -> tuple[Array, ...]:
    """Raw rows (O, I) -> codes (O, I * bits / 32) uint32 and scales (O, I / group_size) uint8.

    Raises NonFiniteError for NaN, infinity (also one that comes of rounding to `dtype_code`), and numbers
    beyond 3.5 * 2**126, which the nearest code would make infinite.
    """
    group_size, bits = MX_MODES[mode]
    rows, width = raw_OI.shape
    flat, source = as_bits(raw_OI, source_code)
    codes = np.empty((rows, width * bits // 32), np.uint32)
    scales = np.empty((rows, width // group_size), np.uint8)
    out = codes.view(np.uint8).reshape(-1), scales.reshape(-1)
    given = flat, source, kernels.KINDS[dtype_code], bits, group_size

    def work(start: int, stop: int) -> int:
        return int(kernels.encode_mx(*given, *out, start, stop))

    bad = each_block(work, flat.size)
    if bad >= 0:
        raise NonFiniteError(bad // width, f"NaN, infinity, or a number too large for {dtype_code}")
    return codes, scales


def decode_mx(codes: Array, scales: Array, mode: str) -> Array:
    """The float32 rows (O, I) that the stored arrays stand for, exactly; mx.dequantize with dtype float32."""
    group_size, bits = MX_MODES[mode]
    rows, width = codes.shape[0], codes.shape[1] * 32 // bits
    out = np.empty((rows, width), np.float32)
    packed, flat = as_bytes(codes), out.reshape(-1)
    scale = (E4M3 if mode == "nvfp4" else E8M0)[scales].reshape(-1)
    values = E4M3 if bits == 8 else E2M1

    def work(start: int, stop: int) -> int:
        return int(kernels.decode_mx(packed, scale, values, bits, group_size, flat, start, stop))

    each_block(work, flat.size)
    return out
