"""MLX's packed weights, seen as the weights they stand for: codes, scales and biases become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlxquant.codecs.spec import MODES, MX_MODES, Codec
from mlxquant.errors import SourceError
from mlxquant.tensors import DTYPES, TensorSpec

_PACKED_BITS = 32  # U32 words, whatever the codec
_PARTS = ("scales", "biases")
_BLOCKS = ("quantization", "quantization_config")


@dataclass(frozen=True)
class Weight:
    """`spec` is the float tensor; `codec` is None where it is stored so; `nbytes` counts all of its parts."""

    spec: TensorSpec
    codec: Codec | None
    nbytes: int

    @property
    def format(self) -> str:
        return self.codec.label if self.codec else DTYPES[self.spec.dtype].label


def unpack(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, Weight]:
    """Every weight of a folder by name, in order; a folder without packed weights comes back as it is.

    Raises SourceError when the packed shapes and the `quantization` block of config.json cannot both be true.
    """
    packed = {n for n, s in specs.items() if s.dtype == "U32" and _part(n, "scales") in specs}
    inside = {_part(n, part) for n in packed for part in _PARTS}
    found: dict[str, Weight] = {}
    for name, spec in specs.items():
        if name in packed:
            codec = codec_of(config, name)
            parts = [specs[p] for part in _PARTS if (p := _part(name, part)) in specs]
            whole = _unpacked(spec, parts[0], codec)
            _check_parts([spec, *parts], codec.parts(name, whole.shape, whole.dtype))
            found[name] = Weight(whole, codec, spec.nbytes + sum(p.nbytes for p in parts))
        elif name not in inside:
            found[name] = Weight(spec, None, spec.nbytes)
    return found


def as_floats(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, Any], dict[str, TensorSpec], dict[str, Weight]]:
    """(config without its quantization block, specs, packed weights) of the float model that an MLX folder stands for.

    Packed weights become F32, which holds every product of code and scale as MLX computes it. Raises SourceError.
    """
    weights = unpack(config, specs)
    packed = {name: weight for name, weight in weights.items() if weight.codec}
    floats = {n: replace(w.spec, dtype="F32") if w.codec else w.spec for n, w in weights.items()}
    return {k: v for k, v in config.items() if k not in _BLOCKS}, floats, packed


def part_names(name: str) -> tuple[str, str, str]:
    """The tensors that store packed weight `name`: codes, scales and (affine only) biases."""
    return name, _part(name, "scales"), _part(name, "biases")


def codec_of(config: Mapping[str, Any], name: str) -> Codec:
    """As stock mlx-lm reads it: the module's own entry, else the block's; affine unless a mode is named.

    Raises SourceError when there is none, or none that MLX could have written.
    """
    block = config.get("quantization", config.get("quantization_config"))
    own = block.get(name.removesuffix(".weight")) if isinstance(block, dict) else None
    entry = own if isinstance(own, dict) else block
    if not isinstance(entry, dict) or not {"bits", "group_size"} <= entry.keys():
        message = f"{name} is packed, but config.json has no `quantization` block with bits and group_size"
        raise SourceError(message, hint="download the folder again")
    mode = entry.get("mode", "affine")
    # `mlx_lm.convert` with a mixed recipe and no group size writes null, which MLX reads as the mode's default.
    usual_group, usual_bits = MX_MODES.get(mode, (64, 4)) if isinstance(mode, str) else (None, None)
    bits = usual_bits if entry.get("bits") is None else entry["bits"]
    group = usual_group if entry.get("group_size") is None else entry["group_size"]
    if mode in MODES and type(bits) is int and type(group) is int and 0 < bits <= 8 and 0 < group <= 4096:
        return Codec(mode, bits, group)
    raise SourceError(
        f"config.json: the quantization of {name} is {str(entry)[:80]}, expected mode, bits and group_size"
    )


def _part(name: str, part: str) -> str:
    return f"{name.removesuffix('.weight')}.{part}"


def _unpacked(spec: TensorSpec, scales: TensorSpec, codec: Codec) -> TensorSpec:
    """Float scales tell the model's dtype; modes with 8-bit scales do not, and bfloat16 stands in."""
    width = spec.width * _PACKED_BITS // codec.bits
    if width != scales.width * codec.group_size or spec.shape[:-1] != scales.shape[:-1]:
        raise SourceError(
            f"{spec.name} is {list(spec.shape)} with scales {list(scales.shape)}, which is not {codec.label}",
            hint="config.json belongs to another model, or the folder is damaged: download it again",
        )
    dtype = scales.dtype if DTYPES[scales.dtype].floating else "BF16"
    return replace(spec, shape=(*spec.shape[:-1], width), dtype=dtype)


def _check_parts(found: Sequence[TensorSpec], expected: Sequence[TensorSpec]) -> None:
    """Raises SourceError for scales or biases that are missing, or of another shape or dtype than MLX writes."""
    stored = {spec.name: spec for spec in found}
    for spec in expected:
        if stored.get(spec.name) != spec:
            there = stored.get(spec.name)
            has = f"{there.dtype} {list(there.shape)}" if there else "missing"
            raise SourceError(
                f"{spec.name} is {has}, expected {spec.dtype} {list(spec.shape)}", hint="download the folder again"
            )
