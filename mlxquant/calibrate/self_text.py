"""Calibration text that the model writes itself, where there is none better: drawn at temperature 1, so that it is as
likely as the model finds it (as LLM-QAT does for its training data, arXiv:2305.17888).

Many samples at once: a step reads all weights once, whatever the number of samples. Each sample has its own random
numbers, so that how many fit beside one another does not change what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.calibrate.text import Generate
from mlxquant.errors import SourceError
from mlxquant.fit.memory import limit_bytes
from mlxquant.measure.runner import Silent, Watch
from mlxquant.measure.windows import begins_with
from mlxquant.run.device import Device
from mlxquant.run.ready import open_unread
from mlxquant.run.text import Text

Array = np.ndarray[Any, Any]

MOST_AT_ONCE = 64
_STEPS_BETWEEN_CLEARS = 256  # MLX keeps the buffers of growing caches for reuse


class Stopped(KeyboardInterrupt):
    """By the user, between two tokens."""


def generator(path: Path, device: Device, text: Text, watch: Watch | None = None) -> Generate:
    """What `calibration` samples 'self' from: reads the model at `path` when it is called, and lets go of it after.

    Raises MemoryBudgetError where the model does not fit beside one sample, SourceError for logits that are NaN, and
    KeyboardInterrupt when the watch says so.
    """

    def generate(samples: int, sequence_length: int, seed: int) -> Array:
        ready = open_unread(path, device, text, context_tokens=sequence_length)
        spare = limit_bytes(device.machine) - ready.budget.total_bytes
        fit = 1 + max(0, spare) // max(1, ready.plan.held_bytes(sequence_length))
        ready.loaded.materialize()
        draw = Draw(ready.loaded.model, ready.plan.make, starts(text), text.eos_ids)
        return draw(samples, sequence_length, seed, min(fit, MOST_AT_ONCE), watch or Silent())

    return generate


def starts(text: Text) -> Array:
    """Tokens that a sample may begin with: BOS where texts begin with it, else any that is no control token."""
    if begin := begins_with(text):
        return np.array(begin[:1], np.int32)
    known = set(text.tokenizer.get_vocab().values())
    return np.array(sorted(known - set(text.tokenizer.added_tokens_decoder) - set(text.eos_ids)), np.int32)


class Draw:
    """make_cache: a new one each time. A sample begins, and goes on behind an end of text, with one of `starts`."""

    def __init__(
        self, model: Callable[..., Any], make_cache: Callable[[], list[Any]], starts: Array, eos_ids: tuple[int, ...]
    ) -> None:
        self._model, self._make_cache, self._starts, self._eos_ids = model, make_cache, starts, eos_ids

    def __call__(self, samples: int, length: int, seed: int, at_once: int, watch: Watch) -> Array:
        """tokens_BL, int32."""
        watch.stage("Sampling the model's text", samples * length, "tokens")
        tokens_BL = np.empty((samples, length), np.int32)
        for first in range(0, samples, at_once):
            rows = range(first, min(first + at_once, samples))
            draws = [np.random.default_rng([seed, row]) for row in rows]
            chance_BL = np.stack([rng.random(length) for rng in draws])
            start_BL = np.stack([rng.choice(self._starts, length) for rng in draws])
            tokens_BL[rows.start : rows.stop] = self._some(chance_BL, start_BL, watch)
        return tokens_BL

    def _some(self, chance_BL: Array, start_BL: Array, watch: Watch) -> Array:
        import mlx.core as mx

        tokens_BL, cache = start_BL.copy(), self._make_cache()
        rows, length = tokens_BL.shape
        for place in range(1, length):
            if watch.stopped():
                raise Stopped
            before_B = tokens_BL[:, place - 1]
            logits_BV = self._model(mx.array(before_B[:, None]), cache=cache)[:, -1]
            drawn_B = _draw(logits_BV, chance_BL[:, place])
            tokens_BL[:, place] = np.where(np.isin(before_B, self._eos_ids), start_BL[:, place], drawn_B)
            watch.advance(rows)
            if place % _STEPS_BETWEEN_CLEARS == 0:
                mx.clear_cache()
        watch.advance(rows)
        return tokens_BL


def _draw(logits_BV: Any, chance_B: Array) -> Array:
    """The token at which the summed probabilities reach each chance, 0 <= chance < 1."""
    import mlx.core as mx

    summed_BV = mx.cumsum(mx.softmax(logits_BV.astype(mx.float32), axis=-1), axis=-1)
    total_B1 = summed_BV[:, -1:]
    wanted_B1 = (1 - mx.array(chance_B.astype(np.float32)))[:, None] * total_B1  # above 0: no token of no probability
    drawn_B, whole = (summed_BV < wanted_B1).sum(axis=-1), mx.isfinite(total_B1).all()
    mx.eval(drawn_B, whole)
    if not whole.item():
        raise SourceError(
            "the model's logits are NaN: weights are damaged, or too large for the dtype it runs in",
            hint="`mlxquant verify` finds damaged weights; or name a text with --calibration",
        )
    return np.array(drawn_B).astype(np.int32)
