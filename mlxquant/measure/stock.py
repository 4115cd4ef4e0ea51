"""Stock mlx-lm on the same model, for comparison: a process of its own, with nothing of ours in force.

    python -m mlxquant.measure.stock MODEL '[{"prompt_tokens": 32, ...}]' REPEATS

prints one JSON list, a list of trials for each case. No OpenBLAS, no expansion, no limits: what
`pip install mlx-lm` gives.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxquant.errors import MlxquantError
from mlxquant.fit.cache import PREFILL_STEP
from mlxquant.measure.speed import WARM_UP, Case, Row, Trial, fill, token_ids


def stock_rows(model: Path, wanted: Sequence[Case], repeats: int) -> list[Row]:
    """Runs the cases under stock mlx-lm. Raises MlxquantError with its last line when it fails."""
    text = json.dumps([asdict(case) for case in wanted])
    command = [sys.executable, "-m", "mlxquant.measure.stock", str(model), text, str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MlxquantError(f"{model}: stock mlx-lm failed: {last}", hint="leave --against out to time mlxquant alone")
    trials = json.loads(done.stdout.splitlines()[-1])
    return [Row(case, tuple(Trial(**t) for t in group)) for case, group in zip(wanted, trials, strict=True)]


def trial(model: Any, case: Case, vocabulary: int, seed: int) -> Trial:
    """One repetition through mlx_lm's own generate_step; the first token's time is prefill, as in ours.

    generate_step hands out a token after it has dispatched the next step, which on a CPU takes as long as the step. So
    its first token is late by one step, and so are all others: decode is not affected, prefill of a few tokens is.
    """
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    tokens = token_ids(case.depth_tokens + case.prompt_tokens, vocabulary, seed)
    cache = make_prompt_cache(model)
    before, prompt = tokens[: case.depth_tokens], tokens[case.depth_tokens :]
    fill(model, cache, before, PREFILL_STEP)
    mx.clear_cache()
    mx.reset_peak_memory()
    began = time.perf_counter()
    times = []
    for _ in generate_step(mx.array(prompt), model, max_tokens=case.generated_tokens, prompt_cache=cache):
        times.append(time.perf_counter())
    first, last = times[0] - began, times[-1] - times[0]
    decode = (len(times) - 1) / last if last else 0.0
    return Trial(first, case.prompt_tokens / first, decode, mx.get_peak_memory())


def main() -> None:
    from mlx_lm import load

    path, text, repeats = sys.argv[1:]
    model, _, config = load(path, return_config=True)
    vocabulary = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    wanted = [Case(**case) for case in json.loads(text)]
    trial(model, WARM_UP, vocabulary, 0)
    groups = [[asdict(trial(model, case, vocabulary, seed)) for seed in range(int(repeats))] for case in wanted]
    print(json.dumps(groups))


if __name__ == "__main__":
    main()
