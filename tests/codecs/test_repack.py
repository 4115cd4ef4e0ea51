"""GGUF blocks into MLX arrays: codes read off the bits here, values against ggml's own decoder and mx.dequantize."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.codecs.encode import decode
from mlxquant.codecs.floats import NonFiniteError
from mlxquant.codecs.ggml import ENCODED, block, decode_rows, encode_rows
from mlxquant.codecs.reference import unpack
from mlxquant.codecs.repack import repack
from mlxquant.codecs.repacked import REPACKED

WIDTH = 512
LOSSLESS = [name for name, repacked in REPACKED.items() if repacked.lossless]


def made(type_name: str, seed: int = 0, scale: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """(raw blocks, what ggml decodes them to)."""
    w_OI = (np.random.default_rng(seed).standard_normal((24, WIDTH)) * scale).astype(np.float32)
    raw = encoded(w_OI, type_name)
    return raw, decoded(raw, type_name)


def encoded(w_OI: np.ndarray, type_name: str) -> np.ndarray:
    """By ggml, or by what is byte-equal to it: then it runs where libgguf has no wheel, too."""
    importance = np.ones(WIDTH, np.float32) if type_name.startswith("IQ") else None
    if type_name in ENCODED:
        return encode_rows(w_OI, "F32", type_name, importance)
    libgguf = pytest.importorskip("libgguf")
    return libgguf.quantize_rows(w_OI, libgguf.GGMLQuantizationType[type_name], imatrix=importance)


def decoded(raw: np.ndarray, type_name: str) -> np.ndarray:
    return gguf.dequantize(raw, gguf.GGMLQuantizationType[type_name])


def nmse(reference: np.ndarray, other: np.ndarray) -> float:
    return float(np.square(reference - other, dtype=np.float64).sum() / np.square(reference, dtype=np.float64).sum())


@pytest.mark.parametrize("type_name", REPACKED)
def test_the_table_tells_what_repacking_adds(type_name: str) -> None:
    raw, values = made(type_name)
    codec = REPACKED[type_name].codec
    extra = nmse(values, decode(repack(raw, type_name, WIDTH), "F16", codec))
    assert extra <= 1.2 * REPACKED[type_name].extra
    assert extra >= 0.8 * REPACKED[type_name].extra


@pytest.mark.parametrize("type_name", REPACKED)
def test_stock_mlx_reads_the_same_values(type_name: str) -> None:
    raw, values = made(type_name)
    codec, parts = REPACKED[type_name].codec, repack(raw, type_name, WIDTH)
    assert [part.shape for part in parts] == [spec.shape for spec in codec.parts("x.weight", (len(raw), WIDTH), "F16")]
    arrays = [mx.array(part) for part in parts]
    scales = [a if a.dtype == mx.uint8 else a.astype(mx.float32) for a in arrays[1:]]
    theirs = mx.dequantize(arrays[0], *scales, group_size=codec.group_size, bits=codec.bits, mode=codec.mode,
                           dtype=mx.float32)  # fmt: skip
    assert nmse(values, np.array(theirs)) <= 1.2 * REPACKED[type_name].extra


@pytest.mark.parametrize("type_name", [name for name in LOSSLESS if name not in ("Q4_K", "Q5_K", "IQ4_XS")])
def test_formats_with_plain_scales_come_back_bit_for_bit(type_name: str) -> None:
    for scale in (0.02, 1e-6, 30.0):
        raw, values = made(type_name, scale=scale)
        assert np.array_equal(decode(repack(raw, type_name, WIDTH), "F16", REPACKED[type_name].codec), values)


def test_q4_k_codes_are_unchanged() -> None:
    """In each 64 weights of a block: 32 bytes, low nibbles first, then high ones."""
    raw, _ = made("Q4_K")
    bytes_ = raw.reshape(-1, 144)[:, 16:].reshape(-1, 4, 32)
    expected = np.stack([bytes_ & 15, bytes_ >> 4], axis=2).reshape(len(raw), WIDTH)
    codes, _, _ = repack(raw, "Q4_K", WIDTH)
    assert np.array_equal(unpack(codes, 4).reshape(len(raw), WIDTH), expected)


def test_q5_k_codes_are_unchanged() -> None:
    """The fifth bits lie in 32 bytes, one bit for each of the eight runs of 32."""
    raw, _ = made("Q5_K")
    blocks = raw.reshape(-1, 176)
    low = blocks[:, 48:].reshape(-1, 4, 32)
    low = np.stack([low & 15, low >> 4], axis=2).reshape(-1, 8, 32)
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes, _, _ = repack(raw, "Q5_K", WIDTH)
    assert np.array_equal(unpack(codes, 5).reshape(-1, 8, 32), low | high << 4)


@pytest.mark.parametrize("type_name", ["Q6_K", "Q3_K"])
def test_zero_blocks_and_rows_of_one_size(type_name: str) -> None:
    w_OI = np.zeros((3, WIDTH), np.float32)
    w_OI[1] = 0.5
    w_OI[2, :16] = np.linspace(-1, 1, 16)  # one of two blocks of a group is zero
    raw = encoded(w_OI, type_name)
    values = decoded(raw, type_name)
    back = decode(repack(raw, type_name, WIDTH), "F16", REPACKED[type_name].codec)
    assert np.abs(back - values).max() <= 2e-3
    assert not back[0].any()


@pytest.mark.parametrize("larger", [0, 1])
@pytest.mark.parametrize(("type_name", "most"), [("Q6_K", 1e-6), ("Q3_K", 5e-6)])
def test_of_two_blocks_the_one_with_the_larger_scale_stays_exact(type_name: str, most: float, larger: int) -> None:
    """But for scales and biases in float16; min and max would make it ten times as much at least."""
    w_OI = np.random.default_rng(0).standard_normal((24, WIDTH // 32, 2, 16)).astype(np.float32)
    w_OI[:, :, 1 - larger] *= 0.05
    raw = encoded(w_OI.reshape(24, WIDTH), type_name)
    back = decode(repack(raw, type_name, WIDTH), "F16", REPACKED[type_name].codec)
    found, values = (x.reshape(-1, 2, 16)[:, larger] for x in (back, decoded(raw, type_name)))
    assert nmse(values, found) < most


@pytest.mark.parametrize("type_name", ["Q6_K", "Q3_K"])
def test_no_group_loses_more_than_by_rounding_between_its_least_and_greatest(type_name: str) -> None:
    raw, values = made(type_name)
    codec = REPACKED[type_name].codec
    group = values.reshape(-1, 32)
    lo, hi = np.minimum(group.min(1, keepdims=True), 0), np.maximum(group.max(1, keepdims=True), 0)
    scale = ((hi - lo) / np.float32(2**codec.bits - 1)).astype(np.float16).astype(np.float32)
    bias = (np.rint(lo / scale) * scale).astype(np.float16).astype(np.float32)
    plain = np.clip(np.rint((group - bias) / scale), 0, 2**codec.bits - 1) * scale + bias
    back = decode(repack(raw, type_name, WIDTH), "F16", codec).reshape(-1, 32)
    ours, theirs = (np.square(found - group).sum(1) for found in (back, plain))
    assert (ours <= theirs * np.float32(1.001)).all()


def test_a_bias_beyond_float16_is_refused_with_its_row() -> None:
    """Q8_0's scale of 1000 fits; its bias, 128 times that, does not."""
    raw, _ = made("Q8_0")
    raw[7, :2] = np.frombuffer(np.float16(1000).tobytes(), np.uint8)
    with pytest.raises(NonFiniteError, match="too large for float16") as error:
        repack(raw, "Q8_0", WIDTH)
    assert error.value.row == 7


def test_nvfp4_scales_that_are_nan_are_zero_as_in_ggml() -> None:
    raw = np.random.default_rng(0).integers(0, 64, (4, WIDTH // 64 * 36)).astype(np.uint8)
    raw[2, 1] = 0x7F
    back = decode(repack(raw, "NVFP4", WIDTH), "F16", REPACKED["NVFP4"].codec)
    assert np.array_equal(back, decode_rows(raw, "NVFP4", WIDTH))
    assert not back[2, 16:32].any()


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_K", "Q6_K"])
def test_a_scale_that_is_nan_is_refused_with_its_row(type_name: str) -> None:
    raw, _ = made(type_name)
    damaged = raw.copy()
    at = block(type_name)[1] - 2 if type_name == "Q6_K" else 0
    damaged[7, at : at + 2] = 0xFF
    with pytest.raises(NonFiniteError) as error:
        repack(damaged, type_name, WIDTH)
    assert error.value.row == 7


def test_rows_split_anywhere_give_the_same_arrays() -> None:
    raw, _ = made("Q6_K")
    whole = repack(raw, "Q6_K", WIDTH)
    parts = [repack(raw[:5], "Q6_K", WIDTH), repack(raw[5:], "Q6_K", WIDTH)]
    for a, b in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.array_equal(a, np.concatenate(b))
