"""What every place that weights come from looks like to the rest of the project."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxquant.tensors import TensorSpec


class Source(Protocol):
    """Tensors that can be listed without reading them and then read a few rows at a time.

    Names, shapes and layout are Hugging Face's, whatever the container was.
    """

    path: Path
    config: dict[str, Any]
    specs: Mapping[str, TensorSpec]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows start..stop of the row view, (stop - start, width), in DTYPES[dtype].numpy (bfloat16: uint16).

        Raises SourceError naming the file and the tensor when the bytes are not there.
        """
        ...
