"""Scales, biases and codes of a quantized matrix, moved one group at a time to where the output error is least.

Rounding column by column decides each code when later ones are still free. Once all are chosen, each group can be
looked at again, all other groups being what they are: the error of the output is E H E^T, E = w - value, so the best
scale and bias of a group are two linear equations, and the best of a code is its value + (H E)_j / H_jj. Both are
coordinate descent: each step lowers the error or is left undone, numbers are rounded to the file's dtype as they are
found, and the next group makes good what that rounding left. A round over all groups costs 2 O I^2 operations, twice
GPTQ's.

Codes alone: coordinate descent as in QuantEase (Behdin et al. 2023, arXiv:2309.01885), from GPTQ's result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlxquant.calibrate import kernels
from mlxquant.calibrate.values import Array, Chosen
from mlxquant.codecs.encode import decode
from mlxquant.codecs.floats import widen
from mlxquant.codecs.kernels import KINDS, unpack
from mlxquant.codecs.search import pack
from mlxquant.codecs.spec import Codec

# Rows that are worked on at a time, always so many: how a matrix product rounds depends on its shape, and a row's
# bytes shall not depend on which rows it came with.
ROWS = 256
_BLOCK = 512


@dataclass
class Tile:
    """Rows of a matrix, transposed: w_IR, code_IR (float32 integers), scale_GR, bias_GR."""

    w_IR: Array
    code_IR: Array
    scale_GR: Array
    bias_GR: Array

    def values_IR(self) -> Array:
        """What the codes stand for: as decode() has it."""
        group = len(self.w_IR) // len(self.scale_GR)
        return self.code_IR * np.repeat(self.scale_GR, group, axis=0) + np.repeat(self.bias_GR, group, axis=0)


def refit(
    w_OI: Array, parts: tuple[Array, ...], hessian_II: Array, dtype_code: str, codec: Codec, *, rounds: int = 2
) -> Chosen:
    """Codes, scales and biases that were chosen in whatever way -> better ones, of no larger error in any row.

    w_OI: float32. parts: of an affine codec. hessian_II: float32 (I, I), symmetric and positive semidefinite.
    """
    codes_OI, (scale_OG, bias_OG) = codes(parts, codec), (widen(part, dtype_code) for part in parts[1:])
    spread = 0.0
    total = 0.0
    for rows in tiles(len(w_OI)):
        tile = Tile(*(padded(array[rows]) for array in (w_OI, codes_OI.astype(np.float32), scale_OG, bias_OG)))
        spread += improve(tile, hessian_II, dtype_code, codec, rounds)[: rows.stop - rows.start].sum()
        total += quadratic(tile.w_IR, hessian_II).sum()
        put_back(tile, rows, codes_OI, scale_OG, bias_OG)
    better = pack(codes_OI, scale_OG, bias_OG, dtype_code, codec)
    return Chosen(better, decode(better, dtype_code, codec), ratio(spread, total))


def improve(tile: Tile, hessian_II: Array, dtype_code: str, codec: Codec, rounds: int) -> Array:
    """Changes codes, scales and biases in place. Returns the squared output error of each row, (R,) float64."""
    error_IR = tile.w_IR - tile.values_IR()
    before_R = quadratic(error_IR, hessian_II)
    if not rounds:
        return before_R
    was = tile.code_IR.copy(), tile.scale_GR.copy(), tile.bias_GR.copy()
    for _ in range(rounds):
        if not _round(tile, error_IR, hessian_II, KINDS[dtype_code], codec):
            break
    after_R = quadratic(tile.w_IR - tile.values_IR(), hessian_II)
    worse_R = ~(after_R <= before_R)  # by float32's rounding, where there was next to nothing to gain
    for now, old in zip((tile.code_IR, tile.scale_GR, tile.bias_GR), was, strict=True):
        now[:, worse_R] = old[:, worse_R]
    return np.where(worse_R, before_R, after_R)


def _round(tile: Tile, error_IR: Array, hessian_II: Array, kind: int, codec: Codec) -> int:
    """Every group once. Returns how many codes moved."""
    top, moved = np.float32(2**codec.bits - 1), 0
    change_BR = np.empty((codec.group_size, error_IR.shape[1]), np.float32)
    for g, start in enumerate(range(0, len(error_IR), codec.group_size)):
        columns = slice(start, start + codec.group_size)
        hessian_BB = np.ascontiguousarray(hessian_II[columns, columns])
        code_BR, error_BR = tile.code_IR[columns], error_IR[columns]
        scale_R, bias_R = tile.scale_GR[g], tile.bias_GR[g]
        pull_BR = hessian_II[columns] @ error_IR
        spreads = hessian_BB @ code_BR, hessian_BB.sum(axis=1)
        kernels.refit_group(pull_BR, *spreads, kind, code_BR, scale_R, bias_R, change_BR)
        error_BR -= change_BR
        pull_BR -= hessian_BB @ change_BR
        moved += kernels.descend_group(pull_BR, hessian_BB, scale_R, bias_R, top, code_BR, error_BR)
    return moved


def quadratic(x_IR: Array, hessian_II: Array) -> Array:
    """x^T H x of each row, (R,) float64. H is symmetric: half of it is read."""
    total_R = np.zeros(x_IR.shape[1])
    for start in range(0, len(x_IR), _BLOCK):
        part = slice(start, start + _BLOCK)
        pull_BR = hessian_II[part, part] @ x_IR[part] + 2 * (hessian_II[part, :start] @ x_IR[:start])
        total_R += (pull_BR * x_IR[part]).sum(axis=0, dtype=np.float64)
    return total_R


def ratio(error: float, total: float) -> float:
    return float(error / total) if total > 0 else 0.0


def tiles(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS))


def padded(rows: Array) -> Array:
    """Up to ROWS rows (R, X) -> (X, ROWS) float32, zero where there are none."""
    out = np.zeros((rows.shape[1], ROWS), np.float32)
    out[:, : len(rows)] = rows.T
    return out


def put_back(tile: Tile, rows: slice, codes_OI: Array, scale_OG: Array, bias_OG: Array) -> None:
    for whole, part in ((codes_OI, tile.code_IR), (scale_OG, tile.scale_GR), (bias_OG, tile.bias_GR)):
        whole[rows] = part.T[: rows.stop - rows.start]


def codes(parts: tuple[Array, ...], codec: Codec) -> Array:
    """(O, I) uint8."""
    packed = parts[0]
    out = np.empty((len(packed), packed.shape[1] * 32 // codec.bits), np.uint8)
    unpack(np.ascontiguousarray(packed).view(np.uint8).reshape(-1), codec.bits, out.reshape(-1))
    return out
