"""Between the float dtypes weights come in and float32, in numpy.

Raw rows have the dtype DTYPES[code].numpy gives them: bfloat16 travels as uint16 bits, since numpy has no
such dtype. The kernels do the same conversions in registers (`kernels.load`, `kernels.store`); these here are
for whole arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxquant.tensors import DTYPES

Array = np.ndarray[Any, Any]
WEIGHT_CODES = ("BF16", "F16", "F32", "F64")


class NonFiniteError(ValueError):
    """A row holds NaN, infinity, or numbers too large for the format.

    The caller knows the tensor and adds its name. `row` counts within the array that was given. `reason` says
    what was found, without the row or the tensor.
    """

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row = row
        self.reason = reason


def widen(raw: Array, code: str) -> Array:
    """BF16 bits, F16, F32 or F64 of any shape -> float32. Exact, but F64 is rounded to nearest even."""
    check(raw, code)
    if code == "BF16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):  # an F64 beyond float32 becomes inf, as in every library
        return raw.astype(np.float32, copy=False)


def narrow(values_f32: Array, code: str) -> Array:
    """float32 -> raw BF16 bits, F16, F32 or F64, to nearest even as MLX's astype; too large becomes inf."""
    check(values_f32, "F32")
    if code == "BF16":
        return _to_bf16(values_f32)
    if code not in WEIGHT_CODES:
        raise ValueError(f"{code} is no float dtype of weights: expected one of {WEIGHT_CODES}")
    with np.errstate(over="ignore", invalid="ignore"):
        return values_f32.astype(DTYPES[code].numpy, copy=False)


def cast(raw: Array, source_code: str, target_code: str) -> Array:
    """Raw -> raw of another dtype, through float32; the array itself when the codes are equal."""
    if source_code == target_code:
        check(raw, source_code)
        return raw
    return narrow(widen(raw, source_code), target_code)


def fold(ufunc: np.ufunc, groups: Array) -> Array:
    """ufunc.reduce over the last axis, a power of two long, by halves: numpy's own takes 5 times as long on axes as
    short as a group. For maximum and minimum, which do not mind the order; NaN stays NaN."""
    while groups.shape[-1] > 1:
        half = groups.shape[-1] // 2
        groups = ufunc(groups[..., :half], groups[..., half:])
    return groups[..., 0]


def check(raw: Array, code: str) -> None:
    """ValueError when `raw` is not what `code` says: a mistake of ours, not of the user."""
    if code not in WEIGHT_CODES:
        raise ValueError(f"{code} is no float dtype of weights: expected one of {WEIGHT_CODES}")
    if raw.dtype != np.dtype(DTYPES[code].numpy):
        raise ValueError(f"{code} rows come as {DTYPES[code].numpy}, not {raw.dtype}")


def _to_bf16(values: Array) -> Array:
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Half a unit of the last kept place, a hair less where that place is already even.
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():  # the carry could turn a NaN into an infinity or flip its sign
        rounded[nan] = 0x7FC0
    return rounded
