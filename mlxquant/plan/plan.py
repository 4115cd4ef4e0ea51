"""The plan: every tensor that will be written, its codec and its bytes, made before any weight is read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlxquant.codecs.repacked import REPACKED
from mlxquant.codecs.spec import KEEP, Codec
from mlxquant.errors import PlanError, UnsupportedError
from mlxquant.families.layout import Layout, Target
from mlxquant.families.mlx_config import stated_dtype
from mlxquant.families.mlx_layout import layout as mlx_layout
from mlxquant.families.mlx_quant import mlx_lm_codec
from mlxquant.families.roles import SENSITIVE, VOCABULARY, Role, assign_roles
from mlxquant.families.shape import ModelShape
from mlxquant.plan import recipe as recipes
from mlxquant.plan import repacking
from mlxquant.plan.recipe import MIXED, REPACK, Settings
from mlxquant.plan.untied import untied_config, with_head
from mlxquant.tensors import DTYPES, FLOAT_CODES, TensorSpec


@dataclass(frozen=True)
class PlannedTensor:
    """One MLX tensor: where its rows come from, what it is, how it is stored. `dtype` is its float dtype code.

    `repack`: the ggml type whose blocks are taken over as they are, or None.
    """

    target: Target
    role: Role
    codec: Codec
    dtype: str
    repack: str | None = None

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        return self.codec.parts(self.name, self.target.shape, self.dtype)

    @property
    def size(self) -> int:
        """Number of weights."""
        return TensorSpec(self.name, self.target.shape, self.dtype).size

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """Everything the executor needs, and nothing it has to decide. `remarks` are the surprises, one line each."""

    model_type: str
    settings: Settings
    base: Codec
    dtype: str
    tensors: tuple[PlannedTensor, ...]
    dropped: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(t.size for t in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over everything that is written."""
        return 8 * self.nbytes / self.size

    def bytes_by_role(self) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for tensor in self.tensors:
            sums[tensor.role.value] += tensor.nbytes
        return dict(sums.most_common())

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`, the manifest and the digest."""
        return {
            "model_type": self.model_type,
            "settings": self.settings.to_json(),
            "base": self.base.label,
            "dtype": DTYPES[self.dtype].label,
            "parameters": self.size,
            "bytes": self.nbytes,
            "bpw": self.bpw,
            "bytes_by_role": self.bytes_by_role(),
            "tensors": [
                {
                    "name": t.name,
                    "role": t.role.value,
                    "shape": list(t.target.shape),
                    "codec": t.codec.label,
                    "dtype": DTYPES[t.dtype].label,
                    "bytes": t.nbytes,
                    "bpw": round(8 * t.nbytes / t.size, 4) if t.size else 0.0,
                }
                | repacking.to_json(t.repack)
                for t in self.tensors
            ],
            "dropped": [list(pair) for pair in self.dropped],
            "remarks": list(self.remarks),
        }

    def digest(self) -> str:
        """sha256 of the plan, source rows included: two plans with one digest write the same bytes."""
        rows = [[asdict(piece) for piece in t.target.pieces] + [t.target.change, t.target.dtype] for t in self.tensors]
        text = json.dumps([self.to_json(), rows], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def quantization_config(self) -> dict[str, Any]:
        """config.json's `quantization` block as stock mlx-lm reads it: the base, then each module that differs."""
        block: dict[str, Any] = dict(self.base.mlx_config())
        for tensor in self.tensors:
            if tensor.codec.quantized and tensor.codec != self.base:
                block[tensor.name.removesuffix(".weight")] = tensor.codec.mlx_config()
        return block


@dataclass(frozen=True)
class Basis:
    """What all plans of one model have in common, whatever the settings: the walk over its tensors, made once."""

    config: dict[str, Any]
    shape: ModelShape
    layout: Layout
    roles: Mapping[str, Role]


def lay_out(config: dict[str, Any], specs: Mapping[str, TensorSpec], untie: bool = False) -> Basis:
    """untie: the model gets an output head of its own, as a rotation needs.

    Raises UnsupportedError (unknown family, tensor or quantization scheme) and SourceError (config and headers do not
    agree), naming the tensors and the next step.
    """
    refuse_quantized_source(config)
    shape = ModelShape.from_config(config)
    laid_out = mlx_layout(config, specs)
    roles = assign_roles(laid_out.targets, shape)
    if untie:
        config, laid_out = untied_config(config), with_head(laid_out, roles, shape)
        shape = ModelShape.from_config(config)
        roles = assign_roles(laid_out.targets, shape)
    return Basis(config, shape, laid_out, roles)


def make_plan(
    config: dict[str, Any],
    specs: Mapping[str, TensorSpec],
    settings: Settings,
    quantized: Mapping[str, str] | None = None,
) -> Plan:
    """Decides everything from config and headers. `quantized`: source tensors that were rounded before -> their format.

    Raises UnsupportedError (unknown family, tensor or quantization scheme), SourceError (config and headers do not
    agree) and PlanError (what was asked cannot be done), each naming the tensors and the next step.
    """
    return choose(lay_out(config, specs, untie=settings.rotate), settings, quantized)


def choose(basis: Basis, settings: Settings, quantized: Mapping[str, str] | None = None) -> Plan:
    """The plan of a model that is laid out already. Raises PlanError (what was asked cannot be done)."""
    shape, laid_out, roles = basis.shape, basis.layout, basis.roles
    dtype = settings.dtype or model_dtype(basis.config, laid_out.targets)
    types = repacking.types(laid_out.targets, quantized or {}, settings, shape)
    codecs = choose_codecs(laid_out.targets, roles, settings, shape, types)
    tensors = tuple(
        PlannedTensor(t, roles[t.name], codecs[t.name], stored_dtype(t, dtype), types.get(t.name))
        for t in laid_out.targets
    )
    repacking.refuse_second_loss(tensors, quantized or {}, settings)
    base = repacking.commonest(tensors) if settings.recipe == REPACK else settings.base
    remarks = check_bits(tensors, settings, shape) + repacking.remarks(tensors) + shape_remarks(shape, laid_out)
    return Plan(shape.model_type, settings, base, dtype, tensors, laid_out.dropped, tuple(remarks))


def refuse_quantized_source(config: dict[str, Any]) -> None:
    """A source that is already quantized would be quantized twice, or misread: named and refused."""
    text = config.get("text_config")
    for block in (config, text if isinstance(text, dict) else {}):
        scheme = block.get("quantization_config") or block.get("quantization")
        if scheme:
            scheme = scheme if isinstance(scheme, dict) else {}
            name = scheme.get("quant_method") or ("MLX " + str(scheme.get("mode", "affine")))
            form = scheme.get("format") or scheme.get("fmt") or f"{scheme.get('bits', '?')} bits"
            raise UnsupportedError(
                f"config.json: the source is already quantized ({name}, {form}) and mlxquant does not read that scheme",
                hint="convert the full-precision (bf16 or fp16) repository of this model instead",
            )


def model_dtype(config: dict[str, Any], targets: Iterable[Target]) -> str:
    """The float dtype of what stays float: config.json's, else that of most source weights."""
    if stated := stated_dtype(config):
        return stated
    counts: Counter[str] = Counter()
    for target in targets:
        if target.dtype in FLOAT_CODES.values():
            counts[target.dtype] += TensorSpec(target.name, target.shape, target.dtype).size
    return counts.most_common(1)[0][0] if counts else "BF16"


def stored_dtype(target: Target, dtype: str) -> str:
    return dtype if target.cast and DTYPES[target.dtype].floating else target.dtype


def choose_codecs(
    targets: tuple[Target, ...],
    roles: Mapping[str, Role],
    settings: Settings,
    shape: ModelShape,
    types: Mapping[str, str],
) -> dict[str, Codec]:
    """A codec for each target: by its whole name, by `--set`, then by the recipe. What MLX has no quantized module for
    stays float.
    """
    base = settings.base
    position = recipes.layer_position(targets) if settings.recipe in MIXED else 0
    exact = dict(settings.codecs)
    chosen: dict[str, Codec] = {}
    for target in targets:
        stock = mlx_lm_codec(shape.model_type, target)
        if stock == KEEP:
            chosen[target.name] = KEEP
        elif target.name in exact:
            chosen[target.name] = require_fit(target, exact[target.name])
        elif (asked := recipes.matching_set(target.name, settings.sets)) is not None:
            chosen[target.name] = require_fit(target, asked)
        elif settings.recipe == REPACK:
            chosen[target.name] = REPACKED[types[target.name]].codec if target.name in types else KEEP
        elif settings.recipe == "uniform":
            chosen[target.name] = (stock or base) if base.divides(target.shape[-1]) else KEEP
        elif settings.recipe in MIXED:
            high = MIXED[settings.recipe][1]
            chosen[target.name] = recipes.mixed(target, base, high, position, shape.layers)
        else:
            chosen[target.name] = recipes.balanced(target, roles[target.name], base)
    check_sets_used(targets, settings, shape)
    return chosen


def require_fit(target: Target, codec: Codec) -> Codec:
    if not codec.divides(target.shape[-1]):
        raise PlanError(
            f"{target.name}: {codec.label} is asked for, but its width {target.shape[-1]} is not a multiple of "
            f"{codec.group_size}",
            hint="choose a group size that divides the width, or keep",
        )
    return codec


def check_sets_used(targets: tuple[Target, ...], settings: Settings, shape: ModelShape) -> None:
    """A pattern that matches nothing, or nothing that it could change, is a typing error, not a wish. A name that is
    none is another model's.
    """
    names = {t.name for t in targets}
    if other := [name for name, _ in settings.codecs if name not in names]:
        raise PlanError(f"a format is given for {other[0]}, which this model has not", hint="was it another model's?")
    for pattern, codec in settings.sets:
        matched = [t for t in targets if recipes.matching_set(t.name, ((pattern, codec),))]
        if not matched:
            raise PlanError(
                f"--set '{pattern}={codec.label}' matches no tensor", hint="`--dry-run` lists the tensors' names"
            )
        if codec.quantized and all(mlx_lm_codec(shape.model_type, t) == KEEP for t in matched):
            raise PlanError(
                f"--set '{pattern}={codec.label}' matches only tensors that MLX keeps float, such as {matched[0].name}",
                hint="leave it out; `--dry-run` lists what is quantized",
            )


def check_bits(tensors: tuple[PlannedTensor, ...], settings: Settings, shape: ModelShape) -> list[str]:
    """Lists weights whose width forced another format; raises PlanError where the asked bits were not reached."""
    if settings.recipe == REPACK:
        return []
    base, remarks, missed, exact = settings.base, [], [], {name for name, _ in settings.codecs}
    for t in tensors:
        width = t.target.shape[-1] if t.target.shape else 1
        if base.divides(width) or mlx_lm_codec(shape.model_type, t.target) == KEEP:
            continue
        if t.name in exact or recipes.matching_set(t.name, settings.sets) is not None:
            continue
        became = t.codec.label if t.codec.quantized else DTYPES[t.dtype].label
        remarks.append(f"{t.name}: width {width} is not a multiple of {base.group_size}: becomes {became}")
        if not t.codec.quantized and t.role not in SENSITIVE | VOCABULARY:
            missed.append(t)
    if missed:
        raise PlanError(_missed_message(missed, tensors, base), hint=_missed_hint(missed, base))
    return remarks


def _missed_message(missed: list[PlannedTensor], tensors: tuple[PlannedTensor, ...], base: Codec) -> str:
    widths = sorted({t.target.shape[-1] for t in missed})
    share = sum(t.size for t in missed) / sum(t.size for t in tensors)
    return (
        f"{base.label} is not reached: {len(missed)} tensors ({share:.0%} of the weights) have widths {widths} that "
        f"group size {base.group_size} does not divide and would stay float, {missed[0].name} first"
    )


def _missed_hint(missed: list[PlannedTensor], base: Codec) -> str:
    fits = [g for g in (128, 64, 32) if g < base.group_size and all(t.target.shape[-1] % g == 0 for t in missed)]
    keep = "--set 'REGEX=keep' to leave them float knowingly"
    return f"use --group-size {fits[0]}, or {keep}" if fits else f"use {keep}"


def shape_remarks(shape: ModelShape, laid_out: Layout) -> list[str]:
    """What a user must hear about parts that are not converted."""
    remarks = []
    if others := sorted(set(shape.modalities) - {"text"}):
        parts = " and ".join(others)
        remarks.append(f"this model has {parts} parts: only its text part is converted")
    reasons: Counter[str] = Counter(reason for _, reason in laid_out.dropped)
    return remarks + [left_out_remark(reason, count) for reason, count in reasons.items()]


def left_out_remark(reason: str, count: int) -> str:
    return f"{count} tensors left out: {reason}"
