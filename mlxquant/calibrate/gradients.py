"""Gradients of what the model says of itself, for some rows of each weight, layer by layer backwards.

For tokens y drawn from the model's own p(. | text before), G = d sum log p(y) / dW has mean 0, and for a small change
dW of the weights the divergence of a sample's tokens, summed, is

    KL(p || q) = 1/2 E <G, dW>^2

the second-order term of KL, whose matrix is Fisher's information (Amari 1998, Natural gradient works efficiently in
learning; Martens 2020, arXiv:1412.1193, section 5: y from the model, not from the text). Tokens of one sample share
their weights, so what their errors have in common is in it, which squares of gradients at a layer's output would miss.

One layer is in memory at a time: what enters each was kept in a file on the way there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.calibrate.layered import Layer, Layered
from mlxquant.calibrate.stand_ins import Probed
from mlxquant.calibrate.streams import FULL, Stream, Streams
from mlxquant.convert.gather import chunks
from mlxquant.measure.changes import put
from mlxquant.measure.runner import Silent, Watch, step
from mlxquant.plan.plan import PlannedTensor

Array = np.ndarray[Any, Any]

# Tokens of which logits are made at a time: of 150,000 columns 75 MB, of which a gradient holds four or five.
_HEAD_TOKENS = 128
_EXPERTS = 8  # of a stack, that rows are drawn from


@dataclass(frozen=True)
class Rows:
    """Some rows of a weight, seen as a matrix. index_R: which, ascending. share_R: how many of its rows each stands
    for: a sum over all rows is about the sum of share times theirs.
    """

    index_R: Array
    share_R: Array


@dataclass(frozen=True)
class Part:
    """gradients: weight -> (S, R, I) float32, of each sample. layer: whose weights they are, with `entering` it; None
    for embedding and head (entering: what entered the embedding's layers is not kept; of the head, the last layer's).
    """

    gradients: Mapping[str, Array]
    layer: Layer | None = None
    entering: Stream | None = None


def spread(tensor: PlannedTensor, count: int, rng: np.random.Generator) -> Rows:
    """`count` rows, each as likely as another; of a stack, of a few of its matrices."""
    lead, rows = int(np.prod(tensor.target.shape[:-2])), tensor.target.shape[-2]
    matrices = rng.choice(lead, min(lead, _EXPERTS), replace=False)
    each = min(rows, max(1, count // len(matrices)))
    index = [m * rows + rng.choice(rows, each, replace=False) for m in matrices]
    index_R = np.sort(np.concatenate(index))
    return Rows(index_R, np.full(len(index_R), lead * rows / len(index_R)))


def by_use(vocabulary: int, tokens_BL: Array, count: int, rng: np.random.Generator) -> Rows:
    """`count` rows of an embedding or head: half of the draws by how often the text has them, half any."""
    used = np.bincount(tokens_BL.reshape(-1), minlength=vocabulary) / tokens_BL.size
    chance = (used + 1 / vocabulary) / 2
    if count >= vocabulary:
        return Rows(np.arange(vocabulary), np.ones(vocabulary))
    drawn = rng.choice(vocabulary, count, p=chance)
    index_R, times = np.unique(drawn, return_counts=True)
    return Rows(index_R, times / (count * chance[index_R]))


def trace(model: Layered, tokens_BL: Array, folder: Path, watch: Watch | None = None) -> list[Stream]:
    """Runs the samples through the model as it is; what enters each layer, and last what leaves them, in files of
    `folder`: 4 * B * L * H bytes each.
    """
    streams = Streams(folder, (*tokens_BL.shape, model.width))
    kept = [streams.of(FULL, number) for number in range(model.count + 1)]
    kept[0].write(model.embedded(tokens_BL))
    for number in range(model.count):
        layer = model.open(number, model.weights(number))
        kept[number + 1].write(layer.run(states) for _, states in kept[number].batches())
        step(watch or Silent())
    return kept


def backwards(
    model: Layered, kept: list[Stream], tokens_SL: Array, rows: Mapping[str, Rows], seed: int
) -> Iterator[Part]:
    """From the head to the embedding. tokens_SL: the first S of the samples that were traced. rows: of each weight that
    is asked for. A layer's weights are let go when the next Part is asked for; its own may be changed before.
    """
    head, table = model.head(), model.embedding()
    last = enumerate(_first(kept[-1], len(tokens_SL)))
    pairs = list(behind(model, ((slice(i, i + 1), states) for i, states in last), rows[head.name], seed))
    slopes, of_head = [slope for slope, _ in pairs], np.stack([by_row for _, by_row in pairs])
    if head.name != table.name:
        yield Part({head.name: of_head}, None, kept[-1])
    for number in reversed(range(model.count)):
        layer = model.open(number, model.weights(number))
        wanted = {t.name: rows[t.name] for t in model.of_layer(number) if t.name in rows}
        slopes, found = _within(layer, _first(kept[number], len(tokens_SL)), slopes, wanted)
        yield Part(found, layer, kept[number])
        del layer
    of_table = _before(model, tokens_SL, slopes, rows[table.name])
    yield Part({table.name: of_table + of_head if head.name == table.name else of_table}, None, kept[-1])


def _first(stream: Stream, count: int) -> list[Array]:
    """What the first `count` samples are there, one by one: (1, L, H)."""
    found: list[Array] = []
    for _, states in stream.batches():
        found += [states[i : i + 1] for i in range(len(states))]
        if len(found) >= count:
            break
    return found[:count]


def behind(
    model: Layered, leaving: Iterable[tuple[slice, Array]], rows: Rows, seed: int
) -> Iterator[tuple[Array, Array]]:
    """Slopes of sum log p(y) by what leaves the last layer, (1, L, H), and by some rows of the head, (R, H), of each
    sample; some tokens at a time. leaving: (which sample, (1, L, H)).
    """
    import mlx.core as mx

    values_VH, index = mx.array(whole_head(model)), mx.array(rows.index_R)
    for sample, states in leaving:
        parts, sums = [], mx.zeros((len(rows.index_R), values_VH.shape[1]))
        for start in range(0, states.shape[1], _HEAD_TOKENS):
            key = mx.random.key(seed + 1_000_003 * sample.start + start)

            def said(part_1TH: Any, probe_RH: Any, key: Any = key) -> Any:
                logits = model.logits(part_1TH, lambda module: Probed(module, values_VH, index, probe_RH))
                return _log_of_drawn(logits, key)

            given = mx.array(states[:, start : start + _HEAD_TOKENS])
            by_hidden, by_row = mx.grad(said, argnums=(0, 1))(given, mx.zeros_like(sums))
            sums = sums + by_row
            mx.eval(by_hidden, sums)
            parts.append(np.array(by_hidden))
        yield np.concatenate(parts, axis=1), np.array(sums)


def head_of(model: Layered, values_VH: Array | None = None) -> Callable[[Any], Any]:
    """The output head with its weights, or with others, for Layered.logits."""
    import mlx.core as mx

    values = mx.array(whole_head(model) if values_VH is None else values_VH)
    none = mx.zeros((0,), dtype=mx.int32)
    return lambda module: Probed(module, values, none, mx.zeros((0, values.shape[1])))


def whole_head(model: Layered) -> Array:
    """Float32 (V, H). It is in memory once, and some rows more."""
    tensor = model.head()
    whole = np.empty(tensor.target.shape, np.float32)
    for start, stop in chunks(tensor.target):
        whole[start:stop] = model.rows(tensor, start, stop)
    return whole


def _log_of_drawn(logits_1TV: Any, key: Any) -> Any:
    import mlx.core as mx

    logits = logits_1TV.astype(mx.float32)
    drawn = mx.random.categorical(mx.stop_gradient(logits), key=key)
    chosen = mx.take_along_axis(logits, drawn[..., None], axis=-1)[..., 0]
    return (chosen - mx.logsumexp(logits, axis=-1)).sum()


def _within(
    layer: Layer, hidden: list[Array], slopes: list[Array], rows: Mapping[str, Rows]
) -> tuple[list[Array], dict[str, Array]]:
    """Slopes by what enters a layer, and by some rows of its weights, from those by what leaves it."""
    import mlx.core as mx

    bare, names = layer.module(lambda _, module: module), list(rows)
    paths = [layer.path(name) for name in names]

    def leaving(states: Any, *weights: Any) -> Any:
        module = bare
        for path, weight in zip(paths, weights, strict=True):
            module = put(module, path, weight)
        return layer.graph(module, states)

    weights = [layer.get(name) for name in names]
    before, found = [], {name: list[Array]() for name in names}
    for states, slope in zip(hidden, slopes, strict=True):
        _, (by_states, *by_weights) = mx.vjp(leaving, [mx.array(states), *weights], [mx.array(slope)])
        picked = [
            by.reshape(-1, by.shape[-1])[mx.array(rows[name].index_R)]
            for name, by in zip(names, by_weights, strict=True)
        ]
        mx.eval(by_states, picked)
        before.append(np.array(by_states))
        for name, some in zip(names, picked, strict=True):
            found[name].append(np.array(some))
        del by_weights
    return before, {name: np.stack(parts) for name, parts in found.items()}


def _before(model: Layered, tokens_SL: Array, slopes: list[Array], rows: Rows) -> Array:
    """Slopes by some rows of the embedding, (S, R, H): 0 for tokens that a sample has not."""
    import mlx.core as mx

    ids_U, places = np.unique(tokens_SL, return_inverse=True)
    table_UH, places_SL = mx.array(model.table(ids_U)), places.reshape(tokens_SL.shape)
    at = np.minimum(np.searchsorted(ids_U, rows.index_R), len(ids_U) - 1)
    has = ids_U[at] == rows.index_R
    found = []
    for places_L, slope in zip(places_SL, slopes, strict=True):
        _, (by_table,) = mx.vjp(lambda t, p=places_L: model.entering(p[None], t), [table_UH], [mx.array(slope)])
        found.append(np.array(by_table)[at] * has[:, None])
    return np.stack(found)
