"""How far each level is from the full-precision model, as we measured it: divergence.json, by scripts/divergence.py.

Two models were measured. The one that stands for a model is the largest that is not much larger than it, because
larger models lose less at the same level: so a figure is rather too high than too low. No law of size is made of two
points. Both are dense; of mixtures of experts nothing was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Literal

from mlxquant.fit.values import Level
from mlxquant.plan.recipe import MIXED

How = Literal["exact", "measured", "at most", "interpolated"]
FLOATS = ("F32", "F16", "BF16")
# What levels between are interpolated along. Others of the same size differ from these by up to a half (Q4_0, IQ4_XS).
K_QUANTS = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
AFFINE_BITS = ("2", "3", "4", "5", "6", "8")
GROUP_SIZE = 64  # of what was measured


@dataclass(frozen=True)
class Divergence:
    """kl: mean KL divergence from the full-precision model in nats, error: its standard error. top1: share of
    positions with the same best token. model: the one it was measured on, of `weights` weights.

    how: 'exact' where nothing is rounded; 'at most' where a level with fewer bits was measured; 'interpolated' between
    two levels by bits per weight, where error and ppl_ratio are not known.
    """

    kl: float
    error: float | None
    top1: float
    ppl_ratio: float | None
    bpw: float
    model: str
    weights: int
    how: How


@dataclass(frozen=True)
class _Measured:
    model: str
    weights: int
    from_weights: int
    levels: Mapping[str, Mapping[str, float]]

    def at(self, key: str, how: How = "measured") -> Divergence:
        f = self.levels[key]
        return Divergence(f["kl"], f["kl_error"], f["top1"], f["ppl_ratio"], f["bpw"], self.model, self.weights, how)

    def between(self, keys: tuple[str, ...], bpw: float) -> Divergence | None:
        """Log-linear in bits per weight between two neighbours of a ladder; None outside it."""
        ladder = [self.at(key) for key in keys]
        for low, high in pairwise(ladder):
            if low.bpw <= bpw <= high.bpw:
                t = (bpw - low.bpw) / (high.bpw - low.bpw)
                kl = exp((1 - t) * log(low.kl) + t * log(high.kl))
                top1 = (1 - t) * low.top1 + t * high.top1
                return Divergence(kl, None, top1, None, bpw, self.model, self.weights, "interpolated")
        return None


def divergence(level: Level) -> Divergence | None:
    """What `level` costs; None where nothing like it was measured: most mx modes, fewer bits than any that was."""
    known = next(m for m in _measured() if level.size >= m.from_weights)
    if level.name.upper() in FLOATS:
        return Divergence(0.0, 0.0, 1.0, 1.0, level.bpw, known.model, known.weights, "exact")
    return _gguf(level, known) if level.format == "gguf" else _mlx(level, known)


def _gguf(level: Level, known: _Measured) -> Divergence | None:
    if level.key in known.levels:
        return known.at(level.key)
    if not level.name.upper().startswith(("Q", "IQ")):  # ternary and MXFP4 are of another law
        return None
    return known.between(tuple(f"gguf {name}" for name in K_QUANTS), level.bpw)


def _mlx(level: Level, known: _Measured) -> Divergence | None:
    """By the bits of most weights. Bits per weight would mislead: at the same 5.0, 4 bits by recipe `balanced` were
    measured at twice the divergence that lies between 4 and 5 bits by `uniform`.
    """
    if level.options and level.key in known.levels:
        return known.at(level.key)
    words = _words(level)
    recipe, group_size = words.get("--recipe", "balanced"), int(words.get("--group-size", GROUP_SIZE))
    bits = words.get("--bits", str(MIXED.get(recipe, (0,))[0]))
    if words.get("--mode", "affine") != "affine" or bits not in AFFINE_BITS:
        return None
    if group_size > GROUP_SIZE:
        return known.between(tuple(f"mlx {b}-bit uniform" for b in AFFINE_BITS), level.bpw)
    balanced = f"mlx {bits}-bit"
    if recipe == "balanced" and balanced in known.levels:
        return known.at(balanced, "measured" if group_size == GROUP_SIZE else "at most")
    # Every other recipe gives some tensors more, and none less; at 8 bits balanced has none to give more.
    same = group_size == GROUP_SIZE and (recipe == "uniform" or (recipe == "balanced" and bits == "8"))
    return known.at(f"{balanced} uniform", "measured" if same else "at most")


def _words(level: Level) -> dict[str, str]:
    """What `convert` is given. A folder that is stored does not say by which recipe it was made: by the poorest."""
    if level.options:
        return dict(zip(level.options[::2], level.options[1::2], strict=False))
    bits, _, group_size = level.name.partition("-bit g")
    return {"--bits": bits.removesuffix("-bit"), "--group-size": group_size or str(GROUP_SIZE), "--recipe": "uniform"}


@cache
def _measured() -> tuple[_Measured, ...]:
    """Largest first."""
    kept = json.loads(Path(__file__).with_name("divergence.json").read_text(encoding="utf-8"))
    return tuple(_Measured(m["model"], m["weights"], m["from_weights"], m["levels"]) for m in kept["models"])
