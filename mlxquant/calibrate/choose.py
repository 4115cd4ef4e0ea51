"""Which codes each weight of one layer gets, by what enters it: the step that `to_mlx` repeats layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from statistics import fmean
from typing import Any

import numpy as np

from mlxquant.calibrate.awq import awq
from mlxquant.calibrate.fold import check, feeds
from mlxquant.calibrate.gptq import NotPositive, Prepared, corrected, gptq, output_error, prepare
from mlxquant.calibrate.layered import Layer, Layered
from mlxquant.calibrate.recipes import Recipe
from mlxquant.calibrate.statistics import Moments
from mlxquant.calibrate.streams import FULL, QUANTIZED, Stream
from mlxquant.calibrate.token_weights import Weights
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
    """One layer's choices, while the layer is at hand. before: as it is; after: with what has been chosen."""

    def __init__(self, before: Layer, after: Layer, weights: dict[str, Array], notes: Sequence[str] = ()) -> None:
        self.before, self.after, self.weights, self.notes = before, after, weights, notes
        self.chosen: dict[str, Chosen] = {}
        self.records: list[Record] = []

    def choose(self, tensor: PlannedTensor, chosen: Chosen) -> None:
        self.chosen[tensor.name] = chosen
        self.after.put(tensor.name, chosen.values_OI.reshape(tensor.target.shape))

    def parts(self, tensor: PlannedTensor) -> tuple[Array, ...]:
        """What is stored of a tensor, rows first."""
        if tensor.name in self.chosen:
            return self.chosen[tensor.name].parts
        return encode(by_rows(self.weights[tensor.name]), "F32", tensor.dtype, KEEP)

    def run(self, kind: str, entering: Stream) -> Iterator[Array]:
        layer = self.before if kind == FULL else self.after
        for _, hidden in entering.batches():
            yield layer.run(hidden)


class Chooser:
    """Carries out a recipe. Holds nothing between layers."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the streams that are looked at."""
        return (FULL, QUANTIZED) if self.recipe.target else (QUANTIZED,)

    # -- one layer

    def layer(self, model: Layered, number: int, streams: Mapping[str, Stream], tokens: Weights) -> Done:
        """Stage by stage: what is chosen first is what the next stage's inputs come from. tokens: how much each counts,
        for the weights that it names. Raises SourceError.
        """
        weights, notes = model.weights(number), tuple[str, ...]()
        if self.recipe.factors:
            weights, notes = self._scaled(model, number, weights, streams[QUANTIZED])
        done = Done(model.open(number, weights), model.open(number, weights), weights, notes)
        for stage in done.after.stages:
            wanted = [model.tensors[name] for name in stage if model.tensors[name].codec.quantized]
            if wanted:
                self._stage(done, stage, wanted, streams, tokens)
        for tensor in model.of_layer(number):
            if tensor.codec.quantized and tensor.name not in done.chosen:
                done.choose(tensor, searched(tensor, by_rows(weights[tensor.name])))
        return done

    def _stage(
        self,
        done: Done,
        stage: Sequence[str],
        wanted: Sequence[PlannedTensor],
        streams: Mapping[str, Stream],
        tokens: Weights,
    ) -> None:
        found = self._looked_at(done, stage, wanted, streams, tokens)
        chosen = [(tensor, self._chosen(done, tensor, *found[tensor.name])) for tensor in wanted]
        for tensor, choice in chosen:
            done.choose(tensor, choice)

    def _looked_at(
        self,
        done: Done,
        stage: Sequence[str],
        wanted: Sequence[PlannedTensor],
        streams: Mapping[str, Stream],
        tokens: Weights,
    ) -> dict[str, tuple[Moments, Moments | None]]:
        """Moments of the stage's inputs in the quantized stream, and with the full one's: for each weight its own where
        tokens count for it as they do for no other. Of experts there are none between streams, which may send a token
        to different ones.
        """
        experts = wanted[0].target.shape[0] if len(wanted[0].target.shape) == 3 else 0
        apart = any(tensor.name in tokens for tensor in wanted)
        crossed = bool(self.recipe.target) and not experts
        found = {
            tensor.name: (
                Moments(tensor.name, "hessian", experts=experts, least_tokens=LEAST_EXPERT_TOKENS),
                Moments(tensor.name, "cross") if crossed else None,
            )
            for tensor in (wanted if apart else wanted[:1])
        }
        was = streams[FULL].batches() if crossed else repeat((slice(0), None))
        for (where, states), (_, full) in zip(streams[QUANTIZED].batches(), was, strict=False):
            x = done.after.inputs(stage, states)
            y = done.before.inputs(stage, full) if crossed else x
            for name, (hessian, cross) in found.items():
                count_N = tokens[name][where].reshape(-1) if name in tokens else None
                hessian.add(x, count_N)
                if cross:
                    cross.add(y, count_N, other_NI=x.x_NI)
        return {tensor.name: found[tensor.name if apart else wanted[0].name] for tensor in wanted}

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

    def _chosen(self, done: Done, tensor: PlannedTensor, moments: Moments, cross: Moments | None) -> Chosen:
        w = done.weights[tensor.name]
        if moments.experts:
            pieces = [self.weight(tensor, w_OI, moments.for_expert(e)[0]) for e, w_OI in enumerate(w)]
            chosen, before = joined([piece for piece, _ in pieces]), fmean(r for _, r in pieces)
            few = len(moments.fallbacks)
            note = f"{few} of {moments.experts} experts saw too little text" if few else chosen.note
        else:
            chosen, before = self.weight(tensor, w, moments.mean(), cross.mean() if cross else None)
            note = chosen.note
        done.records.append(Record(tensor.name, tensor.codec.label, before, chosen.error, moments.tokens, note))
        return chosen

    # -- the vocabulary's matrices

    def table(self, model: Layered, tensor: PlannedTensor, tokens_BL: Array) -> RowChooser:
        """Of the embedding: its rows are added to the stream as they are, each column as good as any other."""
        return lambda w_OI: (searched(tensor, w_OI), 0.0)

    def table_values(self, model: Layered, tensor: PlannedTensor, tokens_BL: Array) -> Callable[[Array], Array] | None:
        """What its codes stand for, given rows as they are; None for one that stays float."""
        choose = self.table(model, tensor, tokens_BL)
        return (lambda rows: choose(rows)[0].values_OI) if tensor.codec.quantized else None

    def head(self, model: Layered, tensor: PlannedTensor, streams: Mapping[str, Stream]) -> RowChooser:
        """Of the output head, by what leaves the trunk."""
        hessian, cross = Moments(tensor.name, "hessian"), Moments(tensor.name, "cross")
        was = streams[FULL].batches() if self.recipe.target else repeat((slice(0), None))
        for (_, states), (_, full) in zip(streams[QUANTIZED].batches(), was, strict=False):
            x = by_rows(np.array(model.finish(states)))
            hessian.add(Inputs(x))
            if full is not None:
                cross.add(Inputs(by_rows(np.array(model.finish(full)))), other_NI=x)
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
    weight = None if hessian_II is None else np.maximum(np.diagonal(hessian_II), 0).astype(np.float32)
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
