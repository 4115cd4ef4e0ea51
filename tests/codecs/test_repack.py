"""GGUF blocks into MLX arrays: codes read off the bits here, values against ggml's own decoder and mx.dequantize."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.codecs.encode import decode
from mlxquant.codecs.floats import NonFiniteError
from mlxquant.codecs.ggml import block
from mlxquant.codecs.reference import unpack
from mlxquant.codecs.repack import repack
from mlxquant.codecs.repacked import REPACKED

WIDTH = 512
LOSSLESS = [name for name, repacked in REPACKED.items() if repacked.lossless]


def made(type_name: str, seed: int = 0, scale: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """(raw blocks, what ggml decodes them to)."""
    libgguf = pytest.importorskip("libgguf")
    w_OI = (np.random.default_rng(seed).standard_normal((24, WIDTH)) * scale).astype(np.float32)
    kind = libgguf.GGMLQuantizationType[type_name]
    importance = np.ones(WIDTH, np.float32) if type_name.startswith("IQ") else None
    raw = libgguf.quantize_rows(w_OI, kind, imatrix=importance)
    return raw, gguf.dequantize(raw, gguf.GGMLQuantizationType[type_name])


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
    assert [part.shape for part in parts] == [
        spec.shape for spec in codec.parts("x.weight", (len(raw), WIDTH), "F16")
    ]
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
    libgguf = pytest.importorskip("libgguf")
    w_OI = np.zeros((3, WIDTH), np.float32)
    w_OI[1] = 0.5
    w_OI[2, :16] = np.linspace(-1, 1, 16)  # one of two blocks of a group is zero
    kind = libgguf.GGMLQuantizationType[type_name]
    raw = libgguf.quantize_rows(w_OI, kind)
    values = gguf.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    back = decode(repack(raw, type_name, WIDTH), "F16", REPACKED[type_name].codec)
    assert np.abs(back - values).max() <= 2e-3
    assert not back[0].any()


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
