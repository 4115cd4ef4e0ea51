"""A model whose output head is a matrix of its own, where it was the embedding: what a rotation of the model leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlxquant.families.layout import Layout
from mlxquant.families.mlx_modules import FAMILIES
from mlxquant.families.roles import Role
from mlxquant.families.shape import ModelShape


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the rotated model: its embedding is no longer its output head."""
    made = dict(config) | {"tie_word_embeddings": False}
    if isinstance(config.get("text_config"), Mapping):
        made["text_config"] = dict(config["text_config"]) | {"tie_word_embeddings": False}
    return made


def with_head(layout: Layout, roles: Mapping[str, Role], model: ModelShape) -> Layout:
    """With an output head of the embedding's rows, where there was none."""
    name = head_name(model)
    if any(t.name == name for t in layout.targets):
        return layout
    embedding = next(t for t in layout.targets if roles[t.name] == Role.EMBEDDING)
    dropped = tuple(pair for pair in layout.dropped if not pair[0].endswith("lm_head.weight"))
    return Layout((*layout.targets, replace(embedding, name=name)), dropped)


def head_name(model: ModelShape) -> str:
    return next((row.name for row in FAMILIES[model.module].root if "head" in row.when.split()), "lm_head.weight")
