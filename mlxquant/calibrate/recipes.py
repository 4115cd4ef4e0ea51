"""What each method of `convert --method` does, and by how much. Figures behind the choices: docs/quality.md."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from mlxquant.plan.recipe import BEST, SEARCH


@dataclass(frozen=True)
class Recipe:
    """How codes are chosen.

    codes: 'search' (each column weighted by its mean square) or 'gptq' (the whole Hessian). damping: of the Hessian's
    mean diagonal. target: how much of what the layers before did wrong is made good, 0 to 1. rounds: of descending
    codes and refitting scales and biases. factors: AWQ's, folded into what feeds a linear layer. tokens: count by what
    an error there costs (importance.py), which takes the model backwards once.
    """

    method: str
    codes: str = "gptq"
    damping: float = 0.01
    target: float = 0.0
    rounds: int = 2
    factors: bool = False
    tokens: bool = False

    @property
    def label(self) -> str:
        """What sets it apart, for people."""
        words = [self.codes, *(["factors"] if self.factors else []), *(["tokens"] if self.tokens else [])]
        return "+".join([*words, *([f"target {self.target:g}"] if self.target else [])])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_BEST = Recipe(BEST, target=0.25, tokens=True)
# What `best` chooses among, the likeliest first: a limit on time leaves out the last. The more text there is for a
# model's width, the more of what went wrong before can be made good without fitting the text itself.
CANDIDATES = (_BEST, replace(_BEST, target=0.5), replace(_BEST, target=0.5, tokens=False), replace(_BEST, target=0.0))
RECIPES: dict[str, tuple[Recipe, ...]] = {
    SEARCH: (Recipe(SEARCH, codes="search"),),
    "awq": (Recipe("awq", codes="search", factors=True),),
    "gptq": (Recipe("gptq"),),
    BEST: CANDIDATES,
}
