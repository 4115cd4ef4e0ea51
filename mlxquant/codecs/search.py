"""Codes, scales and biases of least weighted squared error, in the arrays that `encode` fills by minimum and maximum.

In each group of an affine format the sum of weight * (w - (scale * code + bias))**2 is made small, scale and bias being
numbers that the file's dtype has and codes the nearest to them. Where codes are fixed the best scale and bias are a
weighted least-squares fit, and the other way round codes follow from scale and bias; so one is fitted to the other in
turn, from several places: encode's own result, the group's range with parts of it cut off, and then moves of both ends
of the best so far by some steps and less and less. The group's best is stored, encode's own where nothing is better, so
that the error is never larger than encode's.

That codes and ranges be fitted in turn is as old as Lloyd's quantizer (S. Lloyd, Least Squares Quantization in PCM,
1982); llama.cpp does it from a row of starts for its K-quants (ggml-quants.c, make_qkx2_quants).

For mxfp4 the scale is a power of two, and those below the usual one are tried. The other mx modes are encode's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from mlxquant.codecs import kernels, search_kernels
from mlxquant.codecs.blocks import each_block
from mlxquant.codecs.encode import check_rows, encode
from mlxquant.codecs.floats import Array, NonFiniteError, cast, narrow, widen
from mlxquant.codecs.spec import Codec

# (shares of the range cut off at either end, at first; how often both ends move then; by how many steps at most, first
# and last). Where few columns carry most of the weight the best range lies far from the whole one: LONG leaves 2 to 8 %
# less of such a group's error than SHORT does, for twice the work. LONGEST, for twice that again, leaves 1 or 2 % less:
# taken where there are many codes, and so many ways to lay them.
_SHORT = (0.0, 0.05, 0.1, 0.2), 32, 2.5, 0.15
_LONG = (0.0, 0.05, 0.1, 0.2), 80, 6.0, 0.3
_LONGEST = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4), 256, 6.0, 0.3
_MANY_BITS = 5
_PIECE = 1 << 16  # weights that are made float32 at a time


def search(
    raw_OI: Array, source_code: str, dtype_code: str, codec: Codec, weight: Array | None = None
) -> tuple[Array, ...]:
    """As encode(): raw rows (O, I) -> one array for each of codec.parts(); but scale and bias of each group by search.

    weight: float32 (I,) or (O, I), at least 0: what an error there counts, the mean square of what the column is
    multiplied by, for one. None, or all zero in a group: all the same. The weighted squared error of decode()'s values
    against the rows rounded to `dtype_code` is never larger than encode()'s, group by group, and parts are encode's
    where it is equal. Rows are independent; the same bytes for any number of threads. Memory beyond the arrays: 1 MB a
    thread.

    Raises NonFiniteError as encode() does, and ValueError for arguments that no plan contains.
    """
    if codec.mode not in ("affine", "mxfp4"):
        return encode(raw_OI, source_code, dtype_code, codec)
    check_rows(raw_OI, dtype_code, codec)
    flat = _flat(raw_OI)

    def read(start: int, stop: int) -> Array:
        return widen(cast(flat[start:stop], source_code, dtype_code), dtype_code)

    if codec.mode == "mxfp4":
        parts = encode(raw_OI, source_code, dtype_code, codec)
        return _lower_powers(read, parts, _flat_weight(weight, raw_OI.shape), codec)
    packed = np.empty((len(raw_OI), raw_OI.shape[1] * codec.bits // 32), np.uint32)
    stream = packed.view(np.uint8).reshape(-1)

    def write(start: int, codes: Array) -> None:
        kernels.pack(codes, codec.bits, stream[start * codec.bits // 8 : (start + codes.size) * codec.bits // 8])

    where = _SHORT if weight is None else _LONGEST if codec.bits >= _MANY_BITS else _LONG
    tries = _tries(codec.bits, *where)
    scale, bias = _affine(read, write, raw_OI.shape, dtype_code, codec, weight, tries)
    return packed, narrow(scale, dtype_code), narrow(bias, dtype_code)


def search_values(
    w_OI: Array, dtype_code: str, codec: Codec, weight: Array | None = None
) -> tuple[Array, Array, Array]:
    """The same of float32 rows that are not rounded to the dtype first, for affine: codes (O, I) uint8, scale and bias
    (O, I / group_size), float32 numbers that `dtype_code` has. Looked for no longer than without weights: what GPTQ
    leaves to the next columns needs no better. Raises as search() does.
    """
    _require_affine(codec)
    check_rows(w_OI, dtype_code, codec)
    if w_OI.dtype != np.float32:
        raise ValueError(f"rows come as float32, not {w_OI.dtype}")
    codes = np.empty(w_OI.shape, np.uint8)
    flat, into = _flat(w_OI), codes.reshape(-1)

    def read(start: int, stop: int) -> Array:
        return flat[start:stop]

    def write(start: int, found: Array) -> None:
        into[start : start + found.size] = found

    return codes, *_affine(read, write, w_OI.shape, dtype_code, codec, weight, _tries(codec.bits, *_SHORT))


def pack(codes_OI: Array, scale_OG: Array, bias_OG: Array, dtype_code: str, codec: Codec) -> tuple[Array, ...]:
    """Codes (O, I) uint8 below 2**bits, scales and biases float32 -> the arrays that an affine codec stores. Raises
    ValueError where they do not fit one another.
    """
    _require_affine(codec)
    rows, width = codes_OI.shape
    groups = (rows, width // codec.group_size)
    if codes_OI.dtype != np.uint8 or width % codec.group_size or {scale_OG.shape, bias_OG.shape} != {groups}:
        raise ValueError(
            f"{codec.label}: codes {codes_OI.dtype.name} {codes_OI.shape}, scales {scale_OG.shape}, biases "
            f"{bias_OG.shape} do not go together"
        )
    packed = np.empty((rows, width * codec.bits // 32), np.uint32)
    kernels.pack(codes_OI.flatten(), codec.bits, packed.view(np.uint8).reshape(-1))
    return packed, narrow(scale_OG, dtype_code), narrow(bias_OG, dtype_code)


def _require_affine(codec: Codec) -> None:
    if codec.mode != "affine":
        raise ValueError(f"{codec.label} has no codes with scale and bias: expected an affine codec")


def _flat_weight(weight: Array | None, shape: tuple[int, ...]) -> Array:
    """One row of weights, or all of them. Raises ValueError for what cannot weigh."""
    if weight is None:
        return _flat(np.ones(shape[-1], np.float32))
    if weight.shape not in (shape, shape[-1:]) or weight.dtype != np.float32:
        raise ValueError(f"weights {weight.dtype.name} {weight.shape} for rows {shape}: expected float32, or one row")
    if weight.size and not (weight.min() >= 0 and weight.max() < np.inf):
        raise ValueError("weights must be finite and at least 0")
    return _flat(weight)


def _flat(array: Array) -> Array:
    """numba compiles writable, read-only and unaligned arrays apart: let there be one sort only."""
    flat = np.require(array, requirements=["C", "A"]).reshape(-1)
    flat.flags.writeable = False
    return flat


def _affine(
    read: Callable[[int, int], Array],
    write: Callable[[int, Array], None],
    shape: tuple[int, ...],
    dtype_code: str,
    codec: Codec,
    weight: Array | None,
    tries: tuple[Array, Array],
) -> tuple[Array, Array]:
    """Scale and bias (O, G). read(start, stop) -> float32 weights of the flat rows, write(start, codes)."""
    width, group = shape[1], codec.group_size
    scale, bias = np.empty((2, shape[0], width // group), np.float32)
    scales, biases = scale.reshape(-1), bias.reshape(-1)
    given = _flat_weight(weight, shape), kernels.KINDS[dtype_code], codec.bits, group, *tries

    def work(start: int, stop: int) -> int:
        for at in range(start, stop, _PIECE):
            x = _flat(read(at, min(at + _PIECE, stop)))
            codes = np.empty(x.size, np.uint8)
            found = scales[at // group : (at + x.size) // group], biases[at // group : (at + x.size) // group]
            bad = int(search_kernels.search_affine(x, at, *given, codes, *found))
            if bad >= 0:
                return at + bad
            write(at, codes)
        return -1

    bad = each_block(work, shape[0] * width, group * search_kernels.LANES)
    if bad >= 0:
        raise NonFiniteError(bad // width, f"NaN, infinity, or numbers too far apart for {dtype_code}")
    return scale, bias


@cache
def _tries(bits: int, cuts: tuple[float, ...], count: int, far: float, near: float) -> tuple[Array, Array]:
    """Starts and moves as search_kernels takes them.

    Moves fill the square of both ends' shifts evenly: multiples of 1 / p and 1 / p**2 modulo 1, p**3 = p + 1 (M.
    Roberts, The Unreasonable Effectiveness of Quasirandom Sequences, 2018).
    """
    plastic = 1.32471795724474602596
    number = np.arange(count)
    radius = far * (near / far) ** (number / (count - 1))
    lower, upper = (radius * (2 * ((0.5 + (number + 1) / plastic**k) % 1) - 1) for k in (1, 2))
    moves = np.stack([(upper - lower) / (2**bits - 1), (lower + upper) / 2], axis=-1)
    starts = np.repeat(np.array(cuts), 2).reshape(-1, 2)
    starts, moves = starts.astype(np.float32), moves.astype(np.float32)
    starts.flags.writeable = moves.flags.writeable = False
    return starts, moves


def _lower_powers(
    read: Callable[[int, int], Array], parts: tuple[Array, ...], weight: Array, codec: Codec
) -> tuple[Array, ...]:
    """mxfp4's arrays with better scales and codes, in place."""
    packed, scale = parts
    stream, scales = packed.view(np.uint8).reshape(-1), scale.reshape(-1)
    group, bits = codec.group_size, codec.bits

    def work(start: int, stop: int) -> int:
        for at in range(start, stop, _PIECE):
            x = _flat(read(at, min(at + _PIECE, stop)))
            codes, piece = np.empty(x.size, np.uint8), stream[at * bits // 8 : (at + x.size) * bits // 8]
            kernels.unpack(piece, bits, codes)
            search_kernels.search_mxfp4(x, at, weight, group, codes, scales[at // group : (at + x.size) // group])
            kernels.pack(codes, bits, piece)
        return -1

    each_block(work, stream.size * 8 // bits, group * search_kernels.LANES)
    return parts
