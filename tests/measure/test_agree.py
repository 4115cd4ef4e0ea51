"""The logits check: zero against itself, small against an honest conversion, large against a broken one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest

from mlxquant.convert.checks import open_written
from mlxquant.convert.weight_checks import Promise
from mlxquant.measure.agree import LIMIT_NATS, LIMIT_TIMES, agreement
from mlxquant.run.device import prepare
from tests.cli.runner import mlxquant, refused
from tests.tiny import make


def agree(source, output):
    written = open_written(output)
    return agreement(source, output, prepare("cpu"), written.stored, written.promise)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agree")
    source = make(folder / "source", "qwen2")
    assert mlxquant("convert", source, "-o", folder / "out", "--bits", "8").code == 0
    return source, folder / "out"


def test_a_model_agrees_with_itself(pair):
    found = agreement(pair[0], pair[0], prepare("cpu"), {})
    assert found.kl_nats == found.drift_nats == 0.0
    assert found.top1 == 1.0
    assert found.finite


def test_eight_bits_are_close(pair):
    found = agree(*pair)
    assert 0 < found.kl_nats < 0.02
    assert found.ok


def test_another_model_is_far(pair, tmp_path):
    other = make(tmp_path / "other", "qwen2", seed=3)
    found = agree(other, pair[1])
    assert found.kl_nats > 10 * agree(*pair).kl_nats
    assert found.drift_nats > LIMIT_NATS
    assert not found.ok


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("llama", "float32", ["--bits", "2", "--group-size", "32", "--dtype", "bfloat16"]),
        ("llama", "float16", ["--mode", "mxfp4"]),
        ("llama", "bfloat16", ["--bits", "4", "--method", "rtn"]),
        ("qwen3_moe", "bfloat16", ["--bits", "3", "--set", "down_proj=keep"]),
        ("deepseek_v3", "bfloat16", ["--mode", "nvfp4", "--recipe", "uniform"]),
        ("qwen3_next", "bfloat16", ["--recipe", "uniform"]),
    ],
)
def test_an_honest_output_does_not_drift_however_coarse(family, dtype, options, tmp_path):
    source = make(tmp_path / "source", family, dtype=dtype)
    assert mlxquant("convert", source, "-o", tmp_path / "out", *options).code == 0
    found = agree(source, tmp_path / "out")
    assert found.kl_nats > 100 * found.drift_nats
    assert found.drift_nats < 1e-6
    assert found.ok


def test_a_swapped_projection_shows_at_two_bits(tmp_path):
    """Where the rounding alone moves the answers further than the fault does."""
    source = make(tmp_path / "source", "llama", layers=4)
    assert mlxquant("convert", source, "-o", tmp_path / "out", "--bits", "2").code == 0
    arrays = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for part in ("weight", "scales", "biases"):
        gate, up = (f"model.layers.2.mlp.{name}.{part}" for name in ("gate_proj", "up_proj"))
        arrays[gate], arrays[up] = arrays[up], arrays[gate]
    mx.save_safetensors(str(tmp_path / "out" / "model.safetensors"), arrays, {"format": "mlx"})
    assert not agree(source, tmp_path / "out").ok


def test_verify_fails_on_logits_when_everything_else_is_in_order(pair, tmp_path):
    """A config that rotates positions otherwise: no weight, checksum or name is wrong, only the answers are."""
    source, out = pair
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    config = json.loads((broken / "config.json").read_text())
    config["rope_theta"] *= 10
    (broken / "config.json").write_text(json.dumps(config))
    manifest = json.loads((broken / "mlxquant.json").read_text())
    from mlxquant.convert.manifest import sha256

    manifest["files"]["config.json"] = sha256((broken / "config.json").read_bytes())
    (broken / "mlxquant.json").write_text(json.dumps(manifest))
    assert mlxquant("verify", out, "--source", source).code == 0
    refused(mlxquant("verify", broken, "--source", source), "logits failed")


def test_a_source_too_large_to_run_is_said_and_not_run(pair, monkeypatch):
    from mlxquant.fit import memory

    monkeypatch.setattr(memory, "FILL", 1e-6)
    result = mlxquant("verify", pair[1], "--source", pair[0])
    assert result.code == 0
    assert "skipped: this run does not fit" in result.out


def test_verify_json(pair):
    result = mlxquant("verify", pair[1], "--source", pair[0], "--json")
    checks = {c["name"]: c["ok"] for c in json.loads(result.out)["checks"]}
    assert checks["logits"] is True
    assert all(checks.values())


def test_searched_codes_are_no_plain_rounding(tmp_path):
    source = make(tmp_path / "source", "llama")
    assert mlxquant("convert", source, "-o", tmp_path / "out", "--bits", "3").code == 0
    assert agree(source, tmp_path / "out").ok
    assert not agreement(source, tmp_path / "out", prepare("cpu"), open_written(tmp_path / "out").stored).ok


def test_calibrated_codes_are_held_against_plain_rounding(pair):
    """They cannot be made anew, so their bound is wider."""
    source, out = pair
    stored = open_written(out).stored
    found = agreement(source, out, prepare("cpu"), stored, Promise("gptq", calibrated=True))
    assert found.ok
    assert found.kl_nats < LIMIT_TIMES * found.rounding_nats + LIMIT_NATS
    assert not replace(found, kl_nats=2 * found.rounding_nats + LIMIT_NATS).ok
