"""The loop: tokens in, tokens out. It knows nothing of text, and of the model only that it can be called.

While the host reads token n, the device already computes token n + 1: the next step is dispatched before the
last token is looked at. So when a token is yielded, it has been fed to the model too, unless it is the last
one allowed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import SourceError, UsageError
from mlxquant.fit.cache import PREFILL_STEP
from mlxquant.run.sampling import Sampling

# MLX keeps the buffers of growing caches for reuse; now and then they are given back.
_TOKENS_BETWEEN_CLEARS = 256


@dataclass(frozen=True)
class Token:
    """logprob: of this token at temperature 1, after the repetition penalty."""

    id: int
    logprob: float


@dataclass
class Stats:
    """prefill_s runs until the first token is known; decode_s from there to the last one."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second; the step that makes the first token is the last of the prompt."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second of those after the first, which belongs to prefill."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s and self.generated_tokens > 1 else 0.0


class Generation(Iterator[Token]):
    """One run of the loop over `tokens` (at least one), whose predecessors `history` are in `cache` already: iterate it
    for the tokens. End-of-sequence tokens are not yielded, but fed and counted.

    model        called as model(tokens_BL, cache=cache) -> logits_BLV
    max_tokens   None: until an end-of-sequence token
    on_progress  called with (prompt tokens done, prompt tokens) before each chunk and after the last
    stop         asked between chunks and between tokens; True ends the run with the cache as `fed` says

    Greedy tokens are those of `mlx_lm.generate` with the same model and prefill step. Raises UsageError, and
    SourceError when the model's logits are NaN: argmax would go on with token 0.

    stats    times and counts so far
    fed      token ids that are in the cache because of this run, in order
    finish   None while it runs; then 'eos', 'length' or 'stopped'
    intact   False when an exception left the cache in the middle of a step: `fed` says nothing then
    """

    def __init__(
        self,
        model: Callable[..., Any],
        tokens: Sequence[int],
        cache: list[Any],
        sampling: Sampling | None = None,
        *,
        max_tokens: int | None = None,
        eos_ids: Sequence[int] = (),
        prefill_step: int = PREFILL_STEP,
        history: Sequence[int] = (),
        on_progress: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        if not tokens:
            raise UsageError("there are no tokens to start from", hint="give a prompt that is not empty")
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"{max_tokens} tokens cannot be generated", hint="ask for one or more")
        if prefill_step < 1:
            raise UsageError(f"a prefill step of {prefill_step} tokens makes no headway", hint="use 512 or 2048")
        self.stats = Stats(prompt_tokens=len(tokens))
        self.fed: list[int] = []
        self.finish: str | None = None
        self.intact = True
        self._model, self._tokens, self._cache = model, list(tokens), cache
        self._sampler = (sampling or Sampling()).sampler([*history, *tokens])
        self._max_tokens, self._eos_ids, self._prefill_step = max_tokens, frozenset(eos_ids), prefill_step
        self._on_progress = on_progress or (lambda done, total: None)
        self._stop = stop or (lambda: False)
        self._run = self._loop()

    def __next__(self) -> Token:
        return next(self._run)

    def close(self) -> None:
        """Ends the run early; the cache stays as `fed` says."""
        self._run.close()
        self.finish = self.finish or "stopped"

    def _loop(self) -> Generator[Token, None, None]:
        import mlx.core as mx

        start = time.perf_counter()
        if not self._prefill():
            self.finish = "stopped"
            return
        current = self._step(mx.array(self._tokens[-1:]))
        self.fed.append(self._tokens[-1])
        # Awaited before the next step is dispatched: on a CPU dispatching takes as long as the step itself, which would
        # count as the prompt's.
        mx.eval(*current)
        first = time.perf_counter()
        while True:
            self.intact = False
            final = self._max_tokens is not None and self.stats.generated_tokens + 1 >= self._max_tokens
            following = None if final else self._step(current[0])
            token = Token(int(current[0].item()), float(current[1].item()))
            if math.isnan(token.logprob):
                raise SourceError(
                    "the model's logits are NaN: weights are damaged, or too large for the dtype it runs in",
                    hint="`mlxquant verify` finds damaged weights; convert or download the model again",
                )
            if following:
                self.fed.append(token.id)
            self.intact = True
            self._count(first - start, time.perf_counter() - first)
            self.finish = self._finish(token, final)
            if self.finish != "eos":
                yield token
            if self.finish or following is None:
                return
            current = following

    def _prefill(self) -> bool:
        """Feeds all but the last prompt token, a chunk at a time; False when asked to stop.

        Only the cache is evaluated: the logits of a chunk, tokens x vocabulary, are never made.
        """
        import mlx.core as mx

        head, total = self._tokens[:-1], len(self._tokens)
        for begin in range(0, len(head), self._prefill_step):
            if self._stop():
                return False
            self._on_progress(begin, total)
            chunk = head[begin : begin + self._prefill_step]
            self.intact = False
            self._model(mx.array(chunk)[None], cache=self._cache)
            mx.eval([entry.state for entry in self._cache])
            self.fed += chunk
            self.intact = True
            mx.clear_cache()
        self._on_progress(total, total)
        return True

    def _step(self, token: Any) -> tuple[Any, Any]:
        """Feeds one token, (1,), and sets the device to work on the next: unevaluated token and
        log-probability.
        """
        import mlx.core as mx

        logits_BLV = self._model(token[None], cache=self._cache)
        chosen: tuple[Any, Any] = self._sampler(logits_BLV[:, -1, :])
        mx.async_eval(*chosen)  # type: ignore[no-untyped-call]
        return chosen

    def _count(self, prefill_s: float, decode_s: float) -> None:
        import mlx.core as mx

        self.stats.prefill_s, self.stats.decode_s = prefill_s, decode_s
        self.stats.generated_tokens += 1
        if self.stats.generated_tokens % _TOKENS_BETWEEN_CLEARS == 0:
            mx.clear_cache()

    def _finish(self, token: Token, final: bool) -> str | None:
        if token.id in self._eos_ids:
            return "eos"
        if final:
            return "length"
        return "stopped" if self._stop() else None


generate = Generation  # a verb where it is called
