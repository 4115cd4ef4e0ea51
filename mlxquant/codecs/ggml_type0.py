"""ggml's encoders of x = d * q, byte for byte those of llama.cpp: Q4_0, Q5_0, Q8_0, Q3_K, Q6_K.

The laws are those of ggml/src/ggml-quants.c built for plain x86-64: float32 throughout, every sum in its order, no
fused multiplication. What is ours is the order of the work. A search tries 19 scales on a group of 16 or 32 weights,
and a sum in a promised order cannot be split; so LANES groups stand side by side, one a lane, and the innermost loop
runs over lanes, where LLVM vectorizes it.

It does so only where it can tell that arrays do not overlap. So what belongs to a tile of LANES groups stands in two
flat arrays at constant distances: `tile`, weights turned round (weight of the group, lane), and `lanes`, one number a
group. Short loops over a group say `.size` instead of 16 or 32: of a constant LLVM makes scalar code.

Where the C code is undefined or garbage, x86 decides: NaN becomes the negative one of F16, a float that no int8 holds
becomes 0, and _nearest has the bits of the C trick.

These loops call one another and nothing else that changes: numba's cache notices an edit only in the file of the
function that it compiled.
"""

# mypy: disallow-untyped-defs=False
# Types are numba's to find; the tests hold every kernel against ggml itself, byte for byte.
from __future__ import annotations

import numpy as np

from mlxquant.codecs.kernels import half_to_single, jit, single_to_half

LANES = 64
# Sections of `tile`: weights, their importance, the product of both, codes (as floats).
_SECTION = 32 * LANES
X, W, WX, Q = range(0, 4 * _SECTION, _SECTION)
# Sections of `lanes`. TOP: the first weight of the greatest magnitude. FIT_X, FIT_Q: sums of w*x*q and w*q*q.
# INVERSE: what the codes come from, nearest(INVERSE * x) + MIDDLE.
TOP, TRIED, FIT_X, FIT_Q, BEST, SCALE, INVERSE, MIDDLE = range(0, 8 * LANES, LANES)

_FEW = 8  # rows whose squares are summed side by side
_SUPER, _GROUP = 256, 16  # weights of a K-quant's super-block, and of its groups with a scale each
_ROUNDS = 5
_EPS = np.float32(1e-15)  # GROUP_MAX_EPS: a group whose largest weight is less counts as zero
_ZERO, _ONE, _INF = np.float32(0), np.float32(1), np.float32(np.inf)
# Added to a float below 2**22 this leaves the nearest integer, ties to even, in the lowest bits.
_MAGIC = np.float32(12582912.0)
# roundf, half away from zero, is truncation after adding this: the next float below 0.5, because 0.5 itself would
# round 0.49999997 up. From an exact half the sum is a tie that goes to the integer.
_HALF = np.float32(0.49999997)
# make_qx_quants tries -(n + 0.1 * step) / top: the plain scale first, the others against it.
_STEPS = np.array([0, *range(-9, 0), *range(1, 10)], np.float32)

# Masks and shifts of eight codes in a word of 64 bits.
_1S, _3S, _15S = np.uint64(0x0101010101010101), np.uint64(0x0303030303030303), np.uint64(0x0F0F0F0F0F0F0F0F)
_S2, _S4, _S16 = np.uint64(2), np.uint64(4), np.uint64(16)
# Times this, eight bytes of one bit become a byte at the top.
_GATHER, _S56 = np.uint64(0x0102040810204080), np.uint64(56)


@jit
def _bits(single):
    return np.float32(single).view(np.int32)


@jit
def _nearest(single):
    """nearest_int of ggml-quants.c without its assertion: beyond 2**22 the bits are garbage, and NaN gives 0."""
    return np.int32(np.int32(_bits(single + _MAGIC) & np.int32(0x7FFFFF)) - np.int32(0x400000))


@jit
def _clamp(value, low, high):
    value = value if value > low else low
    return value if value < high else high


@jit
def _half(single):
    """GGML_FP32_TO_FP16, as bits. The NaN that 0 / 0 makes is negative on x86 and positive on ARM."""
    bits = np.uint16(single_to_half(np.float32(single).view(np.uint32)))
    return bits if single == single else np.uint16(0xFE00)


@jit
def _single(half):
    return np.uint32(half_to_single(np.uint32(half))).view(np.float32)


# --- tiles: LANES groups side by side -------------------------------------------------------------------------------


@jit
def _turn(values, n, section):
    """Groups of n weights, one after the other -> n * LANES, turned round. Lanes without a group are 0."""
    groups = values.size // n
    for lane in range(groups):
        group = values[lane * n : (lane + 1) * n]
        for i in range(n):
            section[i * LANES + lane] = group[i]
    for i in range(n):
        for lane in range(groups, LANES):
            section[i * LANES + lane] = _ZERO


@jit
def _weigh_by_squares(n, tile):
    for i in range(n * LANES):
        tile[W + i] = tile[X + i] * tile[X + i]


@jit
def _prepare(n, tile, lanes):
    """Products of weight and importance, and tops."""
    for i in range(n * LANES):
        tile[WX + i] = tile[W + i] * tile[X + i]
    for lane in range(LANES):
        lanes[TOP + lane] = _ZERO
    for i in range(n):
        row = tile[i * LANES :]
        for lane in range(LANES):
            value, top = row[lane], lanes[TOP + lane]
            lanes[TOP + lane] = value if abs(value) > abs(top) else top


@jit
def _fit(n, tile, low, high, lanes):
    """Sums of w*x*q and w*q*q for q = the integer nearest to TRIED * x, n weights a lane.

    |TRIED * x| is at most high + 2, so that the integer can stay a float. Eight weights at a time: LLVM unrolls
    them, and the sums stay in registers meanwhile.
    """
    for lane in range(LANES):
        lanes[FIT_X + lane] = _ZERO
        lanes[FIT_Q + lane] = _ZERO
    for first in range(0, n, 8):
        eight = tile[first * LANES :]
        for lane in range(LANES):
            scale, fit_x, fit_q = lanes[TRIED + lane], lanes[FIT_X + lane], lanes[FIT_Q + lane]
            for i in range(8):
                at = i * LANES + lane
                q = (_clamp(scale * eight[X + at], low, high) + _MAGIC) - _MAGIC
                fit_x += eight[WX + at] * q
                fit_q += eight[W + at] * q * q
            lanes[FIT_X + lane] = fit_x
            lanes[FIT_Q + lane] = fit_q


@jit
def _keep_first(lanes):
    for lane in range(LANES):
        fit_x, fit_q = lanes[FIT_X + lane], lanes[FIT_Q + lane]
        scale = fit_x / fit_q if fit_q != _ZERO else _ZERO
        lanes[SCALE + lane] = scale
        lanes[BEST + lane] = scale * fit_x
        lanes[INVERSE + lane] = lanes[TRIED + lane]


@jit
def _keep_better(lanes):
    for lane in range(LANES):
        fit_x, fit_q, best = lanes[FIT_X + lane], lanes[FIT_Q + lane], lanes[BEST + lane]
        better = (fit_q > _ZERO) & (fit_x * fit_x > best * fit_q)
        scale = fit_x / fit_q
        lanes[SCALE + lane] = scale if better else lanes[SCALE + lane]
        lanes[BEST + lane] = scale * fit_x if better else best
        lanes[INVERSE + lane] = lanes[TRIED + lane] if better else lanes[INVERSE + lane]


@jit
def _search(n, tile, most, lanes):
    """make_qx_quants, rmse_type 1, of groups of n weights and codes -most..most - 1 -> SCALE, INVERSE, MIDDLE.

    A group that counts as zero has three zeros, so that all its codes are 0, as in C.
    """
    for step in _STEPS:
        share = -(most + np.float32(0.1) * step)
        for lane in range(LANES):
            lanes[TRIED + lane] = share / lanes[TOP + lane]
        _fit(n, tile, -most, most - _ONE, lanes)
        if step == _ZERO:
            _keep_first(lanes)
        else:
            _keep_better(lanes)
    for lane in range(LANES):
        empty = abs(lanes[TOP + lane]) < _EPS
        lanes[SCALE + lane] = _ZERO if empty else lanes[SCALE + lane]
        lanes[INVERSE + lane] = _ZERO if empty else lanes[INVERSE + lane]
        lanes[MIDDLE + lane] = _ZERO if empty else most


@jit
def _found_codes(x, n, lanes, most, codes):
    """The codes that a search found, of groups of n weights."""
    low, high = -most, most - _ONE
    for g in range(x.size // n):
        values, into = x[g * n : (g + 1) * n], codes[g * n : (g + 1) * n]
        inverse, middle = lanes[INVERSE + g], np.int32(lanes[MIDDLE + g])
        for i in range(values.size):
            q = _clamp(values[i] * inverse, low, high) + _MAGIC
            into[i] = np.uint8(np.int32(_bits(q) + middle) & np.int32(0xFF))


# --- importance -------------------------------------------------------------------------------------------------------


@jit
def _mean_squares(x_N, importance_I, span, factor):
    """factor * the mean square (sigma2) of each `span` weights; without importance nobody asks, and it is empty."""
    sums = np.zeros(x_N.size // span if importance_I.size else 0, np.float32)
    for first in range(0, sums.size, _FEW):
        # Side by side, because in one sum each addition waits for the one before.
        few = sums[first : first + _FEW]
        rows = x_N[first * span : (first + _FEW) * span]
        for i in range(span):
            for r in range(few.size):
                few[r] += rows[r * span + i] * rows[r * span + i]
    for i in range(sums.size):
        sums[i] = factor * sums[i] / np.float32(span)
    return sums


@jit
def _weigh(x, start, importance_I, sigma2, span, n, weights):
    """importance * sqrt(sigma2 + x**2) of weights start.. of the flat rows; sigma2: one for each `span` weights."""
    for at in range(0, x.size, n):
        column = (start + at) % importance_I.size
        known, values, into = importance_I[column : column + n], x[at : at + n], weights[at : at + n]
        spread = sigma2[(start + at) // span]
        for i in range(values.size):
            into[i] = known[i] * np.sqrt(spread + values[i] * values[i])


# --- blocks of 32 -----------------------------------------------------------------------------------------------------


@jit
def _halve(values, out):
    """Of each pair the weight of the greater magnitude, the first if they are equal."""
    for i in range(out.size):
        a, b = values[2 * i], values[2 * i + 1]
        out[i] = a if abs(a) >= abs(b) else b


@jit
def _tops(x, spare, tops):
    """Of each 32 weights the first of the greatest magnitude; +0 where all are zero."""
    _halve(x, spare[: x.size // 2])
    count, at = x.size // 2, 0
    while count > tops.size:
        _halve(spare[at : at + count], spare[at + count : at + count + count // 2])
        at, count = at + count, count // 2
    for b in range(tops.size):
        tops[b] = spare[at + b] + _ZERO


@jit
def _plain_codes(x, d, most, codes):
    """Codes without a search: quantize_row_q4_0_ref, quantize_row_q5_0_ref."""
    last = np.int32(np.int32(most) * np.int32(2) - np.int32(1))
    for b in range(d.size):
        inverse = _ONE / d[b] if d[b] != _ZERO else _ZERO
        # 1 / a denormal can be infinite; the products are then beyond int8, and x86 makes them 0.
        finite = abs(inverse) < _INF
        shift = most + np.float32(0.5) if finite else _ZERO
        inverse = inverse if finite else _ZERO
        values, into = x[b * 32 : (b + 1) * 32], codes[b * 32 : (b + 1) * 32]
        for i in range(values.size):
            q = np.int32(values[i] * inverse + shift)
            into[i] = np.uint8(q if q < last else last)


@jit
def _blocks_32(x, start, importance_I, sigma2, width, most, tile, lanes, codes):
    """d, in lanes[SCALE:], and codes of up to LANES blocks of 32 that begin at weight `start`."""
    d = lanes[SCALE : SCALE + x.size // 32]
    if importance_I.size == 0:
        _tops(x, tile, d)
        for b in range(d.size):
            d[b] = d[b] / -most
        _plain_codes(x, d, most, codes)
        return
    weights = tile[Q : Q + x.size]
    _weigh(x, start, importance_I, sigma2, width, 32, weights)
    _turn(x, 32, tile[X:])
    _turn(weights, 32, tile[W:])
    _prepare(32, tile, lanes)
    _search(32, tile, most, lanes)
    _found_codes(x, 32, lanes, most, codes)


@jit
def _nibbles(words, out):
    """32 codes in 4 words -> their lower 4 bits, codes 0..15 below codes 16..31."""
    for half in range(2):
        word = (words[half] & _15S) | ((words[2 + half] & _15S) << _S4)
        for i in range(4):
            out[4 * half + i] = np.uint16((word >> (_S16 * np.uint64(i))) & np.uint64(0xFFFF))


@jit
def encode_q4_0(x_N, importance_I, width, out):
    """quantize_row_q4_0_ref, and with importance quantize_row_q4_0_impl. Block: d, 16 bytes of codes."""
    tile, lanes = np.empty(4 * _SECTION, np.float32), np.empty(8 * LANES, np.float32)
    codes, most = np.empty(_SECTION, np.uint8), np.float32(8)
    words, blocks = codes.view(np.uint64), out.view(np.uint16)
    sigma2 = _mean_squares(x_N, importance_I, width, _ONE)
    for start in range(0, x_N.size, _SECTION):
        x = x_N[start : start + _SECTION]
        _blocks_32(x, start, importance_I, sigma2, width, most, tile, lanes, codes)
        for b in range(x.size // 32):
            block = blocks[(start // 32 + b) * 9 : (start // 32 + b + 1) * 9]
            block[0] = _half(lanes[SCALE + b])
            _nibbles(words[4 * b : 4 * b + 4], block[1:])


@jit
def encode_q5_0(x_N, importance_I, width, out):
    """quantize_row_q5_0_ref, and with importance quantize_row_q5_0_impl. Block: d, fifth bits, 16 bytes of codes."""
    tile, lanes = np.empty(4 * _SECTION, np.float32), np.empty(8 * LANES, np.float32)
    codes, most = np.empty(_SECTION, np.uint8), np.float32(16)
    words, blocks = codes.view(np.uint64), out.view(np.uint16)
    sigma2 = _mean_squares(x_N, importance_I, width, _ONE)
    for start in range(0, x_N.size, _SECTION):
        x = x_N[start : start + _SECTION]
        _blocks_32(x, start, importance_I, sigma2, width, most, tile, lanes, codes)
        for b in range(x.size // 32):
            block, four = blocks[(start // 32 + b) * 11 : (start // 32 + b + 1) * 11], words[4 * b : 4 * b + 4]
            block[0] = _half(lanes[SCALE + b])
            block[1] = np.uint16(_fifths(four[0]) | _fifths(four[1]) << np.uint64(8))
            block[2] = np.uint16(_fifths(four[2]) | _fifths(four[3]) << np.uint64(8))
            _nibbles(four, block[3:])


@jit
def _fifths(word):
    return np.uint64(((word >> _S4) & _1S) * _GATHER) >> _S56


@jit
def encode_q8_0(x_N, importance_I, width, out):
    """quantize_row_q8_0_ref; importance changes nothing, as in llama.cpp. Block: d, 32 int8."""
    spare, codes = np.empty(_SECTION, np.float32), np.empty(_SECTION, np.uint8)
    tops, halves = np.empty(LANES, np.float32), np.empty(LANES, np.uint16)
    words, blocks = codes.view(np.uint64), out.view(np.uint16)
    for start in range(0, x_N.size, _SECTION):
        x = x_N[start : start + _SECTION]
        inverse, half = tops[: x.size // 32], halves[: x.size // 32]
        _tops(x, spare, inverse)
        for b in range(inverse.size):
            d = abs(inverse[b]) / np.float32(127)
            half[b] = _half(d)
            # Of a denormal it can be infinite; the products are then beyond int8, and x86 makes them 0.
            reciprocal = _ONE / d
            inverse[b] = reciprocal if reciprocal < _INF else _ZERO
        _rounded_codes(x, inverse, codes)
        for b in range(half.size):
            block = blocks[(start // 32 + b) * 17 : (start // 32 + b + 1) * 17]
            block[0] = half[b]
            for i in range(16):
                word = words[4 * b + i // 4] >> (_S16 * np.uint64(i % 4))
                block[1 + i] = np.uint16(word & np.uint64(0xFFFF))


@jit
def _rounded_codes(x, inverse, codes):
    for b in range(inverse.size):
        values, into, scale = x[b * 32 : (b + 1) * 32], codes[b * 32 : (b + 1) * 32], inverse[b]
        for i in range(values.size):
            q = values[i] * scale
            into[i] = np.uint8(np.int32(q + (_HALF if q >= _ZERO else -_HALF)) & np.int32(0xFF))


# --- super-blocks of 256 ----------------------------------------------------------------------------------------------


@jit
def _requantize(x, d, most, spread, codes):
    """Codes of a super-block for the 16 d that are stored; where d is 0, those of the search stay."""
    for j in range(16):
        for i in range(_GROUP):
            spread[j * _GROUP + i] = d[j]
    low, high = np.int32(-most), np.int32(most - 1)
    for i in range(x.size):
        code = np.int32(_clamp(_nearest(x[i] / spread[i]), low, high) - low)
        codes[i] = np.uint8(code & np.int32(0xFF)) if spread[i] != _ZERO else codes[i]


@jit
def _first_of_greatest(scales):
    """The first scale of the greatest magnitude; NaN is none."""
    found = _ZERO
    for value in scales:
        found = value if abs(value) > abs(found) else found
    return found


@jit
def _copy(values, out):
    for i in range(out.size):
        out[i] = values[i]


@jit
def encode_q6_k(x_N, importance_I, width, out):
    """quantize_row_q6_K_ref, and with importance quantize_row_q6_K_impl, which takes it as it is."""
    tile, lanes = np.empty(4 * _SECTION, np.float32), np.empty(8 * LANES, np.float32)
    codes, most, size = np.empty(LANES * _GROUP, np.uint8), np.float32(32), LANES * _GROUP
    block = np.empty(27, np.uint64)
    for start in range(0, x_N.size, size):
        x = x_N[start : start + size]
        _turn(x, _GROUP, tile[X:])
        if importance_I.size:
            for at in range(0, x.size, _SUPER):
                column = (start + at) % width
                _copy(importance_I[column : column + _SUPER], tile[Q + at : Q + at + _SUPER])
            _turn(tile[Q : Q + x.size], _GROUP, tile[W:])
        else:
            _weigh_by_squares(_GROUP, tile)
        _prepare(_GROUP, tile, lanes)
        _search(_GROUP, tile, most, lanes)
        _found_codes(x, _GROUP, lanes, most, codes)
        for at in range(0, x.size, _SUPER):
            scales = lanes[SCALE + at // _GROUP : SCALE + at // _GROUP + 16]
            _finish_q6_k(x[at : at + _SUPER], scales, tile[Q : Q + _SUPER], codes[at : at + _SUPER], block)
            first = (start + at) // _SUPER * 210
            _copy(block.view(np.uint8), out[first : first + 210])


@jit
def _finish_q6_k(x, scales, spread, codes, block):
    """The scales of 16 groups as int8, and the codes again for those. Block: ql 128, qh 64, scales 16, d.

    Overwrites scales, spread and codes.
    """
    greatest = _first_of_greatest(scales)
    if abs(greatest) < _EPS:
        block.fill(np.uint64(0))
        return
    inverse = np.float32(-128) / greatest
    half = _half(_ONE / inverse)
    d = _single(half)
    stored = block.view(np.int8)[192:208]
    for j in range(16):
        level = _nearest(inverse * scales[j])
        stored[j] = np.int8((level if level < np.int32(127) else np.int32(127)) & np.int32(0xFF))
        scales[j] = d * np.float32(stored[j])
    _requantize(x, scales, 32, spread, codes)
    block.view(np.uint16)[104] = half
    words = codes.view(np.uint64)
    for side in range(2):
        q, low, high = words[16 * side : 16 * side + 16], block[8 * side : 8 * side + 8], block[16 + 4 * side :]
        for i in range(4):
            q1, q2, q3, q4 = q[i], q[4 + i], q[8 + i], q[12 + i]
            low[i] = (q1 & _15S) | ((q3 & _15S) << _S4)
            low[4 + i] = (q2 & _15S) | ((q4 & _15S) << _S4)
            pairs = ((q1 >> _S4) & _3S) | (((q2 >> _S4) & _3S) << _S2)
            high[i] = pairs | ((((q3 >> _S4) & _3S) | (((q4 >> _S4) & _3S) << _S2)) << _S4)


@jit
def _descend(tile, lanes):
    """make_q3_quants: from the plain codes on, each weight in turn takes the code that fits best with the others.

    Five rounds, or until no lane changes: a round without a change would only repeat itself.
    """
    low, high = np.float32(-4), np.float32(3)
    for lane in range(LANES):
        lanes[TRIED + lane] = low / lanes[TOP + lane]
        lanes[FIT_X + lane] = _ZERO
        lanes[FIT_Q + lane] = _ZERO
    for i in range(_GROUP):
        row = tile[i * LANES :]
        for lane in range(LANES):
            q = (_clamp(lanes[TRIED + lane] * row[X + lane], low, high) + _MAGIC) - _MAGIC
            row[Q + lane] = q
            lanes[FIT_X + lane] += row[WX + lane] * q
            lanes[FIT_Q + lane] += row[W + lane] * q * q
    for _ in range(_ROUNDS):
        changed = np.int32(0)
        for i in range(_GROUP):
            changed |= _improve(tile[i * LANES :], lanes)
        if changed == np.int32(0):
            break
    for lane in range(LANES):
        some = (abs(lanes[TOP + lane]) >= _EPS) & (lanes[FIT_Q + lane] > _ZERO)
        lanes[SCALE + lane] = lanes[FIT_X + lane] / lanes[FIT_Q + lane] if some else _ZERO


@jit
def _improve(row, lanes):
    changed = np.int32(0)
    for lane in range(LANES):
        x, w, wx, q = row[X + lane], row[W + lane], row[WX + lane], row[Q + lane]
        fit_x, fit_q = lanes[FIT_X + lane], lanes[FIT_Q + lane]
        rest_x, rest_q = fit_x - wx * q, fit_q - w * q * q
        other = np.float32(_clamp(_nearest(x * rest_q / rest_x), np.int32(-4), np.int32(3)))
        new_x, new_q = rest_x + wx * other, rest_q + w * other * other
        better = (rest_x > _ZERO) & (other != q) & (new_q > _ZERO)
        better &= new_x * new_x * fit_q > fit_x * fit_x * new_q
        row[Q + lane] = other if better else q
        lanes[FIT_X + lane] = new_x if better else fit_x
        lanes[FIT_Q + lane] = new_q if better else fit_q
        changed |= np.int32(better)
    return changed


@jit
def _turn_codes_back(groups, tile, lanes, codes):
    for g in range(groups):
        empty = abs(lanes[TOP + g]) < _EPS
        for i in range(_GROUP):
            q = np.uint8(np.int32(_bits(tile[Q + i * LANES + g] + _MAGIC) + np.int32(4)) & np.int32(7))
            codes[g * _GROUP + i] = np.uint8(0) if empty else q


@jit
def _q3_plain(x, tile, lanes, scale, codes):
    """Scales and codes of up to LANES groups, as quantize_row_q3_K_ref finds them."""
    _turn(x, _GROUP, tile[X:])
    _weigh_by_squares(_GROUP, tile)
    _prepare(_GROUP, tile, lanes)
    _descend(tile, lanes)
    _turn_codes_back(scale.size, tile, lanes, codes)
    _copy(lanes[SCALE:], scale)


@jit
def _q3_weighted(x, start, importance_I, sigma2, tile, lanes, scale, mass, codes):
    """Scales, their importance and codes of up to LANES groups, as quantize_row_q3_K_impl finds them."""
    most, weights = np.float32(4), tile[Q : Q + x.size]
    _weigh(x, start, importance_I, sigma2, _SUPER, _SUPER, weights)
    _turn(x, _GROUP, tile[X:])
    _turn(weights, _GROUP, tile[W:])
    _prepare(_GROUP, tile, lanes)
    _search(_GROUP, tile, most, lanes)
    _found_codes(x, _GROUP, lanes, most, codes)
    _copy(lanes[SCALE:], scale)
    mass.fill(_ZERO)
    for i in range(_GROUP):
        row = tile[W + i * LANES :]
        for g in range(mass.size):
            mass[g] += row[g]


@jit
def _q3_levels_plain(scale, d, levels):
    """Scales in 6 bits, 0..63; that of the greatest magnitude is -32 of its d, level 0."""
    for b in range(d.size):
        scales = scale[b * 16 : (b + 1) * 16]
        greatest = _first_of_greatest(scales)
        inverse = np.float32(-32) / greatest
        d[b] = _ONE / inverse if greatest != _ZERO else _ZERO
        for j in range(16):
            # An int8 in C: of the garbage that infinity leaves, the lowest byte counts.
            level = np.int32(np.int8(_nearest(inverse * scales[j]) & np.int32(0xFF)))
            level = np.int32(_clamp(level, np.int32(-32), np.int32(31)) + np.int32(32))
            levels[b * 16 + j] = np.uint8(level if greatest != _ZERO else np.int32(0))


@jit
def _q3_levels_weighted(scale, mass, tile, lanes, d, levels):
    """The search again, over the 16 scales of up to LANES super-blocks, to 6 bits."""
    most = np.float32(32)
    _turn(scale, _GROUP, tile[X:])
    _turn(mass, _GROUP, tile[W:])
    _prepare(_GROUP, tile, lanes)
    # Scales of huge weights can be infinite or NaN; nearest_int has 0 for either, as it has for 0.
    for i in range(_GROUP * LANES):
        tile[X + i] = tile[X + i] if abs(tile[X + i]) < _INF else _ZERO
    for i in range(scale.size):
        scale[i] = scale[i] if abs(scale[i]) < _INF else _ZERO
    _search(_GROUP, tile, most, lanes)
    _found_codes(scale, _GROUP, lanes, most, levels)
    _copy(lanes[SCALE:], d)


@jit
def encode_q3_k(x_N, importance_I, width, out):
    """quantize_row_q3_K_ref, and with importance quantize_row_q3_K_impl."""
    size, batch = LANES * _GROUP, LANES * _SUPER
    tile, lanes = np.empty(4 * _SECTION, np.float32), np.empty(8 * LANES, np.float32)
    scales, masses, ds = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(LANES, np.float32)
    levels, codes, block = np.empty(size, np.uint8), np.empty(batch, np.uint8), np.empty(14, np.uint64)
    sigma2 = _mean_squares(x_N, importance_I, _SUPER, np.float32(2))
    for start in range(0, x_N.size, batch):
        x = x_N[start : start + batch]
        scale, mass, d = scales[: x.size // _GROUP], masses[: x.size // _GROUP], ds[: x.size // _SUPER]
        for at in range(0, x.size, size):
            part, g = x[at : at + size], at // _GROUP
            if importance_I.size:
                into, with_mass = scale[g : g + LANES], mass[g : g + LANES]
                _q3_weighted(part, start + at, importance_I, sigma2, tile, lanes, into, with_mass, codes[at:])
            else:
                _q3_plain(part, tile, lanes, scale[g : g + LANES], codes[at:])
        if importance_I.size:
            _q3_levels_weighted(scale, mass, tile, lanes, d, levels)
        else:
            _q3_levels_plain(scale, d, levels)
        for b in range(d.size):
            first, at, level = (start // _SUPER + b) * 110, b * _SUPER, levels[b * 16 : b * 16 + 16]
            _finish_q3_k(x[at : at + _SUPER], d[b], level, tile, codes[at : at + _SUPER], block)
            _copy(block.view(np.uint8), out[first : first + 110])


@jit
def _finish_q3_k(x, d, levels, tile, codes, block):
    """The codes again for the d and the levels that are stored. Block: hmask 32, qs 64, scales 12, d."""
    half = _half(d)
    block.view(np.uint16)[54] = half
    shares, spread = tile[X : X + 16], tile[Q : Q + _SUPER]
    for j in range(16):
        shares[j] = _single(half) * np.float32(np.int32(levels[j]) - np.int32(32))
    _requantize(x, shares, 4, spread, codes)
    words = codes.view(np.uint64)
    for i in range(4):
        high = np.uint64(0)
        for k in range(8):
            high |= ((words[4 * k + i] >> _S2) & _1S) << np.uint64(k)
        block[i] = high
    for side in range(2):
        for i in range(4):
            low = np.uint64(0)
            for k in range(4):
                low |= (words[16 * side + 4 * k + i] & _3S) << np.uint64(2 * k)
            block[4 + 4 * side + i] = low
    _pack_levels(levels, block.view(np.uint8)[96:108])


@jit
def _pack_levels(levels, out):
    """16 levels of 6 bits: the lower 4, level j beside level j + 8, then the upper 2, levels j, j + 4, j + 8, j + 12."""
    for j in range(8):
        out[j] = np.uint8((np.int32(levels[j]) & 15) | ((np.int32(levels[j + 8]) & 15) << 4))
    for j in range(4):
        high = np.int32(0)
        for k in range(4):
            high |= np.int32(np.int32(levels[4 * k + j]) >> 4) << np.int32(2 * k)
        out[8 + j] = np.uint8(high)


ENCODERS = {
    "Q4_0": encode_q4_0,
    "Q5_0": encode_q5_0,
    "Q8_0": encode_q8_0,
    "Q3_K": encode_q3_k,
    "Q6_K": encode_q6_k,
}
