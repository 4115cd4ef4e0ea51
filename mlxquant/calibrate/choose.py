"""Which codes each weight of one layer gets, by what enters it: the step that `to_mlx` repeats layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxquant.calibrate.awq import awq
from mlxquant.calibrate.fold import check, feeds
from mlxquant.calibrate.gptq import NotPositive, Prepared, corrected, gptq, output_error, prepare
from mlxquant.calibrate.layered import Layer, Layered
from mlxquant.calibrate.recipes import Recipe
from mlxquant.calibrate.statistics import Moments
from mlxquant.calibrate.streams import FULL, QUANTIZED, Stream
from mlxquant.calibrate.values import Chosen, Inputs
from mlxquant.calibrate.wiring import wiring
from mlxquant.codecs.encode import decode, encode
from mlxquant.codecs.search import search
from mlxquant.codecs.spec import KEEP
from mlxquant.families.shape import ModelShape
from mlxquant.plan.plan import PlannedTensor

Array = np.ndarray[Any, Any]

# Float32 rows -> (codes, the error of min/max rounding).
RowChooser = Callable[[Array], tuple[Chosen, float]]

_CHECK_TOKENS = 32
# An expert that saw fewer tokens than this is calibrated on what all experts of its layer saw.
LEAST_EXPERT_TOKENS = 64


@dataclass(frozen=True)
class Record:
    """Of one weight: its output's error over its output, squared, with codes by min/max rounding and with those that
    were chosen; tokens that it was judged by; what else is to be said.
    """

    name: str
    codec: str
    rounding: float
    error: float
    tokens: int
    note: str = ""


class Done:
    """One layer's choices, while the layer is at hand."""

    def __init__(self, before: Layer, after: Layer, weights: dict[str, Array], notes: Sequence[str] = ()) -> None:
        self.notes = notes
        self._layers = {FULL: before, QUANTIZED: after}
        self._weights = weights
        self.chosen: dict[str, Chosen] = {}
        self.records: list[Record] = []

    def parts(self, tensor: PlannedTensor) -> tuple[Array, ...]:
        """What is stored of a tensor, rows first."""
        if tensor.name in self.chosen:
            return self.chosen[tensor.name].parts
        return encode(by_rows(self._weights[tensor.name]), "F32", tensor.dtype, KEEP)

    def run(self, kind: str, entering: Stream) -> Iterator[Array]:
        for _, hidden in entering.batches():
            yield self._layers[kind].run(hidden)


class Chooser:
    """Carries out a recipe. Holds nothing between layers."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    # -- one layer

    def layer(self, model: Layered, number: int, full: Stream, quantized: Stream) -> Done:
        """Stage by stage: what is chosen first is what the next stage's inputs come from. Raises SourceError."""
        weights = model.weights(number)
        before = model.open(number, weights)
        weights, notes = self._scaled(model, number, weights, quantized) if self.recipe.factors else (weights, ())
        after = model.open(number, weights)
        done = Done(before, after, weights, notes)
        for stage in after.stages:
            wanted = [model.tensors[name] for name in stage if model.tensors[name].codec.quantized]
            if not wanted:
                continue
            hessian = self._moments(after, stage, quantized, wanted[0])
            cross = self._cross(before, after, stage, full, quantized) if self.recipe.target else None
            for tensor in wanted:
                self._choose(done, tensor, weights[tensor.name], hessian, cross)
                after.put(tensor.name, done.chosen[tensor.name].values_OI.reshape(tensor.target.shape))
        for tensor in model.of_layer(number):
            if tensor.codec.quantized and tensor.name not in done.chosen:
                done.chosen[tensor.name] = searched(tensor, by_rows(weights[tensor.name]))
                after.put(tensor.name, done.chosen[tensor.name].values_OI.reshape(tensor.target.shape))
        return done

    def _scaled(
        self, model: Layered, number: int, weights: dict[str, Array], entering: Stream
    ) -> tuple[dict[str, Array], tuple[str, ...]]:
        """The layer's weights with AWQ's factors folded in, and what is to be said of them."""
        shape = ModelShape.from_config(model.config)
        wired = wiring({name: w.shape for name, w in weights.items()}, model.prefix(number), shape)
        layer, moments = model.open(number, weights), dict[str, Moments]()
        for _, hidden in entering.batches():
            heard, _ = layer.heard(hidden)
            for stage in layer.stages:
                for name in stage:
                    if name not in moments:
                        experts = weights[name].shape[0] if weights[name].ndim == 3 else 0
                        moments[name] = Moments(name, "squares", experts=experts, least_tokens=LEAST_EXPERT_TOKENS)
                    moments[name].add(heard[stage[0]])
        _, first = next(entering.batches(_CHECK_TOKENS))
        hold, refused = check(model, number, weights, feeds(wired, weights, shape), first[:1, :_CHECK_TOKENS])
        made = awq(weights, hold, moments, lambda name: model.tensors[name].codec, model.plan.dtype)
        return made.weights, tuple(filter(None, (made.note, *refused)))

    def _moments(self, layer: Layer, stage: Sequence[str], entering: Stream, tensor: PlannedTensor) -> Moments:
        experts = tensor.target.shape[0] if len(tensor.target.shape) == 3 else 0
        found = Moments(stage[0], "hessian", experts=experts, least_tokens=LEAST_EXPERT_TOKENS)
        for _, hidden in entering.batches():
            found.add(layer.inputs(stage, hidden))
        return found

    def _cross(
        self, before: Layer, after: Layer, stage: Sequence[str], full: Stream, quantized: Stream
    ) -> Array | None:
        """Moments between the streams; of experts none, as the two may send a token to different ones."""
        found = Moments(stage[0], "cross")
        for (_, was), (_, became) in zip(full.batches(), quantized.batches(), strict=True):
            x, y = before.inputs(stage, was), after.inputs(stage, became)
            if x.expert_N is not None:
                return None
            found.add(x, other_NI=y.x_NI)
        return found.mean()

    def _choose(self, done: Done, tensor: PlannedTensor, w: Array, moments: Moments, cross: Array | None) -> None:
        if moments.experts:
            pieces, fallbacks = [], 0
            for expert, w_OI in enumerate(w):
                hessian_II, fallback = moments.for_expert(expert)
                pieces.append(self.weight(tensor, w_OI, hessian_II))
                fallbacks += fallback
            chosen = joined([piece for piece, _ in pieces])
            rounding = float(np.mean([r for _, r in pieces]))
            note = f"{fallbacks} of {moments.experts} experts saw too little text" if fallbacks else chosen.note
        else:
            chosen, rounding = self.weight(tensor, w, moments.mean(), cross)
            note = chosen.note
        done.chosen[tensor.name] = chosen
        done.records.append(Record(tensor.name, tensor.codec.label, rounding, chosen.error, moments.tokens, note))

    # -- the vocabulary's matrices

    def table(self, model: Layered, tensor: PlannedTensor, tokens_BL: Array) -> RowChooser:
        """Of the embedding: its rows are added to the stream as they are, each column as good as any other."""
        return lambda w_OI: (searched(tensor, w_OI), 0.0)

    def head(self, model: Layered, tensor: PlannedTensor, full: Stream, quantized: Stream) -> RowChooser:
        """Of the output head, by what leaves the trunk."""
        hessian = Moments(tensor.name, "hessian")
        cross = Moments(tensor.name, "cross")
        for (_, was), (_, became) in zip(full.batches(), quantized.batches(), strict=True):
            y = by_rows(np.array(model.finish(became)))
            hessian.add(Inputs(y))
            if self.recipe.target:
                cross.add(Inputs(by_rows(np.array(model.finish(was)))), other_NI=y)
        return self.prepared(tensor, hessian.mean(), cross.mean() if self.recipe.target else None)

    # -- one weight

    def weight(
        self, tensor: PlannedTensor, w_OI: Array, hessian_II: Array, cross_II: Array | None = None
    ) -> tuple[Chosen, float]:
        """(codes, the error of min/max rounding) under one Hessian."""
        return self.prepared(tensor, hessian_II, cross_II)(w_OI)

    def _ready(self, hessian_II: Array, tensor: PlannedTensor) -> Prepared:
        return prepare(hessian_II, damping=self.recipe.damping, group_size=tensor.codec.group_size)

    def prepared(self, tensor: PlannedTensor, hessian_II: Array, cross_II: Array | None = None) -> RowChooser:
        """The same for row chunks of one matrix."""
        wanted = self.recipe.codes == "gptq" and tensor.codec.mode == "affine"
        note = ""
        try:
            ready = self._ready(hessian_II, tensor) if wanted else None
        except NotPositive as error:
            ready, note = None, str(error)

        def of(w_OI: Array) -> tuple[Chosen, float]:
            before = rounding(tensor, w_OI, hessian_II)
            if ready is None:
                return searched(tensor, w_OI, hessian_II, note), before
            target = corrected(w_OI, hessian_II, cross_II, self.recipe.target) if cross_II is not None else None
            return gptq(w_OI, ready, tensor.dtype, tensor.codec, target_OI=target, rounds=self.recipe.rounds), before

        return of


def searched(tensor: PlannedTensor, w_OI: Array, hessian_II: Array | None = None, note: str = "") -> Chosen:
    """By search, columns weighted by what enters them."""
    weight = None if hessian_II is None else np.ascontiguousarray(np.diagonal(hessian_II), np.float32)
    parts = search(w_OI, "F32", tensor.dtype, tensor.codec, weight)
    values = decode(parts, tensor.dtype, tensor.codec)
    return Chosen(parts, values, 0.0 if hessian_II is None else output_error(w_OI, values, hessian_II), note)


def rounding(tensor: PlannedTensor, w_OI: Array, hessian_II: Array) -> float:
    """The output error of min/max rounding, which is what stock converters write."""
    parts = encode(w_OI, "F32", tensor.dtype, tensor.codec)
    return output_error(w_OI, decode(parts, tensor.dtype, tensor.codec), hessian_II)


def joined(pieces: Sequence[Chosen]) -> Chosen:
    """Matrices of a stack, one below the other."""
    parts = tuple(np.concatenate(arrays) for arrays in zip(*(p.parts for p in pieces), strict=True))
    values = np.concatenate([p.values_OI for p in pieces])
    notes = [p.note for p in pieces if p.note]
    return Chosen(parts, values, float(np.mean([p.error for p in pieces])), notes[0] if notes else "")


def by_rows(values: Array) -> Array:
    return values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)
