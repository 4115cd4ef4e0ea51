"""An MLX folder whose codes were chosen by what data say: `convert --method gptq` and its kin, as a whole.

Two streams of hidden states pass the model layer by layer: one through its weights as they are, one through what their
codes stand for. So each layer's codes are chosen for the inputs that they will see, and against what the model would
have said. Between layers both stand in files (streams.py): killed at any point, the next call goes on from the last
whole layer and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from mlxquant.calibrate.best import Trial, decide
from mlxquant.calibrate.choose import Chooser, Record, RowChooser, kept
from mlxquant.calibrate.gradients import trace
from mlxquant.calibrate.importance import Weights, head_moments, tied, weigh_errors
from mlxquant.calibrate.layered import Layered
from mlxquant.calibrate.recipes import Recipe
from mlxquant.calibrate.rotate import Rotation
from mlxquant.calibrate.streams import QUANTIZED, Streams
from mlxquant.calibrate.text import hold_out
from mlxquant.calibrate.values import Samples
from mlxquant.convert.gather import chunks, refuse_shifted_norms
from mlxquant.convert.manifest import NAME, manifest
from mlxquant.convert.sidecars import small_files
from mlxquant.convert.sources import OpenSource, fingerprint
from mlxquant.convert.to_mlx import named
from mlxquant.files.publish import CALIBRATION, Workspace
from mlxquant.files.shards import INDEX, LIMIT_BYTES, assign, index_json
from mlxquant.files.writing import write_whole, writing
from mlxquant.measure.runner import Silent, Watch
from mlxquant.plan.plan import Plan, PlannedTensor

Array = np.ndarray[Any, Any]

# Of a matrix of the vocabulary that is worked on at once: 4,096 rows of 4,096 weights.
ROWS_BYTES = 32 * 2**20
# Of freed arrays that MLX may keep for the next ones: of every size there is one each layer.
_CACHE_BYTES = 256 * 2**20
# Of the samples, at most eight of them: what recipes are judged by.
_HELD = 0.125


@dataclass(frozen=True)
class Written:
    """out, and what was chosen for each weight, in the order of the choices, by which recipe; what else was tried."""

    out: Path
    records: tuple[Record, ...]
    recipe: Recipe
    trials: tuple[Trial, ...] = ()


def to_mlx(
    source: OpenSource,
    plan: Plan,
    out: Path,
    samples: Samples,
    recipes: Sequence[Recipe],
    *,
    resume: bool | None = None,
    restart: bool = False,
    force: bool = False,
    rotation: Rotation | None = None,
    limit_s: float | None = None,
    shard_bytes: int = LIMIT_BYTES,
    watch: Watch | None = None,
) -> Written:
    """Writes the MLX folder `out`. recipes: one, or several among which held-out samples decide (best.py), limit_s
    seconds long.

    Peak memory: two layers in float32, the Hessians of one stage, some samples' activations. Raises SourceError (bytes
    missing, NaN in weights or activations), UnsupportedError (a family that cannot be run layer by layer), TargetError,
    and KeyboardInterrupt when the watch says so.
    """
    import mlx.core as mx

    mx.set_cache_limit(_CACHE_BYTES)
    refuse_shifted_norms(source, (t.target for t in plan.tensors))
    model = Layered(source, plan, rotation)
    small = small_files(source, plan, model.config)
    shards = assign([t.parts for t in plan.tensors], shard_bytes)
    told = [recipe.to_json() for recipe in recipes]
    said = json.dumps([plan.digest(), shard_bytes, fingerprint(source), samples.sha256, told])
    digest = hashlib.sha256(said.encode()).hexdigest()
    with Workspace.open(out, digest, shards, source=source.path, resume=resume, restart=restart, force=force) as work:
        job = _Job(model, work, samples, recipes, limit_s, watch or Silent())
        job.run()
        for name, data in {**small, INDEX: index_json(shards, plan.size)}.items():
            work.write_file(name, data)
        facts = {"text": samples.label, "sha256": samples.sha256} | job.account(rotation is not None)
        work.write_file(NAME, manifest(plan, source.origin, work.checksums, small, calibration=facts))
        work.publish()
    return Written(out, tuple(job.records), job.recipe, tuple(job.trials))


class _Job:
    """What is written while hidden states go from layer to layer."""

    def __init__(
        self,
        model: Layered,
        work: Workspace,
        samples: Samples,
        recipes: Sequence[Recipe],
        limit_s: float | None,
        watch: Watch,
    ) -> None:
        self._model, self._work, self._watch = model, work, watch
        self._folder = work.partial / CALIBRATION
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
        used, held = hold_out(samples, min(_HELD, 8 / len(samples.tokens_BL))) if len(recipes) > 1 else (samples, None)
        self._tokens_BL = used.tokens_BL
        asked = any(recipe.tokens for recipe in recipes)
        known = weigh_errors(model, self._tokens_BL, self._folder, watch) if asked else None
        self._tokens = known.tokens if known else {}
        table_HH = known.table_HH if known else self._tied_head(recipes)
        self.trials: list[Trial] = []
        if held is not None:
            texts = self._tokens_BL, held.tokens_BL, self._tokens
            self.trials = decide(model, recipes, *texts, self._folder, watch, limit_s, table_HH)
        self.recipe = self.trials[0].recipe if self.trials else recipes[0]
        self._chooser = Chooser(self.recipe, table_HH)
        self._streams = Streams(self._folder, (*self._tokens_BL.shape, model.width), self._chooser.kinds)
        self.records: list[Record] = []

    def account(self, rotated: bool) -> dict[str, Any]:
        """What the manifest says of how codes were chosen."""
        transforms = [*(["rotation"] if rotated else []), *(["factors"] if self.recipe.factors else [])]
        facts = {"transforms": transforms, **self.recipe.to_json(), "tensors": self._told()}
        tried = [{"recipe": trial.recipe.label, "held_out_nats": trial.nats} for trial in self.trials]
        return facts | ({"trials": tried} if tried else {})

    def run(self) -> None:
        first, records = self._streams.resume()
        self.records = [Record(**record) for record in records]
        tokens = self._tokens if self.recipe.tokens else {}
        self._watch.stage(f"Choosing codes by {self.recipe.method}", self._model.count + 2, "layers")
        if first < 0:
            self._begin()
            first = 0
        self._watch.advance(first + 1)
        for number in range(first, self._model.count):
            if self._watch.stopped():
                raise KeyboardInterrupt
            self._layer(number, tokens)
            self._watch.advance(1)
        self._end()
        self._watch.advance(1)

    def _tied_head(self, recipes: Sequence[Recipe]) -> Array | None:
        """Moments of what enters the head, where that is the embedding, of the model as it is; kept for a later run."""
        wanted = self._model.embedding().codec.quantized and any(recipe.codes == "gptq" for recipe in recipes)
        if not (wanted and tied(self._model)):
            return None
        file, scratch = self._folder / "head.safetensors", self._folder / "trace"
        if file.exists():
            found: Array = load(file.read_bytes())["hessian"]
            return found
        self._watch.stage("Asking what enters the head", self._model.count, "layers")
        made = head_moments(self._model, trace(self._model, self._tokens_BL, scratch, self._watch)[-1])
        shutil.rmtree(scratch)
        write_whole(file, save({"hessian": made}))
        return made

    # -- before the first layer

    def _begin(self) -> None:
        """The embedding's codes, and what enters the first layer of both streams."""
        tensor = self._model.embedding()
        if tensor.codec.quantized:
            self._rows(tensor, self._chooser.table(tensor))
        change, sums = self._chooser.table_values(tensor), {}
        for kind, into in self._streams.all_of(0).items():
            sums[kind] = into.write(self._model.embedded(self._tokens_BL, change if kind == QUANTIZED else None))
        self._streams.finish(0, sums, self._told())

    # -- one layer

    def _layer(self, number: int, tokens: Weights) -> None:
        done = self._chooser.layer(self._model, number, self._streams, tokens)
        for tensor in self._model.of_layer(number):
            self._write(tensor, [done.parts(tensor)])
        self.records += done.records
        sums = self._chooser.leave(done, number, self._streams)
        self._streams.finish(number + 1, sums, self._told())

    # -- behind the last

    def _end(self) -> None:
        last, embedding = self._streams.all_of(self._model.count), self._model.embedding()
        for tensor in self._model.outside():
            if tensor.codec.quantized and tensor.name != embedding.name:
                self._rows(tensor, self._chooser.head(self._model, tensor, last))
        for tensor in self._model.outside():
            if not tensor.codec.quantized:
                self._write(
                    tensor,
                    ((kept(tensor, self._model.rows(tensor, *part), part[0]),) for part in chunks(tensor.target)),
                )

    # -- writing

    def _rows(self, tensor: PlannedTensor, choose: RowChooser) -> None:
        """A large matrix, some rows at a time. Chosen again where a stopped run had written it: its record is told."""
        errors: list[tuple[float, float, str]] = []

        def parts() -> Iterator[tuple[Array, ...]]:
            for start, stop in chunks(tensor.target, ROWS_BYTES):
                with named(tensor, start):
                    chosen, rounding = choose(self._model.rows(tensor, start, stop))
                errors.append((rounding, chosen.error, chosen.note))
                yield chosen.parts

        self._write(tensor, parts())
        roundings, found, notes = zip(*errors, strict=True)
        note = next(filter(None, notes), "")
        self.records.append(
            Record(tensor.name, tensor.codec.label, mean(roundings), mean(found), self._tokens_BL.size, note)
        )

    def _write(self, tensor: PlannedTensor, arrays: Iterable[tuple[Array, ...]]) -> None:
        names, done = [part.name for part in tensor.parts], self._work.done(tensor.name)
        for some in arrays:
            for name, array in zip(names, some, strict=True):
                if not done:
                    self._work.write(name, array)
        if not done:
            self._work.finish(tensor.name, names)

    def _told(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self.records]
