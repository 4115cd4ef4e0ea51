"""ggml blocks against ggml's own code (libgguf) and, for the simplest types, the formula written out."""

from __future__ import annotations

import numpy as np
import pytest

from mlxquant.codecs.ggml import block, decode_rows, known_types
from mlxquant.errors import UnsupportedError

WIDTH = 512


def random_blocks(type_name: str, rows: int = 9, seed: int = 0) -> np.ndarray:
    """Any bytes are valid codes; scales among them may be NaN or infinite, which must decode the same."""
    elements, size = block(type_name)
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, WIDTH // elements * size), dtype=np.uint8)


@pytest.mark.parametrize("type_name", sorted(set(known_types()) - {"F32", "F16", "BF16"}))
def test_same_numbers_as_ggml(type_name: str) -> None:
    libgguf = pytest.importorskip("libgguf")
    kind = libgguf.GGMLQuantizationType[type_name]
    raw = random_blocks(type_name)
    theirs = libgguf.dequantize_rows(raw, kind)
    ours = decode_rows(raw, type_name, WIDTH)
    np.testing.assert_array_equal(ours, theirs)


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
