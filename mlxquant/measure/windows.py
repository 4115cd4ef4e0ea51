"""A text cut into windows of tokens, of which the second half of each is scored: llama-perplexity's protocol.

As `perplexity` and `kl_divergence` of llama.cpp's tools/perplexity/perplexity.cpp do: the text is encoded whole, once,
its control tokens not parsed (`common_tokenize(ctx, prompt, true)`), and cut; what is left at the end is dropped. Where
the vocabulary begins texts with BOS, that replaces each window's first token. Positions first .. context - 2 of a
window are scored, first = context / 2: each has seen at least `first` tokens before it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mlxquant.errors import UsageError
from mlxquant.measure.corpus import Corpus
from mlxquant.run.text import Text

Array = np.ndarray[Any, Any]

_LEAST_CONTEXT = 8


@dataclass(frozen=True)
class Protocol:
    """context: tokens of a window. stride: tokens from one window's beginning to the next one's; None: context, so that
    windows do not overlap. windows: how many at most, from the text's beginning; None: all.

    Raises UsageError for values that leave nothing to score or would score a position twice.
    """

    context: int = 512
    stride: int | None = None
    windows: int | None = 64

    def __post_init__(self) -> None:
        if self.context < _LEAST_CONTEXT:
            raise UsageError(f"--context {self.context}: expected at least {_LEAST_CONTEXT} tokens")
        if self.step < (least := self.context - self.first):
            raise UsageError(
                f"--stride {self.step} is less than half of --context {self.context}: positions would count twice",
                hint=f"give --stride {least} or more",
            )
        if self.windows is not None and self.windows < 1:
            raise UsageError(f"--windows {self.windows}: expected 1 or more, or all")

    @property
    def step(self) -> int:
        return self.context if self.stride is None else self.stride

    @property
    def first(self) -> int:
        """The first position that is scored."""
        return self.context // 2


@dataclass(frozen=True, eq=False)
class Windows:
    """tokens_WL: int32. first: the first position of a window that is scored. available: windows that the whole text
    has. bos: what each window begins with, None where the tokenizer begins texts with nothing.
    """

    tokens_WL: Array
    first: int
    available: int
    bos: int | None
    corpus: Corpus
    protocol: Protocol

    @cached_property
    def digest(self) -> str:
        """sha256, hex, over tokens and protocol: equal where the same positions are scored."""
        shape = f"{self.protocol.context} {self.protocol.step} {self.first} {self.bos}\n"
        return hashlib.sha256(shape.encode() + self.tokens_WL.astype("<i4").tobytes()).hexdigest()

    def next_P(self, window: int) -> Array:
        """The text's own next tokens of the scored positions, first .. context - 2."""
        return self.tokens_WL[window, self.first + 1 :]


def cut(text: Text, corpus: Corpus, protocol: Protocol) -> Windows:
    """The corpus in the tokens of `text`'s tokenizer, in windows. Raises UsageError when it is shorter than one."""
    start = begins_with(text)
    # llama.cpp's -f drops the last newline. An end token that the tokenizer would add is none of the text's.
    ids = np.array(start + encode(text, corpus.text.removesuffix("\n")), np.int32)
    context, step = protocol.context, protocol.step
    if len(ids) < context:
        raise UsageError(
            f"{corpus.label}: {len(ids):,} tokens, and one window takes {context:,}",
            hint="give a longer text, or a smaller --context",
        )
    windows = np.lib.stride_tricks.sliding_window_view(ids, context)[::step]
    tokens_WL = windows[: protocol.windows].copy()
    if start:
        tokens_WL[:, 0] = start[0]
    return Windows(tokens_WL, protocol.first, len(windows), start[0] if start else None, corpus, protocol)


def begins_with(text: Text) -> list[int]:
    """What the tokenizer puts before a text, by what it puts before one letter."""
    bare, whole = encode(text, "x"), encode(text, "x", around=True)
    places = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[: next(places, 0)]


def encode(text: Text, part: str, around: bool = False) -> list[int]:
    """Token ids; strings of special tokens are text like any other. verbose: no word about texts longer than a model's
    maximum, which no window is.
    """
    kind = {"add_special_tokens": around, "split_special_tokens": True, "verbose": False}
    return list(text.tokenizer.encode(part, **kind))
