"""Calibration text: samples of equal length from random places of a text, in its own order, none over another.

Where a text is read matters: its beginning is of one topic. Samples begin as windows of `eval` do (measure/windows.py):
with BOS, where the tokenizer begins texts with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mlxquant.calibrate.values import Samples
from mlxquant.errors import UsageError
from mlxquant.measure.corpus import load_corpus
from mlxquant.measure.windows import begins_with, encode
from mlxquant.run.text import Text

Array = np.ndarray[Any, Any]

SELF = "self"
LEAST_TOKENS = 8  # of a sample: below that there is nothing to attend to
# (samples, sequence_length, seed) -> tokens_BL, drawn from the model itself; calibrate/self_text.py makes one.
Generate = Callable[[int, int, int], Array]


def calibration(
    spec: str, text: Text, samples: int, sequence_length: int, seed: int, generate: Generate | None = None
) -> Samples:
    """`samples` times `sequence_length` tokens of what `spec` names: a file, a dataset on the Hub, 'builtin' (as
    measure/corpus.py reads them), or 'self': what the model itself says, by `generate`. The same seed gives the same
    samples.

    Raises UsageError where the text is too short or 'self' has nobody to generate, and as `load_corpus`.
    """
    _check(samples, sequence_length)
    if spec == SELF:
        if generate is None:
            raise UsageError("--calibration self: there is no model to sample from", hint="use builtin, or name a file")
        tokens_BL = generate(samples, sequence_length, seed)
        return made(tokens_BL, f"the model's own text: {samples} samples of {sequence_length} tokens, seed {seed}")
    corpus = load_corpus(spec)
    start = begins_with(text)
    ids = np.array(start + encode(text, corpus.text.removesuffix("\n")), np.int32)
    places = _places(len(ids), samples, sequence_length, seed, corpus.label)
    tokens_BL = ids[places[:, None] + np.arange(sequence_length)]
    if start:
        tokens_BL[:, 0] = start[0]
    return made(tokens_BL, f"{corpus.label}: {samples} samples of {sequence_length} tokens, seed {seed}")


def made(tokens_BL: Array, label: str) -> Samples:
    """Samples of these tokens, hashed."""
    tokens_BL = np.ascontiguousarray(tokens_BL, np.int32)
    return Samples(tokens_BL, label, hashlib.sha256(tokens_BL.astype("<i4").tobytes()).hexdigest())


def hold_out(samples: Samples, share: float) -> tuple[Samples, Samples]:
    """(the rest, about `share` of the samples): the second from everywhere in the text, for decisions that the first
    must not make. At least one each. Raises UsageError for fewer than two samples, or a share that is none.
    """
    count = len(samples.tokens_BL)
    if count < 2 or not 0 < share < 1:
        raise UsageError(f"{count} samples cannot be split with a share of {share:g}", hint="give more --samples")
    held = min(count - 1, max(1, round(count * share)))
    places = (np.arange(held) * 2 + 1) * count // (2 * held)
    kept = np.delete(samples.tokens_BL, places, axis=0)
    return (
        made(kept, f"{len(kept)} of {samples.label}"),
        made(samples.tokens_BL[places], f"{held} held out of {samples.label}"),
    )


def _places(tokens: int, samples: int, length: int, seed: int, label: str) -> Array:
    """Where samples begin, ascending: all ways to lay them without overlap are equally likely."""
    spare = tokens - samples * length
    if spare < 0:
        fit = tokens // length
        hint = f"use --samples {fit} or fewer, or a longer text" if fit else "use a longer text"
        raise UsageError(
            f"{label}: {tokens:,} tokens, and {samples} samples of {length} take {samples * length:,}", hint=hint
        )
    chosen = np.sort(np.random.default_rng(seed).choice(spare + samples, samples, replace=False))
    return chosen - np.arange(samples) + np.arange(samples) * length


def _check(samples: int, sequence_length: int) -> None:
    if samples < 1:
        raise UsageError(f"--samples {samples}: expected 1 or more")
    if sequence_length < LEAST_TOKENS:
        raise UsageError(f"--sequence-length {sequence_length}: expected at least {LEAST_TOKENS} tokens")
