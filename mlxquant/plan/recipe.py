"""Which codec each tensor gets. Pure decisions on names, shapes and roles.

uniform     what stock `mlx_lm.convert` would do, tensor for tensor and byte for byte
mixed_*     mlx-lm's four mixed recipes, likewise byte for byte
balanced    uniform at `bits`, but what decides a lot and weighs little keeps its precision: routers, shared-expert
            gates, MLA latents, SSM and convolution parts at 8 bits or more, embeddings and head at 6 or more
repack      a quantized GGUF file's own blocks in MLX arrays, codes unchanged where MLX has the format
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from mlxquant.codecs.spec import AFFINE_GROUP_SIZES, KEEP, MODES, MX_MODES, Codec, affine, parse_codec
from mlxquant.errors import PlanError, UsageError
from mlxquant.families.layout import Target
from mlxquant.families.roles import SENSITIVE, VOCABULARY, Role
from mlxquant.tensors import FLOAT_CODES

# name -> (bits of most tensors, bits of the chosen ones); mlx_lm/convert.py, mixed_quant_predicate_builder.
MIXED = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
REPACK = "repack"
RECIPES = ("balanced", "uniform", *MIXED, REPACK)
# Who chooses the codes. rtn: nearest to a scale by minimum and maximum, mlx-lm's bytes. search: scale and bias of least
# squared error, codecs/search.py. The others need calibration text.
RTN, SEARCH, BEST = "rtn", "search", "best"
METHODS = (RTN, SEARCH, "awq", "gptq", BEST)
SEARCHED_MODES = ("affine", "mxfp4")
SENSITIVE_BITS, VOCABULARY_BITS = 8, 6
_WHERE_GIVEN = ("sets", "codecs", "method", "rotate")


@dataclass(frozen=True)
class Settings:
    """What the user asked for. `dtype` is a dtype code or None (the source's); `sets` are tried in order. `requantize`:
    weights that are quantized already may be quantized once more. `codecs`: of tensors by their whole name, as a bit
    budget gives them (budget.py); what they name they decide alone. `method`: one of METHODS. `rotate`: the residual
    stream and value heads are put into another basis first."""

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    recipe: str = "balanced"
    dtype: str | None = None
    sets: tuple[tuple[str, Codec], ...] = field(default=())
    requantize: bool = False
    codecs: tuple[tuple[str, Codec], ...] = field(default=())
    method: str = RTN
    rotate: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values, codecs by their labels. `codecs` and `rotate` only where there are any and `method` where it is
        not rtn: digests of old plans stay.
        """
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _WHERE_GIVEN}
        pairs: dict[str, Any] = {"sets": [[pattern, codec.label] for pattern, codec in self.sets]}
        if self.codecs:
            pairs["codecs"] = [[name, codec.label] for name, codec in self.codecs]
        if self.rotate:
            pairs["rotate"] = True
        return plain | pairs | ({} if self.method == RTN else {"method": self.method})

    @property
    def base(self) -> Codec:
        """The codec of an ordinary weight. Raises UsageError for a width the mode does not have."""
        if self.mode == "affine":
            return affine(self.bits or MIXED.get(self.recipe, (4,))[0], self.group_size or 64)
        group_size, bits = MX_MODES[self.mode]
        if self.bits not in (None, bits) or self.group_size not in (None, group_size):
            raise UsageError(
                f"{self.mode} has {bits} bits and group size {group_size}, nothing else",
                hint="leave out --bits and --group-size, or use --mode affine",
            )
        return Codec(self.mode, bits, group_size)


def settings(
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    recipe: str = "balanced",
    dtype: str | None = None,
    sets: tuple[str, ...] = (),
    requantize: bool = False,
    codecs: tuple[tuple[str, str], ...] = (),
    method: str | None = None,
    rotate: bool = False,
) -> Settings:
    """Settings from the command line's words; every contradiction is a UsageError here."""
    if mode not in MODES or recipe not in RECIPES:
        raise UsageError(f"mode {mode!r} or recipe {recipe!r} is unknown", hint=f"modes: {MODES}; recipes: {RECIPES}")
    if recipe in MIXED and mode != "affine":
        raise UsageError(f"recipe {recipe} is defined for --mode affine only, not {mode}", hint="use --recipe balanced")
    if recipe in MIXED and bits not in (None, MIXED[recipe][0]):
        raise UsageError(
            f"recipe {recipe} has {MIXED[recipe][0]} bits, not {bits}",
            hint="leave out --bits, or use --recipe balanced",
        )
    if dtype is not None and dtype not in FLOAT_CODES:
        raise UsageError(f"--dtype {dtype!r} is unknown", hint=f"one of {tuple(FLOAT_CODES)}")
    if recipe == REPACK and (bits, group_size, mode, dtype) != (None, None, "affine", None):
        raise UsageError(
            "--recipe repack keeps the file's own formats, with float16 scales",
            hint="leave out --bits, --group-size, --mode and --dtype, or choose another recipe",
        )
    code = FLOAT_CODES[dtype] if dtype else None
    exact = tuple((name, parse_codec(label)) for name, label in codecs)
    chosen = _method(method, recipe, mode, bits)
    patterns = tuple(map(_parse_set, sets))
    made = Settings(bits, group_size, mode, recipe, code, patterns, requantize, exact, chosen, rotate)
    if rotate and chosen == RTN:
        raise UsageError("--rotate is for methods that look at the model, and rtn does not", hint="add --method gptq")
    _ = made.base  # says now what could not be done
    return made


def _method(method: str | None, recipe: str, mode: str, bits: int | None) -> str:
    """uniform and the mixed recipes promise mlx-lm's bytes, so nothing but rtn unasked. At 2 bits what has the least
    squared error says less of what the model said than what rtn keeps of its largest weights (docs/LOG.md, 2026-11-22).
    """
    if method is None:
        return SEARCH if recipe == "balanced" and mode in SEARCHED_MODES and bits != 2 else RTN
    if method not in METHODS:
        raise UsageError(f"--method {method!r} is unknown", hint=f"one of {METHODS}")
    if recipe == REPACK and method != RTN:
        raise UsageError(f"--recipe repack keeps the file's own codes, and --method {method} chooses others")
    if mode not in SEARCHED_MODES and method != RTN:
        raise UsageError(
            f"--method {method} knows {' and '.join(SEARCHED_MODES)}, not {mode}", hint="leave --method out"
        )
    return method


def _parse_set(text: str) -> tuple[str, Codec]:
    pattern, equals, codec = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--set {text!r} has no '='", hint="write it like --set 'down_proj=8g32' or 'lm_head=keep'")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"--set {text!r}: {pattern!r} is no regular expression ({error})") from error
    return pattern, parse_codec(codec)


def matching_set(name: str, sets: tuple[tuple[str, Codec], ...]) -> Codec | None:
    """The codec of the first pattern found anywhere in the tensor's name."""
    return next((codec for pattern, codec in sets if re.search(pattern, name)), None)


def fit_group(codec: Codec, width: int) -> Codec:
    """The same codec with the largest group size up to its own that divides `width`; KEEP when none does."""
    if codec.divides(width):
        return codec
    if codec.mode != "affine":
        return KEEP
    smaller = [g for g in AFFINE_GROUP_SIZES if g < codec.group_size and width % g == 0]
    return affine(codec.bits, max(smaller)) if smaller else KEEP


def balanced(target: Target, role: Role, base: Codec) -> Codec:
    """The default: `base`, with a floor of bits for the roles that decide a lot."""
    floor = SENSITIVE_BITS if role in SENSITIVE else VOCABULARY_BITS if role in VOCABULARY else 0
    if base.bits < floor:
        # An mx mode has no wider sibling with its own block structure, so the floor is affine there too.
        group_size = base.group_size if base.mode == "affine" else 64
        base = affine(floor, group_size)
    return fit_group(base, target.shape[-1])


def mixed(target: Target, base: Codec, high_bits: int, layer_position: int, layers: int) -> Codec:
    """mlx_lm/convert.py, mixed_quant_predicate: more bits for the head and some layers' value and down projections."""
    if not base.divides(target.shape[-1]):
        return KEEP
    path = target.name.removesuffix(".weight")
    parts = path.split(".")
    index = int(parts[layer_position]) if len(parts) > layer_position and parts[layer_position].isdigit() else 0
    first, last = layers // 8, 7 * layers // 8
    chosen_layer = index < first or index >= last or (index - first) % 3 == 2
    value_or_down = any(key in path for key in ("v_proj", "v_a_proj", "v_b_proj", "down_proj"))
    high = (value_or_down and chosen_layer) or "lm_head" in path
    return affine(high_bits, base.group_size) if high else base


def layer_position(targets: tuple[Target, ...]) -> int:
    """Where the layer number stands in a dotted name, read off the first down projection as mlx-lm does."""
    for target in targets:
        if "down_proj" in target.name:
            return next((i for i, part in enumerate(target.name.split(".")) if part.isdigit()), 0)
    raise PlanError(
        "the mixed recipes need down_proj tensors and this family has none", hint="use --recipe balanced instead"
    )
