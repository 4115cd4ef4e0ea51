"""`convert` with methods that look at text, and with a budget: what they say, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxquant.calibrate.choose import Chooser
from mlxquant.calibrate.recipes import RECIPES
from mlxquant.convert.sources import open_source
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings
from tests.cli.runner import mlxquant, refused
from tests.tiny import make

TEXT = ("--samples", "6", "--sequence-length", "48")


def run(*words):
    return mlxquant("convert", *words)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "llama", "llama", dtype="float32")


def test_gptq_says_what_it_gained_by_kind_of_weight(llama, tmp_path):
    done = run(llama, "-o", tmp_path / "out", "--method", "gptq", *TEXT)
    assert done.code == 0, done.err
    assert "Calibrating with built-in" in done.out
    assert "down_proj" in done.out
    assert "Peak memory" in done.out
    assert (tmp_path / "out" / "config.json").exists()


def test_best_says_what_it_chose_and_what_else_it_tried(llama, tmp_path):
    done = run(llama, "-o", tmp_path / "out", "--method", "best", *TEXT, "--json")
    told = json.loads(done.out)
    assert told["recipe"] == told["trials"][0]["recipe"]
    assert [trial["held_out_nats"] for trial in told["trials"]] == sorted(t["held_out_nats"] for t in told["trials"])
    assert len(told["trials"]) == len(RECIPES["best"])


def test_a_budget_is_never_exceeded_and_its_measurements_are_kept(llama, tmp_path):
    first = run(llama, "-o", tmp_path / "a", "--bpw", "4.5", "--method", "gptq", *TEXT)
    assert first.code == 0, first.err
    assert "Measuring what each tensor costs" in first.out
    kept = tmp_path / "a.plan.json"
    second = run(llama, "-o", tmp_path / "b", "--bpw", "3.5", "--method", "gptq", "--plan-file", kept, *TEXT)
    assert "Measuring" not in second.out
    for name, bpw in (("a", 4.5), ("b", 3.5)):
        plan = json.loads((tmp_path / name / "mlxquant.json").read_text())["plan"]
        assert bpw - 0.1 < plan["bpw"] <= bpw
        assert len({t["codec"] for t in plan["tensors"]}) > 2


def test_a_budget_comes_from_a_mac_s_memory_too(llama, tmp_path):
    done = run(llama, "-o", tmp_path / "a", "--fit", "8GB", "--context", "256", "--method", "gptq", *TEXT, "--dry-run")
    assert done.code == 0, done.err
    assert "8g32" in done.out  # a tiny model has room for all there is


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--samples", "4"), "no --method"),
        (("--method", "rtn", "--calibration", "builtin"), "--method rtn does not"),
        (("--method", "search", "--seed", "1"), "only where some is named"),
        (("--method", "gptq", "--mode", "nvfp4"), "not nvfp4"),
        (("--method", "gptq", "--type", "Q4_K_M"), "--type is for GGUF"),
        (("--rotate", "--method", "rtn"), "--rotate"),
        (("--bpw", "4", "--bits", "4"), "--bits names one"),
        (("--bpw", "4", "--fit", "8GB"), "give one of them"),
        (("--bpw", "4", "--context", "8k"), "--context is for --fit"),
        (("--bpw", "4", "--type", "Q4_K_M"), "--type is for GGUF"),
        (("--fit", "8GB", "--method", "gptq", "--for", "code"), "--for chooses among levels"),
        (("--fit", "8GB", "--method", "gptq", "--context", "0"), "no room for a prompt"),
        (("--plan-file", "x.json"), "is for a budget"),
        (("--method", "gptq", "--samples", "100000"), "samples of 512 take"),
    ],
)
def test_what_contradicts_itself_is_refused_in_one_line(llama, tmp_path, words, said):
    done = run(llama, "-o", tmp_path / "out", *words)
    refused(done, said, code=2)
    assert not list(tmp_path.glob("out*"))


def test_activations_that_are_not_finite_name_their_layer(llama, tmp_path):
    folder = make(tmp_path / "bad", "llama", dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= np.float32(1e30)
    tensors["model.layers.1.mlp.gate_proj.weight"] *= np.float32(1e30)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = run(folder, "-o", tmp_path / "out", "--method", "gptq", *TEXT)
    refused(done, "model.layers.1.mlp.down_proj.weight", "NaN or infinite")


@pytest.mark.parametrize("name", ["model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_name_their_tensor(tmp_path, name):
    folder = make(tmp_path / "bad", "llama", dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].reshape(-1)[5] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = run(folder, "-o", tmp_path / "out", "--method", "gptq", *TEXT)
    refused(done, name, "NaN")
    assert not (tmp_path / "out").exists()


def test_norms_that_were_shifted_before_are_refused(tmp_path):
    folder = make(tmp_path / "shifted", "qwen3_next", dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if name.endswith("layernorm.weight"):
            values += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = run(folder, "-o", tmp_path / "out", "--method", "gptq", *TEXT)
    refused(done, "has been applied already")


def test_a_hessian_that_is_not_positive_falls_back_to_search_and_says_so(llama):
    source = open_source(llama)
    plan = make_plan(source.config, source.specs, settings(recipe="uniform", method="gptq", group_size=32))
    tensor = next(t for t in plan.tensors if t.name.endswith("q_proj.weight"))
    w = np.random.default_rng(0).standard_normal(tensor.target.shape).astype(np.float32)
    hessian = -np.eye(w.shape[1], dtype=np.float32)
    chosen, _ = Chooser(RECIPES["gptq"][0]).prepared(tensor, hessian)(w)
    assert "Hessian" in chosen.note
    assert np.abs(chosen.values_OI - w).max() < 1
