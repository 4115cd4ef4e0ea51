"""What a token costs whatever the level: weights that multiply it, and attention to what came before."""

from __future__ import annotations

from mlxquant.families.shape import ModelShape
from mlxquant.fit.shares import read_parts
from mlxquant.fit.subject import Subject
from mlxquant.fit.values import Work
from mlxquant.tensors import TensorSpec


def work(subject: Subject) -> Work:
    """Of an untied input embedding one row counts. Raises SourceError and UnsupportedError."""
    active = sum(
        share.of(TensorSpec(target.name, target.shape, target.dtype).size) for target, share in read_parts(subject)
    )
    shape = subject.shape
    return Work(shape.layers, "moe" in shape.ffns, active, attention_flops(shape), shape.vocab_size * shape.hidden_size)


def attention_flops(shape: ModelShape) -> int:
    """Of one token and one position of context: a product of query and key, one of weight and value, in every head.

    Layers with full attention alone: a sliding layer stops at its window, a recurrent one has no positions. MLA is
    counted as prefill runs it, with keys and values of every head.
    """
    key = shape.qk_nope_head_dim + shape.qk_rope_head_dim
    value = shape.v_head_dim
    if not shape.kv_lora_rank:
        key = value = shape.global_head_dim or shape.head_dim
    return 2 * shape.mixers.count("full") * shape.heads * (key + value)
