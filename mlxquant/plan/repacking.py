"""A quantized source: which of its blocks are taken over as they are, and a word before others are rounded again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlxquant.codecs.repacked import REPACKED
from mlxquant.codecs.spec import KEEP, Codec
from mlxquant.errors import PlanError
from mlxquant.families.layout import Target
from mlxquant.families.mlx_layout import mlx_lm_codec
from mlxquant.families.shape import ModelShape
from mlxquant.plan import recipe as recipes
from mlxquant.plan.recipe import REPACK, Settings

if TYPE_CHECKING:
    from mlxquant.plan.plan import PlannedTensor


def types(
    targets: tuple[Target, ...], quantized: Mapping[str, str], settings: Settings, shape: ModelShape
) -> dict[str, str]:
    """The ggml type of each target whose blocks are taken over. Raises PlanError where there is nothing to take over.

    Left to decoding: what MLX keeps float, what `--set` names, and targets that are put together from several types.
    """
    if settings.recipe != REPACK:
        return {}
    if not any(kind in REPACKED for kind in quantized.values()):
        raise PlanError(
            "--recipe repack: the source has no quantized GGUF blocks to take over",
            hint="leave it out to quantize the source's float weights",
        )
    found: dict[str, str] = {}
    for target in targets:
        types = {quantized.get(piece.source) for piece in target.pieces}
        (only,) = types if len(types) == 1 else (None,)
        asked = recipes.matching_set(target.name, settings.sets)
        if only in REPACKED and asked is None and mlx_lm_codec(shape.model_type, target) != KEEP:
            found[target.name] = str(only)
    return found


def refuse_second_loss(tensors: tuple[PlannedTensor, ...], quantized: Mapping[str, str], settings: Settings) -> None:
    """Raises PlanError where weights that were quantized before would be quantized again without anybody's wish."""
    again = [
        (t, piece.source)
        for t in tensors
        if t.codec.quantized and t.repack is None
        for piece in t.target.pieces[:1]
        if piece.source in quantized
    ]
    if again and not settings.requantize:
        tensor, source = again[0]
        ggml = quantized[source] in REPACKED
        raise PlanError(
            f"{tensor.name} is {quantized[source]} in the source, {len(again)} tensors in all are quantized already: "
            f"rounding them to {tensor.codec.label} would add a second loss",
            hint=("use --recipe repack, which adds next to none, " if ggml else "convert the full-precision model, ")
            + "or add --allow-requantize",
        )


def commonest(tensors: tuple[PlannedTensor, ...]) -> Codec:
    """The codec of most quantized weights: the one that config.json need not repeat for each module."""
    sizes: Counter[Codec] = Counter()
    for t in tensors:
        if t.codec.quantized:
            sizes[t.codec] += t.size
    return sizes.most_common(1)[0][0] if sizes else KEEP


def remarks(tensors: tuple[PlannedTensor, ...]) -> list[str]:
    """One line for each ggml type: what it becomes and what that adds."""
    counts = Counter(t.repack for t in tensors if t.repack)
    return [f"{count} tensor{'s' * (count > 1)} {name} -> {_text(name)}" for name, count in counts.most_common()]


def _text(type_name: str) -> str:
    known = REPACKED[type_name]
    if known.lossless:
        return f"{known.codec.label}: codes unchanged"
    share = known.extra / known.own
    return f"{known.codec.label}: adds {share:.1%} to the error that {type_name} has (NMSE {known.extra:.1e})"


def to_json(type_name: str | None) -> dict[str, Any]:
    """What taking over a GGUF file's blocks costs, on Gaussian weights (codecs/repacked.py)."""
    if type_name is None:
        return {}
    known = REPACKED[type_name]
    return {"repacked_from": type_name, "nmse_of_format": known.own, "nmse_added": known.extra}
