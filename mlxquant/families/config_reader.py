"""config.json as mlx-lm's ModelArgs would take it: text_config and the family's defaults merged, every read typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.known import BASE, FACTS, KNOWN_TYPES, REMAPPING
from mlxquant.families.mlx_config import text_config

MAX_DIM = 2**31 - 1  # far above any model

# Keys of BASE that a family derives or has not.
_ELSEWHERE = {"mamba2": ("num_attention_heads",), "nemotron_h": ("num_hidden_layers",), "lfm2": ("intermediate_size",)}


@dataclass(frozen=True)
class Reader:
    """The merged config with mlx-lm's defaults behind it; every read is typed."""

    model_type: str
    module: str
    config: Mapping[str, Any]

    @classmethod
    def open(cls, config: Mapping[str, Any]) -> Reader:
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            raise SourceError(f"config.json: model_type is {model_type!r:.60}, expected a name such as 'llama'")
        module = REMAPPING.get(model_type, model_type)
        if module not in FACTS:
            raise UnsupportedError(
                f"config.json: model_type {model_type!r:.60} is not a family mlxquant knows",
                hint=f"known are {', '.join(KNOWN_TYPES)}",
            )
        merged = text_config(config)  # refuses what is no object
        inner = (config.get("text_config") or {}).get("model_type", "mistral")
        if module == "mistral3" and inner not in ("mistral", "ministral3"):
            raise UnsupportedError(f"config.json: a mistral3 of {inner!r:.60} is not a family mlxquant knows")
        return cls(model_type, module, merged)

    def check_required(self) -> None:
        facts = FACTS[self.module]
        needed = (
            *(k for k in BASE if k not in facts.defaults and k not in _ELSEWHERE.get(self.module, ())),
            *facts.required,
        )
        for key in needed:
            if self.config.get(key) is None:
                raise SourceError(f"config.json has no {key}, which a {self.model_type} model needs")

    def raw(self, key: str) -> Any:
        return self.config.get(key, FACTS[self.module].defaults.get(key))

    def integer(self, key: str, low: int = 1, high: int = MAX_DIM) -> int:
        value = self.raw(key)
        if type(value) is not int or not low <= value <= high:
            raise SourceError(f"config.json: {key} is {value!r:.60}, expected a whole number from {low} to {high}")
        return value

    def optional(self, key: str, low: int = 1, high: int = MAX_DIM) -> int | None:
        return None if self.raw(key) is None else self.integer(key, low, high)

    def flag(self, key: str) -> bool:
        value = self.raw(key)
        if value is not None and not isinstance(value, bool):
            raise SourceError(f"config.json: {key} is {value!r:.60}, expected true or false")
        return bool(value)

    def sequence(self, key: str, kind: type, length: int | None = None) -> list[Any] | None:
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise SourceError(f"config.json: {key} is {value!r:.60}, expected a list of {kind.__name__}")
        if length is not None and len(value) != length:
            raise SourceError(f"config.json: {key} has {len(value)} entries, expected one for each of {length} layers")
        return value
