"""Models whose next token is known without arithmetic. They are called and cached as mlx-lm's are."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.cache import KVCache


class Successor:
    """After token t comes t + 1 modulo the vocabulary. Counts the tokens it was fed."""

    def __init__(self, vocab: int = 32) -> None:
        self.vocab = vocab
        self.calls: list[int] = []

    @property
    def tokens(self) -> int:
        return sum(self.calls)

    def __call__(self, tokens_BL, cache):
        batch, length = tokens_BL.shape
        self.calls.append(length)
        # What was fed is the cache's content, so a test can read back what the cache holds.
        stored = mx.broadcast_to(tokens_BL.astype(mx.float32)[:, None, :, None], (batch, 1, length, 4))
        cache[0].update_and_fetch(stored, stored)
        following = (tokens_BL + 1) % self.vocab
        return mx.where(mx.arange(self.vocab) == following[..., None], 5.0, 0.0)

    def make_cache(self):
        return [KVCache()]


class Counting:
    """A real model that counts the tokens it is fed; everything else is the model's own."""

    def __init__(self, model) -> None:
        self._model, self.tokens = model, 0

    def __call__(self, tokens_BL, cache):
        self.tokens += tokens_BL.shape[1]
        return self._model(tokens_BL, cache=cache)


def held(cache) -> list[int]:
    """The tokens in a Successor's cache."""
    return [int(t) for t in cache[0].keys[0, 0, : cache[0].offset, 0].tolist()] if cache[0].offset else []
