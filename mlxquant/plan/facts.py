"""A model's dimensions for people to read, also where its family is not one that mlxquant knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import SourceError
from mlxquant.families.shape import ModelShape

# Field -> keys of config.json and of GGUF metadata (without the architecture's prefix); the first hit counts.
_KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "block_count"),
    "hidden_size": ("hidden_size", "n_embd", "embedding_length"),
    "heads": ("num_attention_heads", "n_head", "attention.head_count"),
    "kv_heads": ("num_key_value_heads", "attention.head_count_kv"),
    "head_dim": ("head_dim", "attention.key_length"),
    "context": ("max_position_embeddings", "n_positions", "context_length"),
    "vocab": ("vocab_size",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "expert_count"),
    "experts_per_token": ("num_experts_per_tok", "expert_used_count"),
}


@dataclass(frozen=True)
class Facts:
    """Counts; None where nothing tells."""

    layers: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    context: int | None = None
    vocab: int | None = None
    experts: int | None = None
    experts_per_token: int | None = None
    tied: bool | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Facts:
        """From the checked shape where the family is known, else the whole numbers under the usual keys."""
        try:
            shape = ModelShape.from_config(config)
        except SourceError:
            return cls._guessed(config)
        return cls(
            layers=shape.layers,
            hidden_size=shape.hidden_size,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            context=shape.context_length,
            vocab=shape.vocab_size,
            experts=shape.experts or None,
            experts_per_token=shape.experts_per_token or None,
            tied=shape.tied,
        )

    @classmethod
    def _guessed(cls, config: Mapping[str, Any]) -> Facts:
        inner = config.get("text_config")
        merged = {**config, **inner} if isinstance(inner, dict) else config
        tied = merged.get("tie_word_embeddings")
        counts = {
            field: next((merged[key] for key in keys if type(merged.get(key)) is int), None)
            for field, keys in _KEYS.items()
        }
        return cls(tied=tied if isinstance(tied, bool) else None, **counts)
