"""The logits check: zero against itself, small against an honest conversion, large against a broken one."""

from __future__ import annotations

import json
import shutil

import pytest

from mlxquant.measure.agree import LIMITS, agreement, limit
from mlxquant.run.device import prepare
from tests.cli.runner import mlxquant, refused
from tests.tiny import make


def agree(source, output):
    return agreement(source, output, prepare("cpu"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agree")
    source = make(folder / "source", "qwen2")
    assert mlxquant("convert", source, "-o", folder / "out", "--bits", "8").code == 0
    return source, folder / "out"


def test_a_model_agrees_with_itself(pair):
    found = agree(pair[0], pair[0])
    assert found.kl_nats == 0.0
    assert found.top1 == 1.0
    assert found.finite


def test_eight_bits_are_close(pair):
    found = agree(*pair)
    assert 0 < found.kl_nats < 0.02


def test_another_model_is_far(pair, tmp_path):
    other = make(tmp_path / "other", "qwen2", seed=3)
    assert agree(pair[0], other).kl_nats > 10 * agree(*pair).kl_nats


def test_limits_grow_as_bits_fall():
    assert [limit(b) for b in (8, 6, 5, 4, 3, 2)] == sorted(LIMITS.values())


def test_verify_fails_on_logits_when_everything_else_is_in_order(pair, tmp_path):
    """A config that rotates positions otherwise: no weight, checksum or name is wrong, only the answers are."""
    source, out = pair
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    config = json.loads((broken / "config.json").read_text())
    config["rms_norm_eps"] = 50.0
    (broken / "config.json").write_text(json.dumps(config))
    manifest = json.loads((broken / "mlxquant.json").read_text())
    from mlxquant.convert.manifest import sha256

    manifest["files"]["config.json"] = sha256((broken / "config.json").read_bytes())
    (broken / "mlxquant.json").write_text(json.dumps(manifest))
    assert mlxquant("verify", out, "--source", source).code == 0
    refused(mlxquant("verify", broken, "--source", source), "logits failed")


def test_a_source_too_large_to_run_is_said_and_not_run(pair, monkeypatch):
    from mlxquant.run import budget

    monkeypatch.setattr(budget, "FILL", 1e-6)
    result = mlxquant("verify", pair[1], "--source", pair[0])
    assert result.code == 0
    assert "skipped: this run does not fit" in result.out


def test_verify_json(pair):
    result = mlxquant("verify", pair[1], "--source", pair[0], "--json")
    checks = {c["name"]: c["ok"] for c in json.loads(result.out)["checks"]}
    assert checks["logits"] is True
    assert all(checks.values())
