"""Affine rows against stock MLX: codes, scales and biases, bit for bit."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.codecs import reference
from mlxquant.codecs.encode import NonFiniteError, decode, encode
from mlxquant.codecs.floats import narrow, widen
from mlxquant.codecs.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, affine
from tests.codecs.rows import bits, exact, mlx_quantize, rows, same, to_mlx

DTYPES = ("BF16", "F16", "F32")


@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("width", AFFINE_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_mlx(dtype: str, width: int, group_size: int) -> None:
    raw = rows(dtype)
    codec = affine(width, group_size)
    ours = encode(raw, dtype, dtype, codec)
    same(ours, mlx_quantize(raw, dtype, dtype, bits=width, group_size=group_size))
    same(ours, reference.encode(exact(raw, dtype, dtype), dtype, codec))
    specs = codec.parts("w.weight", raw.shape, dtype)
    assert [part.shape for part in ours] == [spec.shape for spec in specs]
    assert [part.nbytes for part in ours] == [spec.nbytes for spec in specs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_rows_are_first_rounded_to_the_models_dtype(source: str, dtype: str) -> None:
    raw = rows(source, seed=1, largest=6e4)
    same(encode(raw, source, dtype, affine(4, 64)), mlx_quantize(raw, source, dtype, bits=4, group_size=64))


def test_float64_rows() -> None:
    raw = rows("F32", seed=2, largest=1e30).astype(np.float64) * (1 + 1e-9)
    expected = encode(raw.astype(np.float32), "F32", "BF16", affine(4, 64))
    same(encode(raw, "F64", "BF16", affine(4, 64)), expected)


@pytest.mark.parametrize("width", AFFINE_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_mlx_dequantize_in_float32(dtype: str, width: int) -> None:
    codec = affine(width, 64)
    parts = encode(rows(dtype, seed=3), dtype, dtype, codec)
    with mx.stream(mx.cpu):
        scales, biases = (to_mlx(part, dtype).astype(mx.float32) for part in parts[1:])
        expected = np.array(mx.dequantize(mx.array(parts[0]), scales, biases, group_size=64, bits=width))
    np.testing.assert_array_equal(bits(decode(parts, dtype, codec)), bits(expected))
    np.testing.assert_array_equal(bits(reference.decode(parts, dtype, codec)), bits(expected))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_mlx_dequantize_in_16_bits_rounds_product_and_sum(dtype: str) -> None:
    codec = affine(4, 64)
    parts = encode(rows(dtype, seed=4, largest=1e4), dtype, dtype, codec)
    with mx.stream(mx.cpu):
        q, s, b = mx.array(parts[0]), to_mlx(parts[1], dtype), to_mlx(parts[2], dtype)
        theirs = np.array(mx.dequantize(q, s, b, group_size=64, bits=4).astype(mx.float32))
    scale, bias = (widen(part, dtype)[..., None] for part in parts[1:])
    codes = reference.unpack(parts[0], 4).reshape(*scale.shape[:2], 64).astype(np.float32)
    product = widen(narrow(codes * scale, dtype), dtype)
    rounded = widen(narrow(product + bias, dtype), dtype)
    np.testing.assert_array_equal(theirs, rounded.reshape(theirs.shape))
    assert (theirs != decode(parts, dtype, codec)).any()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_row_that_is_not_finite_is_named(dtype: str, bad: float) -> None:
    values = np.random.default_rng(0).normal(size=(40, 128)).astype(np.float32)
    values[17, 77] = values[30, 3] = bad
    with pytest.raises(NonFiniteError) as caught:
        encode(narrow(values, dtype), dtype, dtype, affine(4, 64))
    assert caught.value.row == 17


def test_the_row_is_found_in_any_thread() -> None:
    values = np.zeros((1200, 1024), np.float32)
    values[1111, 1000] = values[1150, 0] = np.nan
    with pytest.raises(NonFiniteError) as caught:
        encode(values, "F32", "BF16", affine(4, 64))
    assert caught.value.row == 1111


def test_overflow_of_the_models_dtype_is_refused() -> None:
    values = np.full((2, 64), 1e5, np.float32)
    with pytest.raises(NonFiniteError, match="F16"):
        encode(values, "F32", "F16", affine(8, 64))
    encode(values, "F32", "BF16", affine(8, 64))


def test_a_range_beyond_float32_is_refused_where_mlx_stores_infinity() -> None:
    values = np.full((1, 64), 3e38, np.float32)
    values[0, ::2] *= -1
    assert np.isinf(mlx_quantize(values, "F32", "F32", bits=4, group_size=64)[1]).all()
    with pytest.raises(NonFiniteError):
        encode(values, "F32", "F32", affine(4, 64))


def test_row_chunks_threads_and_layout_do_not_change_the_bytes() -> None:
    raw = narrow(np.random.default_rng(5).normal(size=(1030, 640)).astype(np.float32), "BF16")
    codec = affine(3, 64)
    whole = encode(raw, "BF16", "BF16", codec)
    chunks = [encode(raw[at : at + 7], "BF16", "BF16", codec) for at in range(0, len(raw), 7)]
    same(whole, [np.concatenate(parts) for parts in zip(*chunks, strict=True)])
    with ThreadPoolExecutor(4) as pool:
        for parts in pool.map(lambda _: encode(raw, "BF16", "BF16", codec), range(8)):
            same(whole, parts)
    unaligned = np.frombuffer(b"x" + raw.tobytes(), np.uint16, offset=1, count=raw.size).reshape(raw.shape)
    same(whole, encode(unaligned, "BF16", "BF16", codec))
    same(whole, encode(np.asfortranarray(raw), "BF16", "BF16", codec))


def test_no_rows() -> None:
    parts = encode(np.empty((0, 128), np.uint16), "BF16", "BF16", affine(4, 64))
    assert [part.shape for part in parts] == [(0, 16), (0, 2), (0, 2)]
    assert decode(parts, "BF16", affine(4, 64)).shape == (0, 128)


def test_what_no_plan_contains_is_refused_before_a_kernel_sees_it() -> None:
    raw = np.zeros((2, 96), np.uint16)
    with pytest.raises(ValueError, match="whole groups of 64"):
        encode(raw, "BF16", "BF16", affine(4, 64))
    with pytest.raises(ValueError, match="I32"):
        encode(raw, "BF16", "I32", affine(4, 32))
    with pytest.raises(ValueError, match="BF16"):
        encode(raw.astype(np.uint32), "BF16", "BF16", affine(4, 32))
    codes, scales, biases = encode(raw, "BF16", "BF16", affine(4, 32))
    for broken in (
        (codes, scales),
        (codes[:1], scales, biases),
        (codes, scales[:, :2], biases),
        (codes[:, :5], scales, biases),
        (codes.astype(np.uint64), scales, biases),
        (codes[0], scales[0], biases[0]),
    ):
        with pytest.raises(ValueError, match="4g32"):
            decode(broken, "BF16", affine(4, 32))


@pytest.mark.parametrize("source", DTYPES)
def test_no_large_temporary_is_made(source: str) -> None:
    raw = np.zeros((1024, 2048), np.float32).astype({"F16": np.float16, "F32": np.float32}.get(source, np.uint16))
    encode(raw[:1], source, "BF16", affine(4, 64))
    tracemalloc.start()
    parts = encode(raw, source, "BF16", affine(4, 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sum(part.nbytes for part in parts) + 200_000
