"""Which number format a tensor is stored in, and the shapes and bytes that follow. No arrays, no numba.

The formats are MLX's own (`mx.quantize`, mode by mode). For a weight of shape (..., I):

    weight   U32  (..., I * bits / 32)        codes, first element in the lowest bits
    scales        (..., I / group_size)       affine: the model's float dtype; mxfp4, mxfp8, nvfp4: U8
    biases        (..., I / group_size)       affine only
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlxquant.errors import UsageError
from mlxquant.tensors import TensorSpec

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
# mode -> (group_size, bits); the mx modes have no other (mlx/ops.cpp, fp_quantize).
MX_MODES = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
MODES = ("affine", *MX_MODES)


@dataclass(frozen=True)
class Codec:
    """mode 'affine', 'mxfp4', 'nvfp4', 'mxfp8', or 'keep' for a tensor that stays float."""

    mode: str
    bits: int = 0
    group_size: int = 0

    @property
    def quantized(self) -> bool:
        return self.mode != "keep"

    @property
    def label(self) -> str:
        """The text `--set` takes: 4g64, mxfp4, keep."""
        return f"{self.bits}g{self.group_size}" if self.mode == "affine" else self.mode

    def divides(self, width: int) -> bool:
        return not self.quantized or width % self.group_size == 0

    def parts(self, name: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorSpec, ...]:
        """The tensors that store `name` (its full name; quantized ones end in '.weight').

        `dtype` is the float dtype code of the model: that of a kept tensor and of affine scales and biases.
        """
        if not self.quantized:
            return (TensorSpec(name, shape, dtype),)
        base, lead, width = name.removesuffix(".weight"), shape[:-1], shape[-1]
        groups = (*lead, width // self.group_size)
        packed = TensorSpec(name, (*lead, width * self.bits // 32), "U32")
        if self.mode != "affine":
            return packed, TensorSpec(f"{base}.scales", groups, "U8")
        return packed, TensorSpec(f"{base}.scales", groups, dtype), TensorSpec(f"{base}.biases", groups, dtype)

    def mlx_config(self) -> dict[str, int | str]:
        """The entry that stock mlx-lm reads back from config.json's `quantization` block."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


KEEP = Codec("keep")


def affine(bits: int, group_size: int) -> Codec:
    """Raises UsageError for a width or group size that MLX has no kernel for."""
    if bits not in AFFINE_BITS or group_size not in AFFINE_GROUP_SIZES:
        raise UsageError(
            f"{bits}g{group_size} is no affine format",
            hint=f"bits are one of {AFFINE_BITS}, group sizes one of {AFFINE_GROUP_SIZES}",
        )
    return Codec("affine", bits, group_size)


def parse_codec(text: str) -> Codec:
    """'8g32', 'mxfp4', 'keep' -> Codec. Raises UsageError."""
    if text == "keep":
        return KEEP
    if text in MX_MODES:
        group_size, bits = MX_MODES[text]
        return Codec(text, bits, group_size)
    if match := re.fullmatch(r"(\d+)g(\d+)", text):
        return affine(int(match[1]), int(match[2]))
    raise UsageError(f"{text!r} names no codec", hint="write it like 8g32, mxfp4, nvfp4, mxfp8 or keep")
