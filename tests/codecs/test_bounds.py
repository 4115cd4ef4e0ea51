"""The promised error: kept by every row, and broken by a code that is a little off."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlxquant.codecs import reference
from mlxquant.codecs.encode import decode, encode, error_bound
from mlxquant.codecs.floats import Array, narrow
from mlxquant.codecs.spec import AFFINE_BITS, KEEP, Codec, affine, parse_codec
from tests.codecs.rows import exact, rows

CODECS = [affine(bits, 32) for bits in AFFINE_BITS] + [parse_codec(mode) for mode in ("mxfp4", "nvfp4", "mxfp8")]
label = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.label)
dtypes = pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])


def worst(w_OI: Array, decoded: Array, codec: Codec) -> Array:
    error = np.abs(w_OI.astype(np.float64) - decoded)
    return np.asarray(error.reshape(len(w_OI), -1, codec.group_size).max(-1))


@label
@dtypes
def test_every_known_row_keeps_it(dtype: str, codec: Codec) -> None:
    raw = rows(dtype, largest=6e4 if dtype == "F16" else 1e38)
    w = exact(raw, dtype, dtype)
    decoded = decode(encode(raw, dtype, dtype, codec), dtype, codec)
    assert (worst(w, decoded, codec) <= error_bound(w, dtype, codec)).all()


weights = st.one_of(
    st.floats(-1, 1, width=32),
    st.floats(-60000, 60000, width=32),
    st.floats(-(2.0**-20), 2.0**-20, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 6.0, 448.0, 0.1]),
)


@label
@dtypes
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=arrays(np.float32, (2, 32), elements=weights, fill=st.sampled_from([0.0, 0.5, -3.0])))
def test_any_row_keeps_it(dtype: str, codec: Codec, values: Array) -> None:
    raw = narrow(values, dtype)
    w = exact(raw, dtype, dtype)
    decoded = decode(encode(raw, dtype, dtype, codec), dtype, codec)
    assert (worst(w, decoded, codec) <= error_bound(w, dtype, codec)).all()


@pytest.mark.parametrize("bits", AFFINE_BITS)
@dtypes
def test_a_code_two_steps_off_breaks_it(dtype: str, bits: int) -> None:
    codec = affine(bits, 32)
    raw = narrow(np.random.default_rng(bits).normal(size=(200, 32)).astype(np.float32), dtype)
    w = exact(raw, dtype, dtype)
    codes, scales, biases = encode(raw, dtype, dtype, codec)
    plain = reference.unpack(codes, bits)
    steps = 2 if bits < 8 or dtype != "BF16" else 3  # 255 roundings of a bfloat16 scale are half a step more
    plain[:, 7] = np.where(plain[:, 7] >= steps, plain[:, 7] - steps, plain[:, 7] + steps)
    decoded = decode((reference.pack(plain, bits), scales, biases), dtype, codec)
    broken = worst(w, decoded, codec) > error_bound(w, dtype, codec)
    assert broken.mean() > 0.9


@label
def test_a_scale_that_is_off_breaks_it(codec: Codec) -> None:
    raw = narrow(np.random.default_rng(1).normal(size=(200, 32)).astype(np.float32), "F32")
    codes, scales, *biases = encode(raw, "F32", "F32", codec)
    off = scales * np.float32(1.5) if codec.mode == "affine" else (scales + 8 if codec.label == "nvfp4" else scales + 1)
    decoded = decode((codes, off, *biases), "F32", codec)
    assert (worst(raw, decoded, codec) > error_bound(raw, "F32", codec)).mean() > 0.9


@label
def test_it_is_no_larger_than_it_must_be(codec: Codec) -> None:
    """Some group among many comes within a fifth of its bound."""
    raw = np.random.default_rng(2).normal(size=(4000, 32)).astype(np.float32)
    decoded = decode(encode(raw, "F32", "F32", codec), "F32", codec)
    assert (worst(raw, decoded, codec) / error_bound(raw, "F32", codec)).max() > 0.8


def test_an_affine_error_can_be_a_whole_step() -> None:
    """Why the bound is not half a step: 1 is 1.5 steps of 2/3, made into 2 of 0.5, and 3 of those end at -0.5."""
    w = np.zeros((1, 32), np.float32)
    w[0, 0], w[0, 1] = 1.0, -1.0
    codes = encode(w, "F32", "F32", affine(2, 32))
    error = worst(w, decode(codes, "F32", affine(2, 32)), affine(2, 32))
    assert error[0, 0] == abs(codes[1][0, 0]) == 0.5


def test_kept_rows_are_exact() -> None:
    raw = rows("BF16")
    assert decode(encode(raw, "BF16", "BF16", KEEP), "BF16", KEEP).tobytes() == exact(raw, "BF16", "BF16").tobytes()
    assert (error_bound(exact(raw, "BF16", "BF16"), "BF16", KEEP) == 0).all()
