"""Every level that `convert` can write of a model, through the plans it would make; and why it cannot write others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxquant.codecs.repacked import REPACKED
from mlxquant.codecs.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, MX_MODES
from mlxquant.errors import PlanError, SourceError, UsageError
from mlxquant.families.checkpoint import has_merges, header_bytes
from mlxquant.fit.shares import experts_share, gguf_shares, mlx_shares
from mlxquant.fit.stored import mlx_name, stored_level
from mlxquant.fit.subject import Subject
from mlxquant.fit.values import Format, Level
from mlxquant.plan.gguf_types import FILE_TYPES, few, type_settings
from mlxquant.plan.plan import Plan, choose
from mlxquant.plan.recipe import MIXED, REPACK, Settings, settings

if TYPE_CHECKING:
    from mlxquant.plan.gguf_plan import GGUFPlan

# What is shown unless all are asked for.
BITS = (8, 6, 5, 4, 3, 2)
FILE_TYPES_SHOWN = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q2_K")
LEVELS = (*(f"mlx {bits}-bit" for bits in BITS), "mlx mxfp4", *(f"gguf {name}" for name in FILE_TYPES_SHOWN))
GROUP_SIZE = 64  # convert's default


@dataclass(frozen=True)
class Survey:
    """`levels`: what the model is at already, then all that can be written, MLX before GGUF, the largest first.
    `refused`: key of a level -> why it cannot be written."""

    levels: tuple[Level, ...]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class _Candidate:
    """`wanted`: MLX's settings; None for a file type of GGUF, which is its name."""

    name: str
    options: tuple[str, ...]
    wanted: Settings | None = None

    @property
    def format(self) -> Format:
        return "mlx" if self.wanted else "gguf"

    @property
    def key(self) -> str:
        return f"{self.format} {self.name}"


def levels(subject: Subject, all: bool = False) -> tuple[Level, ...]:
    """`survey`'s levels."""
    return survey(subject, all).levels


def survey(subject: Subject, all: bool = False) -> Survey:
    """Asks the plan of each level, the usual ones or `all` of them. No weight is read.

    What is quantized already is not quantized again, as `convert` would not unasked; a GGUF file's blocks are taken
    over. Raises SourceError and UnsupportedError for a model that neither mlx-lm nor llama.cpp has.
    """
    first = _as_it_is(subject)
    found: list[Level] = []
    reasons: dict[str, str] = {}
    for candidate in _candidates(subject, all):
        if candidate.key in {level.key for level in first}:
            continue
        try:
            found.append(_level(subject, candidate))
        except (SourceError, PlanError, UsageError) as error:
            reasons[candidate.key] = error.message
    found.sort(key=lambda level: (level.format != "mlx", -level.nbytes))
    return Survey((*first, *found), reasons)


def _as_it_is(subject: Subject) -> list[Level]:
    """None of a checkpoint that only GGUF's converter reads, as experts fused by transformers 5."""
    try:
        return [stored_level(subject)]
    except SourceError:
        _ = subject.any_basis  # raises where there is nothing to be made of the model
        return []


def left_out(subject: Subject) -> tuple[tuple[str, int, int], ...]:
    """(reason, tensors, bytes) of what the source holds and a loaded model does not: vision towers, tables for further
    tokens. Raises SourceError and UnsupportedError."""
    sums: defaultdict[str, list[int]] = defaultdict(list)
    for name, reason in subject.any_basis.layout.dropped:
        sums[reason].append(subject.specs[name].nbytes)
    return tuple((reason, len(each), sum(each)) for reason, each in sums.items())


def _candidates(subject: Subject, all: bool) -> Iterator[_Candidate]:
    """The usual ones are among all, under the same names."""
    if any(kind in REPACKED for kind in subject.quantized.values()):
        yield _Candidate(REPACK, ("--recipe", REPACK), settings(recipe=REPACK))
    yield from _mlx_candidates(all)
    for name in FILE_TYPES if all else FILE_TYPES_SHOWN:
        yield _Candidate(name, ("--type", name))


def _mlx_candidates(all: bool) -> Iterator[_Candidate]:
    recipes, groups = (("balanced", "uniform"), AFFINE_GROUP_SIZES) if all else (("balanced",), (GROUP_SIZE,))
    for recipe in recipes:
        for bits in reversed(AFFINE_BITS):
            for group_size in groups:
                yield _mlx(("--bits", str(bits)), group_size, recipe, bits=bits)
        for mode in MX_MODES if all else ("mxfp4",):
            yield _mlx(("--mode", mode), None, recipe, mode=mode)
    for recipe in MIXED if all else ():
        for group_size in groups:
            yield _mlx((), group_size, recipe)


def _mlx(
    options: tuple[str, ...], group_size: int | None, recipe: str, *, bits: int | None = None, mode: str = "affine"
) -> _Candidate:
    """With the options that `convert` must be given; its defaults are not."""
    if group_size not in (None, GROUP_SIZE):
        options += ("--group-size", str(group_size))
    if recipe != "balanced":
        options += ("--recipe", recipe)
    wanted = settings(bits=bits, group_size=group_size, mode=mode, recipe=recipe)
    return _Candidate(mlx_name(wanted.base, recipe), options, wanted)


def _level(subject: Subject, candidate: _Candidate) -> Level:
    """Raises SourceError, PlanError and UsageError where it cannot be written."""
    if candidate.wanted is not None:
        plan = choose(subject.basis, candidate.wanted, subject.quantized)
        return _mlx_level(subject, candidate, plan)
    from mlxquant.plan.gguf_plan import choose_types, plan_gguf

    wanted = type_settings(candidate.name)
    if subject.gguf is not None:
        return _gguf_level(subject, candidate, plan_gguf(*subject.gguf, wanted))
    return _gguf_level(subject, candidate, choose_types(subject.gguf_basis, wanted, rounded=subject.quantized))


def _mlx_level(subject: Subject, candidate: _Candidate, plan: Plan) -> Level:
    """mlx-lm loads every tensor of a folder that we write."""
    shares = mlx_shares(subject.basis)
    nbytes = largest = token = 0
    names: list[str] = []
    for tensor in plan.tensors:
        parts = tensor.parts
        sizes = [part.nbytes for part in parts]
        names += [part.name for part in parts]
        nbytes += sum(sizes)
        largest = max(largest, *sizes)
        token += shares[tensor.name].of(sum(sizes))
    return Level(
        name=candidate.name,
        format="mlx",
        options=candidate.options,
        nbytes=nbytes,
        loaded_bytes=nbytes,
        largest_bytes=largest,
        token_bytes=token,
        size=plan.size,
        header_bytes=header_bytes("mlx", 0, names),
        remarks=tuple(_condensed(plan)),
    )


def _gguf_level(subject: Subject, candidate: _Candidate, plan: GGUFPlan) -> Level:
    """llama.cpp maps every tensor of the file."""
    shape = subject.shape
    experts = experts_share(shape.experts_per_token, shape.experts)
    shares = gguf_shares({tensor.name: tensor.target.shape for tensor in plan.tensors}, experts)
    sizes = {tensor.name: tensor.nbytes for tensor in plan.tensors}
    nbytes = sum(sizes.values())
    return Level(
        name=candidate.name,
        format="gguf",
        options=candidate.options,
        nbytes=nbytes,
        loaded_bytes=nbytes,
        largest_bytes=max(sizes.values()),
        token_bytes=sum(shares[name].of(size) for name, size in sizes.items()),
        size=plan.size,
        header_bytes=header_bytes("gguf", shape.vocab_size, sizes, has_merges(subject.config)),
        remarks=plan.remarks,
    )


def _condensed(plan: Plan) -> Iterator[str]:
    """The plan's remarks; what is the same of many tensors once, as in a GGUF plan."""
    names = {tensor.name for tensor in plan.tensors}
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for remark in plan.remarks:
        name, _, text = remark.partition(": ")
        if name in names:
            alike[text].append(name)
        else:
            yield remark
    for text, tensors in alike.items():
        yield f"{few(tensors)}: {text}"
