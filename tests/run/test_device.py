from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mlxquant.errors import MlxquantError, UsageError
from mlxquant.run import device as devices
from mlxquant.run.device import cache_limit, prepare
from mlxquant.units import GIB, MIB

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="a Mac has Accelerate and loads nothing")

PROGRAM = """
import json, sys
{before}
from mlxquant.run.device import prepare
device = prepare("cpu")
import mlx.core as mx
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(json.dumps([device.blas.name, device.blas.detail, "openblas" in maps, device.wired_limit_bytes]))
"""


def in_a_fresh_process(before: str = "", **environment: str) -> list[object]:
    env = {k: v for k, v in os.environ.items() if k != devices.BLAS_VARIABLE} | environment
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return list(json.loads(found.stdout))


@on_linux
def test_openblas_can_be_switched_off():
    name, detail, loaded, _ = in_a_fresh_process(MLXQUANT_BLAS="none")
    assert (name, loaded) == ("reference", False)
    assert "MLXQUANT_BLAS" in detail


@on_linux
def test_openblas_is_loaded_where_there_is_one():
    found = [soname for soname in devices._candidates() if devices._load(soname)]
    name, _, loaded, wired = in_a_fresh_process()
    assert (name, loaded) == (("OpenBLAS", True) if found else ("reference", False))
    assert wired == 0


@on_linux
def test_mlx_multiplies_with_the_blas_that_was_loaded():
    """Mapped is not used: loaded with RTLD_LOCAL, MLX would go on with its own, about 30 times slower."""
    if not any(devices._load(soname) for soname in devices._candidates()):
        pytest.skip("no OpenBLAS here")
    assert 3 * product_seconds() < product_seconds(MLXQUANT_BLAS="none")


def product_seconds(**environment: str) -> float:
    program = """
import time
from mlxquant.run.device import prepare
prepare("cpu")
import mlx.core as mx
def product():
    a = mx.ones((800, 800))
    mx.eval(a)
    began = time.perf_counter()
    mx.eval(a @ a)
    return time.perf_counter() - began
print(min(product() for _ in range(3)))
"""
    env = {k: v for k, v in os.environ.items() if k != devices.BLAS_VARIABLE} | environment
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    return float(done.stdout)


@on_linux
def test_too_late_is_said():
    name, detail, _, _ = in_a_fresh_process(before="import mlx.core")
    assert name == "reference"
    assert "before" in detail


@on_linux
def test_a_library_that_is_no_blas_is_refused(monkeypatch):
    monkeypatch.setenv(devices.BLAS_VARIABLE, "libm.so.6")
    monkeypatch.setattr(devices, "_loaded", None)
    monkeypatch.delitem(sys.modules, "mlx.core")
    with pytest.raises(UsageError, match=r"libm\.so\.6"):
        devices.load_blas()


def test_limits_are_in_force():
    import mlx.core as mx

    device = prepare("cpu")
    assert mx.set_cache_limit(device.cache_limit_bytes) == device.cache_limit_bytes
    assert mx.set_memory_limit(device.memory_limit_bytes) == device.memory_limit_bytes
    assert device.memory_limit_bytes < device.machine.working_set_bytes


def test_cache_limit_is_a_tenth_within_bounds():
    assert cache_limit(1 * GIB) == 256 * MIB
    assert cache_limit(10 * GIB) == 1 * GIB
    assert cache_limit(400 * GIB) == 2 * GIB


def test_devices_that_are_not_there():
    with pytest.raises(UsageError, match="npu"):
        prepare("npu")
    import mlx.core as mx

    if not mx.is_available(mx.gpu):
        with pytest.raises(UsageError, match="no GPU"):
            prepare("gpu")
    with pytest.raises(UsageError, match="wired"):
        prepare("cpu", wired=True)


def test_a_mac_session_without_metal_is_told(monkeypatch):
    """MLX was built for Metal there, and without a device it cannot even allocate."""
    import mlx.core as mx

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "is_available", lambda device: device != mx.gpu)
    with pytest.raises(MlxquantError, match="no Metal device") as caught:
        prepare("cpu")
    assert caught.value.hint
