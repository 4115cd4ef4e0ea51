"""`mlxquant doctor`."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxquant.units import GIB, format_bytes

if TYPE_CHECKING:
    from mlxquant.run.device import Device

PACKAGES = (
    "mlx",
    "mlx-lm",
    "numpy",
    "numba",
    "safetensors",
    "tokenizers",
    "transformers",
    "huggingface-hub",
    "gguf",
)
# One vector core does tens of GFLOP/s; the reference BLAS stays below ten.
SLOW_GFLOPS = 15
LITTLE_DISK_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Finding:
    """problem and advice are empty when all is well."""

    name: str
    value: str
    problem: str = ""
    advice: str = ""


@click.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", help="The device to look at.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(device: str, as_json: bool) -> None:
    """Say which device, BLAS, versions and memory limits are in force, and what to do about each problem."""
    from mlxquant.run.device import prepare

    prepared = prepare(device)
    findings = [*_device(prepared), *_memory(prepared), *_versions(), *_hub(), _numba_cache()]
    if as_json:
        click.echo(json.dumps({"ok": not any(f.problem for f in findings), "findings": [asdict(f) for f in findings]}))
        return
    for finding in findings:
        mark, colour = ("!", "yellow") if finding.problem else (" ", "green")
        click.secho(f"{mark} {finding.name:14}", fg=colour, nl=False)
        click.echo(f" {finding.value}")
        if finding.problem:
            click.echo(f"  {'':14} {finding.problem}")
            click.echo(f"  {'':14} Next: {finding.advice}")
    problems = sum(bool(finding.problem) for finding in findings)
    click.echo(f"{problems} problem{'s' if problems != 1 else ''} found." if problems else "All is well.")


def _device(device: Device) -> list[Finding]:
    from mlxquant.run.device import BLAS_VARIABLE, INSTALL_OPENBLAS, measured_gflops

    machine, blas = device.machine, device.blas
    cores = f", {machine.gpu_cores} GPU cores" if machine.gpu_cores else ""
    where = Finding("device", f"{device.kind} on {machine.chip}, {machine.cpu_cores} CPU cores{cores}")
    if device.kind == "cpu" and platform.system() == "Darwin" and platform.machine() == "arm64":
        where = Finding(
            where.name, where.value, "the GPU of this Mac is not used", "leave --device out, or reinstall mlx"
        )
    gflops = measured_gflops()
    # On a GPU the speed is the GPU's, whatever the BLAS of the CPU.
    value = f"{' '.join(part for part in (blas.name, blas.detail) if part)}, {gflops:.0f} GFLOP/s float32"
    if device.kind == "gpu":
        value = f"{blas.name}; the GPU does {gflops:.0f} GFLOP/s float32 (512 x 512)"
    if device.kind == "cpu" and not blas.fast:
        advice = f"unset {BLAS_VARIABLE}" if os.environ.get(BLAS_VARIABLE) else INSTALL_OPENBLAS
        found = Finding("BLAS", value, "matrix products run on one core without vector instructions", advice)
    elif device.kind == "cpu" and gflops < SLOW_GFLOPS:
        found = Finding("BLAS", value, "this is slow for a fast BLAS", "see whether other programs use the CPU now")
    else:
        found = Finding("BLAS", value)
    return [where, Finding("system", f"{machine.system}, {platform.machine()}"), found]


def _memory(device: Device) -> list[Finding]:
    machine = device.machine
    wired = format_bytes(device.wired_limit_bytes) if device.wired_limit_bytes else "none (only with --wired)"
    limits = f"memory {format_bytes(device.memory_limit_bytes)}, cache {format_bytes(device.cache_limit_bytes)}"
    value = f"{machine.memory_bytes / GIB:.3g} GiB, working set {format_bytes(machine.working_set_bytes)}"
    little = machine.working_set_bytes < 2 * GIB
    return [
        Finding(
            "RAM",
            value,
            "little of it is free" if little else "",
            "close other programs" if little else "",
        ),
        Finding("limits", f"{limits}, wired {wired}"),
    ]


def _versions() -> list[Finding]:
    from mlxquant import __version__

    found = {"mlxquant": __version__, "python": platform.python_version()}
    missing = []
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            missing.append(package)
    value = ", ".join(f"{name} {number}" for name, number in found.items())
    if missing:
        return [Finding("versions", value, f"not installed: {', '.join(missing)}", "reinstall mlxquant with pip")]
    return [Finding("versions", value)]


def _hub() -> list[Finding]:
    """Where models are kept and whether there is a token; the token itself is never shown."""
    import shutil

    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    problem, advice = "", ""
    if not writable:
        problem, advice = "it cannot be written", f"check the rights of {existing}, or set HF_HOME"
    elif free < LITTLE_DISK_BYTES:
        problem, advice = "the disk is nearly full", "free some space, or set HF_HOME to another disk"
    offline = ", offline mode" if constants.HF_HUB_OFFLINE else ""
    token = "present" if get_token() else "none (needed for gated models only: `hf auth login`)"
    return [
        Finding("Hub cache", f"{cache}, {format_bytes(free)} free{offline}", problem, advice),
        Finding("Hub token", token),
    ]


def _numba_cache() -> Finding:
    """Compiled kernels are kept between runs, beside the package or in a user folder."""
    import mlxquant

    chosen = os.environ.get("NUMBA_CACHE_DIR")
    beside = Path(mlxquant.__file__).parent / "codecs"
    if chosen:
        folder, writable = Path(chosen), os.access(chosen, os.W_OK) or not Path(chosen).exists()
    elif os.access(beside, os.W_OK):
        folder, writable = beside / "__pycache__", True
    else:
        folder = Path.home() / (".cache/numba" if platform.system() != "Darwin" else "Library/Caches/numba")
        writable = os.access(Path.home(), os.W_OK)
    if writable:
        return Finding("numba cache", str(folder))
    return Finding(
        "numba cache",
        str(folder),
        "each run compiles its kernels anew",
        "set NUMBA_CACHE_DIR to a folder of yours",
    )
