"""A quantized MLX folder, ours or anybody's, seen as the float folder it stands for: codes decoded as rows are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.codecs.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, MX_MODES, Codec
from mlxquant.convert.sidecars import folder_sidecars
from mlxquant.errors import UnsupportedError
from mlxquant.files.hf_folder import CONFIG, HFFolder
from mlxquant.files.reading import read_json_object
from mlxquant.plan.packed import Weight, as_floats, part_names
from mlxquant.tensors import TensorSpec

Array = np.ndarray[Any, Any]


def is_quantized(path: Path) -> bool:
    """Whether config.json has MLX's `quantization` block. Raises SourceError for a config.json that is none."""
    config = path / CONFIG
    # Path's own raises where the folder may not be read, which HFFolder says better.
    return os.path.isfile(config) and isinstance(  # noqa: PTH113
        read_json_object(config).get("quantization"), dict
    )


class MLXSource:
    """Packed weights are handed out as float32, what stands beside them as it is stored.

    Names and layout stay those of stock mlx-lm's model (experts stacked, some norms 1 + w): the layouts of
    `families` read them as well as Hugging Face's. `quantized` says which weights have been rounded before.
    """

    def __init__(self, path: Path, origin: dict[str, Any] | None = None) -> None:
        from mlxquant.convert.sources import header_hash

        self._folder = HFFolder(path)
        self.path = path
        config, specs, self._packed = as_floats(self._folder.config, self._folder.specs)
        self.config: dict[str, Any] = config
        self.specs: Mapping[str, TensorSpec] = specs
        for name, weight in self._packed.items():
            _refuse_unknown(name, weight)
        self.quantized: Mapping[str, str] = {name: weight.format for name, weight in self._packed.items()}
        self.weight_files = tuple(file.path for file in self._folder.files)
        named = origin or {"name": path.resolve().name}
        self.origin = {"format": "mlx", **named} | header_hash(self._folder.specs)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows start..stop of the row view; float32 for a packed weight, decoded as mx.dequantize does in float32.

        Raises SourceError naming the file and the tensor when the bytes are not there.
        """
        from mlxquant.codecs.encode import decode

        if name not in self._packed:
            return self._folder.read_rows(name, start, stop)
        weight = self._packed[name]
        assert weight.codec is not None
        parts = [part for part in part_names(name) if part in self._folder.specs]
        return decode(
            tuple(self._folder.read_rows(part, start, stop) for part in parts), weight.spec.dtype, weight.codec
        )

    def sidecars(self) -> dict[str, bytes]:
        return folder_sidecars(self.path)


def _refuse_unknown(name: str, weight: Weight) -> None:
    """MLX itself has written nothing else; decoding by a format that we only half know would be silent damage."""
    codec = weight.codec
    assert codec is not None
    affine = codec.mode == "affine" and codec.bits in AFFINE_BITS and codec.group_size in AFFINE_GROUP_SIZES
    if affine or codec == Codec(codec.mode, *reversed(MX_MODES.get(codec.mode, (0, 0)))):
        return
    raise UnsupportedError(
        f"{name}: {codec.mode} with {codec.bits} bits and group size {codec.group_size} is no format that MLX has",
        hint="convert the full-precision repository of this model instead",
    )
