from __future__ import annotations

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.codecs import kernels
from mlxquant.codecs.floats import cast, narrow, widen
from tests.codecs.rows import MX_DTYPES, bits, from_mlx

EVERY_16 = np.arange(65536, dtype=np.uint16)


def near_ties() -> np.ndarray:
    """float32 of all exponents, their low bits at and beside half-way for 7 and 10 bits of mantissa."""
    high = (np.arange(512, dtype=np.uint32) << np.uint32(23))[:, None]
    tails = np.array([0x8000, 0x1000, 0x18000, 0x3000, 0x7F8000, 0x7FF000], np.uint32)
    low = (tails[:, None] + np.array([-1, 0, 1])).astype(np.uint32).ravel()
    values = (high | low).view(np.float32).ravel()
    return values[~np.isnan(values)]


def test_widen_is_exact_for_every_16_bit_float() -> None:
    expected = EVERY_16.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(bits(widen(EVERY_16, "BF16")), bits(expected))
    np.testing.assert_array_equal(widen(EVERY_16.view(np.float16), "F16"), EVERY_16.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_narrow_rounds_as_mlx_does(code: str) -> None:
    values = near_ties()
    with mx.stream(mx.cpu):
        expected = from_mlx(mx.array(values).astype(MX_DTYPES[code]))
    np.testing.assert_array_equal(bits(narrow(values, code)), bits(expected))


def test_narrow_keeps_nan() -> None:
    patterns = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    for code in ("BF16", "F16", "F32", "F64"):
        assert np.isnan(widen(narrow(patterns, code), code)).all()


def test_kernel_conversions_agree_with_numpy() -> None:
    halves = np.empty(65536, np.uint32)
    for source, view in ((kernels.BF16, "BF16"), (kernels.F16, "F16")):
        kernels.load(EVERY_16, source, source, halves)
        raw = EVERY_16 if view == "BF16" else EVERY_16.view(np.float16)
        expected = widen(raw, view)
        finite = ~np.isnan(expected)
        np.testing.assert_array_equal(halves[finite], expected.view(np.uint32)[finite])
    values = near_ties()
    for code in ("BF16", "F16"):
        out = np.empty(values.size, np.uint16)
        kernels.store(values.view(np.uint32), kernels.KINDS[code], out)
        np.testing.assert_array_equal(out, bits(narrow(values, code)))


def test_cast_returns_the_same_array_when_nothing_changes() -> None:
    raw = np.arange(6, dtype=np.uint16).reshape(2, 3)
    assert cast(raw, "BF16", "BF16") is raw
    assert cast(raw, "BF16", "F16").dtype == np.float16


def test_f64_goes_through_float32() -> None:
    raw = np.array([[1 + 2.0**-24 + 2.0**-40, 1e300, -1e-300]])
    np.testing.assert_array_equal(widen(raw, "F64"), np.array([[1 + 2.0**-23, np.inf, -0.0]], np.float32))


@pytest.mark.parametrize(("dtype", "code"), [(np.float16, "BF16"), (np.float32, "F16"), (np.int32, "I32")])
def test_rows_of_another_dtype_are_refused(dtype: type, code: str) -> None:
    with pytest.raises(ValueError, match=code):
        widen(np.zeros((1, 2), dtype), code)
