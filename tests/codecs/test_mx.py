"""mxfp4, nvfp4 and mxfp8 rows against stock MLX, bit for bit, at every scale there is."""

from __future__ import annotations

import platform

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.codecs import reference
from mlxquant.codecs.encode import NonFiniteError, decode, encode
from mlxquant.codecs.floats import narrow, widen
from mlxquant.codecs.spec import MX_MODES, parse_codec
from tests.codecs.rows import exact, mlx_quantize, rows, same

DTYPES = ("BF16", "F16", "F32")
# Below this peak the E8M0 exponent would be under -127: see the head of mlxquant/codecs/mx.py.
TINIEST = {"mxfp4": 6 * 2.0**-127, "nvfp4": 0.0, "mxfp8": 448 * 2.0**-127}
LARGEST = 3.5 * 2.0**126


def tiny(values: np.ndarray, mode: str) -> np.ndarray:
    """Rows with a group whose peak / most is not zero and below 2**-127."""
    peaks = np.abs(values).reshape(len(values), -1, MX_MODES[mode][0]).max(-1)
    return ((peaks > 0) & (peaks <= TINIEST[mode])).any(-1)


def check(raw: np.ndarray, source: str, dtype: str, mode: str) -> tuple[np.ndarray, ...]:
    values = exact(raw, source, dtype)
    keep = ~tiny(values, mode) & (np.abs(values).max(-1) <= LARGEST)
    raw, values = raw[keep], values[keep]
    raw, values = raw[: len(raw) // 2 * 2], values[: len(raw) // 2 * 2]  # MLX reshapes to 32 codes
    ours = encode(raw, source, dtype, parse_codec(mode))
    same(ours, mlx_quantize(raw, source, dtype, mode=mode))
    same(ours, reference.encode(values, dtype, parse_codec(mode)))
    return ours


@pytest.mark.parametrize("mode", MX_MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_mlx(dtype: str, mode: str) -> None:
    ours = check(rows(dtype), dtype, dtype, mode)
    specs = parse_codec(mode).parts("w.weight", (len(ours[0]), 384), dtype)
    assert [part.shape for part in ours] == [spec.shape for spec in specs]


@pytest.mark.parametrize("mode", MX_MODES)
@pytest.mark.parametrize(("source", "dtype"), [("F32", "BF16"), ("F32", "F16"), ("BF16", "F16"), ("F16", "BF16")])
def test_rows_are_first_rounded_to_the_models_dtype(source: str, dtype: str, mode: str) -> None:
    check(rows(source, seed=1, largest=6e4), source, dtype, mode)


def peaked(peaks: np.ndarray, code: str, width: int) -> np.ndarray:
    """One group a row, of random weights of which one is exactly the peak."""
    values = np.random.default_rng(0).uniform(-1, 1, (len(peaks), width)).astype(np.float32)
    values[:, 3] = 1
    return narrow(values * peaks[:, None], code)


@pytest.mark.parametrize("mode", MX_MODES)
@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_every_peak_a_16_bit_dtype_has(code: str, mode: str) -> None:
    every = np.arange(0x7F80 if code == "BF16" else 0x7C00, dtype=np.uint16)
    peaks = widen(every if code == "BF16" else every.view(np.float16), code)
    # All mantissas, one exponent in five: scales go by the octave, and MLX takes seconds for each mode.
    octave = np.frexp(peaks)[1]
    check(peaked(peaks[octave % 5 == 0], code, MX_MODES[mode][0]), code, code, mode)


@pytest.mark.parametrize("mode", MX_MODES)
def test_float32_peaks_beside_every_power_of_two(mode: str) -> None:
    most = 448.0 if mode == "mxfp8" else 6.0
    edges = np.ldexp(np.array([most, most * 1.0625], np.float64)[:, None], np.arange(-117, 118)).astype(np.float32)
    near = (edges.ravel().view(np.int32)[:, None] + np.arange(-2, 3, dtype=np.int32)).ravel().view(np.float32)
    check(peaked(near, "F32", MX_MODES[mode][0]), "F32", "F32", mode)


@pytest.mark.parametrize("size", [1e9, 1.6e10, 1e12, 1e30, 2.9e38])
def test_nvfp4_beyond_its_largest_scale_loses_what_mlx_loses(size: float) -> None:
    codes, scales = check(peaked(np.full(64, size, np.float32), "F32", 16), "F32", "F32", "nvfp4")
    assert (scales == 0x7E).all()
    assert (codes == 0).all() == (size >= 1e30)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("code", ["BF16", "F32"])
def test_below_the_least_exponent_weights_shrink_where_mlx_blows_them_up(code: str, mode: str) -> None:
    raw = peaked(np.geomspace(TINIEST[mode] / 900, TINIEST[mode] / 3, 64, dtype=np.float32), code, 32)
    codec = parse_codec(mode)
    ours = encode(raw, code, code, codec)
    same(ours, reference.encode(widen(raw, code), code, codec))
    assert np.abs(decode(ours, code, codec)).max() <= TINIEST[mode]
    if platform.machine() == "x86_64":  # what C++ leaves undefined comes out otherwise on other processors
        theirs = mlx_quantize(raw, code, code, mode=mode)
        assert np.nanmax(np.abs(decode((theirs[0], theirs[1]), code, codec))) > 1e30


@pytest.mark.parametrize("mode", MX_MODES)
def test_decode_is_mlx_dequantize(mode: str) -> None:
    codec = parse_codec(mode)
    rng = np.random.default_rng(7)
    codes = rng.integers(0, 2**32, (64, codec.group_size * codec.bits // 4), dtype=np.uint32)
    if mode == "nvfp4":
        scales = rng.integers(0, 0x7F, (64, 8), dtype=np.uint8)
    else:
        scales = rng.integers(1, 240, (64, 8), dtype=np.uint8)
    with mx.stream(mx.cpu):
        theirs = mx.dequantize(mx.array(codes), mx.array(scales), mode=mode, dtype=mx.float32)
        expected = np.array(theirs)
    for ours in (decode((codes, scales), "BF16", codec), reference.decode((codes, scales), "BF16", codec)):
        np.testing.assert_array_equal(ours, expected)  # the last E4M3 code is NaN
        np.testing.assert_array_equal(np.signbit(ours[ours == 0]), np.signbit(expected[ours == 0]))


@pytest.mark.parametrize("mode", MX_MODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_the_first_row_that_cannot_be_stored_is_named(mode: str, bad: float) -> None:
    values = np.random.default_rng(0).normal(size=(40, 128)).astype(np.float32)
    values[17, 77] = values[30, 3] = bad
    with pytest.raises(NonFiniteError) as caught:
        encode(values, "F32", "F32", parse_codec(mode))
    assert caught.value.row == 17
