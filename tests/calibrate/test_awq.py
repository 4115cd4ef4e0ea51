"""Factors are chosen by the error of what is computed: never more of it, clearly less where inputs have outliers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibrate.awq import awq
from mlxquant.calibrate.fold import Feed, feeds
from mlxquant.calibrate.layered import Layered
from mlxquant.calibrate.statistics import Moments
from mlxquant.calibrate.values import Inputs
from mlxquant.calibrate.wiring import wiring
from mlxquant.codecs.encode import decode, encode
from mlxquant.codecs.search import search
from mlxquant.codecs.spec import KEEP, affine, parse_codec
from tests.calibrate.stock import difference, tiny

NORM, Q, K = "norm.weight", "q.weight", "k.weight"
FEED = Feed(NORM, (Q, K), (128,))


def layer(seed, outliers=6, rows=96, width=128):
    """A norm and what it feeds; correlated inputs (N, I), of which some columns are large."""
    rng = np.random.default_rng(seed)
    weights = {NORM: rng.uniform(0.5, 1.5, width).astype(np.float32)}
    weights |= {name: (rng.standard_t(4, (rows, width)) * 0.05).astype(np.float32) for name in (Q, K)}
    x_NI = rng.normal(size=(512, 24)) @ rng.normal(size=(24, width)) / 5 + rng.normal(size=(512, width))
    x_NI[:, rng.choice(width, outliers, replace=False)] *= 20
    return weights, x_NI.astype(np.float32)


def moments_of(x_NI, kind="hessian", expert_N=None, experts=0):
    made = Moments("test", kind, experts=experts)
    made.add(Inputs(mx.array(x_NI), None if expert_N is None else mx.array(expert_N)))
    return made


def output_error(weights, folded, columns, x_NI, codec, by):
    """Mean relative output error of both readers, on the inputs themselves."""
    total = 0.0
    for name in (Q, K):
        s = columns.get(name, np.ones(128)).astype(np.float32)
        weight = (x_NI**2).mean(axis=0) / s**2
        parts = by(folded[name], "F32", "BF16", codec, weight.astype(np.float32))
        wrong = (x_NI / s) @ decode(parts, "BF16", codec).T - x_NI @ weights[name].T
        total += (wrong**2).sum() / ((x_NI @ weights[name].T) ** 2).sum()
    return total


def rounded(raw, source_code, dtype_code, codec, weight):
    return encode(raw, source_code, dtype_code, codec)


@pytest.mark.parametrize("codec", ["2g32", "4g64", "8g64", "mxfp4"])
@pytest.mark.parametrize("kind", ["hessian", "squares"])
@pytest.mark.parametrize("outliers", [0, 6])
def test_the_error_is_never_larger_than_without(codec, kind, outliers):
    codec = parse_codec(codec)
    weights, x_NI = layer(1, outliers, rows=32)
    if kind == "squares":  # all that is known of inputs without correlations
        x_NI = x_NI * np.random.default_rng(9).choice(np.float32([-1, 1]), x_NI.shape)
    seen = {name: moments_of(x_NI, kind) for name in (Q, K)}
    made = awq(weights, [FEED], seen, lambda name: codec, "BF16")
    before = output_error(weights, weights, {}, x_NI, codec, search)
    after = output_error(weights, made.weights, made.columns, x_NI, codec, search)
    assert after <= before * (1 + 1e-4 if kind == "hessian" else 1.05)
    assert bool(made.note) == (made.columns != {})


@pytest.mark.parametrize(
    ("bits", "by", "less"), [(3, rounded, 0.6), (4, rounded, 0.6), (3, search, 0.9), (4, search, 0.9)]
)
def test_outlier_columns_lose_much_of_their_error(bits, by, less):
    weights, x_NI = layer(5)
    codec = affine(bits, 64)
    seen = {name: moments_of(x_NI) for name in (Q, K)}
    made = awq(weights, [FEED], seen, lambda name: codec, "BF16", searched=by is search)
    before = output_error(weights, weights, {}, x_NI, codec, by)
    assert output_error(weights, made.weights, made.columns, x_NI, codec, by) < less * before
    assert "norm -" in made.note
    product = made.weights[NORM] * made.weights[Q]
    assert np.abs(product - weights[NORM] * weights[Q]).max() < 1e-6 * np.abs(product).max()


def test_weights_that_stay_float_ask_for_no_factors():
    weights, x_NI = layer(0)
    seen = {name: moments_of(x_NI) for name in (Q, K)}
    assert awq(weights, [FEED], seen, lambda name: KEEP, "BF16").columns == {}
    assert awq(weights, [FEED], {}, lambda name: affine(4, 64), "BF16").columns == {}


def test_each_expert_has_factors_of_its_own():
    rng = np.random.default_rng(0)
    up, down = (rng.standard_t(4, shape).astype(np.float32) for shape in ((3, 64, 32), (3, 32, 64)))
    x_NI = rng.normal(size=(600, 64)).astype(np.float32)
    expert_N = np.repeat([0, 1, 2], 200)
    x_NI[:200, 3] *= 30
    x_NI[200:400, 40] *= 30
    x_NI[400:] *= 1e-3
    feed = Feed("up.weight", ("down.weight",), (3, 64))
    seen = {"down.weight": moments_of(x_NI, "hessian", expert_N, 3)}
    made = awq({"up.weight": up, "down.weight": down}, [feed], seen, lambda name: affine(3, 64), "BF16", searched=False)
    columns = made.columns["down.weight"]
    assert [int(row.argmax()) for row in columns[:2]] == [3, 40]
    expected = (up * columns[..., None] ** -1, down * columns[:, None, :])
    for name, value in zip(("up.weight", "down.weight"), expected, strict=True):
        assert np.allclose(made.weights[name], value, rtol=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "phi3"])
def test_a_layer_computes_what_it_did(tmp_path, family):
    source, plan, basis, _, prefixes = tiny(tmp_path / "source", family)
    model = Layered(source, plan)
    weights = model.weights(1)
    hidden = model.embed(np.random.default_rng(0).integers(3, 512, (4, 12)).astype(np.int32))
    plain = model.open(1, weights)
    experts = {name: value.shape[0] if value.ndim == 3 else 0 for name, value in weights.items()}
    seen = {}
    for stage in plain.stages:
        inputs = plain.inputs(stage, hidden)
        for name in stage:
            seen[name] = Moments(name, "squares", experts=experts[name])
            seen[name].add(inputs)
    found = feeds(wiring({n: w.shape for n, w in weights.items()}, prefixes[1], basis.shape), weights, basis.shape)
    made = awq(weights, found, seen, lambda name: affine(2, 32), "BF16", searched=False)
    assert made.columns
    assert difference(model.open(1, made.weights).run(hidden) - hidden, plain.run(hidden) - hidden) < 1e-4
