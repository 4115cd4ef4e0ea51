"""What each tensor costs at each format, as a file: measured once, any budget can be solved from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxquant.codecs.spec import Codec, parse_codec
from mlxquant.errors import MlxquantError, PlanError, SourceError

VERSION = 1
KEY = "mlxquant_sensitivities"


@dataclass(frozen=True)
class Cost:
    """Of one tensor in one format. nats: predicted mean KL(p || q) a token, if nothing else were rounded. error: mean
    squared error of its weights over their mean square.
    """

    nats: float
    error: float

    @property
    def slope(self) -> float:
        """Nats for each unit of error."""
        return self.nats / self.error if self.error else 0.0


@dataclass(frozen=True)
class Sensitivities:
    """costs: tensor -> format -> Cost. sizes: weights of each tensor. model: hash of the model it was measured on.
    calibration: what text was used, for people; calibration_sha256: of its tokens. method: how codes were chosen.
    """

    model: str
    method: str
    calibration: str
    calibration_sha256: str
    sizes: Mapping[str, int]
    costs: Mapping[str, Mapping[Codec, Cost]]

    def to_json(self) -> dict[str, Any]:
        """Plain values; from_json gives the same again."""
        return {
            KEY: VERSION,
            "model": self.model,
            "method": self.method,
            "calibration": self.calibration,
            "calibration_sha256": self.calibration_sha256,
            "tensors": {
                name: {"size": self.sizes[name]}
                | {"formats": {codec.label: [cost.nats, cost.error] for codec, cost in costs.items()}}
                for name, costs in self.costs.items()
            },
        }

    def require(self, model: str, method: str, where: str) -> None:
        """Raises PlanError for those of another model or another way to choose codes."""
        if self.model != model:
            raise PlanError(f"{where}: was measured on another model", hint="leave the file out to measure this one")
        if self.method != method:
            raise PlanError(
                f"{where}: was measured for --method {self.method}, not {method}",
                hint=f"use --method {self.method}, or leave the file out to measure again",
            )


def from_json(found: Mapping[str, Any], where: str) -> Sensitivities:
    """What to_json wrote. `where` begins the message. Raises SourceError for anything else."""
    if found.get(KEY) != VERSION:
        raise _wrong(where, f"is no plan file of version {VERSION}")
    words = {key: _text(found.get(key), f"{where}: {key}") for key in _WORDS}
    tensors = _table(found.get("tensors"), f"{where}: tensors")
    sizes: dict[str, int] = {}
    costs: dict[str, dict[Codec, Cost]] = {}
    for name, entry in tensors.items():
        at = f"{where}: {_text(name, where)}"
        entry = _table(entry, at)
        size = entry.get("size")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**60:
            raise _wrong(at, f"size is {size!r:.60}, expected a number of weights")
        sizes[name] = size
        costs[name] = {
            _codec(label, at): _cost(pair, at) for label, pair in _table(entry.get("formats"), f"{at}: formats").items()
        }
    return Sensitivities(**words, sizes=sizes, costs=costs)


_WORDS = ("model", "method", "calibration", "calibration_sha256")
_MOST = 1e30  # so that no sum of them leaves the floats


def _wrong(where: str, found: str) -> SourceError:
    return SourceError(f"{where}: {found}", hint="leave the file out to measure again")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 1000:
        raise _wrong(where, f"{value!r:.60} is no line of text")
    return value


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise _wrong(where, f"{value!r:.60} is no object with entries")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        raise _wrong(where, f"{value!r:.60} is no number from 0 on")
    return float(value)


def _cost(value: Any, where: str) -> Cost:
    if not isinstance(value, list) or len(value) != 2:
        raise _wrong(where, f"{value!r:.60} is no pair of nats and error")
    nats, error = (_number(each, where) for each in value)
    return Cost(nats, error)


def _codec(label: str, where: str) -> Codec:
    try:
        codec = parse_codec(label)
    except (MlxquantError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise _wrong(where, f"{label!r:.60} is no format") from error
    if not codec.quantized:
        raise _wrong(where, f"{label!r:.60} is no format that rounds")
    return codec
