"""The corners of IQ4 and of the ternary types that whole rows may miss; test_ggml_encode.py holds the rest."""

from __future__ import annotations

import numpy as np
import pytest

from mlxquant.codecs.ggml import decode_rows, encode_rows
from mlxquant.codecs.ggml_iq4 import LEVELS, _code, _level
from tests.codecs.ggml_rows import ggml_encode


def nearest_in_c(x: np.float32) -> int:
    """best_index_int8 of ggml-quants.c, line by line: NaN fails every comparison."""
    if x <= LEVELS[0]:
        return 0
    if x >= LEVELS[-1]:
        return 15
    low, high = 0, 15
    while high - low > 1:
        middle = (low + high) // 2
        if x < LEVELS[middle]:
            high = middle
        else:
            low = middle
    return high - 1 if x - LEVELS[high - 1] < LEVELS[high] - x else high


def test_the_nearest_level_is_that_of_c() -> None:
    """Counting half-way points below x instead of searching: the same for every float near one, and for NaN."""
    middles = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
    near = np.concatenate([middles, LEVELS])
    points = [near, np.linspace(-130, 120, 5001, dtype=np.float32)]
    for _ in range(3):
        points += [np.nextafter(points[-1][: near.size], np.float32(-np.inf))]
    up = near
    for _ in range(3):
        up = np.nextafter(up, np.float32(np.inf))
        points.append(up)
    odd = np.array([0, -0.0, 1e-45, np.inf, -np.inf, np.nan, 3e38, -3e38], np.float32)
    for x in np.concatenate([*points, odd]):
        expected = nearest_in_c(x)
        assert _code(x) == expected, x
        assert _level(x) == LEVELS[expected], x


@pytest.mark.parametrize("type_name", ["IQ4_NL", "IQ4_XS"])
def test_any_number_of_blocks(type_name: str) -> None:
    """64 blocks go side by side; the last tile is rarely full, and what stood in it before must not show."""
    width = 256
    values = (np.random.default_rng(0).standard_t(3, (40, width)) * 3).astype(np.float32)
    importance = np.random.default_rng(1).exponential(size=width).astype(np.float32)
    for rows in (1, 7, 8, 9, 16, 17, 40):
        for weights in (None, importance):
            ours = encode_rows(values[:rows], "F32", type_name, weights)
            np.testing.assert_array_equal(ours, ggml_encode(values[:rows], type_name, weights))


@pytest.mark.parametrize("type_name", ["IQ4_NL", "IQ4_XS"])
def test_importance_moves_the_error_to_where_it_does_not_matter(type_name: str) -> None:
    rows = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    importance = np.where(np.arange(512) % 4 == 0, 100, 1).astype(np.float32)

    def error(weights: np.ndarray | None) -> float:
        back = decode_rows(encode_rows(rows, "F32", type_name, weights), type_name, 512)
        return float((importance * (back - rows) ** 2).mean())

    assert error(importance) < 0.9 * error(None)


def test_a_scale_that_is_not_a_number_has_the_bits_of_x86() -> None:
    """Squares overflow, infinity over infinity is NaN; its sign differs between machines, the file must not."""
    rows = np.full((1, 32), 1e30, np.float32)
    block = encode_rows(rows, "F32", "IQ4_NL")
    assert block[0, :2].tobytes() == b"\x00\xfe"
    assert block.tobytes() == ggml_encode(rows, "IQ4_NL").tobytes()


@pytest.mark.parametrize("type_name", ["TQ1_0", "TQ2_0"])
def test_halves_round_away_from_zero_and_tiny_blocks_to_zero(type_name: str) -> None:
    half = np.nextafter(np.float32(0.5), np.float32(0))
    rows = np.zeros((4, 256), np.float32)
    rows[0, :6] = 1, 0.5, -0.5, half, -half, -1
    rows[1, :2] = 2.0**-127, -(2.0**-127)  # a normal inverse
    rows[2, :2] = 2.0**-128, -(2.0**-128)  # an infinite one
    rows[3, :2] = 3e38, -1.6e38
    raw = encode_rows(rows, "F32", type_name)
    assert raw.tobytes() == ggml_encode(rows, type_name).tobytes()
    np.testing.assert_array_equal(decode_rows(raw, type_name, 256)[0, :6], [1, 1, -1, 0, 0, -1])
