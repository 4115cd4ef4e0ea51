"""Rows of a target, put together from rows of source tensors. The only place that carries out a Layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from mlxquant.codecs.floats import narrow, widen
from mlxquant.errors import SourceError
from mlxquant.families.layout import Change, Piece, Target
from mlxquant.files.source import Source
from mlxquant.tensors import TensorSpec

Array = np.ndarray[Any, Any]

# Source bytes in flight. Large enough that per-chunk costs vanish, small enough that memory is the interpreter's own.
CHUNK_BYTES = 8 * 2**20
WHOLE = {"mla_embed_q", "mla_unembed"}

# float32 -> float32. Exponential and logarithm in float64, so that the rounded result is the same on every machine.
_ELEMENTWISE: dict[Change, Callable[[Array], Array]] = {
    "add_one": lambda w: w + np.float32(1),
    "subtract_one": lambda w: w - np.float32(1),
    "neg_exp": lambda w: (-np.exp(w.astype(np.float64))).astype(np.float32),
    "log_neg": lambda w: np.log(-w.astype(np.float64)).astype(np.float32),
}


def chunks(target: Target, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """(start, stop) row ranges that cover the target, each about `chunk_bytes` of source.

    Never more than one matrix of a transposed stack at a time: each has to be read whole for any of its rows.
    """
    spec = TensorSpec(target.name, target.shape, target.dtype)
    if target.change in WHOLE or not spec.size:
        yield 0, spec.rows
        return
    step = max(1, chunk_bytes // max(1, spec.nbytes // spec.rows))
    step = target.shape[-2] if target.change == "transposed" else step
    for start in range(0, spec.rows, step):
        yield start, min(start + step, spec.rows)


def rows(source: Source, target: Target, start: int, stop: int) -> Array:
    """Rows start..stop of the target's row view, (stop - start, width), raw in the target's source dtype.

    Raises SourceError naming the tensor when a file is short.
    """
    raw = _unchanged(source, target, start, stop)
    if (change := _ELEMENTWISE.get(target.change)) is None:
        return raw
    return narrow(change(widen(raw, target.dtype)), target.dtype)


def wide_rows(source: Source, target: Target, start: int, stop: int) -> Array:
    """The same rows as float32, with numbers changed in float32 and not rounded to the source's dtype again: what
    llama.cpp's converter, which reads bfloat16 as float32, makes of them.

    Raises SourceError naming the tensor when a file is short.
    """
    values = widen(_unchanged(source, target, start, stop), target.dtype)
    change = _ELEMENTWISE.get(target.change)
    return values if change is None else change(values)


def _unchanged(source: Source, target: Target, start: int, stop: int) -> Array:
    """Rows before any change of their numbers."""
    if target.change in WHOLE:
        return _mla_half(source, target)
    if target.change in ("pairs", "halves"):
        return _rotary(source, target, start, stop)
    if target.change == "elements":
        return _elements(source, target)[start:stop]
    if target.change == "mxfp4":
        return _mxfp4_floats(source, target, start, stop)
    if target.change == "none" and _is_reshape(source, target):
        return _reshaped(source, target)[start:stop]
    parts = list(_pieces(source, target, start, stop))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _pieces(source: Source, target: Target, start: int, stop: int) -> Iterator[Array]:
    """The parts of start..stop that lie in each piece, in order."""
    read = _columns if target.change == "transposed" else _read
    offset = 0
    for piece in target.pieces:
        first, last = max(start, offset), min(stop, offset + piece.count)
        if first < last:
            yield read(source, piece, first - offset, last - offset)
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


def _columns(source: Source, piece: Piece, first: int, last: int) -> Array:
    """Rows of a matrix that lies transposed in the source: the columns of one matrix of the stack."""
    spec = source.specs[piece.source]
    height = spec.shape[-2]
    matrix, column = divmod(piece.start + first * piece.step, spec.width)
    block = source.read_rows(piece.source, matrix * height, (matrix + 1) * height)
    return np.ascontiguousarray(block[:, column : column + (last - first - 1) * piece.step + 1 : piece.step].T)


def _elements(source: Source, target: Target) -> Array:
    (piece,) = target.pieces
    flat = source.read_rows(piece.source, 0, source.specs[piece.source].rows).reshape(-1)
    taken = flat[piece.start : piece.start + (piece.count - 1) * piece.step + 1 : piece.step]
    return np.ascontiguousarray(taken).reshape(-1, target.shape[-1])


def _rotary(source: Source, target: Target, start: int, stop: int) -> Array:
    """Between Hugging Face's rotary order and llama.cpp's; a vector's elements move as a matrix's rows do."""
    name = target.pieces[0].source
    if len(target.shape) == 1:
        return np.take(source.read_rows(name, 0, 1), rotary_order(target, 0, target.shape[0]), axis=1)
    wanted = rotary_order(target, start, stop)
    if not len(wanted):
        return source.read_rows(name, 0, 0)
    first, last = int(wanted.min()), int(wanted.max()) + 1
    return np.take(source.read_rows(name, first, last), wanted - first, axis=0)


def rotary_order(target: Target, start: int, stop: int) -> Array:
    """The source rows that are rows start..stop of a target whose change is pairs or halves.

    llama.cpp puts the two halves of each head's rotary pairs side by side (conversion/llama.py, permute): Hugging
    Face's row (half, i) of a head lies there at 2 * i + half.
    """
    head_dim = target.shape[0] // target.heads
    head, inside = np.divmod(np.arange(start, stop), head_dim)
    if target.change == "pairs":
        i, half = np.divmod(inside, 2)
        inside = half * (head_dim // 2) + i
    else:
        half, i = np.divmod(inside, head_dim // 2)
        inside = 2 * i + half
    return np.asarray(head * head_dim + inside)


def mxfp4_rows(source: Source, target: Target, start: int, stop: int) -> Array:
    """Rows of a target whose change is mxfp4 as GGUF's MXFP4 blocks, (rows, 17 bytes per 32 weights) uint8, exactly.

    Both formats keep the same codes and the same scale byte. Hugging Face's byte i of a block holds weights 2i and
    2i + 1, ggml's (block_mxfp4) weights i and i + 16, the earlier one in the low nibble.
    """
    codes, scales = target.pieces
    groups = source.specs[scales.source].width
    first, last = codes.start + start * codes.step, codes.start + (stop - 1) * codes.step + 1
    packed = source.read_rows(codes.source, first * groups, last * groups).reshape(-1, groups, 16)[:: codes.step]
    nibbles = np.stack((packed & 15, packed >> 4), axis=-1).reshape(-1, groups, 2, 16)
    blocks = np.empty((stop - start, groups, 17), np.uint8)
    blocks[..., 0] = _read(source, scales, start, stop)
    blocks[..., 1:] = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    return blocks.reshape(stop - start, -1)


def _mxfp4_floats(source: Source, target: Target, start: int, stop: int) -> Array:
    from mlxquant.codecs.ggml import decode_rows

    return decode_rows(mxfp4_rows(source, target, start, stop), "MXFP4", target.shape[-1])


def refuse_shifted_norms(source: Source, targets: Iterable[Target]) -> None:
    """Raises SourceError where a qwen3_next's norms do not come out around 1, as 1 + w of its published w does.

    Around 2, an MLX or GGUF tool had shifted them before: the commonest silent corruption among published MLX folders.
    Around 0, an MLX folder's were never shifted. Single norms may honestly be large, so the median over the model's
    norms decides. gemma's are left alone: nothing says that its published w lie around 0, and no tool stores 1 + w.
    """
    if source.config.get("model_type") != "qwen3_next":
        return
    means = {t.name: float(wide_rows(source, t, 0, 1).mean()) for t in targets if _is_centred_norm(t)}
    if not means or 0.25 < (middle := float(np.median(list(means.values())))) < 1.75:
        return
    reason = "has been applied already" if middle > 1 else "is missing"
    raise SourceError(
        f"{next(iter(means))} and {len(means) - 1} other norms: median of their means {middle - 1:.2f} (w of 1 + w), "
        f"expected about 0: their 1 + w shift {reason}",
        hint="convert the original checkpoint, not one that MLX or GGUF tools have rewritten",
    )


def _is_centred_norm(target: Target) -> bool:
    """The gated norm of a delta net is stored as it is, and centred nowhere."""
    gated = target.name.endswith(("linear_attn.norm.weight", "ssm_norm.weight"))
    return len(target.shape) == 1 and target.name.endswith("norm.weight") and not gated


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
