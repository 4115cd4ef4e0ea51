"""ggml blocks -> the arrays of an MLX codec that stand for the same weights, without quantizing a second time.

    x = scale * code + bias     every block of 32 with one scale: scale and bias are the block's own, codes unchanged
    two blocks of 16            Q6_K, Q3_K: MLX has one scale for both. It is put on the lattice of one of the two, so
                                that this one stays exact, and the other loses at most half a fine step (`_align`)
    anything else               min/max rounding of the decoded weights, at bits that make it negligible

Block layouts: ggml/src/ggml-common.h; scales of Q4_K and Q5_K through the `gguf` package.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import quants

from mlxquant.codecs.blocks import each_block
from mlxquant.codecs.encode import encode
from mlxquant.codecs.floats import Array, NonFiniteError
from mlxquant.codecs.ggml import block, decode_rows
from mlxquant.codecs.kernels import TILE, half_to_single, jit, pack, single_to_half
from mlxquant.codecs.repacked import REPACKED
from mlxquant.codecs.spec import Codec


def repack(raw: Array, type_name: str, width: int) -> tuple[Array, ...]:
    """Raw blocks (O, row_bytes) uint8 -> one array for each of REPACKED[type_name].codec.parts(), rows first.

    Affine scales and biases are float16. Raises NonFiniteError where a scale is NaN, infinite or too large for that,
    UnsupportedError and ValueError as `decode_rows`.
    """
    codec = REPACKED[type_name].codec
    if codec.mode != "affine":
        return _repack_mx(raw, type_name, width, codec)
    w_OI = decode_rows(raw, type_name, width)
    blocks = raw.reshape(-1, block(type_name)[1])
    if type_name in _SCALES:
        with np.errstate(invalid="ignore"):  # refused by row, when all parts are made
            made = _SCALES[type_name](blocks)
        scale, bias = (np.ascontiguousarray(x, np.float32).reshape(-1) for x in made)
        return _with_scales(w_OI, scale, bias, codec)
    if type_name in _SUBSCALES:
        with np.errstate(invalid="ignore"):
            sub = np.ascontiguousarray(_SUBSCALES[type_name](blocks), np.float32)
        return _aligned(w_OI, sub.reshape(-1), codec)
    return encode(w_OI, "F32", "F16", codec)


def _with_scales(w_OI: Array, scale: Array, bias: Array, codec: Codec) -> tuple[Array, ...]:
    """Codes by the block's own float32 scale and bias; these are then rounded to float16."""

    def kernel(start: int, stop: int) -> int:
        return int(_codes(w, scale, bias, codec.bits, codec.group_size, packed, start, stop))

    w, packed, halves = _arrays(w_OI, codec)
    each_block(kernel, w.size)
    with np.errstate(over="ignore", invalid="ignore"):
        halves[0][:], halves[1][:] = scale.astype(np.float16), bias.astype(np.float16)
    return _parts(w_OI, packed, halves, codec)


def _aligned(w_OI: Array, sub: Array, codec: Codec) -> tuple[Array, ...]:
    def kernel(start: int, stop: int) -> int:
        return int(_align(w, sub, codec.bits, packed, bits[0], bits[1], start, stop))

    w, packed, halves = _arrays(w_OI, codec)
    bits = [half.view(np.uint16) for half in halves]
    each_block(kernel, w.size)
    return _parts(w_OI, packed, halves, codec)


def _arrays(w_OI: Array, codec: Codec) -> tuple[Array, Array, tuple[Array, Array]]:
    """Flat weights, and room for packed codes and for scales and biases."""
    groups = w_OI.size // codec.group_size
    halves = np.empty(groups, np.float16), np.empty(groups, np.float16)
    return w_OI.reshape(-1), np.empty(w_OI.size * codec.bits // 8, np.uint8), halves


def _parts(w_OI: Array, packed: Array, halves: tuple[Array, Array], codec: Codec) -> tuple[Array, ...]:
    rows = len(w_OI)
    scales, biases = (half.reshape(rows, -1) for half in halves)
    for part in (scales, biases):
        if not (finite := np.isfinite(part).all(axis=1)).all():
            raise NonFiniteError(int(np.argmin(finite)), "a scale that is NaN, infinite or too large for float16")
    return packed.view(np.uint32).reshape(rows, -1), scales, biases


# -- scale and bias of each group, (blocks, groups in a block) float32, from raw blocks (N, bytes)


def _half(blocks: Array, at: int) -> Array:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _centred(zero: int) -> Callable[[Array], tuple[Array, Array]]:
    """d at the block's beginning, codes counted from `zero`."""

    def scales(blocks: Array) -> tuple[Array, Array]:
        d = _half(blocks, 0)
        return d, -zero * d

    return scales


def _with_minimum(blocks: Array) -> tuple[Array, Array]:
    return _half(blocks, 0), _half(blocks, 2)


def _k_scales(blocks: Array) -> tuple[Array, Array]:
    """Q4_K, Q5_K: eight 6-bit scales and minima under d and dmin."""
    scale, minimum = quants.Q4_K.get_scale_min(blocks[:, 4:16])
    scale, minimum = (x.reshape(len(blocks), 8).astype(np.float32) for x in (scale, minimum))
    return _half(blocks, 0) * scale, -(_half(blocks, 2) * minimum)


def _iq4_xs_scales(blocks: Array) -> tuple[Array, Array]:
    """Eight 6-bit scales, four low bits of each in one place and two high ones in another."""
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = (blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15).reshape(len(blocks), 8)
    d = _half(blocks, 0) * ((low | high << 4).astype(np.float32) - 32)
    return d, -128 * d


def _ternary(at: int) -> Callable[[Array], tuple[Array, Array]]:
    def scales(blocks: Array) -> tuple[Array, Array]:
        d = np.repeat(_half(blocks, at), 2, axis=1)
        return d, -d

    return scales


_SCALES: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "Q4_0": _centred(8),
    "Q4_1": _with_minimum,
    "Q5_0": _centred(16),
    "Q5_1": _with_minimum,
    "Q8_0": _centred(128),
    "Q4_K": _k_scales,
    "Q5_K": _k_scales,
    "IQ4_NL": _centred(128),  # its 16 levels are whole numbers from -127 to 113
    "IQ4_XS": _iq4_xs_scales,
    "TQ1_0": _ternary(52),
    "TQ2_0": _ternary(64),
}


# -- scale of each block of 16, (blocks, 16) float32


def _q6_k_subscales(blocks: Array) -> Array:
    return _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)


def _q3_k_subscales(blocks: Array) -> Array:
    """6-bit scales: 16 times four low bits, then 16 times two high ones."""
    packed = blocks[:, 96:108]
    low = (packed[:, None, :8] >> np.array([0, 4], np.uint8)[:, None] & 15).reshape(len(blocks), 16)
    high = (packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(len(blocks), 16)
    return _half(blocks, 108) * ((low | high << 4).astype(np.float32) - 32)


_SUBSCALES: dict[str, Callable[[Array], Array]] = {"Q6_K": _q6_k_subscales, "Q3_K": _q3_k_subscales}


# -- mx modes: the same bits in another order


def _repack_mx(raw: Array, type_name: str, width: int, codec: Codec) -> tuple[Array, ...]:
    """MXFP4: a scale byte, 16 bytes; NVFP4: four scale bytes, 32 bytes. In both the low nibbles of a group's bytes
    are its first half."""
    size = block(type_name)[1]
    if raw.shape[1] != width // block(type_name)[0] * size:
        raise ValueError(f"{width} columns of {type_name} do not take {raw.shape[1]} bytes")
    blocks = raw.reshape(-1, size)
    groups = 1 if type_name == "MXFP4" else 4
    nibbles = blocks[:, groups:].reshape(-1, codec.group_size // 2)
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    scales = np.ascontiguousarray(blocks[:, :groups]).reshape(len(raw), -1)
    if type_name == "NVFP4":
        scales = np.where(scales == 0x7F, np.uint8(0), scales)  # ggml reads E4M3's NaN as 0
    return np.ascontiguousarray(packed).view(np.uint32).reshape(len(raw), -1), scales


# -- kernels


@jit
def _codes(w, scale, bias, bits, group, packed, first, stop):
    """rint((w - bias) / scale) of weights first..stop, packed. A scale of 0 has one level, code 0."""
    top = np.float32((1 << bits) - 1)
    codes = np.empty(TILE, np.uint8)
    for start in range(first, stop, TILE):
        count = min(TILE, stop - start)
        for g in range(count // group):
            s, b = scale[start // group + g], bias[start // group + g]
            inverse = np.float32(1) / s if s != np.float32(0) else np.float32(0)
            for i in range(group):
                x = (w[start + g * group + i] - b) * inverse
                x = x if x > np.float32(0) else np.float32(0)
                x = x if x < top else top
                codes[g * group + i] = np.uint8(x + np.float32(0.5))
        pack(codes[:count], bits, packed[start * bits // 8 : (start + count) * bits // 8])
    return -1


@jit
def _align(w, sub, bits, packed, scales, biases, first, stop):
    """Groups of 32 with two lattices: tries a scale that is a whole fraction of the first block's step, of the
    second's, and min/max, and keeps what leaves the least squared error after float16 rounding."""
    top = (1 << bits) - 1
    codes, trial = np.empty(TILE, np.uint8), np.empty(32, np.uint8)
    for start in range(first, stop, TILE):
        count = min(TILE, stop - start)
        for g in range(count // 32):
            at = start + g * 32
            lo, hi = np.float32(0), np.float32(0)
            for i in range(32):
                lo = w[at + i] if w[at + i] < lo else lo
                hi = w[at + i] if w[at + i] > hi else hi
            best = np.float32(np.inf)
            for candidate in range(3):
                step = abs(sub[at // 16 + candidate]) if candidate < 2 else (hi - lo) / np.float32(top)
                scale, bias = _lattice(step, lo, hi, top)
                error = _try(w[at : at + 32], scale, bias, np.float32(top), trial)
                if error < best or candidate == 0:
                    best = error
                    scales[at // 32], biases[at // 32] = _half_bits(scale), _half_bits(bias)
                    for i in range(32):
                        codes[g * 32 + i] = trial[i]
        pack(codes[:count], bits, packed[start * bits // 8 : (start + count) * bits // 8])
    return -1


@jit
def _lattice(step, lo, hi, top):
    """(scale, bias), both float16 numbers: step divided as often as `top` levels from lo to hi allow, zero a level."""
    scale = step
    if step > np.float32(0):
        times = np.floor(np.float32(top) * step / (hi - lo)) if hi > lo else np.float32(1)
        scale = step / times if times > np.float32(1) else step
    scale = _rounded(scale)
    below = np.rint(lo / scale) if scale > np.float32(0) else np.float32(0)
    return scale, _rounded(below * scale)


@jit
def _try(group, scale, bias, top, codes):
    """Fills `codes` and returns the squared error."""
    inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
    error = np.float32(0)
    for i in range(32):
        x = (group[i] - bias) * inverse
        x = x if x > np.float32(0) else np.float32(0)
        x = x if x < top else top
        code = np.uint8(x + np.float32(0.5))
        codes[i] = code
        off = group[i] - (np.float32(code) * scale + bias)
        error += off * off
    return error


@jit
def _half_bits(single):
    return np.uint16(single_to_half(np.float32(single).view(np.uint32)))


@jit
def _rounded(single):
    return np.uint32(half_to_single(single_to_half(np.float32(single).view(np.uint32)))).view(np.float32)
