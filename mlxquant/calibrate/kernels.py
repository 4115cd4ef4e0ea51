"""The compiled loops of GPTQ and of refitting: whatever follows a choice before the next one can be made.

Tiles lie the other way round than weights do: x_IR is column i of row r, so that the innermost loop runs over rows,
which have nothing to do with one another, and LLVM vectorizes it. No fastmath, one thread: what takes the time is the
matrix products between these calls, and those are the BLAS's.

In a file of their own, each compiled by itself and called from Python: numba's cache notices an edit only in the file
of the function that it compiled.
"""

# mypy: disallow-untyped-defs=False
# Types are numba's to find; the tests hold the kernels against plain numpy in float64.
from __future__ import annotations

import numpy as np

from mlxquant.codecs.kernels import jit, round_bits

_ZERO, _ONE = np.float32(0), np.float32(1)


@jit
def _nearest(x, scale, bias, top):
    """The code of x, as a float: scale * code + bias is nearest to it. A scale of 0 has only one value: code 0."""
    code = np.rint((x - bias) / scale) if scale != _ZERO else _ZERO
    code = code if code > _ZERO else _ZERO
    return code if code < top else top


@jit
def product(a_BB, x_BR):
    """a @ x, of one group. So small that the BLAS's threads would wait for one another longer than this takes: many
    times as long where other processes want the cores."""
    columns, rows = x_BR.shape
    out_BR = np.zeros((columns, rows), np.float32)
    for i in range(columns):
        out = out_BR[i]
        for j in range(columns):
            share, x = a_BB[i, j], x_BR[j]
            for r in range(rows):
                out[r] += share * x[r]
    return out_BR


@jit
def round_columns(w_BR, target_BR, follow_BB, group_B, scale_GR, bias_GR, top, code_BR, error_BR):
    """The columns of a block in turn: code what each should be, and let the later ones make good what is left.

    target_BR: w_BR and what earlier blocks left to make good; changed in place. follow_BB[i, j], i < j: how much of
    the error of column i column j takes over. group_B: which row of scale_GR and bias_GR a column has. Writes code_BR
    (float32) and error_BR = w - value.
    """
    columns, rows = w_BR.shape
    for j in range(columns):
        w, target, code, error = w_BR[j], target_BR[j], code_BR[j], error_BR[j]
        scale, bias = scale_GR[group_B[j]], bias_GR[group_B[j]]
        for r in range(rows):
            code[r] = _nearest(target[r], scale[r], bias[r], top)
        for r in range(rows):
            error[r] = w[r] - np.float32(scale[r] * code[r] + bias[r])
        for k in range(j + 1, columns):
            share, later = follow_BB[j, k], target_BR[k]
            for r in range(rows):
                later[r] += share * error[r]


@jit
def refit_group(pull_BR, spread_BR, spread_B, kind, code_BR, scale_R, bias_R, change_BR):
    """The best scale and bias of one group for its codes, all other groups being as they are.

    pull = H error, of the group's columns; spread_BR = H code and spread_B = H 1 within the group. A change of scale
    and bias by s and b lowers the squared output error by 2 (s c.p + b 1.p) - (s^2 cHc + 2 s b cH1 + b^2 1H1): two
    equations. The scale is rounded to the dtype first, then the bias fitted to what it became, and rounded. Where that
    does not lower the error both stay. Writes the change of the values.
    """
    columns, rows = code_BR.shape
    cc, c1, cp, p1 = np.zeros((4, rows))
    for i in range(columns):
        code, pull, spread, one = code_BR[i], pull_BR[i], spread_BR[i], spread_B[i]
        for r in range(rows):
            cc[r] += code[r] * spread[r]
            c1[r] += code[r] * one
            cp[r] += code[r] * pull[r]
            p1[r] += pull[r]
    total = 0.0
    for i in range(columns):
        total += spread_B[i]
    was, became = np.empty(2, np.float32), np.empty(2, np.float32)
    change_BR[:] = _ZERO
    for r in range(rows):
        det = cc[r] * total - c1[r] * c1[r]
        was[0], was[1] = scale_R[r], bias_R[r]
        became[0] = was[0] + (cp[r] * total - p1[r] * c1[r]) / det if det > 1e-6 * cc[r] * total else was[0]
        became[0] = _rounded(became[0], kind)
        s = float(became[0]) - float(was[0])
        became[1] = _rounded(np.float32(was[1] + (p1[r] - s * c1[r]) / total) if total > 0 else was[1], kind)
        b = float(became[1]) - float(was[1])
        gain = 2 * (s * cp[r] + b * p1[r]) - (s * s * cc[r] + 2 * s * b * c1[r] + b * b * total)
        if gain > 0:  # false for NaN: of infinities, where a dtype ends
            scale_R[r], bias_R[r] = became
            for i in range(columns):
                code = code_BR[i, r]
                change_BR[i, r] = np.float32(became[0] * code + became[1]) - np.float32(was[0] * code + was[1])


@jit
def _rounded(x, kind):
    return np.uint32(round_bits(np.float32(x).view(np.uint32), kind)).view(np.float32)


@jit
def descend_group(pull_BR, hessian_BB, scale_R, bias_R, top, code_BR, error_BR):
    """Codes of one group in turn, each moved to its best, all others in the matrix being as they are.

    pull_BR = H error of the group's columns, kept up to date for the columns that follow. The best value of column j is
    its value + pull / H_jj (the error is quadratic in it), and the nearest that a code has is the best code. Returns
    how many codes moved.
    """
    columns, rows = code_BR.shape
    moved = 0
    change = np.empty(rows, np.float32)
    for j in range(columns):
        code, pull, error, own = code_BR[j], pull_BR[j], error_BR[j], hessian_BB[j, j]
        if not own > _ZERO:
            continue
        for r in range(rows):
            value = np.float32(scale_R[r] * code[r] + bias_R[r])
            better = _nearest(value + pull[r] / own, scale_R[r], bias_R[r], top)
            by = np.float32(scale_R[r] * better + bias_R[r]) - value
            gains = by * (pull[r] + pull[r] - by * own) > _ZERO
            change[r] = by if gains else _ZERO
            moved += gains
            code[r] = better if gains else code[r]
        for r in range(rows):
            error[r] -= change[r]
        for k in range(j + 1, columns):
            share, later = hessian_BB[j, k], pull_BR[k]
            for r in range(rows):
                later[r] -= share * change[r]
    return moved
