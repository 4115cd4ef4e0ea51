"""A tensor of a GGUF file, as planned: apart from the writer, whose `gguf` package takes 0.1 s to import."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlxquant.files.gguf_file import BLOCKS

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True)
class GGUFSpec:
    """One tensor of a file to be: `shape` outermost first, its last axis in whole blocks of `type_name`."""

    name: str
    shape: tuple[int, ...]
    type_name: str

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        elements, nbytes = BLOCKS[self.type_name]
        return self.size // elements * nbytes
