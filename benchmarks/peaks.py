"""Published peaks of MLX against what `mlxquant fit` reckons for the same model, level, machine, prompt and chunk.

    python benchmarks/peaks.py [--json]

Rows of set 'table' are those the rules were checked on; rows of set 'more' were found afterwards, and nothing was
changed for their sake.
Weights are the plan's own bytes of a uniform conversion with groups of 64, as mlx-community publishes them.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from mlxquant.families.checkpoint import checkpoint
from mlxquant.fit.cache import cache_of
from mlxquant.fit.memory import need
from mlxquant.fit.subject import Subject
from mlxquant.fit.values import Level, Need
from mlxquant.machine import described
from mlxquant.plan.plan import choose
from mlxquant.plan.recipe import settings

HERE = Path(__file__).parent
CONFIGS = (HERE / "peaks" / "configs", HERE / "sizes" / "configs")
FLAT_BYTES = 700_000_000  # of scratch, as rules of thumb have it
BOUNDS = {"fused": 0.05, "hybrid": 0.12, "unfused": 0.12, "latent": 0.12}


@dataclass(frozen=True)
class Peak:
    """One row. minus: the prompt and chunk whose peak is subtracted, of a row that is a difference."""

    set: str
    model: str
    config: str
    level: str
    machine: str
    prompt_tokens: int
    chunk_tokens: int
    minus: tuple[int, int] | None
    published_gb: float
    kind: str
    source: str

    @property
    def predicted_gb(self) -> float:
        total = self._total_bytes(self.prompt_tokens, self.chunk_tokens)
        return (total - (self._total_bytes(*self.minus) if self.minus else 0)) / 1e9

    @property
    def error(self) -> float:
        """Of the prediction, as a fraction of what was published."""
        return self.predicted_gb / self.published_gb - 1

    @property
    def within(self) -> bool:
        return abs(self.error) <= BOUNDS[self.kind]

    @property
    def scratch_error(self) -> float:
        """Of what is predicted beside weights and cache, as a fraction of what was published beside them."""
        found = self._need(self.prompt_tokens, self.chunk_tokens)
        return found.scratch_bytes / (self.published_gb * 1e9 - found.weight_bytes - found.cache_bytes) - 1

    @property
    def flat_error(self) -> float:
        """What error() would be with FLAT_BYTES of scratch, whatever the model."""
        found = self._need(self.prompt_tokens, self.chunk_tokens)
        return (found.weight_bytes + found.cache_bytes + FLAT_BYTES) / 1e9 / self.published_gb - 1

    def _total_bytes(self, prompt_tokens: int, chunk_tokens: int) -> int:
        return self._need(prompt_tokens, chunk_tokens).total_bytes

    def _need(self, prompt_tokens: int, chunk_tokens: int) -> Need:
        subject = _subject(self.config)
        level, kv, machine = _level(self.config, self.level), cache_of(subject.shape), described(self.machine)
        return need(level, kv, subject.shape, machine, prompt_tokens, chunk_tokens)


def peaks() -> Iterator[Peak]:
    with (HERE / "peaks" / "published.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            minus = (int(row["minus_prompt"]), int(row["minus_chunk"])) if row["minus_prompt"] else None
            head = (row[key] for key in ("set", "model", "config", "level", "machine"))
            tokens = int(row["prompt_tokens"]), int(row["chunk_tokens"])
            yield Peak(*head, *tokens, minus, float(row["gb"]), row["kind"], row["source"])


@cache
def _subject(name: str) -> Subject:
    path = next(folder / f"{name}.json" for folder in CONFIGS if (folder / f"{name}.json").exists())
    config = json.loads(path.read_text())
    return Subject(name, config, checkpoint(config))


@cache
def _level(config: str, bits: str) -> Level:
    subject = _subject(config)
    if bits == "bf16":
        sizes = [target.nbytes for target in subject.specs.values()]
    else:
        plan = choose(subject.basis, settings(bits=int(bits), recipe="uniform"))
        sizes = [part.nbytes for tensor in plan.tensors for part in tensor.parts]
    total = sum(sizes)
    return Level(bits, "mlx", (), total, total, max(sizes), total, 1)


def markdown(rows: list[Peak]) -> Iterator[str]:
    yield "| model | level | machine | prompt | chunk | attention | published GB | predicted GB | error |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        prompt = f"{row.prompt_tokens} less {row.minus[0]}" if row.minus else str(row.prompt_tokens)
        chunk = f"{row.chunk_tokens} less {row.minus[1]}" if row.minus else str(row.chunk_tokens)
        miss = "" if row.within else " **miss**"
        level = row.level if row.level == "bf16" else f"{row.level}-bit"
        cells = row.model, level, row.machine, prompt, chunk, row.kind, f"{row.published_gb:.10g}"
        yield f"| {' | '.join(cells)} | {row.predicted_gb:.2f} | {row.error:+.1%}{miss} |"


def main() -> None:
    rows = list(peaks())
    if "--json" in sys.argv[1:]:
        print(json.dumps([asdict(r) | {"predicted_gb": r.predicted_gb, "error": r.error} for r in rows], indent=1))
        return
    for name in ("table", "more"):
        chosen = [row for row in rows if row.set == name]
        median = statistics.median(abs(row.error) for row in chosen)
        print(*markdown(chosen), sep="\n")
        inside = f"{sum(row.within for row in chosen)} of {len(chosen)}"
        print(f"\n{name}: {inside} rows within their bound, median error {median:.1%}")
        print(f"{_of_scratch([row for row in chosen if row.minus is None])}\n")


def _of_scratch(rows: list[Peak]) -> str:
    """Totals flatter: most of them is weights and cache, which are exact."""
    off = sorted(abs(row.scratch_error) for row in rows)
    flat = sum(abs(row.flat_error) <= BOUNDS[row.kind] for row in rows)
    tenth = statistics.quantiles(off, n=10, method="inclusive")[-1]
    return (
        f"scratch alone, differences not counted: median {statistics.median(off):.0%}, one in ten {tenth:.0%}; "
        f"with a flat {FLAT_BYTES / 1e9} GB {flat} of {len(rows)} within their bound"
    )


if __name__ == "__main__":
    main()
