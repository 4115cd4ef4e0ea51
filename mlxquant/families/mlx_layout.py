"""Which rows of which source tensors become which MLX tensor, for the checkpoints of every family we know.

The result is what stock mlx-lm's `Model.sanitize` makes of the same checkpoint: names, shapes and values
(tests run the real one beside it). Unlike there, nothing is lost in silence: a tensor is used, dropped with a
reason, or an error. Both a Hugging Face checkpoint and an unquantized MLX folder (experts stacked already)
are read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.known import FACTS
from mlxquant.families.layout import Change, Layout, Piece, Target
from mlxquant.families.mlx_config import text_config
from mlxquant.families.mlx_modules import FAMILIES, dimensions, layer_flags, made_of, model_flags, sizes
from mlxquant.families.mlx_quant import mlx_lm_codec
from mlxquant.families.mlx_rows import Family, How, Row
from mlxquant.families.shape import ModelShape
from mlxquant.tensors import TensorSpec

__all__ = ["layout", "mlx_lm_codec"]

_FLOATS = ("F64", "F32", "F16", "BF16")
_CHANGES: dict[How, Change] = {"add_one": "add_one", "mla_q": "mla_embed_q", "mla_v": "mla_unembed"}
# Families whose text model lies under language_model in MLX; those whose checkpoints may be for text alone.
_NESTED = ("gemma3", "gemma4", "mistral3", "qwen3_5", "qwen3_5_moe", "qwen3_vl")
_TEXT_ALONE = ("qwen3_5", "qwen3_5_moe", "qwen3_vl")
_TOWERS = ("vision_tower.", "model.visual.", "visual.")
_COMMON_DROPS = ((r".*rotary_emb\.inv_freq", "computed at load time, not learned"),)
_NAMED = 8  # names in one message
_ENOUGH = 200  # missing names after which looking further tells nobody more


def layout(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Layout:
    """The targets of stock mlx-lm's model for this checkpoint, in the model's order, and what was left out.

    SourceError: tensors missing, of another shape than config.json says, or of mixed dtypes.
    UnsupportedError: an unknown family, tensors the family has no place for, or weights that are not float.
    """
    shape = ModelShape.from_config(config)
    sources = {_canonical(shape.module, name): spec for name, spec in specs.items()}
    build = _Build(shape, FAMILIES[shape.module], dimensions(shape), sources)
    if len(sources) < len(specs):
        raise SourceError(f"the source has tensors twice, under two names: {_some(_twice(shape.module, specs))}")
    build.shifted = _is_mlx(shape.module, sources)
    build.refuse()
    present = any(name in sources for name in ("lm_head.weight", "language_model.lm_head.weight"))
    build.flags = all_flags(config, shape, present)
    for row, name, source in expected(shape, build.flags, build.dims):
        if (target := build.target(row, name, source)) is not None:
            build.targets.append(target)
        if len(build.missing) >= _ENOUGH:
            break
    build.check_missing()
    return Layout(tuple(build.targets), build.dropped(config))


def _canonical(module: str, name: str) -> str:
    """MLX's name for what stands outside or inside of model in other checkpoints of the same family."""
    if module not in _NESTED:
        return name
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    bare = module in _TEXT_ALONE and not name.startswith(("language_model.", *_TOWERS))
    return f"language_model.{name}" if bare or name == "lm_head.weight" else name


def published(module: str, name: str) -> str:
    """The way back: the name that today's checkpoints of the family have for what MLX calls `name`."""
    if module not in _NESTED or module in ("gemma3", "mistral3"):
        return name
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return name.removeprefix("language_model.")


def _twice(module: str, names: Iterable[str]) -> list[str]:
    seen = Counter(_canonical(module, name) for name in names)
    return [name for name, count in seen.items() if count > 1]


def _is_mlx(module: str, sources: Mapping[str, TensorSpec]) -> bool:
    """Whether this is an MLX folder, as mlx-lm tells it: by its stacked experts or its swapped convolutions."""
    if module in ("qwen3_5", "qwen3_5_moe"):
        return not any("conv1d.weight" in name and spec.shape[-1:] != (1,) for name, spec in sources.items())
    return not any(".experts.0." in name for name in sources)


def all_flags(config: Mapping[str, Any], shape: ModelShape, head_present: bool) -> set[str]:
    """The words of `when` that hold for the whole model; `head_present`: the checkpoint has an output head."""
    return model_flags(text_config(config), shape) | _head(config, shape, head_present)


def _head(config: Mapping[str, Any], shape: ModelShape, present: bool) -> set[str]:
    """'head' where mlx-lm's model has an output head, 'copied_head' where it must be copied from the
    embedding."""
    rule = FACTS[shape.module].tie
    stated = text_config(config).get("tie_word_embeddings")
    if rule == "present":
        return {"head"} if present else set()
    if rule == "never":
        return {"copied_head"} if stated is True and not present else {"head"}
    if rule == "always" and stated is False:
        raise UnsupportedError(
            f"config.json says tie_word_embeddings: false, but stock mlx-lm's {shape.module} "
            "has no output head of its own"
        )
    if rule == "config" and shape.tied and stated is None and present:
        raise SourceError(
            "the source has lm_head.weight, but config.json does not say whether embeddings are tied; "
            "stock mlx-lm would take them as tied and lose it",
            hint='add "tie_word_embeddings": false to config.json if lm_head.weight is to be used, else true',
        )
    return set() if shape.tied else {"head"}


@dataclass
class _Build:
    """What one call of layout() knows and collects.

    `shifted`: an MLX folder, whose norms are 1 + w already.
    """

    shape: ModelShape
    family: Family
    dims: Mapping[str, int]
    sources: Mapping[str, TensorSpec]
    shifted: bool = False
    flags: set[str] = field(default_factory=set)
    targets: list[Target] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)

    def refuse(self) -> None:
        """Raises UnsupportedError for what is known not to work."""
        for name in self.sources:
            for pattern, why in self.family.refuses:
                if re.fullmatch(pattern, name):
                    raise UnsupportedError(f"{self.sources[name].name}: {why}")
        if self.shape.module == "deepseek_v3" and self.shape.layers > 61:
            raise UnsupportedError(
                f"config.json: num_hidden_layers is {self.shape.layers}, but stock mlx-lm's deepseek_v3 drops layer 61"
            )

    def target(self, row: Row, name: str, source: str) -> Target | None:
        """The target for one expected tensor, or None with the missing names noted."""
        out = sizes(row.dims, self.dims)
        if source != name and name in self.sources:  # an MLX folder: stacked, split or halved already
            return self.make(row, name, out, [name], out, "same")
        names, expected = made_of(row, source, self.dims)
        if row.how == "conv" and (spec := self.sources.get(name)) is not None and spec.shape == out:
            expected = out  # an MLX folder: its axes swapped already
        return self.make(row, name, out, names, expected, row.how)

    def make(
        self,
        row: Row,
        name: str,
        shape: tuple[int, ...],
        names: list[str],
        expected: tuple[int, ...],
        how: How,
    ) -> Target | None:
        if absent := [n for n in names if n not in self.sources]:
            self.missing += [n for n in absent[:_ENOUGH] if n not in self.missing]
            return None
        specs = [self.sources[n] for n in names]
        for canonical, spec in zip(names, specs, strict=True):
            self.used.add(canonical)
            self.check(spec, expected, specs[0])
        rows = specs[0].rows  # one shape for all
        return Target(
            name=name,
            shape=shape,
            dtype=specs[0].dtype,
            pieces=tuple(_pieces(row, specs, shape)) if how == "half" else tuple(Piece(s.name, 0, rows) for s in specs),
            change="none" if how == "add_one" and self.shifted else _CHANGES.get(how, "none"),
            cast=row.cast,
        )

    def check(self, spec: TensorSpec, expected: tuple[int, ...], first: TensorSpec) -> None:
        if spec.shape != expected:
            raise SourceError(
                f"{spec.name} is {list(spec.shape)}, expected {list(expected)} "
                f"from config.json ({self.shape.model_type})"
            )
        if spec.dtype not in _FLOATS:
            raise UnsupportedError(
                f"{spec.name} is {spec.dtype}, expected float weights ({', '.join(_FLOATS)})",
                hint="convert from the original, unquantized model",
            )
        if spec.dtype != first.dtype:
            raise SourceError(
                f"{spec.name} is {spec.dtype}, but {first.name}, which it is joined with, is {first.dtype}"
            )

    def check_missing(self) -> None:
        if self.missing:
            count = f"{len(self.missing)} tensors are" if len(self.missing) > 1 else "a tensor is"
            count = f"at least {count}" if len(self.missing) >= _ENOUGH else count
            raise SourceError(
                f"{count} missing that config.json asks for: {_some(self.missing)}",
                hint="is a shard missing, or does config.json belong to another model?",
            )

    def dropped(self, config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """(name, reason) of everything left out; UnsupportedError when there is no reason for it."""
        left, unknown = [], []
        for canonical, spec in self.sources.items():
            if canonical in self.used:
                continue
            if (reason := self.reason(canonical, config)) is not None:
                left.append((spec.name, reason))
            else:
                unknown.append(spec.name)
        if unknown:
            count = f"{len(unknown)} tensors of the source have" if len(unknown) > 1 else "a tensor of the source has"
            raise UnsupportedError(f"{count} no place in a {self.shape.model_type} model: {_some(unknown)}")
        return tuple(left)

    def reason(self, name: str, config: Mapping[str, Any]) -> str | None:
        for pattern, why in (*self.family.drops, *_COMMON_DROPS):
            if re.fullmatch(pattern, name):
                return why
        if name.removeprefix("language_model.") == "lm_head.weight" and "head" not in self.flags:
            return "tied: the embedding is the output head"
        shares = re.match(r".*\.layers\.(\d{1,9})\.self_attn\.[kv]_(proj|norm)\.", name)
        if shares and int(shares[1]) >= self.shape.layers - self.shape.shared_kv_layers:
            return "not used: the layer shares the keys and values of an earlier one"
        more = config.get("num_nextn_predict_layers")
        if self.shape.module in ("deepseek_v3", "glm4_moe", "glm4_moe_lite") and type(more) is int:
            index = re.match(r"model\.layers\.(\d{1,9})\.", name)
            if index and self.shape.layers <= int(index[1]) < self.shape.layers + more:
                return "multi-token prediction, which mlx-lm does not run"
        return None


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _pieces(row: Row, specs: list[TensorSpec], shape: tuple[int, ...]) -> Iterator[Piece]:
    """One half of every expert's fused gate and up matrix: rows e * 2m + part * m, m of them."""
    experts, rows = shape[:2]
    for e in range(experts):
        yield Piece(specs[0].name, (2 * e + row.part) * rows, rows)


def expected(shape: ModelShape, flags: set[str], dims: Mapping[str, int]) -> Iterator[tuple[Row, str, str]]:
    """(row, MLX name, source name) in the model's order: embedding, layers, the rest of the root."""
    family = FAMILIES[shape.module]
    root = [row for row in family.root if set(row.when.split()) <= flags]
    yield root[0], root[0].name, root[0].name
    for index in range(shape.layers):
        here = flags | layer_flags(shape, index)
        for row in family.layer:
            if set(row.when.split()) <= here:
                for one in _repeated(row, dims):
                    at = f"{family.prefix}.{index}."
                    yield one, at + one.name, at + (one.source or one.name)
    for row in root[1:]:
        for one in _repeated(row, dims):
            yield one, one.name, one.source or one.name


def _repeated(row: Row, dims: Mapping[str, int]) -> Iterator[Row]:
    if not row.repeat:
        yield row
    for n in range(dims[row.repeat] if row.repeat else 0):
        yield replace(row, name=row.name.format(n=n))
