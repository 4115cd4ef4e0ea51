"""Typed reading of a GGUF file's key-value pairs: every value is somebody else's until its type has been
looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlxquant.errors import SourceError


class Metadata:
    """The key-value pairs of one GGUF file. A getter with no default raises SourceError when the key is
    missing; every getter raises it when the value has another type. Arrays may be lists, tuples or numpy
    arrays."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise _wrong(key, value, "a string")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 0) -> int:
        value = self._get(key, default)
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise _wrong(key, value, "an integer")
        if value < least:
            raise SourceError(f"GGUF key {key}: found {value}, expected at least {least}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 comes back as the shortest decimal that rounds to it, so that 9.999999747e-06 is 1e-05
        again."""
        value = self._get(key, default)
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
            raise _wrong(key, value, "a number")
        number = float(value)
        if not math.isfinite(number):
            raise _wrong(key, value, "a finite number")
        single = np.float32(number) if abs(number) < np.finfo(np.float32).max else None
        return float(str(single)) if single is not None and float(single) == number else number

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool | np.bool_):
            raise _wrong(key, value, "true or false")
        return bool(value)

    def strings(self, key: str) -> list[str]:
        values = self._array(key)
        if not all(isinstance(v, str) for v in values):
            raise _wrong(key, values, "an array of strings")
        return [str(v) for v in values]

    def numbers(self, key: str, count: int) -> list[float]:
        """At least `count` numbers, as llama.cpp wants one for each token."""
        array = np.asarray(self._array(key))
        if array.ndim != 1 or array.dtype.kind not in "iuf":
            raise _wrong(key, self.values[key], "an array of numbers")
        if len(array) < count:
            raise SourceError(f"GGUF key {key}: {len(array)} entries, expected {count}, one for each token")
        if not np.isfinite(array).all():
            raise SourceError(f"GGUF key {key}: holds an infinity or NaN, expected finite numbers")
        found: list[float] = array[:count].tolist()
        return found

    def each_layer(self, key: str, default: int | None = None) -> int:
        """An integer that may be given for each layer; only one value for all of them has a place in
        config.json."""
        value = self.values.get(key, default)
        if isinstance(value, np.ndarray) or (isinstance(value, Sequence) and not isinstance(value, str)):
            distinct = set(self.numbers(key, len(value)))
            if len(distinct) != 1:
                raise SourceError(f"GGUF key {key}: layers differ ({sorted(distinct)!s:.60}), expected one for all")
            value = next(iter(distinct))
        return Metadata({key: value} if value is not None else {}).integer(key, least=1)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise SourceError(
                f"GGUF key {key} is missing", hint="the file is damaged or was made by a faulty converter"
            )
        return value

    def _array(self, key: str) -> Sequence[Any]:
        value = self._get(key, None)
        if isinstance(value, np.ndarray):
            return value.tolist() if value.ndim == 1 else [value]
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _wrong(key, value, "an array")
        return value


def _wrong(key: str, value: Any, expected: str) -> SourceError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return SourceError(f"GGUF key {key}: found {shown} ({type(value).__name__}), expected {expected}")
