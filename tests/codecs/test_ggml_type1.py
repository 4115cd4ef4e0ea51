"""The encoders of x = d * code + m against ggml's own, byte for byte; and against hashes where libgguf has no wheel."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxquant.codecs.ggml import block
from mlxquant.codecs.ggml_search import clipped, nearest
from mlxquant.codecs.ggml_type1 import ENCODERS
from tests.libgguf_oracle import libgguf_x86

Array = np.ndarray[Any, Any]
NONE = np.empty(0, np.float32)
FILLER = 0xA5  # what `out` holds before: bytes that a kernel leaves out show
SMALL = ("Q4_1", "Q5_1")
WIDTHS = [(name, width) for name in ENCODERS for width in ((32, 96, 544) if name in SMALL else ()) + (256, 512)]


def encode(name: str, rows: Array, importance: Array = NONE) -> Array:
    elements, size = block(name)
    out = np.full((len(rows), rows.shape[1] // elements * size), FILLER, np.uint8)
    ENCODERS[name](np.ascontiguousarray(rows).reshape(-1), importance, rows.shape[1], out.reshape(-1))
    return out


def ggml(name: str, rows: Array, importance: Array = NONE) -> Array:
    libgguf = libgguf_x86()
    raw = libgguf.quantize_rows(
        rows, libgguf.GGMLQuantizationType[name], imatrix=importance if importance.size else None
    )
    return np.asarray(raw).reshape(len(rows), -1)


def same(name: str, rows: Array, importance: Array = NONE) -> None:
    theirs, ours = ggml(name, rows, importance), encode(name, rows, importance)
    differ = np.flatnonzero((theirs != ours).any(1))
    assert not differ.size, f"rows {differ[:8]} of {len(rows)}, first {rows[differ[0]][:8]}"


Make = Callable[[np.random.Generator, tuple[int, int]], Array]


def outlier(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    rows = rng.normal(size=shape) * 0.01
    rows[np.arange(len(rows)), rng.integers(0, shape[1], len(rows))] = rng.choice(
        [3e38, -3e38, 1e5, -7e4, 10], len(rows)
    )
    return rows


def signed_zeros(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return rng.choice([0.0, -0.0], shape)


def sparse(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Blocks whose least weight is a zero: the first of them gives its sign to Q4_1's minimum."""
    rows = signed_zeros(rng, shape)
    kept = rng.uniform(size=shape) < 0.1
    rows[kept] = np.abs(rng.normal(size=int(kept.sum())))
    return rows


def mixed(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return np.ldexp(rng.normal(size=shape), rng.integers(-140, 120, shape))


def groups_apart(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Each 16 weights of their own size: scales that round to 0 beside others, where the search's codes stay."""
    sizes = 10.0 ** rng.uniform(-20, 4, (shape[0], shape[1] // 16))
    return rng.normal(size=shape) * sizes.repeat(16, 1)


ROWS: dict[str, Make] = {
    "Gaussian": lambda rng, shape: rng.normal(size=shape) * 0.02,
    "Student t": lambda rng, shape: rng.standard_t(1.5, shape) * 0.05,
    "constant": lambda rng, shape: rng.normal(size=(shape[0], 1)).repeat(shape[1], 1),
    "zero": lambda rng, shape: np.zeros(shape),
    "signed zeros": signed_zeros,
    "sparse": sparse,
    "denormal": lambda rng, shape: rng.normal(size=shape) * 1e-41,
    "few denormals": lambda rng, shape: rng.normal(size=shape) * 3e-45,
    "1 / d overflows": lambda rng, shape: rng.normal(size=shape) * 1e-38,
    "d is 0 in float16": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.uniform(-17, -6, (shape[0], 1)),
    "squares overflow": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.uniform(4, 22, (shape[0], 1)),
    "huge": lambda rng, shape: rng.normal(size=shape) * 1e30,
    "the range overflows": lambda rng, shape: rng.uniform(-1, 1, shape) * 3.4e38,
    "one outlier": outlier,
    "sorted": lambda rng, shape: np.sort(rng.normal(size=shape), 1),
    "above zero": lambda rng, shape: rng.uniform(1, 2, shape),
    "below zero": lambda rng, shape: -rng.uniform(1, 2, shape),
    "steps": lambda rng, shape: rng.integers(-16, 17, shape) / 2,
    "mixed exponents": mixed,
    "mixed, below zero": lambda rng, shape: -np.abs(mixed(rng, shape)),
    "groups apart": groups_apart,
}
IMPORTANCE: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "none": lambda rng, width: NONE,
    "positive": lambda rng, width: rng.uniform(0.1, 4, width),
    "with zeros": lambda rng, width: rng.uniform(0, 1, width) * (rng.uniform(size=width) < 0.4),
    "with blocks of zeros": lambda rng, width: rng.uniform(0, 1, width) * (np.arange(width) // 32 % 2),
    "zero": lambda rng, width: np.zeros(width),
    "constant": lambda rng, width: np.full(width, 3.0),
    "wide": lambda rng, width: 10.0 ** rng.uniform(-36, 36, width),
    "largest": lambda rng, width: rng.uniform(0, 3e38, width),
}


@pytest.mark.parametrize("kind", IMPORTANCE)
@pytest.mark.parametrize(("name", "width"), WIDTHS)
def test_the_bytes_are_ggml_s(name: str, width: int, kind: str) -> None:
    rng = np.random.default_rng(width)
    importance = IMPORTANCE[kind](rng, width).astype(np.float32)
    for make in ROWS.values():
        same(name, np.clip(make(rng, (6, width)), -3.4e38, 3.4e38).astype(np.float32), importance)


@pytest.mark.parametrize("name", ENCODERS)
def test_scales_below_zero(name: str) -> None:
    """Where a weight or two of a group count, fits are rounding noise: scales are negative, their codes wrap.

    Next to weights that hardly differ, one may be a million times the others, and its code garbage.
    """
    rng = np.random.default_rng(5)
    shape = (64, 4096)
    apart = np.abs(np.ldexp(rng.normal(size=shape), rng.integers(-20, 20, shape)))
    alike = 1 + np.abs(rng.normal(size=shape)) * 1e-6
    for rows in (apart, -apart, -alike):
        for share in (0.04, 0.06, 0.12):
            importance = np.exp(rng.normal(size=4096) * 8) * (rng.uniform(size=4096) < share)
            same(name, rows.astype(np.float32), importance.astype(np.float32))


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_that_tiles_cut(name: str) -> None:
    """4096 weights are a tile: here rows begin and end inside tiles, and the last tile has a rest."""
    rng = np.random.default_rng(3)
    rows = rng.standard_t(3, (23, 768)).astype(np.float32)
    for importance in (NONE, rng.uniform(0.1, 4, 768).astype(np.float32)):
        same(name, rows, importance)
        alone = np.concatenate([encode(name, row[None], importance) for row in rows])
        np.testing.assert_array_equal(alone, encode(name, rows, importance))


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(ENCODERS)),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 4),
    low=st.integers(-45, 37),
    span=st.integers(0, 12),
    shift=st.sampled_from([0.0, 0.0, 1.0, -1.0, 30.0, -30.0]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_bytes_are_ggml_s_for_any_rows(
    name: str, rows: int, blocks: int, low: int, span: int, shift: float, weighted: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (rows, 256 * blocks)
    size = 10.0 ** np.minimum(low + span * rng.uniform(size=shape), 36)
    importance = 10.0 ** rng.uniform(-4, 4, shape[1]) if weighted else NONE
    same(name, ((rng.normal(size=shape) + shift) * size).astype(np.float32), importance.astype(np.float32))


def test_nearest_gives_what_the_bits_say() -> None:
    """ggml's trick as x86-64 computes it: right to 2**22, then garbage; infinity and NaN are not special."""
    assert [nearest(np.float32(x)) for x in (0.5, 1.5, 2.5, -0.5, -1.5, 4194303)] == [0, 2, 2, 0, -2, 4194303]
    assert [nearest(np.float32(x)) for x in (2.0**24, 1e30, np.inf, -np.inf)] == [2097152, 651978, -4194304, -4194304]
    assert nearest(np.float32(np.nan)) == 0
    assert [clipped(np.float32(x), np.int32(15)) for x in (-3, 7.5, 15.4, 99, np.inf)] == [0, 8, 15, 15, 0]


# The first 16 digits of the sha256 of what ggml itself makes of golden_rows(), without and with importance;
# python -c 'from tests.codecs.test_ggml_type1 import print_golden; print_golden()' wrote them.
GOLDEN = {
    "Q4_1": ("77f5d423093f004d", "28ac16d791f1e86b"),
    "Q5_1": ("9f2c56248819f90a", "36ec7fa1cacb46aa"),
    "Q2_K": ("e6185ddac2edad50", "39b250cc000b3f09"),
    "Q4_K": ("a5278880364b9749", "e32fa45fcd7b840f"),
    "Q5_K": ("9fb57f91f0ef3d71", "81b562f04e5af832"),
}


def golden_rows() -> tuple[Array, Array]:
    """Rows and importance that come out the same everywhere: integers of a linear generator, times powers of two."""
    state, numbers = 54321, []
    for _ in range(11 * 512):
        state = (1103515245 * state + 12345) % 2**31
        numbers.append(state >> 7)
    integers = np.array(numbers, np.int64).reshape(11, 512)
    rows = np.ldexp((integers[:10] - 2**23).astype(np.float64), -24)
    rows[1] **= 3
    rows[2] = np.ldexp(rows[2], np.repeat(np.arange(32) - 20, 16))
    rows[3] = np.ldexp(rows[3], 100)
    rows[4] = np.ldexp(rows[4], -130)
    rows[5] = np.round(rows[5] * 8) / 4
    rows[6, :300] = 0
    rows[7, 5] = 1000
    rows[8] = np.ldexp(rows[8], integers[9] % 240 - 120)
    rows[9] = np.ldexp(rows[9], 128)  # beyond half of float32: ranges overflow, and what follows is 0, infinite or NaN
    return rows.astype(np.float32), np.ldexp((integers[10] + 1).astype(np.float32), integers[10] % 80 - 60)


@pytest.mark.parametrize("name", ENCODERS)
def test_golden_hashes(name: str) -> None:
    rows, importance = golden_rows()
    assert (digest(encode(name, rows)), digest(encode(name, rows, importance))) == GOLDEN[name]


def digest(raw: Array) -> str:
    return hashlib.sha256(raw.tobytes()).hexdigest()[:16]


def print_golden() -> None:
    rows, importance = golden_rows()
    for name in ENCODERS:
        print(f'    "{name}": ("{digest(ggml(name, rows))}", "{digest(ggml(name, rows, importance))}"),')
