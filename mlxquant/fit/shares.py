"""What part of each tensor one decoded token reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mlxquant.families.layout import Target
from mlxquant.families.roles import Role
from mlxquant.fit.subject import Subject
from mlxquant.plan.plan import Basis

_EXPERTS = frozenset({Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN})
# GGUF names of stacks of experts, and of tables of which a token reads a row (llama.cpp, gguf-py/gguf/constants.py).
_GGUF_EXPERTS = "_exps."
_GGUF_EMBEDDING, _GGUF_HEAD, _GGUF_LAYER_EMBEDDING = "token_embd.weight", "output.weight", "per_layer_token_embd.weight"


class Share(NamedTuple):
    """`part` of `whole` rows or experts: a fraction that leaves no remainder where whole matrices are counted."""

    part: int = 1
    whole: int = 1

    def of(self, count: int) -> int:
        return count * self.part // self.whole


ALL = Share()


def mlx_shares(basis: Basis) -> dict[str, Share]:
    """Of each MLX tensor. An untied input embedding is read one row a token; a tied one is the head, and read whole."""
    roles = basis.roles
    tied = Role.HEAD not in roles.values()
    experts = experts_share(basis.shape.experts_per_token, basis.shape.experts)
    stacks = {_module(name) for name, role in roles.items() if role in _EXPERTS}  # whose biases are stacked, too
    found: dict[str, Share] = {}
    for target in basis.layout.targets:
        if _module(target.name) in stacks:
            found[target.name] = experts
        elif roles[target.name] is Role.LAYER_EMBEDDING or (roles[target.name] is Role.EMBEDDING and not tied):
            found[target.name] = Share(1, target.shape[0])
        else:
            found[target.name] = ALL
    return found


def gguf_shares(shapes: Mapping[str, tuple[int, ...]], experts: Share) -> dict[str, Share]:
    """Of each tensor of a GGUF file; `shapes` outermost axis first."""
    rows = {_GGUF_LAYER_EMBEDDING} | ({_GGUF_EMBEDDING} if _GGUF_HEAD in shapes else set())
    return {
        name: experts if _GGUF_EXPERTS in name else Share(1, shape[0]) if name in rows and shape else ALL
        for name, shape in shapes.items()
    }


def experts_share(used: int, experts: int) -> Share:
    """Where a config does not say how many experts a token asks, all are counted."""
    return Share(used, experts) if 0 < used < experts else ALL


def read_parts(subject: Subject) -> list[tuple[Target, Share]]:
    """All that the loaded model is made of, with what a token reads of it; what a conversion leaves out is not there.

    Raises SourceError and UnsupportedError for a model that neither mlx-lm nor llama.cpp has.
    """
    basis = subject.any_basis
    if isinstance(basis, Basis):
        targets, shares = basis.layout.targets, mlx_shares(basis)
    else:
        targets, shape = basis.targets, subject.shape
        experts = experts_share(shape.experts_per_token, shape.experts)
        shares = gguf_shares({target.name: target.shape for target in targets}, experts)
    return [(target, shares[target.name]) for target in targets]


def _module(name: str) -> str:
    return name.rpartition(".")[0]
