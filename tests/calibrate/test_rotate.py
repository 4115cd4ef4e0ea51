"""A rotated model gives the logits of the one it was made of, in stock mlx-lm, or is refused by its family's name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlxquant.calibrate.layered import Layered
from mlxquant.calibrate.orthogonal import hadamard, spreading, times
from mlxquant.calibrate.rotate import Rotation
from mlxquant.errors import UnsupportedError
from mlxquant.plan.plan import choose, lay_out
from tests.calibrate.stock import difference, logits, of_layer, tiny
from tests.tiny import FAMILIES

REFUSED = {
    "phi": "subtract the mean",
    "starcoder2": "subtract the mean",
    "stablelm": "subtract the mean",
    "cohere": "subtract the mean",
    "cohere2": "subtract the mean",
    "gemma": "no output head",
    "gemma2": "no output head",
    "gemma3n": "no output head",
    "lfm2": "no output head",
    "lfm2_moe": "no output head",
    "gemma3": "layernorm.weight norms",
    "gemma3_text": "layernorm.weight norms",
    "gemma4": "norm.weight norms",
    "gemma4_text": "norm.weight norms",
    "glm4": "layernorm.weight norms",
    "olmo2": "layernorm.weight norms",
    "olmo3": "layernorm.weight norms",
}


def rotated(rotation, basis, weights, prefixes):
    made = {}
    for i, prefix in enumerate(prefixes):
        made |= rotation.layer(i, of_layer(weights, prefix))
    table, norm = weights[rotation.embedding_name], weights[rotation.norm_name]
    made[rotation.embedding_name] = rotation.embedding(table)
    made[rotation.norm_name] = rotation.final_norm
    made[rotation.head_name] = rotation.head(weights.get(rotation.head_name, table), norm)
    return made


TIED = ("llama", "qwen2", "qwen3_vl", "qwen3_5", "granite", "mamba2", "olmoe")


@pytest.mark.parametrize(
    ("family", "tied"), [(f, False) for f in sorted(set(FAMILIES) - REFUSED.keys())] + [(f, True) for f in TIED]
)
def test_stock_mlx_lm_gives_the_same_logits(tmp_path, family, tied):
    source, plan, basis, weights, prefixes = tiny(tmp_path / "source", family, tied=tied)
    before = logits(tmp_path / "before", source.config, weights)
    rotation = Rotation.of(source.config, plan, seed=3)
    made = rotated(rotation, basis, weights, prefixes)
    assert not np.allclose(made[rotation.embedding_name], weights[rotation.embedding_name], atol=1e-2)
    untied = lay_out(source.config, source.specs, untie=True)
    planned = choose(untied, plan.settings)
    assert {t.name: t.target.shape for t in planned.tensors} == {name: value.shape for name, value in made.items()}
    assert difference(logits(tmp_path / "after", untied.config, made), before) < 2e-5


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_that_a_rotation_would_change_are_refused_by_name(tmp_path, family):
    source, plan, *_ = tiny(tmp_path / "source", family)
    with pytest.raises(UnsupportedError, match=f"{family} cannot be rotated: .*{REFUSED[family]}"):
        Rotation.of(source.config, plan)


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "qwen3_next"])
def test_both_models_are_run_and_compared(tmp_path, family):
    source, plan, *_ = tiny(tmp_path / "source", family, tied=True)
    tokens = np.random.default_rng(0).integers(3, 512, (2, 12)).astype(np.int32)
    model, rotation = Layered(source, plan), Rotation.of(source.config, plan)
    assert rotation.check(model, tokens) < 1e-5
    second = rotation.layers[1]
    values = second.values
    for wrong in (
        replace(second, writes=second.writes[1:]),
        replace(second, reads={norm: names[1:] for norm, names in second.reads.items()}),
        replace(second, values=replace(values, gated=False) if values.gated else replace(values, stop=values.head_dim)),
    ):
        with pytest.raises(UnsupportedError, match=f"{family} cannot be rotated: behind layer 1 hidden states differ"):
            replace(rotation, layers=(rotation.layers[0], wrong)).check(model, tokens)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 44, 60, 64, 76])
def test_hadamard_matrices_have_orthogonal_rows_of_signs(order):
    made = hadamard(order)
    assert set(np.unique(made)) <= {-1.0, 1.0}
    assert np.array_equal(made @ made.T, order * np.eye(order))


@pytest.mark.parametrize(
    ("width", "flat"),
    [(576, True), (1536, True), (2880, True), (3584, True), (4096, True), (96, True), (92, False), (7, False)],
)
def test_a_width_is_spread_evenly_where_its_orders_are_known(width, flat):
    factors = spreading(width, 0)
    q = times(np.eye(width), factors)
    assert np.abs(q @ q.T - np.eye(width)).max() < 1e-12
    assert np.allclose(np.abs(q), width**-0.5) == flat
    x = np.random.default_rng(0).normal(size=(3, width))
    whole = factors[0]
    for factor in factors[1:]:
        whole = np.kron(whole, factor)
    assert np.allclose(times(x, factors), x @ whole, atol=1e-12)


def test_an_order_that_no_construction_gives_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="92"):
        hadamard(92)
