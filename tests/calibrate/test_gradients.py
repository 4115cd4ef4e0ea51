"""Gradients of one layer at a time against mx.grad of the whole model; rows that stand for all."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.calibrate.gradients import Rows, backwards, by_use, spread, trace
from mlxquant.calibrate.layered import Layered
from mlxquant.convert.sources import open_source
from mlxquant.measure.changes import put
from mlxquant.plan.budget import formats
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings
from mlxquant.run.model import load_model
from tests.tiny import VOCAB, make

TOKENS = np.random.default_rng(0).integers(3, VOCAB, (3, 40))


def layered(folder):
    source = open_source(folder)
    return Layered(source, make_plan(source.config, source.specs, settings(group_size=32)))


def all_rows(model):
    sizes = {t.name: int(np.prod(t.target.shape[:-1])) for t in model.plan.tensors if t.name in formats(model.plan)}
    return {name: Rows(np.arange(count), np.ones(count)) for name, count in sizes.items()}


def found(model, folder, count, rows, seed=5):
    parts = list(backwards(model, trace(model, TOKENS, folder), TOKENS[:count], rows, seed))
    return {name: g for part in parts for name, g in part.gradients.items()}


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", False), ("llama", True), ("qwen3_moe", False), ("gemma3", True), ("gemma2", True),
     ("deepseek_v3", False), ("phi", False), ("qwen3_next", False)],
)  # fmt: skip
def test_equal_to_the_gradient_of_the_whole_model(tmp_path, family, tied, monkeypatch):
    """The same targets: what was drawn is drawn again from the same logits, in the same pieces."""
    monkeypatch.setattr("mlxquant.calibrate.gradients._HEAD_TOKENS", 16)
    folder = make(tmp_path / "m", family, dtype="float32", tied=tied, layers=6 if family == "gemma3" else 2)
    model = layered(folder)
    got = found(model, tmp_path / "t", 2, all_rows(model))
    loaded = load_model(folder).model
    for sample in range(2):
        want = dict(nn.utils.tree_flatten(whole_gradient(loaded, TOKENS[sample], sample)))
        assert got.keys() <= want.keys()
        assert len(got) > 10
        for name, g_SRI in got.items():
            expected = np.array(want[name]).reshape(g_SRI.shape[1:])
            assert np.abs(g_SRI[sample] - expected).max() <= 2e-4 * np.abs(expected).max() + 1e-6, name


def whole_gradient(loaded, tokens_L, sample, seed=5):
    ids = mx.array(tokens_L[None])
    logits = loaded(ids)[0]
    drawn = [
        mx.random.categorical(logits[None, at : at + 16], key=mx.random.key(seed + 1_000_003 * sample + at))[0]
        for at in range(0, len(tokens_L), 16)
    ]
    y = mx.concatenate(drawn)

    def said(model):
        made = model(ids)[0].astype(mx.float32)
        return (mx.take_along_axis(made, y[:, None], -1)[:, 0] - mx.logsumexp(made, axis=-1)).sum()

    loaded.unfreeze()
    return nn.value_and_grad(loaded, said)(loaded)[1]


def test_rows_are_those_of_all(tmp_path):
    model = layered(make(tmp_path / "m", "qwen3_moe", dtype="float32"))
    rng, tensors = np.random.default_rng(1), {t.name: t for t in model.plan.tensors}
    every = all_rows(model)
    some = {
        name: by_use(VOCAB, TOKENS, 60, rng) if "layers" not in name else spread(tensors[name], 24, rng)
        for name in every
    }
    whole, part = found(model, tmp_path / "a", 2, every), found(model, tmp_path / "b", 2, some)
    for name, rows in some.items():
        assert len(rows.index_R) <= 60
        assert np.allclose(part[name], whole[name][:, rows.index_R], rtol=1e-4, atol=1e-6), name


def test_half_the_expected_square_is_the_divergence(tmp_path):
    """With many draws, for a small random change of one matrix: within four standard errors."""
    folder = make(tmp_path / "m", dtype="float32")
    model, loaded = layered(folder), load_model(folder).model
    name = "model.layers.0.mlp.up_proj.weight"
    rows = {key: value for key, value in all_rows(model).items() if key == name or "layers" not in key}
    change = 0.003 * np.random.default_rng(2).normal(size=(256, 128)).astype(np.float32)
    kept = trace(model, TOKENS, tmp_path / "t")
    squares = []
    for seed in range(40):
        parts = backwards(model, kept, TOKENS, rows, seed)
        gradients = next(part.gradients[name] for part in parts if name in part.gradients)
        squares += list((gradients * change).sum(axis=(1, 2)) ** 2)
    p = nn.log_softmax(loaded(mx.array(TOKENS)), axis=-1)
    weight = loaded.model.layers[0].mlp.up_proj.weight + mx.array(change)
    q = nn.log_softmax(put(loaded, name.split("."), weight)(mx.array(TOKENS)), axis=-1)
    kl = (mx.exp(p) * (p - q)).sum(axis=(1, 2)).mean().item()
    assert np.mean(squares) / 2 == pytest.approx(kl, abs=4 * np.std(squares) / 2 / np.sqrt(len(squares)))
    assert kl > 10 * 1e-4


@pytest.mark.parametrize("count", [50, 512, 2000])
def test_rows_by_use_stand_for_all(count):
    """A sum over the vocabulary is met in the mean of many drawings."""
    values = np.bincount(TOKENS.reshape(-1), minlength=VOCAB) + 0.1
    sums = []
    for seed in range(200):
        rows = by_use(VOCAB, TOKENS, count, np.random.default_rng(seed))
        assert (np.diff(rows.index_R) > 0).all()
        sums.append((rows.share_R * values[rows.index_R]).sum())
    assert np.mean(sums) == pytest.approx(values.sum(), rel=0.03)


def test_rows_of_a_stack_come_from_some_of_its_matrices(tmp_path):
    model = layered(make(tmp_path / "m", "qwen3_moe"))
    tensor = next(t for t in model.plan.tensors if "switch_mlp.up_proj" in t.name)
    rows = spread(tensor, 20, np.random.default_rng(3))
    assert rows.share_R.sum() == pytest.approx(tensor.size // tensor.target.shape[-1])
    assert np.bincount(rows.index_R // tensor.target.shape[-2]).tolist() == [5, 5, 5, 5]
