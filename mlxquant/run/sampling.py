"""From logits to the next token. Knows nothing of models or text, and stays lazy on the device.

The meaning of each number is mlx-lm's (`mlx_lm.sample_utils`), so that settings carry over:

    repetition penalty   on the logits: those of the last `repetition_context` tokens are divided by it where
                         positive and multiplied where negative (Keskar et al. 2019, arXiv:1909.05858)
    top-p, min-p, top-k  in this order, each on the distribution at temperature 1
    temperature          0 takes the most likely token; else logits are divided by it and one token is drawn
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import UsageError

Array = Any  # mlx.core.array: mlx is imported when a sampler is made, not when settings are parsed


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. 0 switches top_p, top_k, min_p off, and so does 1 for top_p and
    repetition_penalty.

    seed None draws a new one for each sampler; the same seed and the same logits give the same tokens on the
    same device. Raises UsageError for numbers that mean nothing.
    """

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context: int = 20
    seed: int | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, math.inf)
        _within("top_p", self.top_p, 0, 1)
        _within("min_p", self.min_p, 0, 1)
        _within("top_k", self.top_k, 0, math.inf)
        _within("repetition_context", self.repetition_context, 0, math.inf)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        if self.seed is not None:
            _within("seed", self.seed, 0, 2**64 - 1)

    def sampler(self, history: Sequence[int] = ()) -> Sampler:
        """A sampler whose repetition penalty starts with the tokens of `history`."""
        return Sampler(self, history)


class Sampler:
    """`sampler(logits_1V) -> (token (1,), log-probability (1,))`, both unevaluated. Keeps the recent tokens
    and the key.
    """

    def __init__(self, settings: Sampling, history: Sequence[int] = ()) -> None:
        import mlx.core as mx

        self.settings = settings
        self.seed = secrets.randbits(63) if settings.seed is None else settings.seed
        self._key = mx.random.key(self.seed)
        context = settings.repetition_context
        self._penalizes = settings.repetition_penalty != 1.0 and context > 0
        self._recent = mx.array(list(history[-context:]) if context else [], dtype=mx.uint32)

    def __call__(self, logits_1V: Array) -> tuple[Array, Array]:
        import mlx.core as mx

        if self._penalizes:
            logits_1V = penalize(logits_1V, self._recent, self.settings.repetition_penalty)
        # In the logits' own dtype, as mlx-lm does: where bfloat16 makes two tokens equal, both loops see the
        # same tie.
        logprobs_1V = logits_1V - mx.logsumexp(logits_1V, axis=-1, keepdims=True)
        token = self._choose(logprobs_1V)
        if self._penalizes:
            recent = mx.concatenate([self._recent, token.astype(mx.uint32)])
            self._recent = recent[-self.settings.repetition_context :]
        return token, mx.take_along_axis(logprobs_1V, token[:, None], axis=-1).squeeze(-1)

    def _choose(self, logprobs_1V: Array) -> Array:
        import mlx.core as mx

        settings = self.settings
        if settings.temperature == 0:
            return mx.argmax(logprobs_1V, axis=-1)
        keys = mx.random.split(self._key)
        self._key = keys[0]
        kept = restrict(logprobs_1V, settings.top_p, settings.min_p, settings.top_k)
        return mx.random.categorical(kept.astype(mx.float32) / settings.temperature, key=keys[1])


def penalize(logits_1V: Array, recent: Array, penalty: float) -> Array:
    """Makes the tokens of `recent` less likely (penalty > 1), whatever the sign of their logits."""
    import mlx.core as mx

    if recent.size == 0:
        return logits_1V
    index = recent[None].astype(mx.int32)
    chosen = mx.take_along_axis(logits_1V, index, axis=-1)
    changed = mx.where(chosen < 0, chosen * penalty, chosen / penalty)
    return mx.put_along_axis(logits_1V, index, changed.astype(logits_1V.dtype), axis=-1)


def restrict(logprobs_1V: Array, top_p: float = 0.0, min_p: float = 0.0, top_k: int = 0) -> Array:
    """Log-probabilities with the tokens outside top-p, min-p and top-k at -inf. Equal tokens stay or go
    together, except for top-k, which keeps exactly k."""
    import mlx.core as mx

    outside = mx.array(-math.inf, dtype=logprobs_1V.dtype)
    if 0 < top_p < 1:
        descending = -mx.sort(-logprobs_1V, axis=-1)
        mass = mx.exp(descending.astype(mx.float32))
        before = mx.cumsum(mass, axis=-1, inclusive=False)
        # The smallest set whose mass reaches top_p of what there is: the token that crosses the line is in
        # it.
        kept = (before < top_p * mass.sum(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True)
        last = mx.take_along_axis(descending, mx.maximum(kept, 1) - 1, axis=-1)
        logprobs_1V = mx.where(logprobs_1V < last, outside, logprobs_1V)
    if min_p > 0:
        least = mx.max(logprobs_1V, axis=-1, keepdims=True) + math.log(min_p)
        logprobs_1V = mx.where(logprobs_1V < least, outside, logprobs_1V)
    if 0 < top_k < logprobs_1V.shape[-1]:
        rest = mx.argpartition(-logprobs_1V, kth=top_k - 1, axis=-1)[..., top_k:]
        logprobs_1V = mx.put_along_axis(logprobs_1V, rest, outside, axis=-1)
    return logprobs_1V


def suggested(generation_config: dict[str, Any]) -> dict[str, float]:
    """Sampling's arguments as a generation_config.json has them, {} where it asks for the most likely token.

    As Hugging Face means it, `do_sample` alone is a temperature of 1. A temperature without `do_sample` is taken to be
    meant, as vLLM does. Numbers that mean nothing are not worth refusing a model for.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: generation_config.get(name) for name in names}
    if generation_config.get("do_sample") is True and found["temperature"] is None:
        found["temperature"] = 1.0
    if generation_config.get("do_sample") is False or found["temperature"] is None:
        return {}
    numbers = {n: v for n, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    try:
        Sampling(**(numbers | {"top_k": int(numbers.get("top_k", 0))}))  # type: ignore[arg-type]
    except (UsageError, ValueError, OverflowError):
        return {}
    return numbers


def describe(sampling: Sampling) -> str:
    """'temperature 0.6, top_p 0.95, top_k 20': what is not off."""
    if sampling.temperature == 0:
        return "the most likely token"
    off = Sampling()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values = [(name, getattr(sampling, name)) for name in names if getattr(sampling, name) != getattr(off, name)]
    return ", ".join(f"{name} {value:g}" for name, value in values)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or math.isinf(value):
        limits = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise UsageError(f"{name} is {value:g}, but must be {limits}")
