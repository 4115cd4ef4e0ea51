"""The laws of `affine.py` and `mx.py` once more: short, slow, plain numpy. Tests hold the kernels to them.

Weights come as float32 rows (O, I) that are already rounded to the model's dtype.
"""

from __future__ import annotations

import numpy as np

from mlxquant.codecs.floats import Array, fold, narrow, widen
from mlxquant.codecs.mx import E2M1, E4M3, E8M0
from mlxquant.codecs.spec import MX_MODES, Codec

_F32 = np.float32


def encode(w_OI: Array, dtype_code: str, codec: Codec) -> tuple[Array, ...]:
    """The stored arrays of a quantizing codec."""
    groups = _groups(w_OI, codec)
    if codec.mode == "affine":
        scale, bias = affine_scale_bias(groups, codec.bits)
        codes = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, 2**codec.bits - 1)
        return pack(codes.astype(np.uint8), codec.bits), narrow(scale, dtype_code), narrow(bias, dtype_code)
    byte, scale = mx_scale(groups, dtype_code, codec.mode)
    # 0 / 0 in a group whose nvfp4 scale is zero; no distance is then the least, and argmin says 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        x = _rounded(groups / scale[..., None], dtype_code)
        codes = _e4m3(x) if codec.bits == 8 else np.abs(x[..., None] - E2M1).argmin(-1)
    return pack(codes.astype(np.uint8), codec.bits), byte


def decode(parts: tuple[Array, ...], dtype_code: str, codec: Codec) -> Array:
    codes = _groups(unpack(parts[0], codec.bits), codec)
    if codec.mode == "affine":
        scale, bias = (widen(part, dtype_code)[..., None] for part in parts[1:])
        return (codes.astype(_F32) * scale + bias).reshape(len(codes), -1)
    scale = (E4M3 if codec.mode == "nvfp4" else E8M0)[parts[1]][..., None]
    return ((E4M3 if codec.bits == 8 else E2M1)[codes] * scale).reshape(len(codes), -1)


def affine_scale_bias(groups_OGI: Array, bits: int) -> tuple[Array, Array]:
    """Unrounded float32 scale and bias (O, G) of groups (O, G, group_size)."""
    lo, hi = fold(np.minimum, groups_OGI), fold(np.maximum, groups_OGI)
    step = np.maximum((hi - lo) / _F32(2**bits - 1), _F32(1e-7))
    from_lo = np.abs(lo) > np.abs(hi)
    edge, step = np.where(from_lo, lo, hi), np.where(from_lo, step, -step)
    q0 = np.rint(edge / step)
    whole = q0 != 0
    return np.where(whole, edge / np.where(whole, q0, 1), step), np.where(whole, edge, _F32(0))


def mx_scale(groups_OGI: Array, dtype_code: str, mode: str) -> tuple[Array, Array]:
    """(stored byte, its value in float32) of each group (O, G)."""
    most = _F32(448 if MX_MODES[mode][1] == 8 else 6)
    share = _rounded(fold(np.maximum, np.abs(groups_OGI)) / most, dtype_code)
    if mode == "nvfp4":
        byte = _e4m3(share)
        return byte, E4M3[byte]
    fraction, exponent = np.frexp(np.where(share > 0, share, _F32(1)))
    byte = np.maximum(exponent - (fraction == 0.5) + 127, 0).astype(np.uint8)
    return byte, E8M0[byte]


def pack(codes_OI: Array, bits: int) -> Array:
    """Codes (O, ...) uint8 -> a stream of bits, the first code lowest, as uint32 (O, I * bits / 32)."""
    rows = codes_OI.reshape(len(codes_OI), -1, 1)
    stream = np.unpackbits(rows, axis=-1, count=bits, bitorder="little").reshape(len(rows), -1)
    return np.packbits(stream, axis=-1, bitorder="little").view("<u4")


def unpack(packed: Array, bits: int) -> Array:
    stream = np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little").reshape(len(packed), -1, bits)
    return np.packbits(stream, axis=-1, bitorder="little").reshape(len(packed), -1)


def _e4m3(x: Array) -> Array:
    """The nearest E4M3 code, halves to the even one; beyond 448 the code of 448. The sign of zero stays."""
    size = np.minimum(np.abs(x), _F32(448)).astype(np.float64)
    # frexp: size = f * 2**exponent with f in [0.5, 1), so three bits of mantissa end at 2**(exponent - 4).
    unit = np.ldexp(1.0, np.maximum(np.frexp(size)[1] - 4, -9))
    nearest = (np.rint(size / unit) * unit).astype(_F32)
    return np.asarray(np.searchsorted(E4M3[:128], nearest) + 128 * np.signbit(x)).astype(np.uint8)


def _rounded(values: Array, dtype_code: str) -> Array:
    return widen(narrow(values.astype(_F32), dtype_code), dtype_code)


def _groups(rows_OI: Array, codec: Codec) -> Array:
    return rows_OI.reshape(len(rows_OI), -1, codec.group_size)
