"""ggml's block formats, read only: rows of raw blocks -> float32, through the `gguf` package.

llama.cpp's maintainers hold `gguf.quants` against ggml's own dequantization, so no block layout is written
here again.
"""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from mlxquant.codecs.floats import Array
from mlxquant.errors import UnsupportedError

_NAMES = (
    *("F32", "F16", "BF16"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
# An older gguf has not all of them.
_TYPES = {name: GGMLQuantizationType[name] for name in _NAMES if name in GGMLQuantizationType.__members__}


def known_types() -> tuple[str, ...]:
    """The type names `block` and `decode_rows` take."""
    return tuple(_TYPES)


def block(type_name: str) -> tuple[int, int]:
    """(elements, bytes) of one block. Raises UnsupportedError naming the type and those that can be read."""
    elements, size = GGML_QUANT_SIZES[_kind(type_name)]
    return int(elements), int(size)


def decode_rows(raw: Array, type_name: str, width: int) -> Array:
    """Raw blocks (rows, row_bytes) uint8 -> float32 (rows, width), bit-equal to ggml's own dequantization.

    Raises UnsupportedError for a type we cannot read, ValueError when row_bytes is not what `width` takes.
    Damaged blocks decode to what their bits say, NaN included.
    """
    elements, size = block(type_name)
    if raw.dtype != np.uint8 or raw.ndim != 2 or width % elements or raw.shape[1] != width // elements * size:
        raise ValueError(f"{width} columns of {type_name} take {width / elements * size:g} bytes, not {raw.shape}")
    if not raw.size:
        return np.empty((len(raw), width), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        rows = quants.dequantize(np.ascontiguousarray(raw), _kind(type_name))
    return np.asarray(rows, np.float32).reshape(len(raw), width)


def _kind(type_name: str) -> GGMLQuantizationType:
    if type_name not in _TYPES:
        raise UnsupportedError(
            f"the ggml type {type_name} cannot be read: known are {', '.join(_TYPES)}",
            hint="start from the original Hugging Face weights, or from a GGUF file of one of these types",
        )
    return _TYPES[type_name]
