"""The encoders of x = d * q against ggml's own, byte for byte; and against hashes where libgguf has no wheel."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxquant.codecs.ggml import block
from mlxquant.codecs.ggml_scales import LANES
from mlxquant.codecs.ggml_type0 import ENCODERS
from tests.codecs.ggml_rows import ggml_encode

Array = np.ndarray[Any, Any]
NONE = np.empty(0, np.float32)
FILLER = 0xA5  # what `out` holds before: bytes that a kernel leaves out show
SMALL = ("Q4_0", "Q5_0", "Q8_0")
WIDTHS = [(name, width) for name in ENCODERS for width in ((32, 96, 544) if name in SMALL else ()) + (256, 512)]


def encode(name: str, rows: Array, importance: Array = NONE) -> Array:
    elements, size = block(name)
    out = np.full((len(rows), rows.shape[1] // elements * size), FILLER, np.uint8)
    ENCODERS[name](np.ascontiguousarray(rows, np.float32).reshape(-1), importance, rows.shape[1], out.reshape(-1))
    return out


def ggml(name: str, rows: Array, importance: Array = NONE) -> Array:
    return ggml_encode(np.ascontiguousarray(rows, np.float32), name, importance if importance.size else None)


def same(name: str, rows: Array, importance: Array = NONE) -> None:
    theirs, ours = ggml(name, rows, importance), encode(name, rows, importance)
    differ = np.flatnonzero((theirs != ours).any(1))
    assert not differ.size, f"{name}: rows {differ[:8]} of {len(rows)}, first {rows[differ[0]][:8]}"


def mixed(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return np.ldexp(rng.normal(size=shape), rng.integers(-120, 120, size=shape))


def outliers(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    rows = rng.normal(size=shape) * 0.01
    rows[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = 1000.0
    return rows


def steps(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Few values: halves that round to even or away from zero, and tops that are there with both signs."""
    return rng.integers(-16, 17, size=shape) / 2


def beside_halves(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Halves and their neighbours in float32; the top is 127, so that Q8_0 divides by 1."""
    halves = (rng.integers(-20, 20, size=shape) + np.float32(0.5)).astype(np.float32)
    rows = np.nextafter(halves, halves + rng.integers(-1, 2, shape).astype(np.float32))
    rows[:, ::32] = 127
    rows[1::2] /= 8
    return rows


def one_sign(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return rng.uniform(1, 2, size=shape) * rng.choice([-1, 1], (shape[0], 1))


def signed_zeros(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return np.where(rng.uniform(size=shape) < 0.5, 0.0, -0.0)


def sparse(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Whole groups of zeros beside others, of either sign."""
    return signed_zeros(rng, shape) + rng.normal(size=shape) * (rng.uniform(size=shape) < 0.03)


def groups_apart(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Each 16 weights at their own size: scales that round to 0 beside others, where the search's codes stay."""
    rows = rng.normal(size=shape).reshape(shape[0], -1, 16)
    return (rows * 10.0 ** rng.uniform(-20, 4, size=(*rows.shape[:2], 1))).reshape(shape)


ROWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "Gaussian": lambda rng, shape: rng.normal(size=shape) * 0.02,
    "Student t": lambda rng, shape: rng.standard_t(2, size=shape) * 0.05,
    "constant": lambda rng, shape: np.broadcast_to(rng.normal(size=(shape[0], 1)), shape),
    "zero": lambda rng, shape: np.zeros(shape),
    "signed zeros": signed_zeros,
    "sparse": sparse,
    "denormal": lambda rng, shape: rng.normal(size=shape) * 1e-40,
    "near denormal": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.uniform(-39, -33, (shape[0], 1)),
    "near the least group": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.uniform(-17, -6, (shape[0], 1)),
    "huge": lambda rng, shape: rng.normal(size=shape) * 1e30,
    "largest": lambda rng, shape: rng.uniform(-1, 1, size=shape) * 3.4e38,
    "near overflow": lambda rng, shape: rng.normal(size=shape) * 10.0 ** rng.uniform(4, 22, (shape[0], 1)),
    "one outlier": outliers,
    "sorted": lambda rng, shape: np.sort(rng.normal(size=shape), 1),
    "one sign": one_sign,
    "steps": steps,
    "beside halves": beside_halves,
    "mixed exponents": mixed,
    "groups apart": groups_apart,
    "groups of huge": lambda rng, shape: groups_apart(rng, shape) * 1e20,
}
IMPORTANCE: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "none": lambda rng, width: NONE,
    "positive": lambda rng, width: rng.uniform(0.1, 4, width),
    "with zeros": lambda rng, width: rng.uniform(0, 1, width) * (rng.uniform(size=width) < 0.4),
    "zero": lambda rng, width: np.zeros(width),
    "constant": lambda rng, width: np.ones(width),
    "wide": lambda rng, width: 10.0 ** rng.uniform(-30, 30, width),
}


@pytest.mark.parametrize("kind", IMPORTANCE)
@pytest.mark.parametrize(("name", "width"), WIDTHS)
def test_the_bytes_are_ggml_s(name: str, width: int, kind: str) -> None:
    rng = np.random.default_rng(width)
    importance = IMPORTANCE[kind](rng, width).astype(np.float32)
    for make in ROWS.values():
        with np.errstate(under="ignore"):
            same(name, make(rng, (5, width)).astype(np.float32), importance)


@pytest.mark.parametrize("name", ENCODERS)
def test_many_rows_fill_whole_tiles(name: str) -> None:
    """More groups than lanes, more super-blocks than lanes, and a rest."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(LANES + 3, 768)).astype(np.float32)
    for importance in (NONE, rng.uniform(0.1, 4, 768).astype(np.float32)):
        same(name, rows, importance)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(ENCODERS)),
    rows=st.integers(1, 9),
    supers=st.integers(1, 4),
    low=st.integers(-45, 37),
    span=st.integers(0, 12),
    weighted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_bytes_are_ggml_s_for_any_rows(
    name: str, rows: int, supers: int, low: int, span: int, weighted: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (rows, 256 * supers)
    size = 10.0 ** np.minimum(low + span * rng.uniform(size=shape), 37)
    importance = 10.0 ** rng.uniform(-4, 4, shape[1]) if weighted else NONE
    with np.errstate(under="ignore"):
        same(name, (rng.normal(size=shape) * size).astype(np.float32), importance.astype(np.float32))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_row_s_bytes_do_not_depend_on_its_neighbours(name: str) -> None:
    rng = np.random.default_rng(7)
    rows = rng.standard_t(3, size=(70, 512)).astype(np.float32)
    for importance in (NONE, rng.uniform(0.1, 4, 512).astype(np.float32)):
        alone = np.concatenate([encode(name, rows[i : i + 1], importance) for i in (0, 8, 69)])
        np.testing.assert_array_equal(alone, encode(name, rows, importance)[[0, 8, 69]])


def test_q8_0_formula() -> None:
    """Written out, for machines without libgguf; no product is near a half here."""
    rows = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    blocks = encode("Q8_0", rows).reshape(8, 34)
    groups = rows.reshape(8, 32)
    d = abs(groups).max(1, keepdims=True) / np.float32(127)
    np.testing.assert_array_equal(blocks[:, :2].copy().view(np.float16), d.astype(np.float16))
    np.testing.assert_array_equal(blocks[:, 2:].view(np.int8), np.rint(groups * (1 / d)).astype(np.int8))


# sha256 of what ggml itself makes of golden_rows(): print_golden() below wrote them.
GOLDEN = {
    "Q4_0": ("d44669c05fdc318a", "56283890fa9d59a3"),
    "Q5_0": ("a1e7446f1ee79044", "99426be1dc64bdf4"),
    "Q8_0": ("284871bb303291e7", "284871bb303291e7"),
    "Q3_K": ("ca6a679e85e42ef3", "8cf8abcab31feb3c"),
    "Q6_K": ("370fbbcbc1def712", "2b2b1fa384fe5dd8"),
}


def golden_rows() -> tuple[Array, Array]:
    """Rows and importance that come out the same everywhere: integers of a linear generator, times powers of two."""
    state, numbers = 12345, []
    for _ in range(9 * 512):
        state = (1103515245 * state + 12345) % 2**31
        numbers.append(state >> 7)
    integers = np.array(numbers, np.int64).reshape(9, 512)
    rows = np.ldexp((integers[:8] - 2**23).astype(np.float64), -24)
    rows[1] **= 3
    rows[2] = np.ldexp(rows[2], np.repeat(np.arange(32) - 20, 16))
    rows[3] = np.ldexp(rows[3], 100)
    rows[4] = np.ldexp(rows[4], -130)
    rows[5] = np.round(rows[5] * 8) / 4
    rows[6, :300] = 0
    rows[7, 5] = 1000
    return rows.astype(np.float32), np.ldexp((integers[8] + 1).astype(np.float32), -20)


@pytest.mark.parametrize("name", ENCODERS)
def test_golden_hashes(name: str) -> None:
    rows, importance = golden_rows()
    plain, weighted = (hashlib.sha256(encode(name, rows, one).tobytes()).hexdigest()[:16] for one in (NONE, importance))
    assert (plain, weighted) == GOLDEN[name]


def print_golden() -> None:
    rows, importance = golden_rows()
    for name in ENCODERS:
        hashes = [hashlib.sha256(ggml(name, rows, one).tobytes()).hexdigest()[:16] for one in (NONE, importance)]
        print(f'    "{name}": ("{hashes[0]}", "{hashes[1]}"),')
