"""How much errors matter, one layer at a time, against slopes of the whole model where they enter."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibrate import importance as tested
from mlxquant.calibrate.gradients import _HEAD_TOKENS
from mlxquant.calibrate.layered import Layered
from mlxquant.calibrate.stand_ins import Added
from mlxquant.convert.sources import open_source
from mlxquant.measure.changes import at, put
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings
from mlxquant.run.model import load_model
from tests.tiny import VOCAB, make

TOKENS = np.random.default_rng(0).integers(3, VOCAB, (3, 40))
NAMES = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def layered(folder):
    source = open_source(folder)
    return Layered(source, make_plan(source.config, source.specs, settings(group_size=32)))


def slopes(model, path, width, sample):
    """d sum log p(drawn next tokens) / d what a linear layer of the whole model gives, (1, L, width)."""
    ids = mx.array(TOKENS[sample][None])

    def logits(probe):
        return put(model, path, Added(at(model, path), probe))(ids)[0].astype(mx.float32)

    zero = mx.zeros((1, ids.shape[1], width))
    drawn = mx.random.categorical(logits(zero)[None], key=mx.random.key(tested.SEED + 1_000_003 * sample))[0]

    def said(probe):
        made = logits(probe)
        return (mx.take_along_axis(made, drawn[:, None], -1)[:, 0] - mx.logsumexp(made, axis=-1)).sum()

    return np.array(mx.grad(said)(zero))


def test_equal_to_slopes_of_the_whole_model(tmp_path):
    assert TOKENS.shape[1] <= _HEAD_TOKENS  # drawn at once, as `slopes` draws
    folder = make(tmp_path / "m", "llama", dtype="float32")
    found = tested.weigh_errors(layered(folder), TOKENS, tmp_path).tokens
    model = load_model(folder).model
    for layer in range(2):
        for name in NAMES:
            path = f"model.layers.{layer}.{name}".split(".")
            width = at(model, path).weight.shape[0]
            squares = [(slopes(model, path, width, sample) ** 2).sum(-1)[0] for sample in range(len(TOKENS))]
            roots = np.sqrt(squares)
            got = found[".".join([*path, "weight"])]
            assert got.shape == TOKENS.shape
            assert np.abs(got - roots / roots.mean()).max() < 2e-3


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("gemma3", True)])
def test_directions_of_the_table_are_those_of_its_own_slopes(tmp_path, family, tied):
    """And of what enters the head, where it is that. Gemma multiplies its rows."""
    folder = make(tmp_path / "m", family, dtype="float32", tied=tied, layers=6 if family == "gemma3" else 2)
    found = tested.weigh_errors(layered(folder), TOKENS, tmp_path).table_HH
    model = load_model(folder).model
    path = next(path for path, _ in model.named_modules() if path.endswith("embed_tokens")).split(".")
    width = at(model, path).weight.shape[1]
    g = np.concatenate([slopes(model, path, width, sample)[0] for sample in range(len(TOKENS))])
    expected = g.T @ g / TOKENS.size
    if tied:
        trunk = (model.language_model if family == "gemma3" else model).model
        x = np.array(trunk(mx.array(TOKENS))).reshape(-1, width)
        expected += x.T @ x / TOKENS.size
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


def test_experts_have_none_and_a_later_call_finds_what_was_made(tmp_path):
    folder = make(tmp_path / "m", "qwen3_moe", dtype="float32")
    model = layered(folder)
    made = tested.weigh_errors(model, TOKENS, tmp_path)
    found = made.tokens
    assert found
    assert not [name for name in found if len(model.tensors[name].target.shape) != 2]
    assert all(abs(weights.mean() - 1) < 1e-5 for weights in found.values())
    again = tested.weigh_errors(None, TOKENS, tmp_path)  # of no model: from the file
    assert found.keys() == again.tokens.keys()
    assert all(np.array_equal(found[name], again.tokens[name]) for name in found)
    assert np.array_equal(made.table_HH, again.table_HH)
