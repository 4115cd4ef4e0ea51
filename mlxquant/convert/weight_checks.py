"""The stored weights of a folder against its source: what each way of choosing codes promises, asked of every tensor.

rtn       no weight further from the source's than the format allows: codecs/bounds.py
search    the arrays that the search finds, once more; of another version's search, that no group is further from the
          source, in squared error, than rtn's
others    they were chosen by calibration text for what layers make of them, not for themselves: a tensor's squared
          error is only held against CALIBRATED_NMSE, as a tensor in another's place has about 2 and an empty one 1.
          Where weights were first transformed (scaled, rotated) the source's rows are not what was stored: then nothing
          is compared, and the checksums have to do
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from mlxquant.codecs import floats
from mlxquant.codecs.encode import decode, encode, error_bound
from mlxquant.codecs.floats import fold, widen
from mlxquant.convert.gather import chunks, rows
from mlxquant.convert.sources import OpenSource
from mlxquant.convert.taken_over import HasBlocks, block_rows, repack_named
from mlxquant.files.hf_folder import HFFolder
from mlxquant.plan.plan import Plan, PlannedTensor
from mlxquant.plan.recipe import RTN, SEARCH
from mlxquant.tensors import TensorSpec

Array = np.ndarray[Any, Any]
Advance = Callable[[int], None] | None

COMPARE_BYTES = 2**19  # of source: a comparison makes several float arrays of it, which then stay in the cache
CALIBRATED_NMSE = 0.75


@dataclass(frozen=True)
class Promise:
    """How codes were chosen. method: of plan/recipe.py. calibrated: with text. transforms: what was done to the weights
    before, by name. searched_here: by this version of the search.
    """

    method: str = RTN
    calibrated: bool = False
    transforms: tuple[str, ...] = ()
    searched_here: bool = True


def compare_weights(
    folder: HFFolder, source: OpenSource, plan: Plan, promise: Promise, advance: Advance
) -> tuple[bool, str]:
    """(are they what was promised, what was found): kept tensors equal bit for bit, quantized ones as above."""
    if promise.transforms:
        done = " and ".join(promise.transforms)
        return True, f"not compared: weights were transformed before ({done}), so only checksums speak for them"
    worst, worst_name = 0.0, ""
    for tensor in plan.tensors:
        nmse, complaint = compare(folder, source, tensor, promise, advance)
        if complaint:
            return False, f"{tensor.name}: {complaint}"
        if nmse > worst:
            worst, worst_name = nmse, tensor.name
    said = f"worst NMSE {worst:.2e} ({worst_name})" if worst_name else "all of them equal"
    return True, f"{len(plan.tensors)} tensors {_held(promise)}; {said}"


def _held(promise: Promise) -> str:
    if promise.calibrated:
        return f"within an NMSE of {CALIBRATED_NMSE} (chosen by {promise.method} for layers' outputs: no closer bound)"
    if promise.method == SEARCH:
        return "as search finds them" if promise.searched_here else "no further from the source than rtn's"
    return "within their bounds"


def compare(
    folder: HFFolder, source: OpenSource, tensor: PlannedTensor, promise: Promise, advance: Advance
) -> tuple[float, str | None]:
    """(NMSE, complaint or None) of one tensor. Blocks that were taken over are taken over again: that gives the same
    arrays or the folder is not what it says.
    """
    if tensor.repack:
        return 0.0, _compare_repacked(folder, cast(HasBlocks, source), tensor, advance)
    squared_error = squared = 0.0
    for start, stop in chunks(tensor.target, COMPARE_BYTES):
        raw = rows(source, tensor.target, start, stop)
        stored = _stored(folder, tensor, start, stop, advance)
        rounded = floats.cast(raw, tensor.target.dtype, tensor.dtype)
        if not tensor.codec.quantized:
            if not np.array_equal(stored[0].reshape(-1), rounded.reshape(-1)):
                return 1.0, f"rows {start}..{stop} differ from the source"
            continue
        w_OI, decoded_OI = widen(rounded, tensor.dtype), decode(stored, tensor.dtype, tensor.codec)
        if complaint := _broken(rounded, w_OI, stored, decoded_OI, tensor, promise, start):
            return 1.0, complaint
        squared_error += float(np.square(w_OI - decoded_OI, dtype=np.float64).sum())
        squared += float(np.square(w_OI, dtype=np.float64).sum())
    nmse = squared_error / squared if squared else 0.0
    if promise.calibrated and not nmse <= CALIBRATED_NMSE:
        return nmse, f"its squared error is {nmse:.2f} of its squares, more than any choice of codes costs"
    return nmse, None


def _broken(
    rounded: Array,
    w_OI: Array,
    stored: tuple[Array, ...],
    decoded_OI: Array,
    tensor: PlannedTensor,
    promise: Promise,
    start: int,
) -> str | None:
    """What is promised of single rows and is not so."""
    if promise.calibrated:
        return None
    if promise.method == SEARCH:
        return _not_searched(rounded, w_OI, stored, decoded_OI, tensor, promise, start)
    bound_OG = error_bound(w_OI, tensor.dtype, tensor.codec)
    error_OG = fold(np.maximum, np.abs(w_OI - decoded_OI).reshape(*bound_OG.shape, -1))
    row = _first(~(error_OG <= bound_OG))  # NaN is over, too
    return None if row is None else f"row {start + row} is further from the source than {tensor.codec.label} allows"


def _not_searched(
    rounded: Array,
    w_OI: Array,
    stored: tuple[Array, ...],
    decoded_OI: Array,
    tensor: PlannedTensor,
    promise: Promise,
    start: int,
) -> str | None:
    if promise.searched_here:
        from mlxquant.codecs.search import search

        made = search(rounded, tensor.dtype, tensor.dtype, tensor.codec)
        differs = [(a != b).reshape(len(a), -1) for a, b in zip(made, stored, strict=True)]
        row = _first(np.concatenate(differs, axis=1))
        return None if row is None else f"row {start + row} is not what search finds for the source's"
    own_OI = decode(encode(rounded, tensor.dtype, tensor.dtype, tensor.codec), tensor.dtype, tensor.codec)
    found, own = (_squares(w_OI, values, tensor.codec.group_size) for values in (decoded_OI, own_OI))
    row = _first(~(found <= own * (1 + 1e-9)))
    return None if row is None else f"row {start + row} is further from the source than rtn's"


def _squares(w_OI: Array, values_OI: Array, group_size: int) -> Array:
    return np.asarray(np.square(w_OI.astype(np.float64) - values_OI).reshape(len(w_OI), -1, group_size).sum(-1))


def _first(wrong_OX: Array) -> int | None:
    """The first row in which something is wrong."""
    return int(np.argwhere(wrong_OX)[0][0]) if wrong_OX.any() else None


def _compare_repacked(folder: HFFolder, source: HasBlocks, tensor: PlannedTensor, advance: Advance) -> str | None:
    for start, stop in chunks(tensor.target, COMPARE_BYTES):
        stored = _stored(folder, tensor, start, stop, advance)
        made = repack_named(tensor, block_rows(source, tensor, start, stop), start)
        if not all(np.array_equal(a, b, equal_nan=False) for a, b in zip(made, stored, strict=True)):
            return f"rows {start}..{stop} are not the source's {tensor.repack} blocks"
    return None


def _stored(folder: HFFolder, tensor: PlannedTensor, start: int, stop: int, advance: Advance) -> tuple[Array, ...]:
    """The same row range in each stored part: codecs keep rows as rows. A reshaped kept tensor is read whole."""
    stored = tuple(_stored_rows(folder, part, start, stop) for part in tensor.parts)
    if advance:
        advance(sum(a.nbytes for a in stored))
    return stored


def _stored_rows(folder: HFFolder, part: TensorSpec, start: int, stop: int) -> Array:
    return folder.read_rows(part.name, start, min(stop, part.rows))
