"""How each tensor of an output is put together from rows of source tensors.

Every layout change that MLX and GGUF want is a choice of rows (stacking experts, splitting fused projections,
llama.cpp's rotary order), a reshape, or one of a few elementwise or small whole-tensor changes. Written as values, the
plan can be made and printed without weights, and the executor can stay dumb.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# none           rows as they are
# add_one        + 1 in float32 (norms that MLX or GGUF keeps as 1 + w); subtract_one  the way back
# neg_exp        -exp(w): a recurrent layer's decay, of which checkpoints keep the logarithm; log_neg  the way back
# pairs          rows (elements of a vector) in llama.cpp's rotary order: in each of `heads` heads, (2 halves, pairs)
#                becomes (pairs, 2 halves), conversion/llama.py permute; halves  the way back
# transposed     pieces count rows of the source with its last two axes swapped; each lies in one matrix of the stack
# elements       pieces count single elements of the flattened source: for small tensors, read whole
# mxfp4          two pieces, the 4-bit codes and the scales of the same rows, as gpt-oss's checkpoints store MXFP4
# mla_embed_q    kv_b_proj (heads * (nope + v), latent) -> (heads, latent, nope): key half, transposed per head
# mla_unembed    kv_b_proj -> (heads, v, latent): value half
Change = Literal[
    "none", "add_one", "subtract_one", "neg_exp", "log_neg", "pairs", "halves", "transposed", "elements", "mxfp4",
    "mla_embed_q", "mla_unembed",
]  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """`count` rows of one source tensor: start, start + step, ... in the row view of TensorSpec."""

    source: str
    start: int
    count: int
    step: int = 1


@dataclass(frozen=True)
class Target:
    """One float tensor of the output, before any codec: its pieces' rows, one after another, make `shape`.

    `dtype` is the source's dtype code (pieces agree in it; mxfp4: F32, which holds every product of code and scale).
    `cast` is False where the family's own numbers must not be rounded to the model's dtype (mlx-lm's
    `cast_predicate`). `heads` is set for the changes pairs and halves alone.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    change: Change = "none"
    cast: bool = True
    heads: int = 0


@dataclass(frozen=True)
class Layout:
    """All targets in reading order, and what of the source is not converted, with the reason for each."""

    targets: tuple[Target, ...]
    dropped: tuple[tuple[str, str], ...] = ()
