"""One layer at a time gives what the whole model gives, in every family whose layers can stand alone."""

from __future__ import annotations

import numpy as np
import pytest

from mlxquant.calibrate.layered import NOT_LAYERED, Layered
from mlxquant.convert.sources import open_source
from mlxquant.errors import UnsupportedError
from mlxquant.measure.forward import Split
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings
from mlxquant.run.cache import plan_cache
from mlxquant.run.model import load_model
from tests.tiny import FAMILIES, make

LENGTH = 24
# Their trunk has its head inside, so that neither eval nor calibration knows where the layers end.
NO_TRUNK = {"gpt_neox", "olmo"}


def opened(folder):
    source = open_source(folder)
    return Layered(source, make_plan(source.config, source.specs, settings(recipe="uniform", group_size=32)))


def tokens(count=3, vocabulary=512, seed=0):
    return np.random.default_rng(seed).integers(3, vocabulary, (count, LENGTH)).astype(np.int32)


def through(model, tokens_BL):
    hidden = model.embed(tokens_BL)
    for i in range(model.count):
        hidden = model.open(i, model.weights(i)).run(hidden)
    return np.array(model.finish(hidden))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NOT_LAYERED - NO_TRUNK))
def test_a_model_run_layer_by_layer_is_the_model(tmp_path, family):
    # gemma3 looks for the mask of its sixth layer.
    folder = make(tmp_path / family, family, layers=6 if "gemma3" in family else 4, dtype="float32")
    loaded = load_model(folder, expand="on")
    split = Split(loaded, plan_cache(loaded.model))
    tokens_BL = tokens()
    whole = np.stack([split.hidden(tokens_L, 0) for tokens_L in tokens_BL])
    layered = through(opened(folder), tokens_BL[:, :-1])
    assert np.abs(layered - whole).max() <= 2e-5 * np.abs(whole).max()


@pytest.mark.parametrize("family", sorted((NOT_LAYERED | NO_TRUNK) & set(FAMILIES)))
def test_families_whose_layers_cannot_stand_alone_are_refused_by_name(tmp_path, family):
    folder = make(tmp_path / family, family)
    with pytest.raises(UnsupportedError, match=family.partition("_")[0]):
        opened(folder)


def test_stages_are_the_layers_that_share_an_input_in_their_order(tmp_path):
    model = opened(make(tmp_path / "q", "qwen3_moe"))
    stages = [[name.removeprefix("model.layers.1.") for name in stage] for stage in stages_of(model, 1)]
    assert stages == [
        ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
        ["self_attn.o_proj.weight"],
        ["mlp.gate.weight"],
        ["mlp.switch_mlp.up_proj.weight", "mlp.switch_mlp.gate_proj.weight"],
        ["mlp.switch_mlp.down_proj.weight"],
    ]


def stages_of(model, layer):
    return model.open(layer, model.weights(layer)).stages


def test_inputs_are_what_the_linear_layer_is_given(tmp_path):
    model = opened(make(tmp_path / "q", "llama", dtype="float32"))
    hidden, weights = model.embed(tokens()), model.weights(0)
    layer = model.open(0, weights)
    x_NI = np.array(layer.inputs(layer.stages[0], hidden).x_NI)
    norm = weights["model.layers.0.input_layernorm.weight"]
    rows = hidden.reshape(-1, hidden.shape[-1])
    eps = model.config.get("rms_norm_eps", 1e-6)
    assert np.allclose(x_NI, norm * rows / np.sqrt((rows**2).mean(-1, keepdims=True) + eps), rtol=1e-4, atol=1e-6)


def test_each_row_of_an_expert_s_input_comes_with_its_expert(tmp_path):
    model = opened(make(tmp_path / "q", "qwen3_moe", dtype="float32"))
    hidden, weights = model.embed(tokens(6)), model.weights(1)
    layer = model.open(1, weights)
    first, last = layer.stages[-2], layer.stages[-1]
    into, out = layer.inputs(first, hidden), layer.inputs(last, hidden)
    gate, up = (weights[f"model.layers.1.mlp.switch_mlp.{n}_proj.weight"] for n in ("gate", "up"))
    x, expert = np.array(into.x_NI), np.array(into.expert_N)
    assert (expert == np.array(out.expert_N)).all()
    assert len(set(expert)) > 1
    g = np.einsum("ni,noi->no", x, gate[expert])
    made = g / (1 + np.exp(-g)) * np.einsum("ni,noi->no", x, up[expert])
    assert np.allclose(np.array(out.x_NI), made, rtol=1e-3, atol=1e-5)


def test_a_weight_that_was_put_is_the_one_that_runs(tmp_path):
    model = opened(make(tmp_path / "q", "llama", dtype="float32"))
    hidden = model.embed(tokens())
    layer = model.open(1, model.weights(1))
    before = layer.run(hidden)
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        layer.put(name, np.zeros_like(model.weights(1)[name]))
    assert not np.array_equal(before, hidden)
    assert np.array_equal(layer.run(hidden), hidden)  # nothing is written into the stream any more
    again = model.open(1, model.weights(1)).run(hidden)
    assert np.array_equal(again, before)  # the model itself was not changed
