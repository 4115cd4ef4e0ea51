"""Where MLX computes, and within which limits. `prepare` runs before `mlx.core` is imported.

On Linux the mlx wheel brings the *reference* BLAS: one thread, no vector instructions. A symbol that is
already in the process's global scope wins over the wheel's own, so loading OpenBLAS with RTLD_GLOBAL first is
all it takes; loaded after `mlx.core`, it changes nothing. On a Mac the CPU device is Accelerate and there is
nothing to load.

Set MLXQUANT_BLAS=none to measure without it, or MLXQUANT_BLAS=/path/to/lib.so to choose the library.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxquant.errors import MlxquantError, UsageError
from mlxquant.machine import Machine, probe
from mlxquant.units import GIB, MIB

BLAS_VARIABLE = "MLXQUANT_BLAS"
INSTALL_OPENBLAS = "install OpenBLAS, for example with `apt install libopenblas0-pthread` or `dnf install openblas`"
# Builds with 32-bit integers only: `libopenblas64` has the same symbols with other argument types.
_SONAMES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")
_FOLDERS = ("/usr/lib64", "/usr/local/lib", "/opt/OpenBLAS/lib", "/usr/lib")


@dataclass(frozen=True)
class Blas:
    """name: 'OpenBLAS', 'Accelerate' or 'reference'. detail: version, or why it is this one. path: what was
    loaded.
    """

    name: str
    detail: str = ""
    path: str | None = None

    @property
    def fast(self) -> bool:
        return self.name != "reference"


@dataclass(frozen=True)
class Device:
    """What `prepare` put in force. wired_limit_bytes is 0 unless it was asked for."""

    kind: str  # "cpu" or "gpu"
    blas: Blas
    machine: Machine
    memory_limit_bytes: int
    cache_limit_bytes: int
    wired_limit_bytes: int


def prepare(device: str = "auto", *, wired: bool = False) -> Device:
    """Loads the BLAS, imports MLX, chooses the device and sets its memory limits. Call it before any other
    mlx import.

    device: 'auto' (the GPU where there is one), 'cpu' or 'gpu'. Raises UsageError for a device that is not
    there, and MlxquantError on a Mac whose session has no Metal device at all.

    Limits: MLX frees cached buffers and waits for running work above the memory limit, 95 % of the working
    set, as its own allocator does. Freed buffers that MLX keeps for reuse count in no memory figure of its
    own, and by default may grow to the memory limit; `cache_limit` says why ours may not. Nothing is wired
    unless `wired` is set: wired pages cannot be swapped or reclaimed, and a Mac whose GPU memory is wired to
    the limit can panic under load (ml-explore/mlx#3186).
    """
    if device not in ("auto", "cpu", "gpu"):
        raise UsageError(f"{device!r} is no device", hint="use auto, cpu or gpu")
    blas = load_blas()
    import mlx.core as mx

    gpu = mx.is_available(mx.gpu)
    if mx.metal.is_available() and not gpu:  # built for Metal, it allocates even a CPU's arrays through the device
        raise MlxquantError(
            "MLX finds no Metal device in this session, and cannot work without one on a Mac",
            hint="run it as the user who is logged in at the Mac, outside of any sandbox",
        )
    if device == "gpu" and not gpu:
        raise UsageError("this MLX has no GPU device", hint="use --device cpu, or a Mac with Apple silicon")
    kind = "gpu" if gpu and device != "cpu" else "cpu"
    mx.set_default_device(mx.gpu if kind == "gpu" else mx.cpu)
    machine = probe()
    memory, cache = int(0.95 * machine.working_set_bytes), cache_limit(machine.working_set_bytes)
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)
    return Device(kind, blas, machine, memory, cache, _wire(kind, machine) if wired else 0)


def cache_limit(working_set_bytes: int) -> int:
    """Bytes of freed buffers that MLX may keep: a tenth of the working set, from 256 MiB to 2 GiB.

    Prefill of a 2048-token chunk takes 0.6-0.8 GB of scratch on the 4B-30B models measured, whatever the
    bits, and the next chunk wants the same buffers again; decode reuses tens of MB. More than that is only
    held back from others.
    """
    return max(256 * MIB, min(2 * GIB, working_set_bytes // 10))


def _wire(kind: str, machine: Machine) -> int:
    """Wires up to the working set, the most that MLX allows."""
    import mlx.core as mx

    if kind != "gpu" or not mx.metal.is_available():
        raise UsageError("only the GPU of a Mac has wired memory", hint="leave --wired out")
    mx.set_wired_limit(machine.working_set_bytes)
    return machine.working_set_bytes


def load_blas() -> Blas:
    """Makes OpenBLAS the BLAS of an MLX that is imported afterwards; says what is in force. Raises
    UsageError.
    """
    if platform.system() == "Darwin":
        return Blas("Accelerate", "part of macOS")
    choice = os.environ.get(BLAS_VARIABLE, "")
    if choice == "none":
        return Blas("reference", f"{BLAS_VARIABLE}=none")
    global _loaded
    if _loaded is not None:
        return _loaded
    if "mlx.core" in sys.modules:
        return Blas("reference", "mlx.core was imported before OpenBLAS could be loaded")
    for candidate in [choice] if choice else _candidates():
        if found := _load(candidate):
            _loaded = found
            return found
    if choice:
        raise UsageError(f"{choice}: no BLAS with cblas_sgemm can be loaded from here", hint=f"unset {BLAS_VARIABLE}")
    return Blas("reference", "OpenBLAS was not found")


_loaded: Blas | None = None


def _candidates() -> Iterator[str]:
    """The loader's own search first, then where distributions, conda and source builds put it."""
    yield from _SONAMES
    if found := ctypes.util.find_library("openblas"):
        yield found
    triplet = sysconfig.get_config_var("MULTIARCH")
    folders = [Path(sys.prefix) / "lib"]
    if triplet:
        folders += [Path(f"/usr/lib/{triplet}/openblas-{threads}") for threads in ("pthread", "openmp", "serial")]
    folders += [Path(folder) for folder in _FOLDERS]
    for folder in folders:
        for name in _SONAMES:
            if (folder / name).exists():
                yield str(folder / name)


def _load(library: str) -> Blas | None:
    """Looks at the library privately first: what lacks cblas_sgemm must not get into the global scope."""
    try:
        handle = ctypes.CDLL(library)
        if not hasattr(handle, "cblas_sgemm"):
            return None
        handle = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    if not hasattr(handle, "openblas_get_config"):
        return Blas("BLAS", "chosen by hand", library)
    handle.openblas_get_config.restype = ctypes.c_char_p
    words = handle.openblas_get_config().decode(errors="replace").split()
    return Blas("OpenBLAS", words[1] if len(words) > 1 else "", library)


def measured_gflops(size: int = 512, repeats: int = 3) -> float:
    """GFLOP/s of the best of a few float32 (size, size) matrix products on the default device: 2 * size**3
    each.
    """
    import time

    import mlx.core as mx

    a, b = mx.random.normal((size, size)), mx.random.normal((size, size))
    mx.eval(a, b, a @ b)  # the first product also starts the BLAS's threads
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(a @ b)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e9
