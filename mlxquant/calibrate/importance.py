"""How much an error matters to the divergence: at which token, for a linear layer; in which direction, for the table.

For tokens drawn from the model's own p(. | text before) and g = d sum log p / dy at a layer's output y, a small error e
of y at one token costs 1/2 E (g e)^2 nats (gradients.py). Taking g's directions for equally likely, tokens are weighed
by |g|^2, so that the Hessian is H = sum of |g|^2 x x^T (GuidedQuant, Kim et al. 2025, arXiv:2505.07004, with one group
of rows). It matters most where few tokens carry much: all attend to a text's first one, and its values to all.

An error e of an embedding's row costs 1/2 e G e nats each time that the row is used, G = mean g g^T over all tokens, g
being the slope by what enters the first layer. So G is to a row of the table what H is to a row of a linear layer, and
where it is skewed GPTQ puts the errors where they cost little. Where the table is the output head, too, its rows are
what the mean of x x^T over what enters that is to any linear layer's, and both are added: a row is used about as often
as it is said, and both are second orders of the same divergence.

One layer is in memory at a time; what enters each, and slopes, are in files meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mlxquant.calibrate.gradients import Rows, behind, trace
from mlxquant.calibrate.layered import Layer, Layered
from mlxquant.calibrate.stand_ins import Added, Seen
from mlxquant.calibrate.statistics import Moments
from mlxquant.calibrate.streams import Stream
from mlxquant.files.writing import write_whole
from mlxquant.measure.runner import Silent, Watch, step

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]  # of a linear layer's weight, by name -> (B, L) float32, their mean 1

FILE = "importance.safetensors"
SEED = 1
_TABLE = "table"


@dataclass(frozen=True)
class Importance:
    """tokens: for each linear layer that every token passes (experts have none). table_HH: float32, for the rows of the
    embedding.
    """

    tokens: Weights
    table_HH: Array


def weigh_errors(model: Layered, tokens_BL: Array, folder: Path, watch: Watch | None = None) -> Importance:
    """Kept in `folder`, where a later call finds it; 8 * B * L * H bytes a layer are there meanwhile. Raises
    KeyboardInterrupt when the watch says so.
    """
    if (found := _read(folder / FILE)) is not None:
        return found
    scratch = folder / "gradients"
    watch = watch or Silent()
    watch.stage("Asking which tokens matter", 2 * model.count, "layers")
    kept = trace(model, tokens_BL, scratch, watch)
    made: Weights = {}
    one_row = Rows(np.zeros(1, np.int64), np.ones(1))
    of_head = head_moments(model, kept[-1]) if tied(model) else np.float32(0)
    slopes = Stream(scratch / "slopes-last.f32", kept[-1].shape)
    slopes.write(slope for slope, _ in behind(model, kept[-1].batches(1), one_row, SEED))
    for number in reversed(range(model.count)):
        layer = model.open(number, model.weights(number))
        before = Stream(scratch / f"slopes-{number:04}.f32", slopes.shape)
        squares: dict[str, list[Array]] = {}
        before.write(_within(layer, kept[number], slopes, squares))
        made |= {name: _even(np.concatenate(parts)) for name, parts in squares.items()}
        kept[number + 1].path.unlink()
        slopes.path.unlink()
        slopes = before
        step(watch)
    table_HH = _of_table(model, tokens_BL, slopes) + of_head
    shutil.rmtree(scratch)
    write_whole(folder / FILE, save({_TABLE: table_HH, **made}))
    return Importance(made, table_HH)


def tied(model: Layered) -> bool:
    """Whether the embedding is the output head, too."""
    return model.head().name == model.embedding().name


def head_moments(model: Layered, leaving: Stream) -> Array:
    """(H, H): mean of x x^T of what enters the output head, given what leaves the last layer."""
    found = Moments(model.head().name, "hessian")
    for _, states in leaving.batches():
        found.add(model.entering_head(states))
    return found.mean()


def _of_table(model: Layered, tokens_BL: Array, slopes: Stream) -> Array:
    """Mean g g^T, (H, H), of slopes by the rows of the embedding, from those by what enters the first layer."""
    import mlx.core as mx

    ids_U, places = np.unique(tokens_BL, return_inverse=True)
    table_UH, places_BL = model.table(ids_U), places.reshape(tokens_BL.shape)
    in_turn = np.arange(tokens_BL.shape[1])[None]
    total_HH = mx.zeros((model.width, model.width))
    for where, slope in slopes.batches(1):
        rows_LH = mx.array(table_UH[places_BL[where.start]])
        _, (by_LH,) = mx.vjp(lambda rows: model.entering(in_turn, rows), [rows_LH], [mx.array(slope)])
        total_HH = total_HH + by_LH.T @ by_LH
        mx.eval(total_HH)
    total: Array = np.array(total_HH) / tokens_BL.size
    return (total + total.T) / 2


def _within(layer: Layer, entering: Stream, slopes: Stream, squares: dict[str, list[Array]]) -> Iterator[Array]:
    """Slopes by what enters the layer, from those by what leaves it; adds each linear layer's |g|^2 of each token."""
    import mlx.core as mx

    for (_, states), (_, slope) in zip(entering.batches(1), slopes.batches(1), strict=True):
        shapes = _outputs(layer, states)
        zeros = [mx.zeros(shape) for shape in shapes.values()]
        given = [mx.array(states), *zeros]
        _, (by_states, *by_outputs) = mx.vjp(partial(_leaving, layer, list(shapes)), given, [mx.array(slope)])
        sums = [(by * by).sum(axis=-1).reshape(1, -1) for by in by_outputs]
        mx.eval(by_states, sums)
        for name, by_token in zip(shapes, sums, strict=True):
            squares.setdefault(name, []).append(np.array(by_token))
        yield np.array(by_states)


def _leaving(layer: Layer, names: list[str], states: Any, *probes: Any) -> Any:
    """What leaves the layer with probes added to what linear layers give. Not evaluated."""
    added = dict(zip(names, probes, strict=True))
    module = layer.module(lambda name, linear: Added(linear, added[name]) if name in added else linear)
    return layer.graph(module, states)


def _outputs(layer: Layer, states: Array) -> dict[str, tuple[int, ...]]:
    """Shapes of what the linear layers give that every token passes. Nothing is evaluated."""
    import mlx.nn as nn

    found: dict[str, tuple[int, ...]] = {}
    tokens = int(np.prod(states.shape[:2]))

    def wrap(name: str, module: Any) -> Any:
        return Seen(module, name, found) if type(module) is nn.Linear else module

    layer.graph(layer.module(wrap), states)
    return {name: shape for name, shape in found.items() if int(np.prod(shape[:-1])) == tokens}


def _even(squares_BL: Array) -> Array:
    """Square roots, of mean 1: |g|^2 itself leaves a Hessian to a few tokens, which so few samples do not settle."""
    roots = np.sqrt(squares_BL.astype(np.float64))
    mean = roots.mean()
    return (roots / mean if mean > 0 else np.ones_like(roots)).astype(np.float32)


def _read(path: Path) -> Importance | None:
    try:
        found: Weights = load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
    return Importance(found, found.pop(_TABLE)) if _TABLE in found else None
