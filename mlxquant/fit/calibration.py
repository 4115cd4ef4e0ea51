"""A machine's own constants: what `fit --calibrate` timed here, kept in the user's state folder.

One JSON file, {"version", "machines": {key: [measurement, ...]}}. A machine is known by chip, GPU cores and RAM, so a
home folder that moves to another Mac does not bring its speeds along.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlxquant.errors import SourceError, TargetError
from mlxquant.files.writing import write_whole, writing
from mlxquant.machine import Machine

VERSION = 1
FILE = "speeds.json"
LEAST_WIDTH = 0.08  # of log(tok/s): what the same bench gives on another day
ONE_MODEL_WIDTH = 0.2  # one model says how fast the machine is, not how that splits into bytes and layers


@dataclass(frozen=True)
class Trial:
    """One timed case. Bytes are those of one decoded token; cache_bytes at the case's mean depth.

    prompt_flops: of its whole prompt. bandwidth_bytes_per_s: published or measured. likely_s: what speed() reckons for
    it without calibration, None on a machine without published bandwidth.
    """

    engine: str
    model: str
    weight_bytes: float
    cache_bytes: float
    layers: int
    moe: bool
    active_weights: int
    prompt_tokens: int
    prompt_flops: float
    decode_s: float
    prefill_tok_s: float
    bandwidth_bytes_per_s: float
    date: str
    versions: str
    likely_s: float | None = None


@dataclass(frozen=True)
class Own:
    """Decode: `scale` times the general model, or seconds = byte_s * bytes + layer_s * layers.

    Widths: half the range of log(tok/s).
    """

    engine: str
    models: int
    scale: float | None
    byte_s: float
    layer_s: float
    prefill_flops: float
    width: float
    prefill_width: float

    @property
    def alone(self) -> bool:
        """Whether it answers without the general constants: it always holds seconds a byte."""
        return self.byte_s > 0

    def decode_s(self, nbytes: float, layers: int) -> float:
        return self.byte_s * nbytes + self.layer_s * layers


def state_folder() -> Path:
    """MLXQUANT_STATE, or the platform's own place for what a program should remember."""
    if chosen := os.environ.get("MLXQUANT_STATE"):
        return Path(chosen).expanduser()
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Application Support" / "mlxquant"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mlxquant"


def keep(machine: Machine, trials: Sequence[Trial]) -> Path:
    """Adds `trials` to this machine's, in place of older ones of the same model, engine and case.

    Returns the file. Raises SourceError where it cannot be read as ours, TargetError where it cannot be written.
    """
    path = state_folder() / FILE
    fresh = {_case(trial) for trial in trials}
    with writing(path), _alone(path.parent):
        known = _read(path)
        mine = [trial for trial in known.get(_key(machine), []) if _case(trial) not in fresh]
        known[_key(machine)] = [*mine, *trials]
        content = {"version": VERSION, "machines": {key: [asdict(t) for t in kept] for key, kept in known.items()}}
        write_whole(path, f"{json.dumps(content, indent=1)}\n".encode())
    return path


def check(machine: Machine) -> None:
    """Raises what keep() would raise after minutes of timing, before them."""
    load(machine)
    folder = state_folder()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise TargetError(f"{folder / FILE}: cannot keep the calibration: {there} cannot be written to")


def load(machine: Machine) -> Own | None:
    """This machine's constants, None where it was never calibrated. Raises SourceError for a torn or foreign file."""
    trials = _read(state_folder() / FILE).get(_key(machine), [])
    return own_of(trials) if trials else None


def own_of(trials: Sequence[Trial]) -> Own:
    """From the trials of one machine: a scale where they are of one model, else constants of its own."""
    models = len({trial.model for trial in trials})
    byte_s, layer_s = _line(trials) if models > 1 else (0.0, 0.0)
    byte_s = byte_s or statistics.median(t.decode_s / (t.weight_bytes + t.cache_bytes) for t in trials)
    ratios = [trial.decode_s / trial.likely_s for trial in trials if trial.likely_s]
    scale = statistics.median(ratios) if ratios and models == 1 else None
    off = [abs(math.log(t.decode_s / (byte_s * (t.weight_bytes + t.cache_bytes) + layer_s * t.layers))) for t in trials]
    flops = [t.prompt_flops * t.prefill_tok_s / t.prompt_tokens for t in trials]
    return Own(
        " and ".join(sorted({f"{trial.engine} {trial.versions}" for trial in trials})),
        models,
        scale,
        byte_s,
        layer_s,
        statistics.median(flops),
        ONE_MODEL_WIDTH if models == 1 else max(LEAST_WIDTH, 2 * statistics.median(off)),
        max(ONE_MODEL_WIDTH, 2 * statistics.median(abs(math.log(f / statistics.median(flops))) for f in flops)),
    )


def _line(trials: Sequence[Trial]) -> tuple[float, float]:
    """(seconds a byte, seconds a layer) by Theil and Sen: the median of what each pair of models says, neither below 0.

    seconds / layers = byte_s * bytes / layers + layer_s. (0, 0) where no pair differs enough to tell.
    """
    points = [((t.weight_bytes + t.cache_bytes) / t.layers, t.decode_s / t.layers) for t in trials]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[:i] if _apart(a[0], b[0])]
    if not slopes or statistics.median(slopes) <= 0:
        return 0.0, 0.0
    byte_s = statistics.median(slopes)
    layer_s = statistics.median(y - byte_s * x for x, y in points)
    return (byte_s, layer_s) if layer_s > 0 else (0.0, 0.0)


def _apart(a: float, b: float) -> bool:
    return max(a, b) > 1.2 * min(a, b)


def _case(trial: Trial) -> tuple[object, ...]:
    return trial.engine, trial.model, trial.weight_bytes, trial.cache_bytes, trial.prompt_tokens


def _key(machine: Machine) -> str:
    return f"{machine.chip} | {machine.gpu_cores or machine.cpu_cores} cores | {machine.memory_bytes} bytes"


def _read(path: Path) -> dict[str, list[Trial]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from error
    if not isinstance(found, dict) or found.get("version") != VERSION or not isinstance(found.get("machines"), dict):
        raise _unreadable(path, f"it is no calibration of version {VERSION}")
    return {str(key): [_trial(path, one) for one in _listed(path, kept)] for key, kept in found["machines"].items()}


def _listed(path: Path, found: Any) -> list[Any]:
    if not isinstance(found, list):
        raise _unreadable(path, f"a machine's measurements are {found!r:.60}, expected a list")
    return found


_LEAST, _MOST = 1e-30, 1e30  # of any unit; so that no product or quotient leaves the floats
_POSITIVE = ("weight_bytes", "layers", "active_weights", "prompt_tokens", "prompt_flops", "decode_s", "prefill_tok_s")


def _trial(path: Path, found: Any) -> Trial:
    names = {field.name: field.type for field in fields(Trial)}
    if not isinstance(found, dict) or set(found) != set(names):
        raise _unreadable(path, f"a measurement is {found!r:.60}")
    for name, kind in names.items():
        value = found[name]
        if not _fits(str(kind), value) or (name in _POSITIVE and value <= 0):
            raise _unreadable(path, f"{name} is {value!r:.60}")
    return Trial(**found)


def _fits(kind: str, value: Any) -> bool:
    if kind == "str":
        return isinstance(value, str) and value.isprintable()
    if kind == "bool":
        return isinstance(value, bool)
    if value is None:
        return "None" in kind
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (value == 0 or _LEAST <= value <= _MOST)


def _unreadable(path: Path, found: str) -> SourceError:
    return SourceError(f"{path}: {found}", hint="remove the file and run `mlxquant fit MODEL --calibrate` again")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Reads, adds and writes while no other process does: they wait, for milliseconds."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
