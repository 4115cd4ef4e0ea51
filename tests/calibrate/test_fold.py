"""Factors folded into a layer leave stock mlx-lm's logits as they were, in every family."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlxquant.calibrate.fold import check, feeds, fold
from mlxquant.calibrate.layered import Layered
from mlxquant.calibrate.wiring import wiring
from mlxquant.codecs.floats import narrow, widen
from tests.calibrate.stock import difference, logits, of_layer, tiny
from tests.tiny import FAMILIES

# Families none of whose norms stand in front of linear layers, or of whose layers too little is known; whose values are
# no linear layer's, or normed; whose feed-forward part is no product with what a linear layer gives.
NO_NORMS = {"olmo2", "olmo3", "gemma3n", "gemma4", "gemma4_text"}
NO_VALUES = {"mamba2", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gemma3n", "gemma4", "gemma4_text"}
NO_PRODUCTS = {"phi", "starcoder2", "gpt_oss", "mamba2", "nemotron_h"}


def found(basis, weights, prefix):
    own = of_layer(weights, prefix)
    return feeds(wiring({n: w.shape for n, w in own.items()}, prefix, basis.shape), own, basis.shape)


def kind(feed):
    if len(feed.readers) > 1 or "norm" in feed.feeder:
        return "norm"
    return "product" if feed.readers[0].endswith(("down_proj.weight", "w2.weight")) else "values"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_stock_mlx_lm_computes_the_same_with_random_factors_in_every_feed(tmp_path, family):
    source, _, basis, weights, prefixes = tiny(tmp_path / "source", family)
    before = logits(tmp_path / "before", source.config, weights)
    rng, kinds = np.random.default_rng(1), set()
    for prefix in prefixes:
        for feed in found(basis, weights, prefix):
            kinds.add(kind(feed))
            weights, _ = fold(weights, feed, 10.0 ** rng.uniform(-1, 1, feed.shape))
    after = logits(tmp_path / "after", source.config, weights)
    assert difference(after, before) < 1e-4
    lacking = (("norm", NO_NORMS), ("values", NO_VALUES), ("product", NO_PRODUCTS))
    assert kinds == {name for name, families in lacking if family not in families}


@pytest.mark.parametrize("family", ["qwen2", "gemma", "llama"])
def test_norms_and_biases_that_the_file_rounds_take_their_factor_with_them(tmp_path, family):
    source, _, basis, weights, prefixes = tiny(tmp_path / "source", family)
    rng = np.random.default_rng(2)
    for name, value in weights.items():  # as the file has it to begin with
        if value.ndim == 1:
            weights[name] = widen(narrow(value, "BF16"), "BF16")
    before = logits(tmp_path / "before", source.config, weights)
    for prefix in prefixes:
        for feed in found(basis, weights, prefix):
            weights, used = fold(weights, feed, 10.0 ** rng.uniform(-1, 1, feed.shape), "BF16")
            kept = weights[feed.feeder] if kind(feed) == "norm" else weights.get(feed.bias, np.zeros(1, np.float32))
            assert np.array_equal(kept, widen(narrow(kept, "BF16"), "BF16"))
            assert used.shape == feed.shape
            assert (used > 0).all()
    assert difference(logits(tmp_path / "after", source.config, weights), before) < 1e-5


def test_a_channel_that_its_norm_shuts_off_or_rounding_would_keeps_finite_weights(tmp_path):
    _, _, basis, weights, (prefix, *_) = tiny(tmp_path / "source", "llama")
    feed = found(basis, weights, prefix)[0]
    weights[feed.feeder][:2] = 0, 1e-38
    made, used = fold(weights, feed, np.full(feed.shape, 1e9), "F16")
    assert made[feed.feeder][:2].tolist() == [0, np.float32(1e-38)]
    assert used[1] == 1
    assert all(np.isfinite(value).all() for value in made.values())


def layered(folder, family):
    source, plan, basis, _, prefixes = tiny(folder, family)
    model = Layered(source, plan)
    weights = model.weights(0)
    hidden = model.embed(np.random.default_rng(0).integers(3, 512, (1, 12)).astype(np.int32))
    return model, basis, weights, prefixes[0], hidden


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "qwen2_moe", "phi3", "gpt_oss"])
def test_what_is_claimed_of_a_layer_is_tried_on_it(tmp_path, family):
    model, basis, weights, prefix, hidden = layered(tmp_path / "source", family)
    claimed = found(basis, weights, prefix)
    hold, refused = check(model, 0, weights, claimed, hidden)
    assert hold == claimed
    assert not refused


def test_a_wrong_claim_is_refused_by_the_name_of_its_weight(tmp_path):
    model, basis, weights, prefix, hidden = layered(tmp_path / "source", "qwen2_moe")
    norm, values, later, *_ = found(basis, weights, prefix)
    wrong = [
        replace(later, readers=later.readers[1:]),  # the router reads it, too
        replace(norm, readers=norm.readers[1:]),
        values,
        replace(norm, feeder=later.feeder),
    ]
    hold, refused = check(model, 0, weights, wrong, hidden)
    assert hold == (values,)
    assert len(refused) == 3
    assert all(line.startswith(prefix) and "layernorm.weight" in line for line in refused)
