"""Decoding against ggml itself (libgguf), the `gguf` package and, for the simplest types, the formula written out."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from mlxquant.codecs import blocks
from mlxquant.codecs.ggml import ENCODED, block, decode_rows, known_types
from mlxquant.errors import UnsupportedError
from tests.codecs.ggml_rows import ggml_decode

WIDTH = 512


def random_blocks(type_name: str, rows: int = 9, seed: int = 0) -> np.ndarray:
    """Any bytes are valid codes; scales among them may be NaN or infinite, which must decode the same."""
    elements, size = block(type_name)
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, WIDTH // elements * size), dtype=np.uint8)


QUANTIZED = sorted(set(known_types()) - {"F32", "F16", "BF16"})


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Zero's sign included; any NaN is as good as another, since machines differ in its bits."""
    assert ours.dtype == theirs.dtype == np.float32
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_same_numbers_as_ggml(type_name: str) -> None:
    raw = random_blocks(type_name, rows=200)
    assert_same_bits(decode_rows(raw, type_name, WIDTH), ggml_decode(raw, type_name))


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_same_numbers_as_gguf(type_name: str) -> None:
    """Where libgguf has no wheel, too. Every byte value in every place: 512 blocks at least."""
    raw = random_blocks(type_name, rows=300, seed=1)
    with np.errstate(all="ignore"):
        theirs = quants.dequantize(raw, GGMLQuantizationType[type_name]).reshape(len(raw), WIDTH)
    assert_same_bits(decode_rows(raw, type_name, WIDTH), theirs)


def test_same_numbers_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", 1)
    for type_name in ENCODED:
        raw = random_blocks(type_name, rows=37)
        results = set()
        for threads in (1, 2, 3):
            monkeypatch.setattr(blocks, "cores", lambda threads=threads: threads)
            results.add(decode_rows(raw, type_name, WIDTH).tobytes())
        assert len(results) == 1


def test_rows_cut_out_of_others_and_read_only_ones() -> None:
    for type_name in ENCODED:
        raw = random_blocks(type_name)
        expected = decode_rows(raw, type_name, WIDTH).tobytes()
        padded = np.concatenate([raw, raw], 1)[:, : raw.shape[1]]
        assert decode_rows(padded, type_name, WIDTH).tobytes() == expected
        raw.flags.writeable = False
        assert decode_rows(raw, type_name, WIDTH).tobytes() == expected


def halves(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def test_q8_0_formula() -> None:
    blocks = random_blocks("Q8_0").reshape(9, -1, 34)
    blocks[..., 1] &= 0xBF  # an exponent that is not infinity's
    expected = blocks[..., 2:].view(np.int8) * halves(blocks[..., :2])
    np.testing.assert_array_equal(decode_rows(blocks.reshape(9, -1), "Q8_0", WIDTH), expected.reshape(9, -1))


def test_q4_0_and_q4_1_formula() -> None:
    for name, head in (("Q4_0", 2), ("Q4_1", 4)):
        blocks = random_blocks(name).reshape(9, -1, head + 16)
        blocks[..., 1:head:2] &= 0xBF
        codes = np.concatenate([blocks[..., head:] & 15, blocks[..., head:] >> 4], -1).astype(np.float32)
        scale = halves(blocks[..., :2])
        expected = scale * (codes - 8) if name == "Q4_0" else scale * codes + halves(blocks[..., 2:4])
        np.testing.assert_array_equal(decode_rows(blocks.reshape(9, -1), name, WIDTH), expected.reshape(9, -1))


def test_floats_are_widened() -> None:
    values = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    bf16 = (values.view(np.uint32) >> 16).astype(np.uint16)
    for name, raw in (("F32", values), ("F16", values.astype(np.float16)), ("BF16", bf16)):
        out = decode_rows(raw.view(np.uint8), name, 8)
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, values, rtol=2**-7)
    assert decode_rows(np.empty((0, 18), np.uint8), "Q4_0", 32).shape == (0, 32)


def test_block_sizes() -> None:
    assert block("Q4_K") == (256, 144)
    assert block("IQ4_NL") == (32, 18)
    assert block("F16") == (1, 2)


@pytest.mark.parametrize("name", ["Q4_0_4_4", "I32", "q4_0", "", "Q9_X"])
def test_unknown_types_are_named_with_the_known(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"type {name} cannot be read.*Q4_0.*IQ4_XS") as caught:
        block(name)
    assert caught.value.hint


@pytest.mark.parametrize(("shape", "width"), [((2, 17), 32), ((2, 18), 33), ((18,), 32)])
def test_rows_of_another_length_are_refused(shape: tuple[int, ...], width: int) -> None:
    with pytest.raises(ValueError, match="Q4_0"):
        decode_rows(np.zeros(shape, np.uint8), "Q4_0", width)
