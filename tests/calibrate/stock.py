"""Tiny models' weights by MLX name, and what stock mlx-lm computes of a folder of them."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model
from safetensors.numpy import save_file

from mlxquant.calibrate.layered import whole
from mlxquant.convert.sources import open_source
from mlxquant.families.mlx_modules import FAMILIES as KNOWN
from mlxquant.plan.plan import lay_out, make_plan
from mlxquant.plan.recipe import settings
from tests.tiny import ALWAYS_TIED, FAMILIES, NEVER_TIED, VOCAB

LENGTH = 16
# Layers whose mask stock mlx-lm asks for, whether the model has them or not.
ASKED = {"cohere2": 4, "gemma3": 6, "gemma3_text": 6}


def checkpoint(folder, family, *, tied=False, layers=2, width=128, seed=0, **config):
    """tests.tiny.make in float32 and without a tokenizer, which takes longer than all the rest."""
    folder.mkdir()
    layers = max(layers, ASKED.get(family, 0))
    tied = (tied or family in ALWAYS_TIED) and family not in NEVER_TIED
    base, tensors = FAMILIES[family](np.random.default_rng(seed), width, layers, tied)
    base |= {"torch_dtype": "float32", "vocab_size": VOCAB, "tie_word_embeddings": tied} | config
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(base))
    return folder


def tiny(folder, family, **how):
    """(source, plan, basis, {name: float32}, prefixes of the layers)"""
    source = open_source(checkpoint(folder, family, **how))
    plan = make_plan(source.config, source.specs, settings(recipe="uniform", group_size=32))
    basis = lay_out(source.config, source.specs)
    at = KNOWN[basis.shape.module].prefix
    weights = {t.name: whole(source, t) for t in plan.tensors}
    return source, plan, basis, weights, [f"{at}.{i}." for i in range(basis.shape.layers)]


def of_layer(weights, prefix):
    return {name: value for name, value in weights.items() if name.startswith(prefix)}


def logits(folder, config, weights, seed=0):
    """Of some random tokens, float32 (L, V)."""
    folder.mkdir()
    arrays = {name: mx.array(value) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_model(folder, strict=True)
    tokens = np.random.default_rng(seed).integers(3, VOCAB, (1, LENGTH))
    return np.array(model(mx.array(tokens))[0].astype(mx.float32))


def difference(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
