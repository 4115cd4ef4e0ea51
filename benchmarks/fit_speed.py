"""Fits the constants of mlxquant/fit/speed.py to published speeds, and says how far off they are where it did not look.

    python benchmarks/fit_speed.py            writes mlxquant/fit/speed.json from the rows whose split is 'fit'
    python benchmarks/fit_speed.py --report   tables of errors in Markdown, one JSON line last

Robust least squares in log(seconds): what is off by more than SOFT counts by its size, not its square. Rows that
repeat a machine, model and quantization share the weight of the square root of their number. A weak prior holds what
a half of the data cannot tell apart (PRIOR, in natural logarithms, from the facts that stand beside it).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from speeds.rows import MODELS, Point, fit_lines, points  # noqa: E402

from mlxquant.fit.speed import (  # noqa: E402
    Chip,
    Constants,
    Load,
    blocks_of,
    decode_s,
    decode_width,
    prefill_s,
    prefill_width,
    prompt_weights,
)
from mlxquant.macs import bandwidth  # noqa: E402

OUT = ROOT / "mlxquant" / "fit" / "speed.json"
SOFT, PRIOR_WIDTH = 0.08, 0.7
ENGINES = {
    "mlx": "mlx-lm 0.31 on mlx 0.31-0.32 (2026)",
    "gguf": "llama.cpp b7948-b10333, Metal with flash attention (2026)",
}
DATE = "2026-11-21"
COVERAGE = 0.9  # of the fit's own left-out rows, so that four of five of others are held
DEEP_TOKENS = 300
LEAST_UNSEEN = 1.25  # a range is that much wider on a chip that was not seen, even where those left out did well
FLOOR = 0.3  # of a range's width, where all of the time is reading weights

# Where each parameter starts, and what the prior holds it to. Bandwidth efficiency and layer times as commonly
# reported; an M1 core does 0.33 TFLOPS (Apple: 2.6 with 8 cores), 0.22 of it in practice.
DECODE = {
    "efficiency": 0.9,
    "layer_s": 70e-6,
    "expert_layer_s": 35e-6,
    "recurrent_layer_s": 35e-6,
    "generation_ratio": 1.15,
    "simple_rate": 20e9,
    "super_rate": 14e9,
}
OLD = {"old_layer_s": 30e-6, "old_depth": 2.0, "old_super": 0.8}
PREFILL = {
    "prefill_flops": 0.22e12,
    "prefill_ratio": 1.1,
    "tensor_ratio": 3.0,
    "expert_flops_ratio": 0.6,
    "chunk_layer_s": 0.5e-3,
    "expert_chunk_layer_s": 1.5e-3,
}
CHUNKS = {"mlx": 2048, "gguf": 512}


@dataclass(frozen=True)
class Fitted:
    """decode: by engine; old: how llama.cpp was before it ran operations concurrently; prefill: by engine."""

    constants: dict[str, Constants]
    old: dict[str, float]


def chip_of(point: Point, known: Iterable[str]) -> Chip:
    rate = bandwidth(point.chip, point.cores)
    assert rate, point
    return Chip(int(point.chip[1]), point.cores, rate, point.chip in known)


def load_of(point: Point) -> Load:
    of_prompt = prompt_weights(point.engine, point.active, point.head, point.layers, point.shared)
    return Load(
        point.weight_bytes, point.cache_bytes, point.active, of_prompt, point.attention_flops, point.layers,
        point.recurrent, point.moe, blocks_of(point.bits.removeprefix("UD-"), 8 * point.weight_bytes / point.active),
    )  # fmt: skip


def decode_of(at: Constants, old: dict[str, float], point: Point, chip: Chip) -> float:
    """Seconds a token. Before flash attention keys and values were read once for every query head, not every pair."""
    load = load_of(point)
    if not point.old:
        return decode_s(at, load, chip)
    load = replace(load, cache_bytes=point.depth * point.attention_flops * old["old_depth"])
    then = replace(
        at,
        layer_s=at.layer_s + old["old_layer_s"],
        super_rate=at.super_rate * old["old_super"] if at.super_rate else None,
    )
    return decode_s(then, load, chip)


def robust(predict: Callable[[np.ndarray], np.ndarray], target: np.ndarray, weight: np.ndarray, start: np.ndarray):
    """Levenberg-Marquardt on sum(w * sqrt(r**2 + SOFT**2)) + prior, by reweighting. Returns the parameters."""
    x, damping, step_size = start.copy(), 1e-2, 1e-5

    def loss(r: np.ndarray, x: np.ndarray) -> float:
        return float(np.sum(weight * np.sqrt(r * r + SOFT**2)) + np.sum((x - start) ** 2) / (2 * PRIOR_WIDTH**2) * SOFT)

    r = predict(x) - target
    for _ in range(200):
        jacobian = np.stack([(predict(x + d) - r - target) / step_size for d in np.eye(len(x)) * step_size], 1)
        q = weight / np.sqrt(r * r + SOFT**2)
        normal = jacobian.T @ (q[:, None] * jacobian) + np.eye(len(x)) * SOFT / PRIOR_WIDTH**2
        slope = jacobian.T @ (q * r) + (x - start) * SOFT / PRIOR_WIDTH**2
        trial = x - np.linalg.solve(normal + damping * np.diag(np.diag(normal)), slope)
        r_trial = predict(trial) - target
        if loss(r_trial, trial) < loss(r, x):
            done = loss(r, x) - loss(r_trial, trial) < 1e-9
            x, r, damping = trial, r_trial, damping / 3
            if done:
                break
        else:
            damping *= 4
            if damping > 1e9:
                break
    return x


def weights(rows: Sequence[Point]) -> np.ndarray:
    same = Counter((p.engine, p.chip, p.cores, p.model, p.bits) for p in rows)
    return np.array([same[(p.engine, p.chip, p.cores, p.model, p.bits)] ** -0.5 for p in rows])


def blank(engine: str) -> Constants:
    numbers = {name: start for name, start in (DECODE | PREFILL).items() if engine == "gguf" or "_rate" not in name}
    rates = {} if engine == "gguf" else {"simple_rate": None, "super_rate": None}
    return Constants(
        engine=ENGINES[engine], chunk_tokens=CHUNKS[engine], decode_spread={}, prefill_spread={}, unseen={}, chips=(),
        **numbers, **rates,
    )  # fmt: skip


def fit_decode(rows: Sequence[Point], engine: str) -> tuple[Constants, dict[str, float]]:
    rows = [p for p in rows if p.engine == engine and p.decode]
    start = blank(engine)
    names = [n for n in DECODE if getattr(start, n) is not None]
    extra = list(OLD) if engine == "gguf" else []
    first = np.log([*(getattr(start, n) for n in names), *(OLD[n] for n in extra)])
    chips = [chip_of(p, ()) for p in rows]

    def made(x: np.ndarray) -> tuple[Constants, dict[str, float]]:
        values = np.exp(x)
        own = {n: float(v) for n, v in zip(names, values, strict=False)}
        return replace(start, **own), {n: float(v) for n, v in zip(extra, values[len(names) :], strict=True)}

    def predict(x: np.ndarray) -> np.ndarray:
        at, old = made(x)
        return np.log([decode_of(at, old, p, c) for p, c in zip(rows, chips, strict=True)])

    target = -np.log([p.decode for p in rows])
    return made(robust(predict, target, weights(rows), first))


def fit_prefill(rows: Sequence[Point], constants: dict[str, Constants]) -> dict[str, Constants]:
    """Both engines at once: they share how generations of the GPU differ, and nothing else."""
    rows = [p for p in rows if p.prefill]
    own = [n for n in PREFILL if n != "prefill_ratio"]
    names = ["prefill_ratio", *((engine, n) for engine in constants for n in own)]
    first = np.log([PREFILL[n if isinstance(n, str) else n[1]] for n in names])
    chips, loads = [chip_of(p, ()) for p in rows], [load_of(p) for p in rows]

    def made(x: np.ndarray) -> dict[str, Constants]:
        value = dict(zip(names, map(float, np.exp(x)), strict=True))
        return {
            engine: replace(at, prefill_ratio=value["prefill_ratio"], **{n: value[engine, n] for n in own})
            for engine, at in constants.items()
        }

    def predict(x: np.ndarray) -> np.ndarray:
        at = made(x)
        return np.log([prefill_s(at[p.engine], a, c, p.prompt) for p, a, c in zip(rows, loads, chips, strict=True)])

    target = np.log([p.prompt / p.prefill for p in rows])
    return made(robust(predict, target, weights(rows), first))


def fit(rows: Sequence[Point]) -> Fitted:
    """The constants alone; ranges come from `with_ranges`."""
    found = {engine: fit_decode(rows, engine) for engine in ENGINES}
    return Fitted(fit_prefill(rows, {engine: at for engine, (at, _) in found.items()}), found["gguf"][1])


@dataclass(frozen=True)
class Miss:
    """One prediction beside what was measured. off: log(predicted / measured) of the rate."""

    point: Point
    what: str
    off: float
    width: float
    unit: float  # the width that a spread of 1 would give


def misses(fitted: Fitted, rows: Iterable[Point], dated: bool = True) -> list[Miss]:
    """dated: old builds of llama.cpp as such; else all rows as mlxquant answers, which knows of no builds."""
    found = []
    for p in rows:
        at = fitted.constants[p.engine]
        chip, load = chip_of(p, at.chips), load_of(p)
        kind = "moe" if p.moe else "dense"
        if p.decode:
            off = -np.log(decode_of(at, fitted.old, p if dated else replace(p, old=False), chip) * p.decode)
            width = decode_width(at, load, chip) if at.decode_spread else 0.0
            bare = replace(at, decode_spread={kind: 1.0, "floor": FLOOR}, unseen={"decode": 1.0, "prefill": 1.0})
            found.append(Miss(p, "decode", float(off), width, decode_width(bare, load, chip)))
        if p.prefill:
            off = np.log(p.prompt / prefill_s(at, load, chip, p.prompt) / p.prefill)
            width = prefill_width(at, load, chip) if at.prefill_spread else 0.0
            found.append(Miss(p, "prefill", float(off), width, 1.0))
    return found


def left_out(rows: Sequence[Point], key: Callable[[Point], str]) -> list[Miss]:
    """Each row predicted by a fit that has not seen any row with the same key."""
    found = []
    for value in sorted({key(p) for p in rows}):
        rest = [p for p in rows if key(p) != value]
        found += misses(fit(rest), [p for p in rows if key(p) == value])
    return found


def out_of_date(point: Point) -> bool:
    """At depth, before flash attention: no range of today's builds should be as wide as what that was off by."""
    return point.old and point.depth > DEEP_TOKENS


def spread_of(found: Sequence[Miss], share: float = COVERAGE) -> float:
    """The width that holds `share` of what was found, and more where it was found on few models: Student's t, about."""
    if not found:
        return 1.0
    models = max(2, len({m.point.model for m in found}))
    few = (1 + 1 / models) ** 0.5 * (1 + 0.66 / (models - 1))
    return few * float(np.quantile([abs(m.off) / m.unit for m in found], share))


def with_ranges(fitted: Fitted, rows: Sequence[Point]) -> Fitted:
    """Spreads from rows left out by model; what an unseen chip adds from rows left out by chip."""
    by_model = left_out(rows, lambda p: hashlib.sha256(p.model.encode()).hexdigest()[0])
    by_chip = left_out(rows, lambda p: p.chip)
    made = {}
    for engine, at in fitted.constants.items():
        own = [m for m in by_model if m.point.engine == engine and not out_of_date(m.point)]
        away = [m for m in by_chip if m.point.engine == engine and not out_of_date(m.point)]
        spreads: dict[str, dict[str, float]] = {}
        for what in ("decode", "prefill"):
            # Few models with experts, and few chips: their ranges are at least those of all together.
            everything = spread_of([m for m in own if m.what == what])
            spreads[what] = {
                kind: max(everything, spread_of([m for m in own if m.what == what and m.point.moe == (kind == "moe")]))
                if kind == "moe"
                else spread_of([m for m in own if m.what == what and not m.point.moe])
                for kind in ("dense", "moe")
            }
        unseen = {}
        for what in ("decode", "prefill"):
            far = [
                replace(m, unit=m.unit * spreads[what]["moe" if m.point.moe else "dense"])
                for m in away
                if m.what == what
            ]
            unseen[what] = max(LEAST_UNSEEN, spread_of(far))
        chips = tuple(sorted({p.chip for p in rows if p.engine == engine and p.decode}))
        made[engine] = replace(
            at, decode_spread=spreads["decode"] | {"floor": FLOOR}, prefill_spread=spreads["prefill"], unseen=unseen,
            chips=chips,
        )  # fmt: skip
    return Fitted(made, fitted.old)


def rounded(value: object) -> object:
    """Four digits: more is noise, and would differ from one BLAS to the next."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def content(rows: Sequence[Point], fitted: Fitted) -> str:
    return (
        json.dumps(
            {
                "made_by": "benchmarks/fit_speed.py",
                "date": DATE,
                "rows": len(rows),
                "data_sha256": hashlib.sha256((fit_lines() + MODELS.read_text()).encode()).hexdigest(),
                "engines": {engine: rounded(asdict(at)) for engine, at in fitted.constants.items()},
                "old_llama_cpp": rounded(fitted.old),
            },
            indent=1,
        )
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="evaluate; writes nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.report:
        from speeds.report import report

        report()
        return
    rows = points()
    arguments.out.write_text(content(rows, with_ranges(fit(rows), rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
