"""The values that walk through this room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Samples:
    """Calibration text. tokens_BL: int32, one sample a row. label: what it is, for people. sha256: hex, of the tokens'
    bytes: equal where the same was seen.
    """

    tokens_BL: Array
    label: str
    sha256: str


@dataclass(frozen=True)
class Inputs:
    """What entered a linear layer for some tokens. x_NI: float32. expert_N: which expert each row was sent to, or None
    for a layer that every token passes.
    """

    x_NI: Any
    expert_N: Any = None


@dataclass(frozen=True)
class Chosen:
    """Codes for one weight. parts: as Codec.parts stores them. values_OI: float32, what they stand for. error: squared
    error of the layer's output over its squared output, 0 .. 1, under the Hessian that was given. note: where something
    else was done than asked, and why.
    """

    parts: tuple[Array, ...]
    values_OI: Array
    error: float
    note: str = ""
