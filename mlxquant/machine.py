"""What computer this is: a plain value that the planner compares models with.

`probe()` reads this one. On a Mac the numbers come from MLX itself, which knows the GPU's working set; elsewhere from
the operating system, and the "working set" is the memory that is free now.
"""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Exact memory bandwidth in bytes per second by chip name and GPU cores (None: any). Apple's spec pages print these
# rounded; 68.25, 153.6 and 819.2 are published as such and the other rows are the same bus arithmetic.
_GB = 10**9
BANDWIDTH: dict[tuple[str, int | None], float] = {
    ("M1", None): 68.25 * _GB,
    ("M1 Pro", None): 204.8 * _GB,
    ("M1 Max", None): 409.6 * _GB,
    ("M1 Ultra", None): 819.2 * _GB,
    ("M2", None): 102.4 * _GB,
    ("M2 Pro", None): 204.8 * _GB,
    ("M2 Max", None): 409.6 * _GB,
    ("M2 Ultra", None): 819.2 * _GB,
    ("M3", None): 102.4 * _GB,
    ("M3 Pro", None): 153.6 * _GB,
    ("M3 Max", 30): 307.2 * _GB,
    ("M3 Max", 40): 409.6 * _GB,
    ("M3 Ultra", None): 819.2 * _GB,
    ("M4", None): 120.0 * _GB,
    ("M4 Pro", None): 273.0 * _GB,
    ("M4 Max", 32): 409.6 * _GB,
    ("M4 Max", 40): 546.0 * _GB,
    ("M5", None): 153.6 * _GB,
    ("M5 Pro", None): 307.2 * _GB,
    ("M5 Max", 32): 460.8 * _GB,
    ("M5 Max", 40): 614.4 * _GB,
}


@dataclass(frozen=True)
class Machine:
    """memory_bytes: RAM. working_set_bytes: what one process may use without hurting the rest.

    max_buffer_bytes: the largest single allocation. bandwidth_bytes_per_s: None when nobody published it.
    """

    chip: str
    gpu_cores: int | None
    cpu_cores: int
    memory_bytes: int
    working_set_bytes: int
    max_buffer_bytes: int
    bandwidth_bytes_per_s: float | None
    device: str  # "gpu" or "cpu": where MLX computes
    system: str


def bandwidth(chip: str, gpu_cores: int | None) -> float | None:
    """Bytes per second for 'Apple M3 Max' or 'M3 Max'; None when unknown. The same name can have two bandwidths."""
    name = chip.removeprefix("Apple ").strip()
    return BANDWIDTH.get((name, gpu_cores)) or BANDWIDTH.get((name, None))


def probe() -> Machine:
    """Reads this computer. Imports MLX only on a Mac, where the GPU's limits are known to nobody else."""
    if platform.system() == "Darwin":
        return _probe_mac()
    memory, available = _linux_memory()
    return Machine(
        chip=_linux_cpu(),
        gpu_cores=None,
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=memory,
        working_set_bytes=available,
        max_buffer_bytes=available,
        bandwidth_bytes_per_s=None,
        device="cpu",
        system=f"{platform.system()} {platform.release()}",
    )


def _probe_mac() -> Machine:
    import mlx.core as mx

    # Not mx.metal.is_available(): that says how MLX was built, and a sandbox may have no Metal device all the same.
    info = mx.device_info(mx.gpu) if mx.is_available(mx.gpu) else {}
    chip = str(info.get("device_name") or _run("sysctl", "-n", "machdep.cpu.brand_string"))
    memory = int(info.get("memory_size") or _run("sysctl", "-n", "hw.memsize") or 0)
    cores = _mac_gpu_cores()
    return Machine(
        chip=chip,
        gpu_cores=cores,
        cpu_cores=os.cpu_count() or 1,
        memory_bytes=memory,
        working_set_bytes=int(info.get("max_recommended_working_set_size") or memory * 2 // 3),
        max_buffer_bytes=int(info.get("max_buffer_length") or memory // 2),
        bandwidth_bytes_per_s=bandwidth(chip, cores),
        device="gpu" if info else "cpu",
        system=f"macOS {platform.mac_ver()[0]}",
    )


def _mac_gpu_cores() -> int | None:
    for line in _run("ioreg", "-r", "-d1", "-w0", "-c", "AGXAccelerator").splitlines():
        if '"gpu-core-count"' in line:
            digits = line.rpartition("=")[2].strip()
            return int(digits) if digits.isdigit() else None
    return None


def _run(*command: str) -> str:
    try:
        # Device names in the registry need not be UTF-8.
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False)
        return done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _linux_memory() -> tuple[int, int]:
    """(total, available) bytes; a container's own limit counts where it is lower."""
    fields = {}
    with Path("/proc/meminfo").open() as lines:
        for line in lines:
            key, _, value = line.partition(":")
            fields[key] = int(value.split()[0]) * 1024
    total, available = fields["MemTotal"], fields.get("MemAvailable", fields["MemFree"])
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    if limit.isdigit() and int(limit) < total:
        return int(limit), min(available, int(limit))
    return total, available


def _linux_cpu() -> str:
    with Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
