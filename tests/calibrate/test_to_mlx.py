"""Folders whose codes were chosen by text: they load in stock mlx-lm, and whoever stops the work loses none of it."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibrate.recipes import RECIPES
from mlxquant.calibrate.rotate import Rotation
from mlxquant.calibrate.text import calibration
from mlxquant.calibrate.to_mlx import to_mlx
from mlxquant.convert.checks import check_folder
from mlxquant.convert.sources import open_source
from mlxquant.files.publish import CALIBRATION
from mlxquant.measure.runner import Silent
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings
from mlxquant.run.model import load_model
from mlxquant.run.text import Text
from tests.tiny import make


@cache
def text(folder):
    return calibration("builtin", Text.load(folder), 8, 64, 0)


def convert(folder, out, method="gptq", bits=4, watch=None):
    source = open_source(folder)
    plan = make_plan(source.config, source.specs, settings(recipe="uniform", method=method, bits=bits, group_size=32))
    return to_mlx(source, plan, out, text(folder), RECIPES[method], watch=watch)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """What `convert` makes of a folder by a method: once, for all tests that only look at it."""
    return cache(lambda folder, method: convert(folder, tmp_path_factory.mktemp("converted") / method, method))


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


class StopAt(Silent):
    """Presses Ctrl-C before so many steps."""

    def __init__(self, steps):
        self.left = steps

    def stopped(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("method", ["search", "awq", "gptq", "best"])
def test_each_layer_says_more_nearly_what_it_said(trained_dense, trained_experts, converted, method):
    for folder in (trained_dense, trained_experts):
        written = converted(folder, method)
        load_model(written.out)  # by stock mlx-lm, strictly
        judged = [record for record in written.records if record.rounding]
        assert len(judged) >= 15
        assert np.mean([r.error / r.rounding for r in judged]) < (0.95 if method in ("search", "awq") else 0.7)


def test_gptq_is_before_search_and_search_before_rounding_in_every_layer(trained_dense, trained_experts, converted):
    for folder in (trained_dense, trained_experts):
        errors = {m: {r.name: r for r in converted(folder, m).records} for m in ("search", "gptq")}
        for name, record in errors["gptq"].items():
            if record.rounding:
                assert record.error < errors["search"][name].error < errors["search"][name].rounding, name


@pytest.mark.parametrize("steps", [0, 1])
def test_stopped_and_gone_on_with_it_is_byte_for_byte_the_same(trained_dense, converted, tmp_path, steps):
    whole = converted(trained_dense, "gptq").out
    with pytest.raises(KeyboardInterrupt):
        convert(trained_dense, tmp_path / "parts", watch=StopAt(steps))
    assert not (tmp_path / "parts").exists()
    resumed = convert(trained_dense, tmp_path / "parts").out
    assert hashes(resumed) == hashes(whole)
    assert not (tmp_path / "parts.partial").exists()


def test_best_stopped_wherever_it_is_ends_in_the_same_bytes(trained_dense, converted, tmp_path):
    stops, out = 0, tmp_path / "parts"
    while not out.exists():
        with suppress(KeyboardInterrupt):
            convert(trained_dense, out, "best", watch=StopAt(2 + 3 * stops))
        stops += 1
    assert stops > 2
    assert hashes(out) == hashes(converted(trained_dense, "best").out)


def test_states_that_were_damaged_are_computed_again(trained_dense, converted, tmp_path):
    whole = converted(trained_dense, "gptq").out
    with pytest.raises(KeyboardInterrupt):
        convert(trained_dense, tmp_path / "parts", watch=StopAt(1))
    (states,) = (tmp_path / "parts.partial" / CALIBRATION).glob("quantized-*.f32")
    states.write_bytes(b"\1" + states.read_bytes()[1:])
    assert hashes(convert(trained_dense, tmp_path / "parts").out) == hashes(whole)


def test_the_manifest_tells_the_text_and_every_weight_s_error(trained_dense, converted):
    written = converted(trained_dense, "gptq")
    account = json.loads((written.out / "mlxquant.json").read_text())["calibration"]
    assert "built-in" in account["text"]
    assert [tensor["name"] for tensor in account["tensors"]] == [record.name for record in written.records]
    assert all(check.ok for check in check_folder(written.out, open_source(trained_dense)))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_every_width_has_its_codes(trained_dense, tmp_path, bits):
    written = convert(trained_dense, tmp_path / "out", bits=bits)
    assert all(r.error < r.rounding for r in written.records if r.rounding)


@pytest.mark.parametrize(("method", "tied"), [("gptq", True), ("best", True), ("best", False)])
def test_an_embedding_is_chosen_by_what_enters_the_head_that_it_is_or_by_what_its_errors_cost(tmp_path, method, tied):
    folder = make(tmp_path / "tiny", "llama", dtype="float32", tied=tied)
    first, *_ = convert(folder, tmp_path / "out", method).records
    assert first.name == "model.embed_tokens.weight"
    assert 0 < first.error < 0.9 * first.rounding


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_model_says_what_it_said_until_it_is_rounded(tmp_path, tied):
    folder = make(tmp_path / "tiny", "llama", dtype="float32", tied=tied)
    source = open_source(folder)
    wanted = settings(recipe="uniform", method="gptq", bits=8, group_size=32, rotate=True)
    plan = make_plan(source.config, source.specs, wanted)
    samples = text(folder)
    rotation = Rotation.of(source.config, plan)
    out = to_mlx(source, plan, tmp_path / "out", samples, RECIPES["gptq"], rotation=rotation).out
    before, after = (load_model(path, expand="on").model for path in (folder, out))
    tokens = mx.array(samples.tokens_BL[:1])
    difference = mx.abs(after(tokens) - before(tokens)).max() / mx.abs(before(tokens)).max()
    assert difference.item() < 0.05  # 8 bits of random weights
    assert np.allclose(np.array(after.model.norm.weight), 1)
    assert [check for check in check_folder(out, source) if not check.ok] == []
