"""Scales, biases and codes of a quantized matrix, moved one group at a time to where the output error is least.

Rounding column by column decides each code when later ones are still free. Once all are chosen, each group can be
looked at again, all other groups being what they are. The error of the output is E H E^T, E = w - value; a change d of
a group's values lowers it by 2 d.p - d H d, p = H E and H being the group's own. So, in turn:

    anew    values would best change by H^-1 p. Scale and bias are searched for these, codes rounded by GPTQ within
            the group; with the scale and bias that it has, too. The better is taken where it lowers the error
    refit   codes as they are, scale and bias: two linear equations. The scale is rounded to the file's dtype first, the
            bias fitted to what it became
    descend each code in turn: the best of column j, all else as it is, is its value + p_j / H_jj

Each lowers the error or is left undone, and what rounding left the next groups make good. A round over all groups
costs 2 O I^2 operations, twice GPTQ's. (All scales and biases at once, 2 G unknowns a row, would take a matrix of
(2 G)^2 for each row; going through them in turn, with codes moving in between, gets as far.)

Descent by codes is QuantEase (Behdin et al. 2023, arXiv:2309.01885), here from GPTQ's result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mlxquant.calibrate import kernels
from mlxquant.calibrate.values import Array, Chosen
from mlxquant.codecs.blocks import cores
from mlxquant.codecs.encode import NonFiniteError, decode
from mlxquant.codecs.floats import widen
from mlxquant.codecs.kernels import KINDS, unpack
from mlxquant.codecs.search import pack, search_values
from mlxquant.codecs.spec import Codec

# Rows that are worked on at a time, always so many: how a matrix product rounds depends on its shape, and a row's
# bytes shall not depend on which rows it came with.
ROWS = 256
_BLOCK = 512
# Tiles under way: while one waits for its loops the BLAS works for another. More would cost memory.
_THREADS = 4
# Of a group's mean diagonal: what H^-1 p is damped by. It only proposes.
_DAMPING = 1e-3


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
        scale_IR, bias_IR = (np.repeat(part, group, axis=0) for part in (self.scale_GR, self.bias_GR))
        return np.asarray(self.code_IR * scale_IR + bias_IR)


@dataclass(frozen=True)
class Group:
    """Some columns of one scale, and their Hessian: itself, what it maps 1 to, damped and inverted, and factored as in
    gptq.py."""

    columns: slice
    hessian_BB: Array
    spread_B: Array
    inverse_BB: Array
    follow_BB: Array
    cost_B: Array


def groups(hessian_II: Array, codec: Codec) -> list[Group]:
    """What improve() needs of a Hessian, once for all rows."""
    found = []
    for start in range(0, len(hessian_II), codec.group_size):
        columns = slice(start, start + codec.group_size)
        own_BB = np.ascontiguousarray(hessian_II[columns, columns])
        damping = _DAMPING * float(np.diagonal(own_BB).mean()) or 1.0
        damped_BB = own_BB.astype(np.float64) + damping * np.eye(len(own_BB))
        root_BB = upper_root(damped_BB)
        root_B = np.diagonal(root_BB)
        parts = own_BB.sum(axis=1), np.linalg.inv(damped_BB), root_BB / root_B, np.square(root_B)
        found.append(Group(columns, own_BB, *(np.ascontiguousarray(part, np.float32) for part in parts)))
    return found


def upper_root(a_BB: Array) -> Array:
    """R upper, A = R R^T. Raises LinAlgError."""
    return np.asarray(np.linalg.cholesky(a_BB[::-1, ::-1])[::-1, ::-1])


def refit(
    w_OI: Array,
    parts: tuple[Array, ...],
    hessian_II: Array,
    dtype_code: str,
    codec: Codec,
    *,
    rounds: int = 2,
    recode: bool = True,
) -> Chosen:
    """Codes, scales and biases that were chosen in whatever way -> better ones, of no larger error in any row.

    w_OI: float32. parts: of an affine codec. recode: False leaves codes as they are. hessian_II: float32 (I, I),
    symmetric and positive semidefinite. Raises LinAlgError where it is far from that.
    """
    codes_OI, (scale_OG, bias_OG) = codes(parts, codec), (widen(part, dtype_code) for part in parts[1:])
    pieces = groups(hessian_II, codec)

    def work(rows: slice) -> tuple[float, float]:
        tile = Tile(*(padded(array[rows]) for array in (w_OI, codes_OI, scale_OG, bias_OG)))
        error_R = improve(tile, hessian_II, pieces, dtype_code, codec, rounds, recode)
        put_back(tile, rows, codes_OI, scale_OG, bias_OG)
        return float(error_R.sum()), float(quadratic(tile.w_IR, hessian_II).sum())

    share = ratio(each_tile(work, len(w_OI)))
    better = pack(codes_OI, scale_OG, bias_OG, dtype_code, codec)
    return Chosen(better, decode(better, dtype_code, codec), share)


def improve(
    tile: Tile,
    hessian_II: Array,
    pieces: list[Group],
    dtype_code: str,
    codec: Codec,
    rounds: int,
    recode: bool = True,
) -> Array:
    """Changes codes, scales and biases in place. Returns the squared output error of each row, (R,) float64."""
    error_IR = tile.w_IR - tile.values_IR()
    before_R = quadratic(error_IR, hessian_II)
    if not rounds:
        return before_R
    was = tile.code_IR.copy(), tile.scale_GR.copy(), tile.bias_GR.copy()
    for _ in range(rounds):
        for g, group in enumerate(pieces):
            pull_BR = hessian_II[group.columns] @ error_IR
            if recode:
                _anew(tile, g, group, error_IR, pull_BR, dtype_code, codec)
            _refit(tile, g, group, error_IR, pull_BR, dtype_code)
            if recode:
                of_group = tile.scale_GR[g], tile.bias_GR[g], np.float32(2**codec.bits - 1)
                both = tile.code_IR[group.columns], error_IR[group.columns]
                kernels.descend_group(pull_BR, group.hessian_BB, *of_group, *both)
    after_R = quadratic(tile.w_IR - tile.values_IR(), hessian_II)
    worse_R = ~(after_R <= before_R)  # by float32's rounding, where there was next to nothing to gain
    for now, old in zip((tile.code_IR, tile.scale_GR, tile.bias_GR), was, strict=True):
        now[:, worse_R] = old[:, worse_R]
    return np.where(worse_R, before_R, after_R)


def _anew(tile: Tile, g: int, group: Group, error_IR: Array, pull_BR: Array, dtype_code: str, codec: Codec) -> None:
    """Codes, scale and bias of one group of all rows. pull_BR = H error; both are kept up to date."""
    code_BR, error_BR = tile.code_IR[group.columns], error_IR[group.columns]
    scale_R, bias_R = tile.scale_GR[g], tile.bias_GR[g]
    top = np.float32(2**codec.bits - 1)
    value_BR = tile.w_IR[group.columns] - error_BR
    ideal_BR = value_BR + kernels.product(group.inverse_BB, pull_BR)
    best_R = np.zeros(len(scale_R))
    taken_BR = np.zeros_like(value_BR)
    for scale, bias in ((scale_R.copy(), bias_R.copy()), *_searched(ideal_BR, group, dtype_code, codec)):
        code = _round_within(ideal_BR, group, scale, bias, top)
        change_BR = (code * scale + bias) - value_BR
        gain_R = (change_BR * (2 * pull_BR - kernels.product(group.hessian_BB, change_BR))).sum(
            axis=0, dtype=np.float64
        )
        better = gain_R > best_R
        best_R[better] = gain_R[better]
        for into, found in ((code_BR, code), (taken_BR, change_BR)):
            np.copyto(into, found, where=better)
        for into, found in ((scale_R, scale), (bias_R, bias)):
            np.copyto(into, found, where=better)
    error_BR -= taken_BR
    pull_BR -= kernels.product(group.hessian_BB, taken_BR)


def _refit(tile: Tile, g: int, group: Group, error_IR: Array, pull_BR: Array, dtype_code: str) -> None:
    """Scale and bias of one group of all rows, for the codes that it has."""
    code_BR = tile.code_IR[group.columns]
    spread_BR, change_BR = kernels.product(group.hessian_BB, code_BR), np.empty_like(code_BR)
    own = code_BR, tile.scale_GR[g], tile.bias_GR[g], change_BR
    kernels.refit_group(pull_BR, spread_BR, group.spread_B, KINDS[dtype_code], *own)
    error_IR[group.columns] -= change_BR
    pull_BR -= kernels.product(group.hessian_BB, change_BR)


def _searched(ideal_BR: Array, group: Group, dtype_code: str, codec: Codec) -> list[tuple[Array, Array]]:
    """Scale and bias for what the values should be; none where the dtype does not reach so far."""
    try:
        _, scale_RG, bias_RG = search_values(np.ascontiguousarray(ideal_BR.T), dtype_code, codec, group.cost_B)
    except NonFiniteError:
        return []
    return [(scale_RG[:, 0].copy(), bias_RG[:, 0].copy())]


def _round_within(ideal_BR: Array, group: Group, scale_R: Array, bias_R: Array, top: np.float32) -> Array:
    code_BR, error_BR = np.empty_like(ideal_BR), np.empty_like(ideal_BR)
    one_B = np.zeros(len(ideal_BR), np.int64)
    kernels.round_columns(
        ideal_BR, ideal_BR.copy(), group.follow_BB, one_B, scale_R[None], bias_R[None], top, code_BR, error_BR
    )
    return code_BR


def quadratic(x_IR: Array, hessian_II: Array) -> Array:
    """x^T H x of each row, (R,) float64. H is symmetric: half of it is read."""
    total_R = np.zeros(x_IR.shape[1])
    for start in range(0, len(x_IR), _BLOCK):
        part = slice(start, start + _BLOCK)
        pull_BR = hessian_II[part, part] @ x_IR[part] + 2 * (hessian_II[part, :start] @ x_IR[:start])
        total_R += (pull_BR * x_IR[part]).sum(axis=0, dtype=np.float64)
    return total_R


def each_tile(work: Callable[[slice], tuple[float, float]], rows: int) -> list[tuple[float, float]]:
    """What work(rows) says of each tile of ROWS rows or fewer, in order; some tiles at a time."""
    with ThreadPoolExecutor(min(_THREADS, cores())) as pool:
        return list(pool.map(work, tiles(rows)))


def ratio(sums: list[tuple[float, float]]) -> float:
    """Of sums of squared errors to sums of squared outputs."""
    error, total = (sum(part) for part in zip(*sums, strict=True))
    return error / total if total > 0 else 0.0


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
