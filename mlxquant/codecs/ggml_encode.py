"""Raw rows of any float dtype -> blocks of any ggml type: widening, refusals and threads around the kernels.

A kernel is given whole rows of float32 and the place for their blocks. Rows are independent in every type, so
neither the number of threads nor the split into tiles shows in the bytes.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlxquant.codecs import ggml_iq4, ggml_ternary, ggml_type0, ggml_type1, kernels
from mlxquant.codecs.blocks import as_bits, each_block
from mlxquant.codecs.floats import Array, NonFiniteError, check, widen
from mlxquant.codecs.kernels import jit

Kernel = Callable[[Array, Array, int, Array], Any]

# Weights a thread widens at a time: 512 kB, which a second-level cache holds. With less, threads that encode a simple
# format wait for one another between two tiles.
_TILE = 1 << 17
# The largest float32, as bits, that does not round to infinity: in float16 65519.996, half a step above 65504.
_LARGEST = {"F16": np.uint32(0x477FEFFF), "BF16": np.uint32(0x7F7F7FFF)}
_FINITE = np.uint32(0x7F7FFFFF)


def encode(raw_OI: Array, source_code: str, type_name: str, importance_I: Array, row_bytes: int) -> Array:
    """What `ggml.encode_rows` promises, for arguments that it has checked."""
    rows, width = len(raw_OI), int(raw_OI.shape[1])
    out = np.empty((rows, row_bytes), np.uint8)
    blocks = out.reshape(-1)
    kernel, largest = ENCODERS[type_name], _LARGEST.get(type_name, _FINITE)
    load, plain = _loader(raw_OI, source_code, width), _plain(raw_OI, source_code)
    tile_rows = max(1, _TILE // width)

    def work(start: int, stop: int) -> int:
        tile = np.empty(0 if plain is not None else min(tile_rows * width, stop - start), np.uint32)
        for first in range(start // width, stop // width, tile_rows):
            last = min(first + tile_rows, stop // width)
            if plain is not None:
                bits = plain[first * width : last * width]
            else:
                bits = tile[: (last - first) * width]
                load(first, last, bits)
            bad = int(_beyond(bits, largest))
            if bad >= 0:
                return first * width + bad
            kernel(bits.view(np.float32), importance_I, width, blocks[first * row_bytes : last * row_bytes])
        return -1

    bad = each_block(work, rows * width, tile_rows * width)
    if bad >= 0:
        found = f"NaN, infinity, or a number too large for {type_name}" if type_name in _LARGEST else "NaN or infinity"
        raise NonFiniteError(bad // width, found)
    return out


def _plain(raw_OI: Array, code: str) -> Array | None:
    """float32 rows as flat bits where kernels can read them in place, which fast types feel. Kernels do not write
    there; but of a read-only array numba would compile every one of them again, so its rows are copied.
    """
    flags = raw_OI.flags
    in_place = code == "F32" and flags.c_contiguous and flags.aligned and flags.writeable
    return raw_OI.view(np.uint32).reshape(-1) if in_place else None


def _loader(raw_OI: Array, code: str, width: int) -> Callable[[int, int, Array], None]:
    """load(first row, last row, out): their float32 bits."""
    if code == "F64":  # rounded tile by tile: beyond float32 it becomes infinity and is refused

        def load(first: int, last: int, out: Array) -> None:
            out[:] = widen(raw_OI[first:last], "F64").reshape(-1).view(np.uint32)

        check(raw_OI, "F64")
        return load
    flat, kind = as_bits(raw_OI, code)
    return lambda first, last, out: kernels.load(flat[first * width : last * width], kind, kind, out)


@jit
def _beyond(bits, largest):
    """Where the first number larger than `largest` stands, or -1: the top first, which vectorizes."""
    top = np.uint32(0)
    for i in range(bits.size):
        size = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        top = size if size > top else top
    if top <= largest:
        return -1
    for i in range(bits.size):
        if np.uint32(bits[i] & np.uint32(0x7FFFFFFF)) > largest:
            return i
    return -1


def _float(kind: int, dtype: type[np.unsignedinteger[Any]]) -> Kernel:
    """To nearest even, as ggml's conversions: ggml_compute_fp32_to_fp16 and _bf16 of ggml-impl.h."""
    return lambda x, importance, width, out: kernels.store(x.view(np.uint32), kind, out.view(dtype))


_FLOATS: dict[str, Kernel] = {
    "F32": _float(kernels.F32, np.uint32),
    "F16": _float(kernels.F16, np.uint16),
    "BF16": _float(kernels.BF16, np.uint16),
}
ENCODERS: dict[str, Kernel] = {
    **_FLOATS,
    **ggml_type0.ENCODERS,
    **ggml_type1.ENCODERS,
    **ggml_iq4.ENCODERS,
    **ggml_ternary.ENCODERS,
}
