"""Which recipe suits this model: each is carried out on its first layers, and held-out text says what that cost.

The divergence of the model with these layers quantized and the rest as it is, over samples that no code was chosen by.
All candidates begin from the same embedding and are told apart by the same samples. With a limit on time, candidates
are left out from the end once the first has shown how long one takes; without, the choice is the same on every run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.calibrate.choose import Chooser
from mlxquant.calibrate.gradients import head_of
from mlxquant.calibrate.importance import Weights
from mlxquant.calibrate.layered import Layered
from mlxquant.calibrate.recipes import Recipe
from mlxquant.calibrate.streams import FULL, QUANTIZED, Stream, Streams
from mlxquant.files.writing import write_whole
from mlxquant.measure.runner import Watch, step
from mlxquant.measure.score import score

Array = np.ndarray[Any, Any]

# Of the layers, so many are quantized by each candidate.
SHARE = 0.15
FILE = "trials.json"
_HEAD_TOKENS = 128


@dataclass(frozen=True)
class Trial:
    """nats: mean divergence a token of the held-out samples, the first layers being quantized by this recipe."""

    recipe: Recipe
    nats: float


def decide(
    model: Layered,
    candidates: Sequence[Recipe],
    tokens_BL: Array,
    held_BL: Array,
    tokens: Weights,
    folder: Path,
    watch: Watch,
    limit_s: float | None = None,
    table_HH: Array | None = None,
) -> list[Trial]:
    """The candidates that were tried, the best first.

    tokens: of importance.py for tokens_BL. table_HH: as Chooser takes it. Kept in `folder`, where a later call finds
    what was decided. Raises KeyboardInterrupt when the watch says so.
    """
    if (found := _read(folder / FILE, candidates)) is not None:
        return found
    scratch = folder / "trials"
    layers = max(1, round(SHARE * model.count))
    watch.stage("Trying recipes", len(candidates) * layers + model.count - layers, "layers")
    began, tried, held = time.monotonic(), list[Recipe](), dict[str, Stream]()
    for recipe in candidates:
        took = (time.monotonic() - began) / max(1, len(tried))
        if tried and limit_s is not None and time.monotonic() - began + took > limit_s:
            break
        chooser = Chooser(recipe, table_HH)
        held[str(len(tried))] = _carried_out(model, chooser, layers, tokens_BL, held_BL, tokens, scratch, watch)
        tried.append(recipe)
    held[FULL] = Stream(scratch / "full.f32", _shape(model, held_BL))
    held[FULL].write(model.embedded(held_BL))
    _run_on(model, held, layers, watch)
    trials = [Trial(recipe, _divergence(model, held[FULL], held[str(i)], held_BL)) for i, recipe in enumerate(tried)]
    trials.sort(key=lambda trial: trial.nats)
    shutil.rmtree(scratch)
    told = [{"recipe": trial.recipe.to_json(), "nats": trial.nats} for trial in trials]
    write_whole(folder / FILE, (json.dumps(told) + "\n").encode())
    return trials


def _carried_out(
    model: Layered,
    chooser: Chooser,
    layers: int,
    tokens_BL: Array,
    held_BL: Array,
    tokens: Weights,
    scratch: Path,
    watch: Watch,
) -> Stream:
    """What the held-out samples are behind the first layers, quantized by a recipe."""
    folder = scratch / chooser.recipe.label
    streams = Streams(folder, _shape(model, tokens_BL), chooser.kinds)
    held = Streams(folder / "held", _shape(model, held_BL), (QUANTIZED,))
    change = chooser.table_values(model.embedding())
    for kind in chooser.kinds:
        streams.of(kind, 0).write(model.embedded(tokens_BL, change if kind == QUANTIZED else None))
    held.of(QUANTIZED, 0).write(model.embedded(held_BL, change))
    for number in range(layers):
        done = chooser.layer(model, number, streams, tokens if chooser.recipe.tokens else {})
        chooser.leave(done, number, streams)
        held.of(QUANTIZED, number + 1).write(done.run(held.of(QUANTIZED, number)))
        for entering in (*streams.all_of(number).values(), held.of(QUANTIZED, number)):
            entering.path.unlink()
        step(watch)
    return held.of(QUANTIZED, layers)


def _run_on(model: Layered, held: dict[str, Stream], layers: int, watch: Watch) -> None:
    """Candidates' streams through the layers that none has quantized, and the FULL one through all."""
    for number in range(model.count):
        layer = model.open(number, model.weights(number))
        for kind in held if number >= layers else [FULL]:
            leaving = Stream(held[kind].path.with_name(f"leaving-{number}.f32"), held[kind].shape)
            leaving.write(layer.run(states) for _, states in held[kind].batches())
            held[kind].path.unlink()
            held[kind] = leaving
        if number >= layers:
            step(watch)


def _divergence(model: Layered, full: Stream, quantized: Stream, tokens_BL: Array) -> float:
    """Mean KL(full || quantized) over every token but the first eighth of each sample, which had little to go by."""
    import mlx.core as mx

    head, parts = head_of(model), []
    first = tokens_BL.shape[1] // 8
    for (where, p), (_, q) in zip(full.batches(1), quantized.batches(1), strict=True):
        following = tokens_BL[where.start, 1:]
        for start in range(first, tokens_BL.shape[1] - 1, _HEAD_TOKENS):
            some = slice(start, min(start + _HEAD_TOKENS, tokens_BL.shape[1] - 1))
            logits = [np.array(model.logits(mx.array(x[:, some]), head)[0].astype(mx.float32)) for x in (p, q)]
            parts.append(score(logits[0], logits[1], following[some])["kl"])
    return float(np.concatenate(parts).mean())


def _shape(model: Layered, tokens_BL: Array) -> tuple[int, int, int]:
    return (*tokens_BL.shape, model.width)


def _read(path: Path, candidates: Sequence[Recipe]) -> list[Trial] | None:
    """What was decided among these candidates."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        by_json = {json.dumps(recipe.to_json()): recipe for recipe in candidates}
        return [Trial(by_json[json.dumps(entry["recipe"])], float(entry["nats"])) for entry in told]
    except (OSError, ValueError, KeyError, TypeError):
        return None
