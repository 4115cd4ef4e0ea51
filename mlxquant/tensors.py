"""What a tensor is before anything is read of it: a name, a shape, a dtype, and so a number of bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """One row of the dtype table.

    `code` is the safetensors name and the key everywhere in mlxquant. `numpy` is the dtype raw rows come in:
    bfloat16 and the 8-bit floats have none in numpy, so their bits travel as unsigned integers.
    `label` is the name config.json and MLX use.
    """

    code: str
    itemsize: int
    numpy: str
    label: str
    floating: bool


DTYPES: dict[str, DType] = {
    d.code: d
    for d in (
        DType("F64", 8, "<f8", "float64", True),
        DType("F32", 4, "<f4", "float32", True),
        DType("F16", 2, "<f2", "float16", True),
        DType("BF16", 2, "<u2", "bfloat16", True),
        DType("F8_E4M3", 1, "u1", "float8_e4m3fn", True),
        DType("F8_E5M2", 1, "u1", "float8_e5m2", True),
        DType("F8_E8M0", 1, "u1", "float8_e8m0fnu", True),
        DType("I64", 8, "<i8", "int64", False),
        DType("I32", 4, "<i4", "int32", False),
        DType("I16", 2, "<i2", "int16", False),
        DType("I8", 1, "i1", "int8", False),
        DType("U64", 8, "<u8", "uint64", False),
        DType("U32", 4, "<u4", "uint32", False),
        DType("U16", 2, "<u2", "uint16", False),
        DType("U8", 1, "u1", "uint8", False),
        DType("BOOL", 1, "u1", "bool", False),
    )
}

# What `--dtype` takes and what MLX computes in.
FLOAT_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype code (a key of DTYPES) of one tensor.

    Every tensor is also a matrix of rows, the unit we stream: `width` is the last axis, `rows` the product of the
    others (1 for a vector or a scalar).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1]) if self.shape else 1
