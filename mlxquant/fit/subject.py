"""The model that is asked about: its config and the specs of its tensors, wherever they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxquant.families.shape import ModelShape
from mlxquant.fit.values import Level
from mlxquant.tensors import TensorSpec


@dataclass(frozen=True)
class Subject:
    """`specs`: of the float checkpoint, under Hugging Face's or MLX's names. `quantized`: those that have been rounded
    before -> their format. `stored`: the level that a quantized model or file is at already.
    """

    name: str
    config: dict[str, Any]
    specs: Mapping[str, TensorSpec]
    quantized: Mapping[str, str] = field(default_factory=dict)
    stored: Level | None = None

    @property
    def shape(self) -> ModelShape:
        """Raises SourceError and UnsupportedError, naming the key of config.json."""
        return ModelShape.from_config(self.config)
