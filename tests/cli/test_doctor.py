from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def doctor(*args, **environment):
    found = subprocess.run(
        [sys.executable, "-m", "mlxquant", "doctor", *args],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def findings(**environment):
    told = json.loads(doctor("--json", **environment))
    return told["ok"], {f["name"]: f for f in told["findings"]}


def test_says_everything():
    _, found = findings()
    assert {"device", "system", "BLAS", "RAM", "limits", "versions", "Hub cache", "Hub token", "numba cache"} <= set(
        found
    )
    assert "GFLOP/s" in found["BLAS"]["value"]
    assert "wired none" in found["limits"]["value"]
    assert "mlx-lm 0." in found["versions"]["value"]


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac has Accelerate")
def test_each_problem_has_a_next_step():
    ok, found = findings(MLXQUANT_BLAS="none")
    assert not ok
    assert found["BLAS"]["advice"] == "unset MLXQUANT_BLAS"
    assert "Next: unset MLXQUANT_BLAS" in doctor(MLXQUANT_BLAS="none")


def test_token_is_named_present_and_never_shown():
    output = doctor(HF_TOKEN="hf_" + "secret" * 5)
    assert "present" in output
    assert "secret" not in output


def test_hub_cache_follows_the_environment(tmp_path):
    _, found = findings(HF_HOME=str(tmp_path / "hf"))
    assert str(tmp_path / "hf") in found["Hub cache"]["value"]
