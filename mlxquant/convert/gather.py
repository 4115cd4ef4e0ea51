"""Rows of an MLX target, put together from rows of source tensors. The only place that carries out a Layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from mlxquant.codecs.floats import narrow, widen
from mlxquant.errors import SourceError
from mlxquant.families.layout import Piece, Target
from mlxquant.files.source import Source
from mlxquant.tensors import TensorSpec

Array = np.ndarray[Any, Any]

# Source bytes in flight. Large enough that per-chunk costs vanish, small enough that memory is the interpreter's own.
CHUNK_BYTES = 8 * 2**20
WHOLE = {"mla_embed_q", "mla_unembed"}


def chunks(target: Target, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """(start, stop) row ranges that cover the target, each about `chunk_bytes` of source."""
    spec = TensorSpec(target.name, target.shape, target.dtype)
    if target.change in WHOLE or not spec.size:
        yield 0, spec.rows
        return
    step = max(1, chunk_bytes // max(1, spec.nbytes // spec.rows))
    for start in range(0, spec.rows, step):
        yield start, min(start + step, spec.rows)


def rows(source: Source, target: Target, start: int, stop: int) -> Array:
    """Rows start..stop of the target's row view, (stop - start, width), raw in the target's source dtype.

    Raises SourceError naming the tensor when a file is short.
    """
    if target.change in WHOLE:
        return _mla_half(source, target)
    if _is_reshape(source, target):
        return _reshaped(source, target)[start:stop]
    parts = list(_pieces(source, target, start, stop))
    raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return _add_one(raw, target) if target.change == "add_one" else raw


def _pieces(source: Source, target: Target, start: int, stop: int) -> Iterator[Array]:
    """The parts of start..stop that lie in each piece, in order."""
    offset = 0
    for piece in target.pieces:
        first, last = max(start, offset), min(stop, offset + piece.count)
        if first < last:
            yield _read(source, piece, first - offset, last - offset)
        offset += piece.count


def _is_reshape(source: Source, target: Target) -> bool:
    return source.specs[target.pieces[0].source].width != (target.shape[-1] if target.shape else 1)


def _reshaped(source: Source, target: Target) -> Array:
    """A convolution's (C, 1, K) -> (C, K, 1): the same bytes in rows of another width; small, so read whole."""
    name = target.pieces[0].source
    return source.read_rows(name, 0, source.specs[name].rows).reshape(-1, target.shape[-1])


def _read(source: Source, piece: Piece, first: int, last: int) -> Array:
    if piece.step == 1:
        return source.read_rows(piece.source, piece.start + first, piece.start + last)
    start = piece.start + first * piece.step
    return source.read_rows(piece.source, start, start + (last - first - 1) * piece.step + 1)[:: piece.step]


def _add_one(raw: Array, target: Target) -> Array:
    return narrow(widen(raw, target.dtype) + np.float32(1), target.dtype)


def refuse_shifted_norms(source: Source, targets: Iterable[Target]) -> None:
    """Raises SourceError where norms that are to get their 1 + w shift seem to have it already.

    As published these weights scatter around 0; around 1, an MLX or GGUF tool has shifted them before, and shifting
    twice is the commonest silent corruption among published MLX folders. Single norms may honestly be large, so the
    median over the model's norms decides.
    """
    means = {}
    for target in targets:
        if target.change == "add_one":
            spec = TensorSpec(target.name, target.shape, target.dtype)
            means[target.name] = float(
                widen(rows(source, replace(target, change="none"), 0, spec.rows), target.dtype).mean()
            )
    if means and (middle := float(np.median(list(means.values())))) > 0.75:
        raise SourceError(
            f"{next(iter(means))} and {len(means) - 1} other norms: median of their means {middle:.2f}, expected about "
            "0: their 1 + w shift has been applied already",
            hint="convert the original checkpoint, not one that MLX or GGUF tools have rewritten",
        )


def _mla_half(source: Source, target: Target) -> Array:
    """kv_b_proj's key half (transposed per head) or value half; mlx_lm/models/deepseek_v3.py, sanitize."""
    (piece,) = target.pieces
    heads = target.shape[0]
    spec = source.specs[piece.source]
    w_HDL = source.read_rows(piece.source, 0, spec.rows).reshape(heads, -1, spec.width)
    if target.change == "mla_embed_q":
        nope = target.shape[2]
        half = w_HDL[:, :nope].swapaxes(1, 2)
    else:
        half = w_HDL[:, w_HDL.shape[1] - target.shape[1] :]
    return np.ascontiguousarray(half).reshape(-1, target.shape[-1])
