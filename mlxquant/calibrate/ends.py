"""What rounding the embedding and the output head costs, measured by forwards.

Inside the layers 1/2 E <G, dW>^2 holds down to 2 bits within a factor of 1.5. An embedding is itself the first hidden
state, whose norm divides by its size: there it was five times too low at 2 bits (SmolLM2-135M, rotated so that its
head is its own), and these two are a model's largest tensors. So both are rounded, alone, at the low bits, and some
tokens pass the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlxquant.calibrate.gradients import head_of, whole_head
from mlxquant.calibrate.layered import Layered
from mlxquant.calibrate.values import Array
from mlxquant.codecs.spec import Codec
from mlxquant.plan.sensitivities import Cost

# (rows (R, I) float32, format) -> what their codes stand for
Values = Callable[[Array, Codec], Array]

MEASURED_BITS = (2, 3, 4)  # the slope at 4 is that of more
SAMPLES, TOKENS = 4, 128  # of each sample the first; of 150,000 columns their log p takes 300 MB
_ROWS = 8192  # of the head that are rounded at a time


def corrected(
    model: Layered, tokens_SL: Array, leaving_SLH: Array, ways: Mapping[str, Values],
    costs: Mapping[str, Mapping[Codec, Cost]],
) -> dict[str, dict[Codec, Cost]]:  # fmt: skip
    """Costs of embedding and head with the nats that forwards measure: at each low number of bits for one group size,
    by which those of others follow in proportion to the squared error. ways: how their codes are chosen, by name.
    leaving_SLH: what leaves the last layer of the model as it is, given tokens_SL.

    Memory: one layer, the head in float32, log p of all tokens.
    """
    formats = {name: measured_formats(costs[name]) for name in ways}
    found: dict[str, dict[int, float]] = {name: {} for name in ways}
    for name, codec, nats in _forwards(model, tokens_SL, leaving_SLH, ways, formats):
        found[name][codec.bits] = nats / max(costs[name][codec].error, 1e-30)
    made = {}
    for name, slopes in found.items():
        made[name] = {
            codec: Cost(cost.error * slopes[min(codec.bits, max(slopes))], cost.error)
            for codec, cost in costs[name].items()
        }
    return made


def measured_formats(costs: Iterable[Codec]) -> list[Codec]:
    """One of each low number of bits: that with groups of 64, or what is next to it."""
    found: dict[int, Codec] = {}
    for codec in sorted(costs, key=lambda codec: abs(codec.group_size - 64)):
        if codec.bits in MEASURED_BITS:
            found.setdefault(codec.bits, codec)
    return list(found.values())


def _forwards(
    model: Layered, tokens_SL: Array, leaving_SLH: Array, ways: Mapping[str, Values], formats: Mapping[str, list[Codec]]
) -> Iterator[tuple[str, Codec, float]]:
    table, head = model.embedding().name, model.head().name
    whole = whole_head(model)
    p = _log_p(model, leaving_SLH, whole)
    if table in ways:
        codecs = formats[table]
        for codec, moved_SLH in zip(codecs, _through(model, tokens_SL, ways[table], codecs), strict=True):
            of_head = _rounded(whole, ways[table], codec) if head == table else whole
            yield table, codec, _divergence(p, _log_p(model, moved_SLH, of_head))
    if head in ways and head != table:
        for codec in formats[head]:
            yield head, codec, _divergence(p, _log_p(model, leaving_SLH, _rounded(whole, ways[head], codec)))


def _through(model: Layered, tokens_SL: Array, values: Values, codecs: Sequence[Codec]) -> list[Array]:
    """What leaves the last layer with the embedding in each format: (S, L, H) each."""
    ids_U, places = np.unique(tokens_SL, return_inverse=True)
    table_UH, places_SL = model.table(ids_U), places.reshape(tokens_SL.shape)
    states = [np.concatenate(list(model.embed_rows(places_SL, values(table_UH, codec)))) for codec in codecs]
    for number in range(model.count):
        layer = model.open(number, model.weights(number))
        states = [layer.run(some) for some in states]
    return states


def _rounded(values_VH: Array, values: Values, codec: Codec) -> Array:
    out = np.empty_like(values_VH)
    for start in range(0, len(out), _ROWS):
        out[start : start + _ROWS] = values(values_VH[start : start + _ROWS], codec)
    return out


def _log_p(model: Layered, leaving_SLH: Array, values_VH: Array) -> list[Array]:
    """log p of each sample's tokens, (L, V), by a head of these values."""
    import mlx.core as mx

    wrap, found = head_of(model, values_VH), []
    for states in leaving_SLH:
        logits: Any = model.logits(mx.array(states[None]), wrap)[0].astype(mx.float32)
        found.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
    return found


def _divergence(p: list[Array], q: list[Array]) -> float:
    """Mean KL(p || q) a token."""
    return float(np.mean([(np.exp(a) * (a - b)).sum(axis=-1).mean() for a, b in zip(p, q, strict=True)]))
