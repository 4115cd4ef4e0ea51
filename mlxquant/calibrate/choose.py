"""Which codes each weight of one layer gets, by what enters it: the step that `to_mlx` repeats layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import repeat
from statistics import fmean
from typing import Any

import numpy as np

from mlxquant.calibrate.awq import awq
from mlxquant.calibrate.fold import Feed, check, feeds
from mlxquant.calibrate.gptq import NotPositive, Prepared, corrected, gptq, output_error, prepare
from mlxquant.calibrate.importance import Weights
from mlxquant.calibrate.layered import Layer, Layered
from mlxquant.calibrate.recipes import Recipe
from mlxquant.calibrate.refit import refit
from mlxquant.calibrate.statistics import Moments
from mlxquant.calibrate.streams import FULL, QUANTIZED, Stream, Streams
from mlxquant.calibrate.values import Chosen, Inputs
from mlxquant.calibrate.wiring import wiring
from mlxquant.codecs.encode import decode, encode
from mlxquant.codecs.floats import narrow
from mlxquant.codecs.search import search
from mlxquant.convert.to_mlx import check_finite, named
from mlxquant.families.shape import ModelShape
from mlxquant.plan.plan import PlannedTensor
from mlxquant.tensors import DTYPES

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


@dataclass(frozen=True)
class Looked:
    """Moments of what enters a linear layer in the quantized stream, y; with what it was, x; and of what the stream is
    off by where the layer adds to it, d: mean y y^T, x y^T and d y^T.
    """

    hessian: Moments
    cross: Moments | None
    left: Moments | None

    @classmethod
    def of(cls, tensor: PlannedTensor, both: bool, writes: bool, last: bool) -> Looked:
        """both: there are two streams. last: what leaves the layer tells x and d together."""
        name, shape = tensor.name, tensor.target.shape
        experts = shape[0] if len(shape) == 3 else 0
        return cls(
            Moments(name, "hessian", experts=experts, least_tokens=LEAST_EXPERT_TOKENS),
            Moments(name, "cross") if both and not (writes and last) else None,
            Moments(name, "cross") if both and writes else None,
        )

    def add(self, y: Inputs, x: Inputs | None, left_NH: Any = None, count_N: Array | None = None) -> None:
        self.hessian.add(y, count_N)
        if self.cross and x:
            self.cross.add(x, count_N, other_NI=y.x_NI)
        if self.left:
            self.left.add(Inputs(left_NH), count_N, other_NI=y.x_NI)


class Done:
    """One layer's choices, while the layer is at hand. before: as it is; after: with what has been chosen.

    writes: weights whose output is added to the stream as it is. adds: of these, those that can make good what the
    stream is off by: the first stage knows what entered the layer, and the last what leaves it.
    """

    def __init__(self, before: Layer, after: Layer, weights: dict[str, Array], writes: frozenset[str]) -> None:
        self.before, self.after, self.weights = before, after, weights
        writing = [stage for stage in after.stages if not writes.isdisjoint(stage)]
        ends = {*writing[0], *after.stages[-1]} if writing else set[str]()
        self.adds = writes & ends
        self.chosen: dict[str, tuple[Array, ...]] = {}
        self.records: list[Record] = []
        self.sums: dict[str, str] = {}

    def choose(self, tensor: PlannedTensor, chosen: Chosen) -> None:
        """The weight as it was and its values are let go: the layer has them."""
        self.chosen[tensor.name] = chosen.parts
        self.after.put(tensor.name, chosen.values_OI.reshape(tensor.target.shape))
        del self.weights[tensor.name]

    def parts(self, tensor: PlannedTensor) -> tuple[Array, ...]:
        """What is stored of a tensor, rows first."""
        if tensor.name in self.chosen:
            return self.chosen[tensor.name]
        return (kept(tensor, by_rows(self.weights[tensor.name])),)

    def run(self, entering: Stream) -> Iterator[Array]:
        """What leaves the layer with what has been chosen."""
        for _, hidden in entering.batches():
            yield self.after.run(hidden)


class Chooser:
    """Carries out a recipe. Holds nothing between layers. table_HH: what errors of the embedding's rows cost, by
    importance.py; of a recipe that asks for no importance, only where the embedding is the output head, too.
    """

    def __init__(self, recipe: Recipe, table_HH: Array | None = None) -> None:
        self.recipe, self._table_HH = recipe, table_HH

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the streams that are looked at."""
        return (FULL, QUANTIZED) if self.recipe.target else (QUANTIZED,)

    # -- one layer

    def layer(self, model: Layered, number: int, streams: Streams, tokens: Weights) -> Done:
        """Stage by stage: what is chosen first is what the next stage's inputs come from. What leaves the layer as it
        is gets written first, as the last stage compares with it. tokens: how much each counts, for the weights that
        it names. Raises SourceError.
        """
        weights, notes = model.weights(number), tuple[str, ...]()
        shape = ModelShape.from_config(model.config)
        wired = wiring({name: w.shape for name, w in weights.items()}, model.prefix(number), shape)
        if self.recipe.factors:
            hold = feeds(wired, weights, shape)
            weights, notes = self._scaled(model, number, weights, hold, streams.of(QUANTIZED, number))
        plain = float(model.config.get("residual_multiplier") or 1) == 1  # granite's is not
        known = plain and not (wired.written_norms or wired.unknown)
        done = Done(
            model.open(number, weights), model.open(number, weights), weights, frozenset(wired.writes if known else ())
        )
        if FULL in self.kinds:
            full = (done.before.run(states) for _, states in streams.of(FULL, number).batches())
            done.sums[FULL] = streams.of(FULL, number + 1).write(full)
        for stage in done.after.stages:
            wanted = [model.tensors[name] for name in stage if model.tensors[name].codec.quantized]
            if wanted:
                found = self._looked_at(done, stage, wanted, streams, number, tokens)
                for tensor in wanted:
                    done.choose(tensor, self._chosen(done, tensor, found.pop(tensor.name)))
        for tensor in model.of_layer(number):
            if tensor.codec.quantized and tensor.name not in done.chosen:
                with named(tensor):
                    done.choose(tensor, searched(tensor, by_rows(weights[tensor.name])))
        if notes and done.records:
            done.records[0] = replace(done.records[0], note="; ".join([*notes, *filter(None, [done.records[0].note])]))
        return done

    def leave(self, done: Done, number: int, streams: Streams) -> dict[str, str]:
        """Writes what leaves the layer with what was chosen; the sha256 of both streams."""
        leaving = streams.of(QUANTIZED, number + 1)
        return done.sums | {QUANTIZED: leaving.write(done.run(streams.of(QUANTIZED, number)))}

    def _looked_at(
        self,
        done: Done,
        stage: Sequence[str],
        wanted: Sequence[PlannedTensor],
        streams: Streams,
        number: int,
        tokens: Weights,
    ) -> dict[str, Looked]:
        """Moments of the stage's inputs: for each weight its own where tokens count for it as they do for no other. Of
        experts there are none between the streams, which may send a token to different ones.
        """
        dense = len(wanted[0].target.shape) == 2
        apart = any(tensor.name in tokens for tensor in wanted)
        both = bool(self.recipe.target) and dense
        last = stage == done.after.stages[-1]
        found = {t.name: Looked.of(t, both, t.name in done.adds, last) for t in (wanted if apart else wanted[:1])}
        crossed = any(looked.cross for looked in found.values())
        adds = any(looked.left for looked in found.values())
        for (where, states), full, leaving in zip(
            streams.of(QUANTIZED, number).batches(),
            _batches(streams, number, crossed or (adds and not last)),
            _batches(streams, number + 1, adds and last),
            strict=False,
        ):
            x, left = done.before.inputs(stage, full) if crossed else None, None
            if adds and last:
                y, out = done.after.inputs_and_out(stage, states)
                left = by_rows(leaving - out)
            else:
                y = done.after.inputs(stage, states)
                left = by_rows(full - states) if adds else None
            for name, looked in found.items():
                looked.add(y, x, left, tokens[name][where].reshape(-1) if name in tokens else None)
        return {tensor.name: found[tensor.name if apart else wanted[0].name] for tensor in wanted}

    def _scaled(
        self, model: Layered, number: int, weights: dict[str, Array], found: Sequence[Feed], entering: Stream
    ) -> tuple[dict[str, Array], tuple[str, ...]]:
        """The layer's weights with AWQ's factors folded in, and what is to be said of them."""
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
        hold, refused = check(model, number, weights, found, first[:1, :_CHECK_TOKENS])
        made = awq(weights, hold, moments, lambda name: model.tensors[name].codec, model.plan.dtype)
        return made.weights, tuple(filter(None, (made.note, *refused)))

    def _chosen(self, done: Done, tensor: PlannedTensor, looked: Looked) -> Chosen:
        w, moments = done.weights[tensor.name], looked.hessian
        if moments.experts:
            pieces = []
            for e, w_OI in enumerate(w):
                with named(tensor, e * len(w_OI)):
                    pieces.append(self.prepared(tensor, moments.for_expert(e)[0])(w_OI))
            chosen, before = joined([piece for piece, _ in pieces]), fmean(r for _, r in pieces)
            few = len(moments.fallbacks)
            note = f"{few} of {moments.experts} experts saw too little text" if few else chosen.note
        else:
            means = [part.mean() if part else None for part in (looked.cross, looked.left)]
            with named(tensor):
                chosen, before = self.prepared(tensor, moments.mean(), *means)(w)
            note = chosen.note
        done.records.append(Record(tensor.name, tensor.codec.label, before, chosen.error, moments.tokens, note))
        return chosen

    # -- the vocabulary's matrices

    def table(self, tensor: PlannedTensor) -> RowChooser:
        """Of the embedding; where nothing is known, each column is as good as any other."""
        if self._table_HH is not None:
            return self.prepared(tensor, self._table_HH)
        return lambda w_OI: (searched(tensor, w_OI), 0.0)

    def table_values(self, tensor: PlannedTensor) -> Callable[[Array], Array] | None:
        """What its codes stand for, given rows as they are; None for one that stays float."""
        choose = self.table(tensor)
        return (lambda rows: choose(rows)[0].values_OI) if tensor.codec.quantized else None

    def head(self, model: Layered, tensor: PlannedTensor, streams: Mapping[str, Stream]) -> RowChooser:
        """Of the output head, by what leaves the trunk."""
        looked = Looked.of(tensor, bool(self.recipe.target), writes=False, last=True)
        was = streams[FULL].batches() if looked.cross else repeat((slice(0), None))
        for (_, states), (_, full) in zip(streams[QUANTIZED].batches(), was, strict=False):
            looked.add(model.entering_head(states), model.entering_head(full) if looked.cross else None)
        return self.prepared(tensor, looked.hessian.mean(), looked.cross.mean() if looked.cross else None)

    # -- one weight

    def prepared(
        self, tensor: PlannedTensor, hessian_II: Array, cross_II: Array | None = None, left_OI: Array | None = None
    ) -> RowChooser:
        """Codes under one Hessian; of a matrix in row chunks where there is no left_OI."""
        rounds = self.recipe.rounds

        @cache
        def ready() -> Prepared:
            return prepare(hessian_II, damping=self.recipe.damping, group_size=tensor.codec.group_size)

        def of(w_OI: Array) -> tuple[Chosen, float]:
            before, target = rounding(tensor, w_OI, hessian_II), None
            if self.recipe.codes != "gptq" or tensor.codec.mode != "affine":
                return searched(tensor, w_OI, hessian_II, rounds=rounds), before
            try:
                if cross_II is not None or left_OI is not None:  # first: that and ready() take a Hessian's memory each
                    target = corrected(w_OI, hessian_II, cross_II, left_OI, strength=self.recipe.target)
                return gptq(w_OI, ready(), tensor.dtype, tensor.codec, target_OI=target, rounds=rounds), before
            except NotPositive as error:
                return searched(tensor, w_OI, hessian_II, str(error)), before

        return of


def _batches(streams: Streams, number: int, wanted: bool) -> Iterator[Any]:
    """Of the stream as it is, what enters a layer; nothing for ever, where it is not wanted."""
    return (states for _, states in streams.of(FULL, number).batches()) if wanted else repeat(None)


def kept(tensor: PlannedTensor, values: Array, start: int = 0) -> Array:
    """Rows as they are stored, of what stays float. Raises SourceError for NaN and numbers that the dtype has not."""
    if not DTYPES[tensor.dtype].floating:
        return values
    with named(tensor, start):
        raw = narrow(values, tensor.dtype)
        check_finite(raw, tensor.dtype)
    return raw


def searched(
    tensor: PlannedTensor, w_OI: Array, hessian_II: Array | None = None, note: str = "", rounds: int = 0
) -> Chosen:
    """By search, columns weighted by what enters them. rounds: of fitting scales and biases to the output, then; codes
    stay as they are.
    """
    weight = None if hessian_II is None else np.maximum(np.diagonal(hessian_II), 0).astype(np.float32)
    parts = search(w_OI, "F32", tensor.dtype, tensor.codec, weight)
    if rounds and hessian_II is not None and tensor.codec.mode == "affine":
        # A group's own part of the Hessian may not be positive: then what search found stays.
        with suppress(np.linalg.LinAlgError):
            return refit(w_OI, parts, hessian_II, tensor.dtype, tensor.codec, rounds=rounds, recode=False)
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
