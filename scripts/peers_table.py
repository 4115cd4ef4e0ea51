"""Tables of docs/quality.md from what benchmarks/calibrated.py kept in benchmarks/results/calibrated-*.json.

scripts/quality_page.py writes them. All files of one model are one table, if they are of one text and as many windows;
of a student that is in two the newer file's figures count. What stands behind `<!-- = calibrated` in the page:

    MODEL                            all students, by size
    MODEL setting                    text, windows, device
    MODEL STUDENT STUDENT            the first one's divergence by the second's; mlx_lm/4g64 is `mlx_lm 4g64`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mlxquant.measure.columns import MILLI, estimate
from mlxquant.measure.report import Estimate

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
MISSING = "not measured yet"
SAME_SIZE = 1e-3  # as benchmarks/calibrated.py
Row = dict[str, Any]


def kept(model: str) -> list[Row]:
    """Of each student the newest row; by size. Exits where two files cannot be compared."""
    files = [json.loads(path.read_text()) for path in RESULTS.glob("calibrated-*.json")]
    files = sorted((file for file in files if file["model"] == model), key=lambda file: file["date"])
    if len({(file["windows"], row["setting"]["text_sha256"]) for file in files for row in file["rows"]}) > 1:
        sys.exit(f"{RESULTS}: calibrated-*.json of {model} are of different texts or windows")
    rows = {row["name"]: row for file in files for row in file["rows"]}
    return sorted(rows.values(), key=lambda row: (round(row["bpw"], 2), row["divergence"]["kl"]["value"]))


def text(words: list[str]) -> str:
    match words:
        case [model]:
            return table(model)
        case [model, "setting"]:
            return setting(model)
        case [model, student, other]:
            return one(model, student.replace("/", " "), other.replace("/", " "))
    sys.exit(f"<!-- = calibrated {' '.join(words)} --> means nothing")


def table(model: str) -> str:
    rows = kept(model)
    if not rows:
        return f"\n{MISSING}\n"
    lines = [
        "| student | bits per weight | MB | KL divergence, milli-nats | of `mlx_lm.convert`'s at this size "
        "| perplexity ratio | same top token, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        d = row["divergence"]
        cells = [
            row["name"],
            f"{row['bpw']:.2f}",
            f"{row['nbytes'] / 1e6:,.0f}",
            plus_minus(d["kl"], MILLI),
            share(row, rows),
            plus_minus(d["ppl_ratio"]),
            plus_minus(d["top1"], 100),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n" + "\n".join(lines) + "\n"


def share(row: Row, rows: list[Row]) -> str:
    stock = [r for r in rows if r["method"] == "mlx_lm" and abs(r["nbytes"] / row["nbytes"] - 1) < SAME_SIZE]
    return f"{row['divergence']['kl']['value'] / stock[0]['divergence']['kl']['value']:.3f}" if stock else ""


def one(model: str, name: str, other: str) -> str:
    """The first student's divergence by the other's."""
    kl = {row["name"]: row["divergence"]["kl"]["value"] for row in kept(model)}
    return f"{kl[name] / kl[other]:.3f}" if name in kl and other in kl else MISSING


def setting(model: str) -> str:
    rows = kept(model)
    if not rows:
        return MISSING
    s = rows[0]["setting"]
    versions = ", ".join(f"{name} {number}" for name, number in s["versions"].items() if number[:1].isdigit())
    return (
        f"{s['windows']} windows of {s['context']} tokens, second half scored; text: {s['text']} "
        f"(sha256 {s['text_sha256'][:12]}); {s['device']}; {versions}"
    )


def plus_minus(found: Row, scale: float = 1) -> str:
    return estimate(Estimate(**found), scale)
