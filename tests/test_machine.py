"""What a Mac's tools print, read; and what this machine says of itself."""

from __future__ import annotations

import sys

import pytest

from mlxquant import machine
from mlxquant.machine import bandwidth, probe

# `ioreg -r -d1 -w0 -c AGXAccelerator` on an M4, shortened.
IOREG = """+-o AGXAcceleratorG16G  <class AGXAcceleratorG16G, id 0x10000039c, registered, matched, active, busy 0>
    {
      "IOMatchedAtBoot" = Yes
      "GPUConfigurationVariable" = {"num_gps"=4,"gpu_gen"=16,"num_cores"=10,"num_frags"=10}
      "PerformanceStatistics" = {"In use system memory (driver)"=0,"Device Utilization %"=30}
      "model" = "Apple M4"
      "gpu-core-count" = 10
      "MetalPluginName" = "AGXMetalG16G_B0"
    }
"""


@pytest.mark.parametrize(
    ("printed", "cores"),
    [(IOREG, 10), ("", None), (IOREG.replace("gpu-core-count", "x"), None), (IOREG.replace("= 10\n", "= ?\n"), None)],
)
def test_gpu_cores(monkeypatch, printed, cores):
    monkeypatch.setattr(machine, "_run", lambda *command: printed)
    assert machine._mac_gpu_cores() == cores


def test_tools_that_are_missing_or_print_what_is_no_utf8():
    assert machine._run("no-such-tool-here") == ""
    printed = machine._run(sys.executable, "-c", r"import sys; sys.stdout.buffer.write(b'\xff \"gpu\" = 8\n')")
    assert printed.endswith('"gpu" = 8')


def test_bandwidth_by_chip_and_cores():
    assert bandwidth("Apple M1", 8) == 68.25e9
    assert bandwidth("Apple M3 Max", 30) == 307.2e9
    assert bandwidth("Apple M3 Max", 40) == 409.6e9
    assert bandwidth("Apple M3 Max", None) is None  # two are sold
    assert bandwidth("Apple Paravirtual device", None) is None


def test_a_mac_as_a_virtual_machine_describes_itself(monkeypatch):
    """What MLX told on a hosted runner; no tool there knows the GPU's cores."""
    import mlx.core as mx

    told = {
        "device_name": "Apple Paravirtual device",
        "architecture": "air64_v27",
        "max_recommended_working_set_size": 5010800640,
        "memory_size": 7516192768,
        "max_buffer_length": 3758096384,
        "resource_limit": 499000,
    }
    monkeypatch.setattr(machine, "_run", lambda *command: "")
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    monkeypatch.setattr(mx, "device_info", lambda device: told)
    found = machine._probe_mac()
    assert (found.working_set_bytes, found.memory_bytes, found.max_buffer_bytes) == (5010800640, 7516192768, 3758096384)
    assert (found.device, found.gpu_cores, found.bandwidth_bytes_per_s) == ("gpu", None, None)


def test_a_mac_without_a_metal_device(monkeypatch):
    """Its tools still tell what it is."""
    import mlx.core as mx

    printed = {"machdep.cpu.brand_string": "Apple M2 Pro", "hw.memsize": "17179869184"}
    monkeypatch.setattr(machine, "_run", lambda *command: printed.get(command[-1], ""))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)  # how MLX was built, not what is there
    monkeypatch.setattr(mx, "is_available", lambda device: device != mx.gpu)
    found = machine._probe_mac()
    assert (found.device, found.memory_bytes) == ("cpu", 17179869184)
    assert 0 < found.working_set_bytes < found.memory_bytes


def test_this_machine():
    found = probe()
    assert 0 < found.working_set_bytes <= found.memory_bytes
    assert found.cpu_cores >= 1
    assert found.chip
    if sys.platform == "darwin":
        assert found.chip.startswith("Apple")
        assert found.system.startswith("macOS")
