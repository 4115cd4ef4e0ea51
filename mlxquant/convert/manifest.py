"""mlxquant.json: the plan and a checksum of everything that was written, so that `verify` can tell later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mlxquant import __version__
from mlxquant.plan.plan import Plan

NAME = "mlxquant.json"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest(
    plan: Plan,
    origin: dict[str, Any],
    tensors: Mapping[str, str],
    small: Mapping[str, bytes],
    calibration: Mapping[str, Any] | None = None,
) -> bytes:
    """`tensors`: sha256 of each stored tensor's bytes; `small`: the other files; `calibration`: by what codes were
    chosen, and how well they do.
    """
    value = {
        "mlxquant": __version__,
        "source": origin,
        "plan_sha256": plan.digest(),
        "plan": plan.to_json(),
        **({"calibration": calibration} if calibration is not None else {}),
        "tensors": dict(sorted(tensors.items())),
        "files": {name: sha256(data) for name, data in sorted(small.items())},
    }
    return (json.dumps(value, indent=1) + "\n").encode()
