"""A tiny checkpoint of each family, opened with foreign code: safetensors for the source, stock mlx-lm for
the model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes  # noqa: F401  (safetensors finds bfloat16 through it)
import numpy as np
from safetensors import safe_open

from mlxquant.families.layout import Layout, Target
from mlxquant.tensors import TensorSpec
from tests import tiny

_HOME = TemporaryDirectory(prefix="mlxquant-tiny-")  # gone with the process
TIES = [(family, tied) for family in tiny.FAMILIES for tied in (False, True)]
# One of the two only where the family leaves no choice.
TIES = [
    (family, tied)
    for family, tied in TIES
    if not (tied and family in tiny.NEVER_TIED) and (tied or family not in tiny.ALWAYS_TIED)
]


@cache
def folder(family: str, tied: bool = False) -> Path:
    """Made once a run; nobody writes into it."""
    return tiny.make(Path(_HOME.name) / f"{family}-{tied}", family, tied=tied, layers=4)


def config(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def specs(path: Path) -> dict[str, TensorSpec]:
    with safe_open(path / "model.safetensors", "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {n: TensorSpec(n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}


def arrays(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def build(target: Target, source: dict[str, np.ndarray], nope: int) -> np.ndarray:
    """The law of Layout in numpy: pieces' rows one after another, then the change, then the shape."""
    rows = []
    for piece in target.pieces:
        array = source[piece.source]
        matrix = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
        rows.append(matrix[piece.start : piece.start + piece.count * piece.step : piece.step])
    value = np.concatenate(rows)
    if target.change == "add_one":
        value = (value.astype(np.float32) + 1).astype(value.dtype)
    elif target.change in ("mla_embed_q", "mla_unembed"):
        heads = value.reshape(target.shape[0], -1, value.shape[-1])
        value = heads[:, :nope].swapaxes(1, 2) if target.change == "mla_embed_q" else heads[:, nope:]
    else:
        assert target.change == "none"
    return value.reshape(target.shape)


def built(path: Path, made: Layout) -> dict[str, np.ndarray]:
    source, nope = arrays(path), config(path).get("qk_nope_head_dim", 0)
    return {t.name: build(t, source, nope) for t in made.targets}


def stock_model(path: Path):
    from mlx_lm.utils import load_model

    return load_model(path, lazy=False)


def stock_parameters(path: Path) -> dict[str, np.ndarray]:
    """Name -> bits of stock mlx-lm's parameters; bfloat16 as uint16, which numpy can compare."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    model, _ = stock_model(path)
    return {
        name: np.array(value.view(mx.uint16)) if value.dtype == mx.bfloat16 else np.array(value)
        for name, value in tree_flatten(model.parameters())
    }
