"""Rows that real models and bad luck bring, and the bridges between raw rows and MLX arrays."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxquant.codecs.floats import narrow, widen

MX_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
WIDTH = 384
_LARGEST = {"BF16": 3.3e38, "F16": 65504.0, "F32": 3.4e38}
_LEAST = {"BF16": 9.2e-41, "F16": 6e-8, "F32": 1.4e-45}


def rows(code: str, seed: int = 0, largest: float | None = None) -> np.ndarray:
    """Raw rows (n, 384) of dtype `code`: random ones of several tails, and every odd one we know."""
    rng = np.random.default_rng(seed)
    shape = (8, WIDTH)
    top = largest or _LARGEST[code]
    values = np.concatenate(
        [
            rng.normal(size=shape) * 0.02,
            rng.standard_t(2, size=shape) * 0.05,
            rng.uniform(-1, 1, size=shape) ** 7,
            rng.uniform(1, 2, size=shape),
            -rng.uniform(1, 2, size=shape),
            np.exp(rng.uniform(-30, 5, size=shape)) * rng.choice([-1, 1], size=shape),
            rng.integers(-40, 40, size=shape) * 0.125,
            _odd(rng, top, _LEAST[code]),
        ]
    )
    with np.errstate(over="ignore"):
        return narrow(np.clip(values, -top, top).astype(np.float32), code)


def _odd(rng: np.random.Generator, top: float, least: float) -> np.ndarray:
    signs = rng.choice([-1.0, 1.0], size=WIDTH)
    line = np.linspace(-1, 1, WIDTH)
    lone = np.zeros(WIDTH)
    lone[[5, 200]] = 7.0, -3.0
    outlier = rng.normal(size=WIDTH) * 0.01
    outlier[::77] = 50.0
    return np.stack(
        [
            np.zeros(WIDTH),
            np.where(signs > 0, 0.0, -0.0),
            np.full(WIDTH, 0.3),
            np.full(WIDTH, -0.3),
            lone,
            outlier,
            line,
            line[::-1] * 3,
            np.round(line * 8) / 2,
            signs * least * np.arange(WIDTH),
            signs * 1e-7 * rng.uniform(size=WIDTH),
            # One sign in each group of 128, so that no group's range is beyond float32.
            np.repeat([1, -1, 1], 128) * top * rng.uniform(0.3, 1, size=WIDTH),
            top * rng.uniform(-0.4, 0.4, size=WIDTH),
        ]
    )


def to_mlx(raw: np.ndarray, code: str) -> mx.array:
    return mx.array(raw).view(mx.bfloat16) if code == "BF16" else mx.array(raw)


def from_mlx(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def mlx_quantize(raw: np.ndarray, source: str, dtype: str, **codec: object) -> list[np.ndarray]:
    """What stock MLX stores for these rows, on the CPU device, which is the one whose bytes are promised."""
    with mx.stream(mx.cpu):
        parts = mx.quantize(to_mlx(raw, source).astype(MX_DTYPES[dtype]), **codec)
        mx.eval(parts)
    return [from_mlx(part) for part in parts]


def bits(values: np.ndarray) -> np.ndarray:
    """For comparisons that tell -0 from 0."""
    return values.view({2: np.uint16, 4: np.uint32}[values.itemsize]) if values.dtype.kind == "f" else values


def same(ours: tuple[np.ndarray, ...], theirs: list[np.ndarray] | tuple[np.ndarray, ...]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(bits(mine), bits(other))


def exact(raw: np.ndarray, source: str, dtype: str) -> np.ndarray:
    """float32 rows, rounded to `dtype`: what reference and bounds take."""
    return widen(narrow(widen(raw, source), dtype), dtype)
