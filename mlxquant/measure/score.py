"""How far a student's next-token distribution is from its teacher's, position by position, over the whole vocabulary.

Everything is summed in float64 from float32 logits as they come out of the head; nothing is cut off and nothing stands
for a tail. With the logits shifted by their greatest (x for the teacher, y for the student),

    KL(p || q) = sum p (log p - log q) = sum e^x (x - y) / sum e^x - log sum e^x + log sum e^y

which is exactly 0 for equal rows and is right to about 1e-15 nats times the logits' range.

Kernels stand in one file, for numba's cache notices no edit in another (codecs/kernels.py). They are written so that
LLVM vectorizes them: sums are kept in `_LANES` places, the i-th for tokens i, i + _LANES, ..., and put together at the
end of a row, so that their order is the same on every machine and for any number of threads.
"""

# mypy: disallow-untyped-defs=False
# Types are numba's to find; the tests hold the kernels against sums in longdouble and exp in 40 digits.
from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlxquant.codecs.blocks import each_block
from mlxquant.codecs.kernels import jit

Array = np.ndarray[Any, Any]

# Of one position. kl: KL(p || q), nats. nll_*: negative log probability of the text's next token under teacher p and
# student q. best_*: their most probable token. shared5: how many of p's five best are among q's five best.
POSITION = np.dtype(
    [
        ("kl", np.float64),
        ("nll_p", np.float64),
        ("nll_q", np.float64),
        ("best_p", np.int32),
        ("best_q", np.int32),
        ("shared5", np.uint8),
    ]
)

_BEST = 5
_LANES = 256  # three of them in float64 and the logits beside them stay in a first-level cache
# Below the best token's probability times e**-708, the least that is normal in float64, a probability counts as 0.
_LEAST = -708.0
_LOG2_E = 1.4426950408889634
# ln 2 in two parts, the first with zeros enough at its end that k times it is exact (fdlibm, e_exp.c).
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_ROUND = 1.5 * 2.0**52  # adding it rounds to an integer, which then stands in the lowest bits
# (e**r - 1 - r) / r**2 for |r| <= ln(2) / 2: the polynomial through it at ten Chebyshev nodes, worked out in 60 digits
# (tests/measure/test_score.py does it again). It is off by 1.6e-17 of e**r at most.
_C0, _C1, _C2, _C3, _C4 = (
    0.5000000000000001,
    0.16666666666666669,
    0.041666666666624164,
    0.008333333333330065,
    0.0013888888917196719,
)
_C5, _C6, _C7, _C8, _C9 = (
    0.00019841269863040545,
    2.4801521322368692e-05,
    2.7557268480310024e-06,
    2.7620075879983367e-07,
    2.5100375832561234e-08,
)
_MANTISSA = np.int64(52)


def score(p_PV: Array, q_PV: Array, next_P: Array) -> Array:
    """(P,) POSITION from the float32 logits of teacher p and student q (P, V), not normalised, and the text's next
    tokens (P,), integers below V. On all cores; the same bits for any number of them.

    Of tokens that are equally good the lowest id is the better one. A logit of -inf is probability 0: it adds nothing
    to kl as the teacher's, and makes it inf where only the student's. NaN, +inf, or a row of nothing but -inf make kl
    NaN. With fewer than five tokens, shared5 is V.

    Raises ValueError for arrays that do not fit one another.
    """
    _check(p_PV, q_PV, next_P)
    positions, vocabulary = p_PV.shape
    out_P = np.empty(positions, POSITION)
    p, q = _only_read(p_PV, np.float32), _only_read(q_PV, np.float32)
    following = _only_read(next_P, np.int64)
    kl, nll_p, nll_q = np.empty((3, positions))
    best = np.empty((positions, 3), np.int32)

    def work(start: int, stop: int) -> int:
        _rows(p, q, following, kl, nll_p, nll_q, best, start // vocabulary, stop // vocabulary)
        return -1

    each_block(work, p_PV.size, max(1, vocabulary))
    out_P["kl"], out_P["nll_p"], out_P["nll_q"] = kl, nll_p, nll_q
    out_P["best_p"], out_P["best_q"], out_P["shared5"] = best.T
    return out_P


def _check(p_PV: Array, q_PV: Array, next_P: Array) -> None:
    if p_PV.dtype != np.float32 or q_PV.dtype != np.float32:
        raise ValueError(f"logits are {p_PV.dtype} and {q_PV.dtype}: expected float32")
    if p_PV.ndim != 2 or p_PV.shape != q_PV.shape or next_P.shape != p_PV.shape[:1]:
        raise ValueError(f"logits {p_PV.shape} and {q_PV.shape}, next {next_P.shape}: expected (P, V) twice, (P,)")
    if next_P.size and not 0 <= next_P.min() <= next_P.max() < p_PV.shape[1]:
        raise ValueError(f"next tokens {next_P.min()}..{next_P.max()}: expected 0..{p_PV.shape[1] - 1}")


def _only_read(array: Array, dtype: type[np.generic]) -> Array:
    """One sort of array, contiguous, aligned and read-only: numba compiles each sort apart."""
    view = np.require(array, dtype, ["C", "A"]).view()
    view.flags.writeable = False
    return view


@jit
def exp(x):
    """e**x for x <= 0, off by less than 2e-16 of it; 0 below -708.

    x = k ln 2 + r, and k is added to the exponent of e**r. NaN stays, for one that was a float32 has zeros where k is
    read.
    """
    low = _LEAST if x < _LEAST else x
    shifted = low * _LOG2_E + _ROUND
    k = shifted - _ROUND
    r = (low - k * _LN2_HIGH) - k * _LN2_LOW
    tail = _C5 + r * (_C6 + r * (_C7 + r * (_C8 + r * _C9)))
    tail = _C0 + r * (_C1 + r * (_C2 + r * (_C3 + r * (_C4 + r * tail))))
    bits = np.float64(1.0 + (r + r * r * tail)).view(np.int64) + (np.float64(shifted).view(np.int64) << _MANTISSA)
    return 0.0 if x < _LEAST else np.int64(bits).view(np.float64)


@jit
def _rows(p, q, following, kl, nll_p, nll_q, best, first, stop):
    """Positions first..stop. best[i]: p's best token, q's, and how many of five they share."""
    tops = np.empty(-(-p.shape[1] // _LANES), np.float32)
    sums = np.empty((3, _LANES))
    ids_p, ids_q = np.empty(_BEST, np.int32), np.empty(_BEST, np.int32)
    for i in range(first, stop):
        count = _five_best(p[i], tops, ids_p)
        _five_best(q[i], tops, ids_q)
        p_most, q_most = np.float64(p[i, ids_p[0]]), np.float64(q[i, ids_q[0]])
        p_sum, q_sum, gap = _sums(p[i], q[i], p_most, q_most, sums)
        p_log, q_log = math.log(p_sum), math.log(q_sum)
        divergence = gap / p_sum - p_log + q_log
        kl[i] = 0.0 if divergence < 0.0 else divergence  # rounding; NaN is not below 0
        nll_p[i] = p_log - (p[i, following[i]] - p_most)
        nll_q[i] = q_log - (q[i, following[i]] - q_most)
        best[i, 0], best[i, 1], best[i, 2] = ids_p[0], ids_q[0], _shared(ids_p[:count], ids_q[:count])


@jit
def _sums(p, q, p_most, q_most, sums):
    """sum e**x, sum e**y and sum e**x (x - y) of one row, x = p - p_most, y = q - q_most."""
    sums.fill(0.0)
    for start in range(0, p.size, _LANES):
        _add(p[start : start + _LANES], q[start : start + _LANES], p_most, q_most, sums[0], sums[1], sums[2])
    p_sum, q_sum, gap = 0.0, 0.0, 0.0
    for lane in range(_LANES):
        p_sum += sums[0, lane]
        q_sum += sums[1, lane]
        gap += sums[2, lane]
    return p_sum, q_sum, gap


@jit
def _add(p, q, p_most, q_most, p_sum, q_sum, gap):
    for i in range(p.size):
        x, y = p[i] - p_most, q[i] - q_most
        weight = exp(x)
        p_sum[i] += weight
        q_sum[i] += exp(y)
        # Without weight there may be -inf less -inf, or infinity.
        gap[i] += 0.0 if weight == 0.0 else weight * (x - y)


@jit
def _five_best(row, tops, ids):
    """Fills `ids` with the best five tokens, best first, and says how many there are.

    Blocks whose greatest logit is no better than the fifth so far are passed over: all but a few.
    """
    for block in range(tops.size):
        tops[block] = _greatest(row[block * _LANES : (block + 1) * _LANES].view(np.int32))
    found = 0
    for block in range(tops.size):
        if block > 0 and not tops[block] > row[ids[_BEST - 1]]:  # the first block has filled all five
            continue
        for token in range(block * _LANES, min((block + 1) * _LANES, row.size)):
            if found < _BEST:
                found += 1
            elif not row[token] > row[ids[_BEST - 1]]:
                continue
            at = found - 1
            while at > 0 and row[token] > row[ids[at - 1]]:
                ids[at] = ids[at - 1]
                at -= 1
            ids[at] = token
    return found


@jit
def _greatest(bits):
    """The greatest float32 of a block that is given as int32 bits.

    Bits with the magnitude of negative numbers inverted are ordered as the numbers are, and integers have a maximum
    that vectorizes.
    """
    most = np.int32(-0x80000000)
    for i in range(bits.size):
        key = np.int32(bits[i] ^ np.int32(np.int32(bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        most = key if key > most else most
    return np.int32(most ^ np.int32(np.int32(most >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@jit
def _shared(a, b):
    count = 0
    for token in a:
        for other in b:
            count += token == other
    return count
