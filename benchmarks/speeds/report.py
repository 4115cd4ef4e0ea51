"""Errors of the speed model where the fit did not look: held-out models, the halves swapped, chips left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import numpy as np
from fit_speed import Fitted, Miss, fit, misses, out_of_date, with_ranges
from speeds.rows import Point, points

BIG_BYTES = 3e9

GROUPS: dict[str, Callable[[Point], bool]] = {
    "dense llama.cpp": lambda p: p.engine == "gguf" and not p.moe and not out_of_date(p),
    "- builds since September 2025": lambda p: p.engine == "gguf" and not p.moe and not p.old,
    "- builds before, short contexts": lambda p: p.engine == "gguf" and not p.moe and p.old and not out_of_date(p),
    "dense llama.cpp before, deep": lambda p: p.engine == "gguf" and not p.moe and out_of_date(p),
    "dense MLX, 3 GB and more": lambda p: p.engine == "mlx" and not p.moe and p.weight_bytes >= BIG_BYTES,
    "dense MLX, all": lambda p: p.engine == "mlx" and not p.moe,
    "MoE, both engines": lambda p: p.moe,
    "- MoE llama.cpp": lambda p: p.moe and p.engine == "gguf",
    "- MoE MLX": lambda p: p.moe and p.engine == "mlx",
    "all": lambda p: True,
}


def table(found: Sequence[Miss], what: str) -> list[dict[str, object]]:
    rows = []
    for name, belongs in GROUPS.items():
        group = [m for m in found if m.what == what and belongs(m.point)]
        if not group:
            continue
        off = np.abs(np.expm1([m.off for m in group]))
        held = float(np.mean([abs(m.off) <= m.width for m in group]))
        rows.append(
            {
                "group": name,
                "rows": len(group),
                "models": len({m.point.model for m in group}),
                "chips": len({m.point.chip for m in group}),
                "median": round(float(np.median(off)), 4),
                "p90": round(float(np.quantile(off, 0.9)), 4),
                "bias": round(float(np.median([m.off for m in group])), 4),
                "held": round(held, 3),
                "range": round(float(np.median([np.exp(m.width) for m in group])), 3),
            }
        )
    return rows


def draw(title: str, rows: list[dict[str, object]]) -> None:
    print(f"\n### {title}\n\n| rows | n | models | chips | median | p90 | bias | in range | range |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        part = [f"{100 * float(str(row[k])):.1f} %" for k in ("median", "p90", "bias")]
        print(
            f"| {row['group']} | {row['rows']} | {row['models']} | {row['chips']} | {' | '.join(part)} "
            f"| {100 * float(str(row['held'])):.0f} % | x{row['range']} |"
        )


def ranged(rows: Sequence[Point]) -> Fitted:
    return with_ranges(fit(rows), rows)


def repeats(rows: Iterable[Point]) -> dict[str, object]:
    """How far published measurements of the same thing are apart: the floor of any model's error."""

    def same(p: Point) -> tuple[object, ...]:
        return p.engine, p.chip, p.cores, p.model, round(p.weight_bytes / 1e7), round(p.depth / 600), p.moe

    spans = []
    for _, group in groupby(sorted((p for p in rows if p.decode), key=same), key=same):
        rates = sorted(p.decode or 0.0 for p in group)
        if len(rates) > 1:
            middle = float(np.median(rates))
            spans += [abs(rate / middle - 1) for rate in rates]
    middle, far = np.quantile(spans, [0.5, 0.9])
    return {"rows": len(spans), "median": round(float(middle), 4), "p90": round(float(far), 4)}


def report() -> None:
    seen, held, both = points(), points(("held-out",)), points(("fit", "held-out"))
    shipped, swapped = ranged(seen), ranged(held)
    chips = {e: set(at.chips) for e, at in shipped.constants.items()}
    chips_swapped = {e: set(at.chips) for e, at in swapped.constants.items()}
    on_held, on_seen = misses(shipped, held, dated=False), misses(swapped, seen, dated=False)
    parts = {
        "held-out models, chips seen": [m for m in on_held if m.point.chip in chips[m.point.engine]],
        "held-out models, chips not seen": [m for m in on_held if m.point.chip not in chips[m.point.engine]],
        "halves swapped, chips seen": [m for m in on_seen if m.point.chip in chips_swapped[m.point.engine]],
        "each chip left out of the fit half, its rows of both halves": unseen_chips(seen, both),
        "held-out models, chips seen, each row as the build it was measured with": [
            m for m in misses(shipped, held) if m.point.chip in chips[m.point.engine]
        ],
        "the fit's own rows": misses(shipped, seen, dated=False),
    }
    line: dict[str, object] = {"repeats": repeats(both)}
    for name, found in parts.items():
        for what in ("decode", "prefill"):
            rows = table(found, what)
            draw(f"{what}: {name}", rows)
            line[f"{what}: {name}"] = rows
    outside = points(("",), ("ollama",))
    rows = table(misses(shipped, outside), "decode")
    draw("decode: ollama, not fitted", rows)
    line["ollama"] = rows
    print(f"\nMeasurements of the same thing are apart by: {line['repeats']}\n")
    print(json.dumps(line))


def unseen_chips(seen: Sequence[Point], both: Sequence[Point]) -> list[Miss]:
    """Fitted to the fit half without the chip; asked for all that was measured on it."""
    found = []
    for chip in sorted({p.chip for p in both}):
        fitted = ranged([p for p in seen if p.chip != chip])
        found += misses(fitted, [p for p in both if p.chip == chip], dated=False)
    return found
