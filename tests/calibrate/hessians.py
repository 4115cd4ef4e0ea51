"""Hessians such as layers have: correlated columns of very different sizes."""

from __future__ import annotations

import numpy as np


def inputs(width: int, tokens: int = 1000, seed: int = 0) -> np.ndarray:
    """(tokens, width) float64."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(tokens, width)) @ (rng.normal(size=(width, width)) * np.geomspace(1, 0.02, width)[:, None])
    return mixed * rng.lognormal(0, 0.7, width)


def hessian(width: int, seed: int = 0) -> np.ndarray:
    x = inputs(width, seed=seed)
    return (x.T @ x / len(x)).astype(np.float32)


def weights(rows: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.03, (rows, width)).astype(np.float32)


def row_errors(w: np.ndarray, values: np.ndarray, h: np.ndarray) -> np.ndarray:
    """E H E^T of each row, in float64."""
    e = w.astype(np.float64) - values
    return np.einsum("oi,ij,oj->o", e, h.astype(np.float64), e)
