"""How each tensor of an MLX folder is put together from rows of source tensors.

Every layout change that MLX families need is a choice of rows (stacking experts, splitting fused projections), a
reshape, or one of a few elementwise or small whole-tensor changes. Written as values, the plan can be made and printed
without weights, and the executor can stay dumb.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# none           rows as they are
# add_one        + 1 in float32, then rounded to the stored dtype (norms that MLX keeps as 1 + w)
# mla_embed_q    kv_b_proj (heads * (nope + v), latent) -> (heads, latent, nope): key half, transposed per head
# mla_unembed    kv_b_proj -> (heads, v, latent): value half
Change = Literal["none", "add_one", "mla_embed_q", "mla_unembed"]


@dataclass(frozen=True)
class Piece:
    """`count` rows of one source tensor: start, start + step, ... in the row view of TensorSpec."""

    source: str
    start: int
    count: int
    step: int = 1


@dataclass(frozen=True)
class Target:
    """One float tensor of the MLX model, before any codec: its pieces' rows, one after another, make `shape`.

    `dtype` is the source's dtype code (pieces agree in it). `cast` is False where the family's own numbers must not be
    rounded to the model's dtype (mlx-lm's `cast_predicate`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    change: Change = "none"
    cast: bool = True


@dataclass(frozen=True)
class Layout:
    """All targets in reading order, and what of the source is not converted, with the reason for each."""

    targets: tuple[Target, ...]
    dropped: tuple[tuple[str, str], ...] = ()
