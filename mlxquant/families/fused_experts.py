"""Experts that a checkpoint keeps fused and in layouts of its own, seen as the tensors that MLX would have.

gpt-oss: gate and up interleaved in one tensor; as floats with the last two axes swapped, or as MXFP4 codes and scales
(conversion/gpt_oss.py). Newer Qwen checkpoints: gate and up one after the other (conversion/qwen.py, Qwen2MoeModel).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from mlxquant.errors import SourceError
from mlxquant.families.layout import Piece, Target
from mlxquant.tensors import TensorSpec

_GPT_OSS = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up|down)_proj(_bias|_blocks|_scales)?")
_QWEN = re.compile(r"(model\.layers\.\d+\.mlp\.)experts\.(gate_up|down)_proj(?:\.weight)?")
_MX_GROUP = 32


def views(module: str, specs: Mapping[str, TensorSpec]) -> tuple[dict[str, Target], set[str]]:
    """({MLX name: what it is made of}, the fused tensors that all of these are made of).

    Raises SourceError for a fused tensor of a shape that cannot be split, or one that is there unfused as well.
    """
    found: dict[str, Target] = {}
    used: set[str] = set()
    for name, spec in specs.items():
        for view in _views(module, spec, specs):
            if view.name in specs:
                raise SourceError(f"{name} and {view.name} are both in the source, expected one of them")
            found[view.name] = view
            used |= {name, *(piece.source for piece in view.pieces)}
    return found, used


def _views(module: str, spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> Iterator[Target]:
    if module == "gpt_oss" and (match := _GPT_OSS.fullmatch(spec.name)):
        at, which, kind = match.groups()
        if kind == "_blocks":
            yield from _mxfp4(at, which, spec, specs)
        elif kind == "_bias":
            yield from _biases(at, which, spec)
        elif kind is None:
            yield from _transposed(at, which, spec)
    if module in ("qwen2_moe", "qwen3_moe") and (match := _QWEN.fullmatch(spec.name)):
        yield from _halves(f"{match[1]}switch_mlp.", match[2], spec)


def _parts(which: str) -> tuple[str, ...]:
    return ("gate", "up") if which == "gate_up" else ("down",)


def _transposed(at: str, which: str, spec: TensorSpec) -> Iterator[Target]:
    """(experts, in, out) with gate and up in every second column -> (experts, out, in)."""
    experts, width, columns = _axes(spec, 3, "experts, inputs, outputs", which)
    parts = _parts(which)
    rows = columns // len(parts)
    for part, name in enumerate(parts):
        pieces = tuple(Piece(spec.name, e * columns + part, rows, len(parts)) for e in range(experts))
        yield Target(f"{at}{name}_proj.weight", (experts, rows, width), spec.dtype, pieces, "transposed")


def _biases(at: str, which: str, spec: TensorSpec) -> Iterator[Target]:
    experts, columns = _axes(spec, 2, "experts, outputs", which)
    parts = _parts(which)
    rows = columns // len(parts)
    for part, name in enumerate(parts):
        piece = Piece(spec.name, part, experts * rows, len(parts))
        yield Target(f"{at}{name}_proj.bias", (experts, rows), spec.dtype, (piece,), "elements")


def _mxfp4(at: str, which: str, blocks: TensorSpec, specs: Mapping[str, TensorSpec]) -> Iterator[Target]:
    """codes (experts, out, groups, 16) uint8 and scales (experts, out, groups) uint8 -> (experts, out, 32 * groups)."""
    experts, rows, groups, _ = _axes(blocks, 4, "experts, outputs, groups, 16", which, axis=1)
    name = blocks.name.removesuffix("_blocks") + "_scales"
    scales = specs.get(name, TensorSpec(name, (), "U8"))
    codes = TensorSpec(blocks.name, (experts, rows, groups, _MX_GROUP // 2), "U8")
    for spec, expected in ((blocks, codes), (scales, TensorSpec(name, (experts, rows, groups), "U8"))):
        if spec != expected:
            raise SourceError(
                f"{spec.name} is {list(spec.shape)} {spec.dtype}, expected {list(expected.shape)} U8 (MXFP4)"
            )
    parts = _parts(which)
    count = experts * rows // len(parts)
    for part, one in enumerate(parts):
        pieces = tuple(Piece(source, part, count, len(parts)) for source in (blocks.name, name))
        shape = (experts, rows // len(parts), groups * _MX_GROUP)
        yield Target(f"{at}{one}_proj.weight", shape, "F32", pieces, "mxfp4")


def _halves(at: str, which: str, spec: TensorSpec) -> Iterator[Target]:
    """(experts, 2 * out, in): each expert's gate rows, then its up rows."""
    experts, rows, width = _axes(spec, 3, "experts, outputs, inputs", which, axis=1)
    parts = _parts(which)
    count = rows // len(parts)
    for part, name in enumerate(parts):
        pieces = tuple(Piece(spec.name, e * rows + part * count, count) for e in range(experts))
        yield Target(f"{at}{name}_proj.weight", (experts, count, width), spec.dtype, pieces)


def _axes(spec: TensorSpec, axes: int, meaning: str, which: str, axis: int = -1) -> tuple[int, ...]:
    """The shape, once it has so many axes, none empty, and gate and up can share `axis`."""
    shape = spec.shape
    if len(shape) != axes or not math.prod(shape) or shape[axis] % len(_parts(which)):
        even = ", an even number of outputs" if which == "gate_up" else ""
        raise SourceError(f"{spec.name} is {list(shape)}, expected ({meaning}){even}")
    return shape
