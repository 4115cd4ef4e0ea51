"""How fast a model runs: prefill and decode at given prompt sizes and cache depths, with the spread of repetitions."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlxquant.fit.cache import PREFILL_STEP
from mlxquant.run.generate import generate


@dataclass(frozen=True)
class Case:
    """prompt_tokens are prefilled on top of depth_tokens already in the cache; then generated_tokens follow."""

    prompt_tokens: int
    generated_tokens: int
    depth_tokens: int


WARM_UP = Case(16, 4, 0)  # kernels are compiled and buffers made before anything is timed


@dataclass(frozen=True)
class Trial:
    """One repetition. ttft_s: from the call to the first token, which is prefill's. peak_bytes: MLX's own peak."""

    ttft_s: float
    prefill_tok_s: float
    decode_tok_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Row:
    """A case over its repetitions: means, and standard deviations (0 for a single one)."""

    case: Case
    trials: tuple[Trial, ...]

    def mean(self, field: str) -> float:
        return statistics.fmean(getattr(t, field) for t in self.trials)

    def deviation(self, field: str) -> float:
        return statistics.stdev(getattr(t, field) for t in self.trials) if len(self.trials) > 1 else 0.0

    @property
    def peak_bytes(self) -> int:
        return max(t.peak_bytes for t in self.trials)

    def to_json(self) -> dict[str, Any]:
        fields = ("ttft_s", "prefill_tok_s", "decode_tok_s")
        numbers = {f: self.mean(f) for f in fields} | {f"{f}_deviation": self.deviation(f) for f in fields}
        return asdict(self.case) | numbers | {"peak_bytes": self.peak_bytes, "repeats": len(self.trials)}


def cases(prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int]) -> list[Case]:
    return [Case(p, n, d) for d in depths for p in prompts for n in generated]


def token_ids(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Random ids: speed does not depend on what they mean, and nothing can be cached between runs."""
    rng = random.Random(seed)
    return [rng.randrange(vocabulary) for _ in range(count)]


def bench(
    model: Callable[..., Any],
    make_cache: Callable[[], list[Any]],
    vocabulary: int,
    wanted: Sequence[Case],
    repeats: int,
    prefill_step: int = PREFILL_STEP,
) -> Iterator[Row]:
    """Yields a Row for each case. A short unmeasured run first warms kernels and buffers."""
    run_case(model, make_cache(), vocabulary, WARM_UP, prefill_step)
    for case in wanted:
        trials = [run_case(model, make_cache(), vocabulary, case, prefill_step, seed) for seed in range(repeats)]
        yield Row(case, tuple(trials))


def run_case(
    model: Callable[..., Any], cache: list[Any], vocabulary: int, case: Case, prefill_step: int, seed: int = 0
) -> Trial:
    """One trial in a fresh cache; the peak is reset first, so that it is this trial's own."""
    import mlx.core as mx

    tokens = token_ids(case.depth_tokens + case.prompt_tokens, vocabulary, seed)
    before, prompt = tokens[: case.depth_tokens], tokens[case.depth_tokens :]
    fill(model, cache, before, prefill_step)
    mx.clear_cache()
    mx.reset_peak_memory()
    run = generate(model, prompt, cache, max_tokens=case.generated_tokens, prefill_step=prefill_step, history=before)
    for _ in run:
        pass
    stats = run.stats
    return Trial(stats.prefill_s, stats.prefill_rate, stats.decode_rate, mx.get_peak_memory())


def fill(model: Callable[..., Any], cache: list[Any], tokens: Sequence[int], step: int) -> None:
    """Puts tokens into the cache without sampling."""
    import mlx.core as mx

    for start in range(0, len(tokens), step):
        model(mx.array(list(tokens[start : start + step]))[None], cache=cache)
        mx.eval([entry.state for entry in cache])
