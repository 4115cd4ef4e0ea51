"""What each tensor costs at each format, in nats a token: what a bit budget is solved by.

For some rows of each weight codes are chosen as they will be (by rounding, by search, by GPTQ under the Hessian of what
enters the layer, which for `best` is weighed as importance.py says) in every format; what their errors cost is
1/2 E <G, dW>^2 by gradients.py. Gradients come from other samples than Hessians: codes are fitted to the text that they
are chosen by, and would look better there than they are.
Embedding and head are measured besides (ends.py).

Rows are taken as independent: errors of two rows of a weight, or of two weights, have nothing to do with one another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from mlxquant.calibrate.choose import LEAST_EXPERT_TOKENS
from mlxquant.calibrate.ends import SAMPLES, TOKENS, Values, corrected
from mlxquant.calibrate.gptq import NotPositive, Prepared, gptq, prepare
from mlxquant.calibrate.gradients import Part, Rows, backwards, by_use, spread, trace
from mlxquant.calibrate.importance import Importance, weigh_errors
from mlxquant.calibrate.layered import Layered, some_rows
from mlxquant.calibrate.statistics import Moments
from mlxquant.calibrate.streams import Stream
from mlxquant.calibrate.values import Array, Inputs, Samples
from mlxquant.codecs.encode import decode, encode
from mlxquant.codecs.search import search
from mlxquant.codecs.spec import Codec
from mlxquant.convert.gather import chunks
from mlxquant.errors import UsageError
from mlxquant.measure.runner import Silent, Watch, step
from mlxquant.plan.budget import formats
from mlxquant.plan.recipe import BEST
from mlxquant.plan.sensitivities import Cost, Sensitivities

METHODS = ("rtn", "search", "gptq", BEST)
_BY_HESSIAN = ("gptq", BEST)


@dataclass(frozen=True)
class Depth:
    """How closely is looked. rows: of each weight; vocabulary: of embedding and head; samples: that gradients are taken
    of, at most half of all.
    """

    rows: int = 128
    vocabulary: int = 1024
    samples: int = 8


def measure(
    model: Layered,
    samples: Samples,
    method: str,
    folder: Path,
    *,
    depth: Depth | None = None,
    seed: int = 0,
    watch: Watch | None = None,
) -> Sensitivities:
    """What every tensor that a budget decides on costs in each of its formats. folder: for hidden states, 4 * tokens *
    width * (layers + 1) bytes; whoever calls removes it.

    Peak memory: one layer and its slopes in float32, a Hessian, the head. Raises UsageError for a method that is none
    or fewer than two samples, SourceError (weights or activations that are not finite), UnsupportedError (a family that
    cannot be run layer by layer).
    """
    return _Measuring(model, samples, method, depth or Depth(), seed, watch or Silent()).run(folder)


def identity(model: Layered) -> str:
    """Tells models apart, those of the same shape and rotated ones, too: a hash of names, shapes and one row of every
    tensor.
    """
    digest, outside = hashlib.sha256(), {t.name for t in model.outside()}
    for tensor in model.plan.tensors:
        digest.update(f"{tensor.name} {tensor.target.shape} {tensor.dtype}\n".encode())
        read = model.rows if tensor.name in outside else partial(some_rows, model.source)
        digest.update(read(tensor, 0, 1).tobytes())
    return digest.hexdigest()


class _Measuring:
    def __init__(self, model: Layered, samples: Samples, method: str, depth: Depth, seed: int, watch: Watch) -> None:
        if method not in METHODS:
            raise UsageError(f"there are no sensitivities for method {method!r}", hint=f"one of {METHODS}")
        count = len(samples.tokens_BL)
        if count < 2:
            raise UsageError(
                "one sample of calibration text is not enough for a bit budget", hint="give more --samples"
            )
        self.model, self.samples, self.method, self.seed, self.watch = model, samples, method, seed, watch
        self.count = min(depth.samples, count // 2)
        self.formats = formats(model.plan)
        self.tensors = {t.name: t for t in model.plan.tensors if t.name in self.formats}
        self.rows = dict(self._drawn(depth))
        self.known: Importance | None = None
        self.costs: dict[str, dict[Codec, Cost]] = {}
        self.ways: dict[str, Values] = {}

    def run(self, folder: Path) -> Sensitivities:
        tokens_BL = self.samples.tokens_BL
        if self.method == BEST:
            self.known = weigh_errors(self.model, tokens_BL[self.count :], folder, self.watch)
        self.watch.stage("Measuring tensors", 2 * self.model.count, "steps")
        kept = trace(self.model, tokens_BL, folder, self.watch)
        for part in backwards(self.model, kept, tokens_BL[: self.count], self.rows, self.seed):
            self._part(part)
            if part.layer is not None:
                step(self.watch)
        self._measure_ends(kept[-1])
        names = [t.name for t in self.model.plan.tensors if t.name in self.costs]
        return Sensitivities(
            identity(self.model),
            self.method,
            self.samples.label,
            self.samples.sha256,
            {name: self.tensors[name].size for name in names},
            {name: self.costs[name] for name in names},
        )

    def _drawn(self, depth: Depth) -> Iterator[tuple[str, Rows]]:
        rng = np.random.default_rng(self.seed)
        ends = {self.model.head().name, self.model.embedding().name}
        for name, tensor in self.tensors.items():
            if name in ends:
                yield name, by_use(tensor.target.shape[0], self.samples.tokens_BL, depth.vocabulary, rng)
            else:
                yield name, spread(tensor, depth.rows, rng)

    def _part(self, part: Part) -> None:
        for name, choose in self._choosers(part):
            self.costs[name] = self._costs(name, self._weights(part, name), part.gradients[name], choose)
            if part.layer is None:
                self.ways[name] = choose

    def _measure_ends(self, leaving: Stream) -> None:
        """With the beginnings of some samples, which later tokens do not change."""
        count, length = min(SAMPLES, self.count), min(TOKENS, self.samples.tokens_BL.shape[1])
        states = np.concatenate([some for _, some in islice(leaving.batches(1), count)])[:, :length]
        tokens = self.samples.tokens_BL[:count, :length]
        self.costs |= corrected(self.model, tokens, states, self.ways, self.costs)

    def _costs(self, name: str, w_RI: Array, g_SRI: Array, choose: Values) -> dict[Codec, Cost]:
        share_R, length = self.rows[name].share_R, self.samples.tokens_BL.shape[1]
        costs = {}
        for codec in self.formats[name]:
            d_RI = choose(w_RI, codec) - w_RI
            squares_SR = np.einsum("sri,ri->sr", g_SRI, d_RI, optimize=True).astype(np.float64) ** 2
            nats = float((squares_SR @ share_R).mean()) / (2 * length)
            costs[codec] = Cost(nats, float((d_RI**2).sum() / max((w_RI**2).sum(), 1e-30)))
        return costs

    def _weights(self, part: Part, name: str) -> Array:
        """The rows that were drawn, float32 (R, I)."""
        index_R = self.rows[name].index_R
        if part.layer is not None:
            values = np.array(part.layer.get(name))
            return np.ascontiguousarray(values.reshape(-1, values.shape[-1])[index_R])
        tensor = self.tensors[name]
        found = []
        for start, stop in chunks(tensor.target):
            wanted = index_R[(index_R >= start) & (index_R < stop)]
            if len(wanted):
                found.append(self.model.rows(tensor, start, stop)[wanted - start])
        return np.concatenate(found)

    def _choosers(self, part: Part) -> Iterator[tuple[str, Values]]:
        """How codes are chosen for each weight of a part. What shares an input shares its statistics; what no linear
        layer holds, and an embedding, has none.
        """
        layer, done = part.layer, set[str]()
        for stage in layer.stages if layer else ():
            seen = None
            for name in (name for name in stage if name in part.gradients):
                if layer and (self.known or seen is None):  # tokens count for each as they do for no other
                    seen = self._seen(part, name, partial(layer.inputs, stage))
                yield name, self._values(name, seen)
                done.add(name)
        for name in part.gradients:
            if name not in done:
                yield name, self._values(name, None if layer else self._of_ends(part, name))

    def _of_ends(self, part: Part, name: str) -> _Factored | Array | None:
        """What embedding and head are chosen by; as `to_mlx` does."""
        table, head = name == self.model.embedding().name, name == self.model.head().name
        if self.known and table:
            return _Factored(self.known.table_HH)
        by_head = head and (self.method in _BY_HESSIAN or not table)
        return self._seen(part, name, self.model.entering_head) if by_head else None

    def _seen(self, part: Part, name: str, inputs: Callable[[Array], Inputs]) -> _Factored | Array | None:
        """Of the samples that no gradient was taken of: Hessians, or for search mean squares, (I,) or (experts, I)."""
        if self.method == "rtn" or part.entering is None:
            return None
        lead = self.tensors[name].target.shape[:-2]
        kind: Literal["hessian", "squares"] = "hessian" if self.method in _BY_HESSIAN else "squares"
        moments = Moments(name, kind, experts=lead[0] if lead else 0, least_tokens=LEAST_EXPERT_TOKENS)
        tokens = self.known.tokens.get(name) if self.known else None
        for which, states in part.entering.batches():
            first = max(which.start, self.count)
            if len(rest := states[first - which.start :]):
                some = slice(first - self.count, which.stop - self.count)
                moments.add(inputs(rest), None if tokens is None else tokens[some].reshape(-1))
        return _Factored(moments) if self.method in _BY_HESSIAN else moments.columns()

    def _values(self, name: str, seen: _Factored | Array | None) -> Values:
        tensor = self.tensors[name]
        dtype, matrix_R = tensor.dtype, self._matrix_of(name)
        if self.method == "rtn":
            return lambda w_RI, codec: decode(encode(w_RI, "F32", dtype, codec), dtype, codec)
        if isinstance(seen, _Factored):
            return _Gptq(dtype, seen, matrix_R)
        weight = seen if seen is None or matrix_R is None else seen[matrix_R]
        return lambda w_RI, codec: _searched(w_RI, dtype, codec, weight)

    def _matrix_of(self, name: str) -> Array | None:
        """Which matrix of a stack each drawn row is of; None where there is but one."""
        rows = self.tensors[name].target.shape[-2]
        return self.rows[name].index_R // rows if len(self.tensors[name].target.shape) > 2 else None


class _Factored:
    """Hessians of what enters a stage, each factored once for all weights and formats: None where that fails."""

    def __init__(self, seen: Moments | Array) -> None:
        self._seen, self._made = seen, dict[int, Prepared | None]()

    def hessian(self, matrix: int) -> Array:
        return self._seen.for_expert(matrix)[0] if isinstance(self._seen, Moments) else self._seen

    def of(self, matrix: int) -> Prepared | None:
        if matrix not in self._made:
            try:
                self._made[matrix] = prepare(self.hessian(matrix))
            except NotPositive:
                self._made[matrix] = None
        return self._made[matrix]


class _Gptq:
    """Values by GPTQ, each matrix of a stack by its own Hessian; by search where that has no factor."""

    def __init__(self, dtype: str, factored: _Factored, matrix_R: Array | None) -> None:
        self._dtype, self._factored, self._matrix_R = dtype, factored, matrix_R

    def __call__(self, w_RI: Array, codec: Codec) -> Array:
        if self._matrix_R is None:
            return self._of(0, w_RI, codec)
        values_RI = np.empty_like(w_RI)
        for matrix in np.unique(self._matrix_R).tolist():
            rows = self._matrix_R == matrix
            values_RI[rows] = self._of(matrix, w_RI[rows], codec)
        return values_RI

    def _of(self, matrix: int, w_RI: Array, codec: Codec) -> Array:
        prepared = self._factored.of(matrix)
        if prepared is None:
            weight = np.diagonal(self._factored.hessian(matrix)).astype(np.float32)
            return _searched(w_RI, self._dtype, codec, weight)
        return gptq(w_RI, prepared, self._dtype, codec, rounds=1).values_OI


def _searched(w_RI: Array, dtype: str, codec: Codec, weight: Array | None) -> Array:
    return decode(search(w_RI, "F32", dtype, codec, weight), dtype, codec)
