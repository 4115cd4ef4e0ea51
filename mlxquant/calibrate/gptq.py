"""GPTQ: columns are rounded one after the other, and those to come make good what each left.

Of a linear layer with weights w, values v and H = mean x x^T over its inputs, the squared output error is
(w - v) H (w - v)^T. With H = (U + 1) D (U + 1)^T, U strictly upper and D diagonal, that is the sum over columns j of
D_j (w_j + sum over i < j of (w_i - v_i) U_ij - v_j)^2: so each column in turn is rounded to what the bracket asks
for. These are the codes of GPTQ (Frantar et al. 2022, arXiv:2210.17323), whose inverse Hessian has the factor
D^-1/2 (U + 1)^-1; QuIP (Chee et al. 2023, arXiv:2307.13304, theorem 6) shows that the two are one. Here no inverse is
needed, and D_j is what an error of column j costs when all later ones can still make it good.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxquant.calibrate import kernels
from mlxquant.calibrate.refit import Tile, each_tile, groups, improve, padded, put_back, quadratic, ratio, upper_root
from mlxquant.calibrate.values import Array, Chosen
from mlxquant.codecs.encode import NonFiniteError, decode
from mlxquant.codecs.search import pack, search_values
from mlxquant.codecs.spec import Codec

# Group size up to which groups stay whole in activation order: on layers of SmolLM2-135M that left less error in groups
# of 32 at all bits, about as much in groups of 64, more in groups of 128.
_WHOLE_UP_TO = 64
# Damping, tenfold each time, until the Hessian is positive definite.
_DAMPINGS = 3
# In float64 up to this width: 128 MB. Beyond, in float32 with diagonal blocks in float64.
_DOUBLE_WIDTH = 4096
_BLOCK = 256
_COLUMNS = 128


class NotPositive(ValueError):
    """A Hessian that is not positive definite, whatever damping was tried. The caller adds the tensor's name."""


@dataclass(frozen=True)
class Prepared:
    """A Hessian, ready to quantize any rows by.

    hessian_II: as it was given. order_I: columns in the order in which they are rounded. follow_II: U, float32, in that
    order; on and below its diagonal is nothing of meaning. cost_I: D, float32, in the columns' own order. damping: the
    share of the mean diagonal that was added.
    """

    hessian_II: Array
    order_I: Array
    follow_II: Array
    cost_I: Array
    damping: float

    def keeps_whole(self, group_size: int) -> bool:
        """Whether each group's columns come one right after the other."""
        group_GB = (self.order_I // group_size).reshape(-1, group_size)
        return bool((group_GB == group_GB[:, :1]).all())


def prepare(
    hessian_II: Array, *, damping: float = 0.01, act_order: bool = True, group_size: int | None = None
) -> Prepared:
    """Factors a Hessian, float32 (I, I), symmetric; kept, not copied.

    damping: a share of the mean diagonal that is added to all of it; tenfold, twice, where that is not enough. A column
    that was never active (diagonal 0) is rounded to nearest. act_order: columns by falling diagonal; with a group_size
    of up to 64, whole groups by falling mean and columns so within each (group-aware reordering: Gafni et al. 2025,
    arXiv:2505.14638), so that their scales can wait for what they should be. In larger groups columns rather go by
    themselves. Memory beyond the Hessian: one copy, three in float64 up to 4,096
    columns. Raises NotPositive.
    """
    diagonal_I = np.diagonal(hessian_II).astype(np.float64)
    whole = group_size if group_size and group_size <= _WHOLE_UP_TO else 1
    order_I = _order(diagonal_I, whole) if act_order else np.arange(len(diagonal_I))
    factor_II, share = _damped_root(hessian_II, order_I, damping)
    root_I = np.diagonal(factor_II).copy()
    cost_I = np.empty(len(root_I), np.float32)
    cost_I[order_I] = np.square(root_I)
    factor_II /= root_I
    return Prepared(hessian_II, order_I, factor_II.astype(np.float32, copy=False), cost_I, share)


def _damped_root(hessian_II: Array, order_I: Array, damping: float) -> tuple[Array, float]:
    """(R upper with R R^T = the Hessian in this order and a share of its mean diagonal; that share). What is below R's
    diagonal means nothing. Raises NotPositive.
    """
    mean = float(np.diagonal(hessian_II).mean(dtype=np.float64))
    if not 0 < mean < np.inf:
        raise NotPositive(f"the Hessian's mean diagonal is {mean:g}: expected a positive number")
    for share in (damping * 10**power for power in range(_DAMPINGS)):
        factor_II = _permuted(hessian_II, order_I)
        factor_II.reshape(-1)[:: len(factor_II) + 1] += share * mean
        try:
            _factor(factor_II)
        except np.linalg.LinAlgError:
            continue
        return factor_II, share
    raise NotPositive(f"the Hessian is not positive definite, not even with {share:g} of its mean diagonal added")


def _order(diagonal_I: Array, group_size: int) -> Array:
    """Whole groups by falling mean, columns within each by falling diagonal; equal ones as they came."""
    mean_I = np.repeat(diagonal_I.reshape(-1, group_size).mean(axis=1), group_size)
    number_I = np.arange(len(diagonal_I)) // group_size
    return np.lexsort((-diagonal_I, number_I, -mean_I))


def _permuted(hessian_II: Array, order_I: Array) -> Array:
    out = np.empty_like(hessian_II, np.float64 if len(order_I) <= _DOUBLE_WIDTH else np.float32)
    for start in range(0, len(out), _BLOCK):  # so that the rows taken are never a second copy
        rows = order_I[start : start + _BLOCK]
        out[start : start + _BLOCK] = hessian_II[rows][:, order_I]
    return out


def _factor(a_II: Array) -> None:
    """A -> R upper with A = R R^T, in place; what is below the diagonal is left as it was.

    Blocks of columns from the last to the first, each reduced by all that follow in one matrix product: it has the
    fewest operations, I^3 / 3, and adds up most of them in one sum. Raises LinAlgError.
    """
    for start in reversed(range(0, len(a_II), _BLOCK)):
        stop = min(start + _BLOCK, len(a_II))
        panel = a_II[:stop, start:stop]
        panel -= a_II[:stop, stop:] @ a_II[start:stop, stop:].T
        corner = panel[start:].astype(np.float64)
        if not np.isfinite(corner).all():  # of which some LAPACKs make a factor full of NaN
            raise np.linalg.LinAlgError
        root = upper_root(corner)
        panel[start:] = root
        panel[:start] = panel[:start] @ np.linalg.inv(root).T.astype(a_II.dtype)


def gptq(
    w_OI: Array,
    prepared: Prepared,
    dtype_code: str,
    codec: Codec,
    *,
    target_OI: Array | None = None,
    rounds: int = 2,
) -> Chosen:
    """Codes of w_OI, float32, in an affine codec, then `rounds` of refitting and descent (refit.py).

    Where the order of columns keeps groups whole, scale and bias of each are searched when it is reached, for what it
    then should be; where it mixes them, all groups' beforehand, for what was given. Either counts errors by their cost.
    target_OI: what the values should be near to instead of w_OI, as corrected() makes it; `Chosen.error` is then
    against this. Rows do not depend on one another: any split into row chunks gives the same bytes. Memory beyond what
    is returned: 2 kB a column, and a byte a weight.

    Raises NonFiniteError (row), and ValueError for a codec without codes and scales.
    """
    w_OI = np.asarray(w_OI if target_OI is None else target_OI, np.float32)
    if not prepared.keeps_whole(codec.group_size):
        codes_OI, scale_OG, bias_OG = search_values(w_OI, dtype_code, codec, prepared.cost_I)
    else:
        codes_OI = np.empty(w_OI.shape, np.uint8)
        scale_OG, bias_OG = np.ones((2, len(w_OI), w_OI.shape[1] // codec.group_size), np.float32)
    hessian_II = prepared.hessian_II
    pieces = groups(hessian_II, codec) if rounds else []

    def work(rows: slice) -> tuple[float, float]:
        w_IR = padded(w_OI[rows])
        tile = Tile(w_IR, np.empty_like(w_IR), padded(scale_OG[rows]), padded(bias_OG[rows]))
        try:
            _round(tile, prepared, dtype_code, codec)
        except NonFiniteError as error:
            raise NonFiniteError(rows.start + error.row, error.reason) from error
        error_R = improve(tile, hessian_II, pieces, dtype_code, codec, rounds)
        put_back(tile, rows, codes_OI, scale_OG, bias_OG)
        return float(error_R.sum()), float(quadratic(w_IR, hessian_II).sum())

    share = ratio(each_tile(work, len(w_OI)))
    parts = pack(codes_OI, scale_OG, bias_OG, dtype_code, codec)
    return Chosen(parts, decode(parts, dtype_code, codec), share, _note(prepared))


def _note(prepared: Prepared) -> str:
    return f"the Hessian needed {prepared.damping:g} of its mean diagonal added" if prepared.damping > 0.05 else ""


def _round(tile: Tile, prepared: Prepared, dtype_code: str, codec: Codec) -> None:
    """Fills in the codes; and where columns come in their own order, scales and biases."""
    order_I, follow_II = prepared.order_I, prepared.follow_II
    searched = not prepared.keeps_whole(codec.group_size)
    w_IR, top = tile.w_IR[order_I], np.float32(2**codec.bits - 1)
    code_IR, error_IR = np.empty_like(w_IR), np.empty_like(w_IR)
    for start in range(0, len(w_IR), step := _COLUMNS if searched else codec.group_size):
        part = slice(start, min(start + step, len(w_IR)))
        target_BR = w_IR[part] + follow_II[:start, part].T @ error_IR[:start]
        group_B = order_I[part] // codec.group_size
        if not searched:
            g, cost_B = int(group_B[0]), prepared.cost_I[order_I[part]]
            found = search_values(np.ascontiguousarray(target_BR.T), dtype_code, codec, cost_B)
            tile.scale_GR[g], tile.bias_GR[g] = found[1][:, 0], found[2][:, 0]
        follow_BB = np.ascontiguousarray(follow_II[part, part])
        choices = group_B, tile.scale_GR, tile.bias_GR, top
        kernels.round_columns(w_IR[part], target_BR, follow_BB, *choices, code_IR[part], error_IR[part])
    tile.code_IR[order_I] = code_IR


def corrected(
    w_OI: Array,
    hessian_II: Array,
    cross_II: Array | None,
    left_OI: Array | None = None,
    *,
    strength: float = 1.0,
    damping: float = 0.03,
) -> Array:
    """What weights should be, of the inputs that they get, so that the layer says what it would have said.

    hessian_II = mean y y^T of the inputs y that quantized layers before made, cross_II = mean x y^T of what they were,
    x. |w x - t y|^2 is least for t = w cross hessian^-1 = w + w (cross - hessian) hessian^-1 (GPTAQ, Li et al. 2025,
    arXiv:2504.02692; Qronos, Zhang et al. 2025, arXiv:2505.11695). left_OI = mean d y^T: where the output is added to a
    stream that is already off by d, t makes that good, too. strength: how much of the difference is taken. damping: of
    the Hessian's mean diagonal; more than codes need, as this is fitted to noise, too. Float32 (O, I). Raises
    NotPositive. Memory beyond the arguments: as prepare().
    """
    root_II, _ = _damped_root(hessian_II, np.arange(len(hessian_II)), damping)
    pull_OI = np.zeros(w_OI.shape, root_II.dtype) if left_OI is None else left_OI.astype(root_II.dtype)
    if cross_II is not None:
        pull_OI += w_OI @ (cross_II - hessian_II)
    _divide(pull_OI, root_II)
    return np.asarray(w_OI + np.float32(strength) * pull_OI.astype(np.float32, copy=False), np.float32)


def _divide(b_OI: Array, root_II: Array) -> None:
    """B -> B A^-1 in place, A = R R^T: by R^T from the last columns to the first, then by R the other way."""
    parts = [slice(start, min(start + _BLOCK, len(root_II))) for start in range(0, len(root_II), _BLOCK)]
    corners = [np.linalg.inv(np.triu(root_II[part, part]).astype(np.float64)).astype(b_OI.dtype) for part in parts]
    for part, inverse in zip(reversed(parts), reversed(corners), strict=True):
        b_OI[:, part] -= b_OI[:, part.stop :] @ root_II[part, part.stop :].T
        b_OI[:, part] = b_OI[:, part] @ inverse.T
    for part, inverse in zip(parts, corners, strict=True):
        b_OI[:, part] -= b_OI[:, : part.start] @ root_II[: part.start, part]
        b_OI[:, part] = b_OI[:, part] @ inverse


def output_error(w_OI: Array, values_OI: Array, hessian_II: Array) -> float:
    """Squared error of the layer's output over its squared output, 0 .. 1."""

    def work(rows: slice) -> tuple[float, float]:
        w_IR = padded(w_OI[rows])
        error_R = quadratic(w_IR - padded(values_OI[rows]), hessian_II)
        return float(error_R.sum()), float(quadratic(w_IR, hessian_II).sum())

    return ratio(each_tile(work, len(w_OI)))
