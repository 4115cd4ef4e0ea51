"""The model that is asked about: its config and the specs of its tensors, wherever they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlxquant.errors import SourceError
from mlxquant.families.shape import ModelShape
from mlxquant.fit.values import Level
from mlxquant.plan.plan import Basis, lay_out
from mlxquant.tensors import TensorSpec

if TYPE_CHECKING:
    from mlxquant.files.gguf_file import GGUFTensor
    from mlxquant.plan.gguf_plan import GGUFBasis


@dataclass(frozen=True)
class Subject:
    """`specs`: of the float checkpoint, under Hugging Face's or MLX's names. `quantized`: those that have been rounded
    before -> their format. `stored`: the level that a quantized model or a GGUF file is at already. `tokens`: entries
    of the tokenizer, where it has been read: gemma3's GGUF embedding is cut to them. `gguf`: of a GGUF file, its
    metadata with types and its tensors: from them convert makes another one. `remarks`: what was taken for granted.
    """

    name: str
    config: dict[str, Any]
    specs: Mapping[str, TensorSpec]
    quantized: Mapping[str, str] = field(default_factory=dict)
    stored: Level | None = None
    tokens: int | None = None
    gguf: tuple[Mapping[str, Any], Mapping[str, GGUFTensor]] | None = None
    remarks: tuple[str, ...] = ()

    @property
    def shape(self) -> ModelShape:
        """Raises SourceError and UnsupportedError, naming the key of config.json."""
        return ModelShape.from_config(self.config)

    @property
    def basis(self) -> Basis:
        """The model as mlx-lm lays it out. Raises SourceError and UnsupportedError."""
        if isinstance(self._tried, SourceError):
            raise self._tried
        return self._tried

    @cached_property
    def _tried(self) -> Basis | SourceError:
        """Once: a walk over 45,000 tensors takes a tenth of a second."""
        try:
            return lay_out(self.config, self.specs)
        except SourceError as error:
            return error

    @cached_property
    def gguf_basis(self) -> GGUFBasis:
        """The model as llama.cpp lays it out. Raises SourceError and UnsupportedError."""
        from mlxquant.plan.gguf_plan import lay_out_checkpoint

        made = None if isinstance(self._tried, SourceError) else self._tried.layout
        return lay_out_checkpoint(self.config, self.specs, self.tokens, made)

    @property
    def any_basis(self) -> Basis | GGUFBasis:
        """As mlx-lm lays it out, or where mlx-lm cannot read the checkpoint, llama.cpp. Raises as `basis`."""
        try:
            return self.basis
        except SourceError as error:
            try:
                return self.gguf_basis
            except SourceError:
                raise error from None
