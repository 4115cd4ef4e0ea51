"""One door to the formats: raw rows -> the arrays a codec stores, and back."""

from __future__ import annotations

import numpy as np

from mlxquant.codecs.affine import decode_affine, encode_affine
from mlxquant.codecs.bounds import error_bound
from mlxquant.codecs.floats import Array, NonFiniteError, cast, widen
from mlxquant.codecs.kernels import KINDS
from mlxquant.codecs.mx import decode_mx, encode_mx
from mlxquant.codecs.spec import Codec

__all__ = ["NonFiniteError", "decode", "encode", "error_bound"]


def encode(raw_OI: Array, source_code: str, dtype_code: str, codec: Codec) -> tuple[Array, ...]:
    """Rows (O, I) in DTYPES[source_code].numpy -> one array for each of codec.parts(), rows first.

    Rows are first rounded to `dtype_code` (BF16, F16 or F32), the dtype of scales and biases. Bit-identical
    to mx.quantize(mx.array(raw).astype(dtype), ...) on the CPU device, but for mx groups below 3e-36 (see
    `mx.py`). Memory beyond the arrays themselves: 50 kB a thread (a float64 source is first copied to
    float32).

    Rows are independent, so any split of a tensor into row chunks gives the same bytes. Safe to call from
    several threads. Raises NonFiniteError (quantizing codecs only), and ValueError for arguments that no plan
    contains.
    """
    if not codec.quantized:
        return (cast(raw_OI, source_code, dtype_code),)
    check_rows(raw_OI, dtype_code, codec)
    if codec.mode == "affine":
        return encode_affine(raw_OI, source_code, dtype_code, codec.bits, codec.group_size)
    return encode_mx(raw_OI, source_code, dtype_code, codec.mode)


def check_rows(raw_OI: Array, dtype_code: str, codec: Codec) -> None:
    """ValueError for rows or a dtype that a quantizing codec does not take: a mistake of ours, not of the user."""
    if raw_OI.ndim != 2 or not codec.divides(raw_OI.shape[1]):
        raise ValueError(f"{codec.label} takes rows of whole groups of {codec.group_size}, not {raw_OI.shape}")
    if dtype_code not in KINDS:
        raise ValueError(f"{dtype_code} is no dtype MLX quantizes from: expected one of {tuple(KINDS)}")


def decode(parts: tuple[Array, ...], dtype_code: str, codec: Codec) -> Array:
    """The arrays of one tensor -> float32 (O, I), what they stand for. A kept tensor of any shape is widened.

    Equal to mx.dequantize in float32, bit for bit, whatever dtype the scales are stored in. Raises ValueError
    when the arrays do not fit each other or the codec.
    """
    if not codec.quantized:
        return widen(parts[0], dtype_code)
    _check_parts(parts, codec)
    if codec.mode == "affine":
        codes, scales, biases = parts
        return decode_affine(codes, scales, biases, dtype_code, codec.bits, codec.group_size)
    codes, scales = parts
    return decode_mx(codes, scales, codec.mode)


def _check_parts(parts: tuple[Array, ...], codec: Codec) -> None:
    """The kernels index without bounds checks: nothing ill-shaped may reach them."""
    kinds = [(part.dtype.name, part.shape) for part in parts]
    wanted = 3 if codec.mode == "affine" else 2
    if len(parts) != wanted or any(part.ndim != 2 for part in parts):
        raise ValueError(f"{codec.label} is stored as {wanted} matrices, not {kinds}")
    bits = parts[0].shape[1] * 32
    groups = (len(parts[0]), bits // (codec.bits * codec.group_size))
    whole = bits % (codec.bits * codec.group_size) == 0
    if not whole or any(part.shape != groups for part in parts[1:]):
        raise ValueError(f"{codec.label} codes do not go with these scales: {kinds}")
    if parts[0].dtype != np.uint32 or (codec.mode != "affine" and parts[1].dtype != np.uint8):
        raise ValueError(f"{codec.label} codes are uint32 and mx scales uint8, not {kinds}")
