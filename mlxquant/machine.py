"""What computer this is: a plain value that the planner compares models with.

`probe()` reads this one. On a Mac the numbers come from MLX itself, which knows the GPU's working set; elsewhere from
the operating system, and the "working set" is the memory that is free now. `described()` is a Mac that is not at hand,
as macs.toml has it.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mlxquant.errors import UsageError
from mlxquant.macs import (
    NEW_MACOS,
    Chip,
    Words,
    agreed,
    bandwidth,
    chip_name,
    largest_buffer,
    read_words,
    rows_of,
    usual_working_set,
)
from mlxquant.units import GIB, parse_ram

_LEAST_RAM_BYTES, _MOST_RAM_BYTES = 4 * GIB, 1024 * GIB


@dataclass(frozen=True)
class Machine:
    """memory_bytes: RAM. working_set_bytes: what one process may use without hurting the rest.

    max_buffer_bytes: the largest single allocation. bandwidth_bytes_per_s: None when nobody published it.
    limits: where these two are from: 'read' from this machine, 'observed' on such Macs, or 'derived' by the rule that
    the observed ones follow. older_working_set_bytes: what macOS 15 and before gives a described Mac, where it differs.
    usual_working_set_bytes: on a Mac, what macs.toml has for its RAM and macOS, beside the value read from it.
    remarks: what was taken for granted of a described Mac.
    """

    chip: str
    gpu_cores: int | None
    cpu_cores: int | None
    memory_bytes: int
    working_set_bytes: int
    max_buffer_bytes: int
    bandwidth_bytes_per_s: float | None
    device: str  # "gpu" or "cpu": where MLX computes
    system: str
    limits: Literal["read", "observed", "derived"] = "read"
    older_working_set_bytes: int | None = None
    usual_working_set_bytes: int | None = None
    remarks: tuple[str, ...] = ()

    @property
    def system_bytes(self) -> int:
        """What is left to the system and all other programs: on a Mac Metal's reserve, elsewhere what they use now."""
        return max(0, self.memory_bytes - self.working_set_bytes)

    @property
    def generation(self) -> str | None:
        """'M5' of 'Apple M5 Max'; None when it is no chip of Apple's."""
        found = re.match(r"(?:Apple )?([AM][0-9]+)\b", self.chip)
        return found[1] if found else None

    @property
    def title(self) -> str:
        """'M3 Max, 40 GPU cores, 64 GB', with RAM as Apple prints it; that of another computer in GiB."""
        cores = [f"{self.gpu_cores} GPU cores"] if self.gpu_cores else []
        unit = "GB" if self.device == "gpu" else "GiB"
        return ", ".join([self.chip.removeprefix("Apple "), *cores, f"{self.memory_bytes / GIB:.4g} {unit}"])

    def with_older_macos(self) -> Machine:
        """A described Mac under macOS 15 or before; itself where nothing differs."""
        older = self.older_working_set_bytes
        if older is None:
            return self
        limits: Literal["observed", "derived"] = (
            "observed" if usual_working_set(self.memory_bytes, 15)[1] else "derived"
        )
        return replace(
            self,
            working_set_bytes=older,
            max_buffer_bytes=largest_buffer(older),
            system="macOS 15",
            limits=limits,
            older_working_set_bytes=None,
        )


def described(
    mac: str | None = None, *, chip: str | None = None, ram: str | None = None, gpu_cores: int | None = None
) -> Machine:
    """A Mac by its words: 'M2 8GB', 'm3 max 40-core 64gb', 'M3-Pro', '16GB'; or chip, RAM and GPU cores apart.

    RAM is as Apple prints it: 8GB is 8 GiB. `mac` names a Mac that was sold; `ram` beside a chip is taken as it stands,
    with a remark where no such Mac was sold. A chip without RAM has the least it was sold with; RAM without a chip has
    no bandwidth. Limits are those of macOS 26, from macs.toml. Raises UsageError.
    """
    said = read_words(mac) if mac is not None else Words()
    name = agreed("chip", [said.chip, None if chip is None else chip_name(chip)])
    memory = agreed("amount of RAM", [said.memory_bytes, None if ram is None else parse_ram(ram)])
    cores = agreed("number of GPU cores", [said.gpu_cores, gpu_cores])
    if memory is not None and not _LEAST_RAM_BYTES <= memory <= _MOST_RAM_BYTES:
        raise UsageError(f"no Mac has {_gb(memory)} of RAM", hint="write it like 16GB; 4GB to 1024GB are understood")
    if name is not None:
        return _of_chip(name, memory, cores, sold=ram is None)
    if memory is None or cores is not None:
        raise UsageError(
            "which Mac is not said: its chip is missing", hint="write it like 'M2 8GB' or 'M3 Max 40-core 64GB'"
        )
    return _described("Mac", None, None, memory, ("the chip is not given, and with it the bandwidth",))


def _of_chip(name: str, memory: int | None, cores: int | None, *, sold: bool) -> Machine:
    """sold: RAM that this chip was not sold with is an error, not a remark."""
    rows = rows_of(name)
    remarks = [f"what is known of the {name} is second hand, from one source"] if rows[0].second_hand else []
    if cores is not None:
        rows = _with_cores(rows, cores)
    if memory is None:
        memory = min(row.ram_gib[0] for row in rows) * GIB
        if sum(len(row.ram_gib) for row in rows) > 1:
            remarks.append(f"RAM is not given: {_gb(memory)} is the least that the {name} was sold with")
    fitting = tuple(row for row in rows if row.sold_with(memory))
    if not fitting:
        unsold = (
            f"the {name}{f' with {cores} GPU cores' if cores else ''} was sold with {_sizes(rows)}, not {_gb(memory)}"
        )
        if sold:
            raise UsageError(
                unsold, hint=f"--chip '{name}' --ram {_gb(memory, '')} reckons with such a Mac all the same"
            )
        remarks.append(unsold)
    rows = fitting or rows
    if len(rows) > 1:
        remarks.append(f"the {name} has two bandwidths, by its GPU cores: the lower one is taken")
    slowest = min(rows, key=lambda row: row.bandwidth_bytes_per_s)
    if cores is None and len(rows) == 1 and len(rows[0].gpu_cores) == 1 and not rows[0].second_hand:
        cores = rows[0].gpu_cores[0]
    return _described(f"Apple {name}", cores, slowest.bandwidth_bytes_per_s, memory, tuple(remarks))


def _with_cores(rows: Sequence[Chip], cores: int) -> tuple[Chip, ...]:
    fitting = tuple(row for row in rows if row.has_cores(cores))
    if not fitting:
        there = _either([str(count) for row in rows for count in row.gpu_cores])
        there = f"up to {there}" if rows[0].second_hand else there
        raise UsageError(
            f"the {rows[0].name} has {there} GPU cores, not {cores}", hint="leave them out where you do not know them"
        )
    return fitting


def _described(chip: str, cores: int | None, rate: float | None, memory: int, remarks: tuple[str, ...]) -> Machine:
    working_set, observed = usual_working_set(memory)
    older, _ = usual_working_set(memory, 15)
    return Machine(
        chip=chip,
        gpu_cores=cores,
        cpu_cores=None,
        memory_bytes=memory,
        working_set_bytes=working_set,
        max_buffer_bytes=largest_buffer(working_set),
        bandwidth_bytes_per_s=rate,
        device="gpu",
        system=f"macOS {NEW_MACOS}",
        limits="observed" if observed else "derived",
        older_working_set_bytes=None if older == working_set else older,
        remarks=remarks,
    )


def _gb(memory_bytes: int, space: str = " ") -> str:
    """As Apple prints it: 8 GiB is '8 GB'."""
    return f"{memory_bytes / GIB:.10g}{space}GB"


def _sizes(rows: Sequence[Chip]) -> str:
    sizes = sorted(gib for row in rows for gib in row.ram_gib)
    return f"{sizes[0]} to {sizes[-1]} GB" if rows[0].second_hand else f"{_either([str(gib) for gib in sizes])} GB"


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


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
    cores, version = _mac_gpu_cores(), platform.mac_ver()[0]
    return Machine(
        chip=chip,
        gpu_cores=cores,
        cpu_cores=os.cpu_count() or 1,
        memory_bytes=memory,
        working_set_bytes=int(info.get("max_recommended_working_set_size") or memory * 2 // 3),
        max_buffer_bytes=int(info.get("max_buffer_length") or memory // 2),
        bandwidth_bytes_per_s=bandwidth(chip, cores, memory),
        device="gpu" if info else "cpu",
        system=f"macOS {version}",
        usual_working_set_bytes=usual_working_set(memory, _major(version))[0],
    )


def _major(version: str) -> int:
    """26 of '26.5.1'; a version that is not told counts as new."""
    first = version.partition(".")[0]
    return int(first) if first.isdecimal() else NEW_MACOS


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


def peak_memory_bytes() -> int:
    """The most that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
