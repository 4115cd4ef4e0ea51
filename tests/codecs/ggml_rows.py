"""Rows and importances that find the corners of ggml's encoders, and ggml's own answer to them (libgguf)."""

from __future__ import annotations

import numpy as np

from tests.libgguf_oracle import libgguf_x86

WEIGHTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
BLOCKS = (*WEIGHTED, "Q8_0", "TQ1_0", "TQ2_0")
ROWS = 4  # of each kind


def kinds_of_rows(width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Name -> float32 (ROWS, width). All finite, up to 3e38: ggml's sums then overflow, and ours must alike."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, width)
    signs, uniform = rng.choice([-1.0, 1.0], shape), rng.uniform(size=shape)
    gauss = rng.normal(size=shape)
    outlier = gauss * 0.01
    outlier[:, ::77] = 50
    lone = np.zeros(shape)
    lone[:, [5, -3]] = 7, -3
    kinds = {
        "gauss": gauss * 0.02,
        "heavy tails": rng.standard_t(2, shape) * 0.05,
        "peaked": (2 * uniform - 1) ** 7,
        "positive": 1 + uniform,
        "negative": -1 - uniform,
        "sorted": np.sort(gauss, 1),
        "falling": np.sort(gauss, 1)[:, ::-1] * 3,
        "on a grid": rng.integers(-40, 40, shape) * 0.125,
        "ternary": rng.integers(-1, 2, shape) * 0.7,
        "zero": np.zeros(shape),
        "signed zero": signs * 0.0,
        "constant": np.full(shape, 0.3),
        "negative constant": np.full(shape, -0.3),
        "two numbers": lone,
        "outliers": outlier,
        "all exponents": signs * np.exp(rng.uniform(-100, 88, shape)),
        "many exponents": signs * np.exp(rng.uniform(-30, 5, shape)),
        "denormal": signs * 1.4e-45 * rng.integers(0, 100, shape),
        "larger denormal": signs * 1e-40 * uniform,
        "near ggml's zero": signs * 2e-15 * uniform,
        "below ggml's zero": signs * 9e-16 * uniform,
        "beyond float16": signs * 6.5e6 * uniform,
        "1e12": signs * 1e12 * uniform,
        "1e19": signs * 1e19 * uniform,
        "huge": signs * 1e30 * uniform,
        "largest": signs * 3.4e38 * uniform,
    }
    return {name: rows.astype(np.float32) for name, rows in kinds.items()}


def all_rows(width: int, seed: int = 0) -> np.ndarray:
    return np.concatenate(list(kinds_of_rows(width, seed).values()))


def importances(width: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    usual = rng.uniform(0.1, 2, width)
    return {
        "usual": usual.astype(np.float32),
        "with zeros": np.where(rng.uniform(size=width) < 0.3, 0, usual).astype(np.float32),
        "constant": np.ones(width, np.float32),
        "all zero": np.zeros(width, np.float32),
        "of all sizes": np.exp(rng.uniform(-60, 60, width)).astype(np.float32),
    }


def ggml_encode(rows: np.ndarray, type_name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """ggml_quantize_chunk of libgguf's reference backend; skips the test where there is no wheel of it."""
    libgguf = libgguf_x86()
    out = libgguf.quantize_rows(rows, libgguf.GGMLQuantizationType[type_name], importance)
    return out.view(np.uint8).reshape(len(rows), -1)


def ggml_decode(raw: np.ndarray, type_name: str) -> np.ndarray:
    libgguf = libgguf_x86()
    return libgguf.dequantize_rows(raw, libgguf.GGMLQuantizationType[type_name])


def exact_rows(width: int, rows: int = 64) -> np.ndarray:
    """The same float32 on every machine: integers from a seed, times powers of two. No libm in sight."""
    rng = np.random.default_rng(7)
    whole = rng.integers(-(2**15), 2**15, (rows, width)).astype(np.float32)
    return np.ldexp(whole, rng.integers(-30, 4, (rows, width // 32)).repeat(32, 1)).astype(np.float32)


def exact_importance(width: int) -> np.ndarray:
    return (np.random.default_rng(8).integers(0, 1000, width) / 8).astype(np.float32)
