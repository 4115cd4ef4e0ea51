"""ggml's block formats: rows of floats -> raw blocks, and back.

The types we write have kernels of our own; the others are decoded by the `gguf` package, which llama.cpp's maintainers
hold against ggml. Nothing here loads numba or gguf before rows come: planning asks for names alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mlxquant.codecs.floats import Array
from mlxquant.errors import UnsupportedError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_FLOATS = ("F32", "F16", "BF16")
_BLOCKS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
)
ENCODED = _FLOATS + _BLOCKS
_NAMES = (
    *ENCODED,
    *("IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M"),
    *("MXFP4", "NVFP4"),
)

# Where a block's float16 scales stand, in bytes (ggml/src/ggml-common.h).
_SCALES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **{"IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,)},
}


def known_types() -> tuple[str, ...]:
    """The type names `block` and `decode_rows` take."""
    return _NAMES


def block(type_name: str) -> tuple[int, int]:
    """(elements, bytes) of one block. Raises UnsupportedError naming the type and those that can be read."""
    from gguf import GGML_QUANT_SIZES

    elements, size = GGML_QUANT_SIZES[_kind(type_name)]
    return int(elements), int(size)


def encode_rows(raw_OI: Array, source_code: str, type_name: str, importance_I: Array | None = None) -> Array:
    """Raw rows (O, I) in DTYPES[source_code].numpy -> blocks (O, row_bytes) uint8.

    Byte-equal to ggml_quantize_chunk of llama.cpp's x86-64 build (ggml/src/ggml-quants.c), with the importance
    matrix's row `importance_I` (float32, one a column) or without; Q8_0, TQ1_0, TQ2_0 and the floats take no notice
    of it, as there. Numbers too large for a type's float16 scale (from 5e5 on in Q4_0) get an infinite one, as
    there. Memory beyond the arrays themselves: about 1 MB a thread. Safe to call from several threads.

    Raises NonFiniteError for NaN and infinity, and in F16 and BF16 for what would round to infinity; UnsupportedError
    for a type we do not write; ValueError for arguments that no plan contains.
    """
    if type_name not in ENCODED:
        raise UnsupportedError(f"the ggml type {type_name} cannot be written: known are {', '.join(ENCODED)}")
    elements, size = block(type_name)
    if raw_OI.ndim != 2 or raw_OI.shape[1] % elements:
        raise ValueError(f"{type_name} takes rows of whole blocks of {elements}, not {raw_OI.shape}")
    rows, width = raw_OI.shape
    importance = _importance(importance_I, width)
    if not raw_OI.size:
        return np.empty((rows, width // elements * size), np.uint8)
    from mlxquant.codecs.ggml_encode import encode

    return encode(raw_OI, source_code, type_name, importance, width // elements * size)


def row_without_scale(raw: Array, type_name: str) -> int:
    """The first of the rows (O, row_bytes) uint8 with a scale that is infinite or NaN, which no reader survives; or -1.

    llama-quantize refuses such rows, too (ggml_validate_row_data).
    """
    for at in _SCALES.get(type_name, ()):
        halves = raw.reshape(len(raw), -1, block(type_name)[1])[:, :, at : at + 2].view(np.uint16)
        bad = ((halves & 0x7C00) == 0x7C00).any(axis=(1, 2))
        if bad.any():
            return int(np.argmax(bad))
    return -1


def _importance(importance_I: Array | None, width: int) -> Array:
    """One sort of array for the kernels: float32, contiguous, writable; of size 0 where there is none."""
    if importance_I is None:
        return np.empty(0, np.float32)
    if importance_I.shape != (width,) or importance_I.dtype != np.float32:
        raise ValueError(f"importance is float32 ({width},), not {importance_I.dtype} {importance_I.shape}")
    if not (np.isfinite(importance_I) & (importance_I >= 0)).all():
        raise ValueError("importance has numbers that are negative or not finite")
    return importance_I.copy()  # numba compiles read-only, strided and unaligned arrays apart


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
    if type_name in _BLOCKS:
        from mlxquant.codecs.ggml_decode import decode

        return decode(raw, type_name, width)
    from gguf import quants

    with np.errstate(invalid="ignore", over="ignore"):
        rows = quants.dequantize(np.ascontiguousarray(raw), _kind(type_name))
    return np.asarray(rows, np.float32).reshape(len(raw), width)


def _kind(type_name: str) -> GGMLQuantizationType:
    if type_name not in _NAMES:
        raise UnsupportedError(
            f"the ggml type {type_name} cannot be read: known are {', '.join(_NAMES)}",
            hint="start from the original Hugging Face weights, or from a GGUF file of one of these types",
        )
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[type_name]
