"""Moments against the same sums in float64, whatever the batches; experts apart; and what is no number."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibrate.statistics import Moments
from mlxquant.calibrate.values import Inputs
from mlxquant.errors import SourceError

ROWS, WIDTH, EXPERTS = 300, 24, 5


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, y, weights, and experts of which the last is never asked and the one before it twice."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, ROWS, WIDTH)) * np.geomspace(0.01, 30, WIDTH)
    experts = rng.integers(0, EXPERTS - 2, ROWS)
    experts[[7, 190]] = EXPERTS - 2
    return x.astype(np.float32), y.astype(np.float32), rng.random(ROWS).astype(np.float32), experts


def wide(kind: str, x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The definition, in float64."""
    x, y, w = (a.astype(np.float64) for a in (x, y, w))
    if kind == "squares":
        return (w[:, None] * x * x).sum(0) / w.sum()
    return np.einsum("n,ni,nj->ij", w, x, x if kind == "hessian" else y) / w.sum()


def added(kind: Any, *, step: int, weights: bool, experts: bool, least: int = 1, as_mlx: bool = True) -> Moments:
    x, y, w, expert_N = data()
    moments = Moments("a.weight", kind, experts=EXPERTS if experts else 0, least_tokens=least)
    for some in (slice(at, at + step) for at in range(0, ROWS, step)):
        inputs = Inputs(*(mx.array(a[some]) if as_mlx else a[some] for a in (x, expert_N)[: 1 + experts]))
        moments.add(inputs, w[some] if weights else None, y[some] if kind == "cross" else None)
    return moments


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max() / 30, rtol=1e-4)


@pytest.mark.parametrize("kind", ["squares", "hessian", "cross"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("step", [ROWS, 7])
def test_means_of_a_dense_layer(kind: str, weights: bool, step: int) -> None:
    x, y, w, _ = data()
    moments = added(kind, step=step, weights=weights, experts=False)
    found = moments.mean()
    assert found.dtype == (np.float64 if kind == "squares" else np.float32)
    close(found, wide(kind, x, y, w if weights else np.ones(ROWS)))
    assert moments.tokens == ROWS
    np.testing.assert_array_equal(moments.for_expert(0)[0], found)


@pytest.mark.parametrize("kind", ["squares", "hessian", "cross"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("as_mlx", [False, True])
def test_each_expert_sees_its_own_tokens(kind: str, weights: bool, as_mlx: bool) -> None:
    x, y, w, experts = data()
    w = w if weights else np.ones_like(w)
    moments = added(kind, step=50, weights=weights, experts=True, least=3, as_mlx=as_mlx)
    pooled = wide(kind, x, y, w)
    close(moments.mean(), pooled)
    for expert in range(EXPERTS):
        mine = experts == expert
        assert moments.tokens_of(expert) == mine.sum()
        found, is_fallback = moments.for_expert(expert)
        assert is_fallback == (mine.sum() < 3)
        close(found, pooled if is_fallback else wide(kind, x[mine], y[mine], w[mine]))
    assert moments.fallbacks == (EXPERTS - 2, EXPERTS - 1)


def test_columns_and_sums() -> None:
    x, _, _, experts = data()
    moments = added("squares", step=64, weights=False, experts=True, least=3)
    columns = moments.columns()
    assert columns.shape == (EXPERTS, WIDTH)
    assert columns.dtype == np.float32
    np.testing.assert_allclose(columns[-1], (x.astype(np.float64) ** 2).mean(0), rtol=1e-5)
    sums, counts = moments.sums(WIDTH)
    assert counts.tolist() == np.bincount(experts, minlength=EXPERTS).tolist()
    assert (sums[-1] == 0).all()
    np.testing.assert_allclose(sums[3], (x[experts == 3].astype(np.float64) ** 2).sum(0), rtol=1e-5)
    dense = added("squares", step=64, weights=False, experts=False)
    np.testing.assert_allclose(dense.columns(), (x.astype(np.float64) ** 2).mean(0), rtol=1e-5)
    assert [a.shape for a in dense.sums(WIDTH)] == [(1, WIDTH), (1,)]


def test_a_hessian_is_symmetric_and_of_half_precision_inputs_exact() -> None:
    x = mx.random.normal((64, 16), key=mx.random.key(0)).astype(mx.bfloat16)
    moments = Moments("a.weight", "hessian")
    moments.add(Inputs(x))
    np.testing.assert_array_equal(moments.mean(), moments.mean().T)
    close(moments.mean(), wide("hessian", np.array(x.astype(mx.float32)), np.array(0), np.ones(64)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e30])
@pytest.mark.parametrize("kind", ["squares", "hessian"])
def test_what_is_no_number_names_the_layer(bad: float, kind: Any) -> None:
    x = np.ones((4, 8), np.float32)
    moments = Moments("model.layers.3.mlp.down_proj.weight", kind)
    moments.add(Inputs(x))
    x[2, 5] = bad
    with pytest.raises(SourceError, match=r"model\.layers\.3\.mlp\.down_proj\.weight: what enters this layer is NaN"):
        moments.add(Inputs(x))
    assert moments.tokens == 4


def test_no_token_at_all() -> None:
    with pytest.raises(SourceError, match=r"a\.weight: no calibration token"):
        Moments("a.weight", "squares", experts=2).for_expert(1)


def test_rows_of_no_weight_give_an_expert_nothing() -> None:
    x, experts, weight = np.ones((4, 8), np.float32), np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0], np.float32)
    moments = Moments("a.weight", "squares", experts=2)
    moments.add(Inputs(x, experts), weight)
    assert moments.fallbacks == (1,)
    np.testing.assert_array_equal(moments.columns(), np.ones((2, 8)))
