"""Bits and group size for each tensor, so that the divergence they are expected to cost is least and the bytes of
everything that is written stay within a limit.

A unit is a tensor as MLX stores it: tied and fused weights are one already, and stock mlx-lm reads bits and group size
of every module by itself (mlx_lm/utils.py, load_model: class_predicate), so no two modules must be alike.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from mlxquant.codecs.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, KEEP, Codec, affine
from mlxquant.errors import PlanError
from mlxquant.families.mlx_quant import mlx_lm_codec
from mlxquant.families.roles import SENSITIVE
from mlxquant.plan.plan import Plan, PlannedTensor
from mlxquant.plan.recipe import SENSITIVE_BITS, Settings, matching_set
from mlxquant.plan.sensitivities import Cost, Sensitivities
from mlxquant.plan.solver import Option, Unit, solve

FORMATS = tuple(affine(bits, group_size) for bits in AFFINE_BITS for group_size in AFFINE_GROUP_SIZES)


@dataclass(frozen=True)
class Choice:
    """chosen: of every tensor, what stays float included. free: names of those there was something to decide for.
    remarks: what had to be given up.
    """

    limit_bytes: int
    chosen: Mapping[str, Option]
    sizes: Mapping[str, int]
    free: frozenset[str]
    remarks: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(option.nbytes for option in self.chosen.values())

    @property
    def bpw(self) -> float:
        """Bits per weight over everything that is written."""
        return 8 * self.nbytes / sum(self.sizes.values())

    @property
    def nats(self) -> float:
        """Mean divergence a token that is expected: the tensors' sum."""
        return sum(option.nats for option in self.chosen.values())

    @property
    def commonest(self) -> Codec:
        """The format of most weights."""
        weights: Counter[Codec] = Counter()
        for name, option in self.chosen.items():
            if option.codec.quantized:
                weights[option.codec] += self.sizes[name]
        return weights.most_common(1)[0][0] if weights else KEEP

    def settings(self, given: Settings) -> Settings:
        """`given` with each tensor's format by name, and the commonest as the base."""
        codecs = tuple((name, option.codec) for name, option in self.chosen.items() if name in self.free)
        base = self.commonest
        if not base.quantized:
            return replace(given, codecs=codecs)
        return replace(given, codecs=codecs, bits=base.bits, group_size=base.group_size, mode=base.mode)


def limit_of(plan: Plan, bpw: float) -> int:
    """The most bytes at which Plan.bpw is not above `bpw`."""
    return int(Fraction(bpw) * plan.size // 8)


def formats(plan: Plan) -> dict[str, tuple[Codec, ...]]:
    """For each tensor that a budget decides on, what it may become: of what MLX quantizes and no --set names, the
    formats whose groups divide its width.
    """
    found = {}
    for tensor in plan.tensors:
        kept = mlx_lm_codec(plan.model_type, tensor.target) == KEEP
        if not kept and matching_set(tensor.name, plan.settings.sets) is None:
            found[tensor.name] = tuple(codec for codec in FORMATS if codec.divides(tensor.target.shape[-1]))
    return {name: codecs for name, codecs in found.items() if codecs}


def budget(plan: Plan, costs: Mapping[str, Mapping[Codec, Cost]], limit_bytes: int) -> Choice:
    """The cheapest set of formats within limit_bytes. costs: as Sensitivities has them; plan: whatever its own formats.

    Routers, latents and recurrent parts keep 8 bits, unless the limit cannot be met so: then the remarks say it.
    Raises PlanError when even the smallest is too large (naming its bpw), or when a tensor has no costs.
    """
    free, sizes = formats(plan), {t.name: t.size for t in plan.tensors}
    remarks = []
    units = [_unit(t, free.get(t.name, ()), costs, SENSITIVE_BITS) for t in plan.tensors]
    if _least_bytes(units) > limit_bytes:
        units = [_unit(t, free.get(t.name, ()), costs, 0) for t in plan.tensors]
        if any(t.role in SENSITIVE and t.name in free for t in plan.tensors):
            remarks = [f"routers, latents and recurrent parts may get less than {SENSITIVE_BITS} bits: with them at "
                       f"{SENSITIVE_BITS} the limit cannot be met"]  # fmt: skip
    if (least := _least_bytes(units)) > limit_bytes:
        raise PlanError(
            f"{8 * limit_bytes / plan.size:.3f} bits per weight cannot be met: the smallest that this model can have "
            f"is {8 * least / plan.size:.3f} ({least:,} bytes)",
            hint="ask for that much or more; what stays float and the embedding count, too",
        )
    return Choice(limit_bytes, solve(units, limit_bytes), sizes, frozenset(free), tuple(remarks))


def _least_bytes(units: list[Unit]) -> int:
    return sum(min(option.nbytes for option in unit.options) for unit in units)


def _unit(
    tensor: PlannedTensor, codecs: tuple[Codec, ...], costs: Mapping[str, Mapping[Codec, Cost]], floor: int
) -> Unit:
    """floor: bits that what decides a lot and weighs little must have."""
    if not codecs:
        return Unit(tensor.name, (Option(tensor.codec, tensor.nbytes, 0.0),))
    if tensor.role in SENSITIVE:
        codecs = tuple(codec for codec in codecs if codec.bits >= floor)
    known = costs.get(tensor.name, {})
    options = [(codec, known[codec].nats) for codec in codecs if codec in known]
    if not options:
        raise PlanError(
            f"{tensor.name}: what it costs at {codecs[0].label} was not measured", hint="measure the model again"
        )
    return Unit(tensor.name, tuple(Option(codec, _nbytes(tensor, codec), nats) for codec, nats in options))


def _nbytes(tensor: PlannedTensor, codec: Codec) -> int:
    return sum(part.nbytes for part in codec.parts(tensor.name, tensor.target.shape, tensor.dtype))


@dataclass(frozen=True)
class Reason:
    """Why a tensor has another format than the commonest. more_bits: for each weight. ratio: what its weights would
    cost at the commonest, each, against the median tensor; that is slope (nats for one unit of error) times error
    (relative squared), against their medians.
    """

    name: str
    codec: Codec
    more_bits: float
    ratio: float
    slope: float
    error: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.codec.label} ({self.more_bits:+.2f} bits): {self.ratio:.2g} times the median's "
            f"divergence a weight (slope {self.slope:.2g} x, error {self.error:.2g} x)"
        )


def explain(choice: Choice, measured: Sensitivities) -> list[Reason]:
    """One for each tensor whose format is not the commonest, the most bits first."""
    common = choice.commonest
    points = dict(_densities(choice, measured, common))
    if not points:
        return []
    middle = [statistics.median(values) for values in zip(*points.values(), strict=True)]
    reasons = []
    for name, point in points.items():
        option = choice.chosen[name]
        if option.codec != common:
            more = 8 * option.nbytes / choice.sizes[name] - _bpw(common, choice, name)
            reasons.append(Reason(name, option.codec, more, *map(_ratio, point, middle)))
    return sorted(reasons, key=lambda reason: (-reason.more_bits, -reason.ratio))


def _densities(
    choice: Choice, measured: Sensitivities, common: Codec
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Of each free tensor: nats a weight, slope a weight and error, at the commonest format or the next it has."""
    for name in choice.chosen:
        costs = measured.costs.get(name, {}) if name in choice.free else {}
        if costs:
            cost = costs.get(common) or costs[min(costs, key=lambda codec: _distance(codec, common))]
            yield name, (cost.nats / choice.sizes[name], cost.slope / choice.sizes[name], cost.error)


def _distance(codec: Codec, other: Codec) -> tuple[int, int]:
    return abs(codec.bits - other.bits), abs(codec.group_size - other.group_size)


def _bpw(codec: Codec, choice: Choice, name: str) -> float:
    """Of an affine format with the scales and biases of this tensor's dtype, which its own format tells."""
    own = choice.chosen[name]
    if codec.mode != "affine" or own.codec.mode != "affine":
        return float(codec.bits)
    group_bits = (8 * own.nbytes / choice.sizes[name] - own.codec.bits) * own.codec.group_size
    return codec.bits + group_bits / codec.group_size


def _ratio(value: float, middle: float) -> float:
    return value / middle if middle else 1.0
