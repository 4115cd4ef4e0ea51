"""Writes the figures of docs/quality.md from what scripts/quality.py kept under benchmarks/results/.

    python scripts/quality_page.py [--check]

The page is written by hand but for what stands between `<!-- = WORDS -->` and `<!-- / -->`, a table or a number. WORDS:

    ladder MODEL gguf|mlx|all        a table of students; MODEL as in the name of the kept file
    pair MODEL STUDENT STUDENT       how much further the second is from the teacher
    MODEL STUDENT FIGURE             one figure: kl, p99, ppl_ratio, delta_p_rms, top1, bpw
    setting MODEL                    text, windows, device
    calibrated MODEL [...]           what benchmarks/calibrated.py kept: see peers_table.py
    bits                             bits per weight of each level for well-known shapes, by llama.cpp's rules

A figure that is not measured yet says so. --check fails when the page is not what this would write.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import peers_table
from quality_bits import LEVELS, MODELS, bits_per_weight

from mlxquant.measure.columns import MILLI, estimate
from mlxquant.measure.report import Estimate

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "quality.md", ROOT / "benchmarks" / "results"
MISSING = "not measured yet"
_MARK = re.compile(r"(<!-- = (.+?) -->)(.*?)(<!-- / -->)", re.DOTALL)
Result = dict[str, Any]


def results() -> dict[str, Result]:
    """{model: its newest kept result}."""
    files = sorted(RESULTS.glob("quality-*.json"), key=lambda path: path.stem[-10:])
    return {found["model"]: found for found in map(json.loads, (path.read_text() for path in files))}


def fill(page: str, kept: dict[str, Result]) -> str:
    return _MARK.sub(lambda m: m[1] + text(m[2].split(), kept) + m[4], page)


def text(words: list[str], kept: dict[str, Result]) -> str:
    match words:
        case ["bits"]:
            return bits()
        case ["calibrated", *rest]:
            return peers_table.text(rest)
        case [kind, model, *_] if kind in ("ladder", "pair", "setting") and model not in kept:
            return f"\n{MISSING}\n" if kind == "ladder" else MISSING
        case ["ladder", model, group]:
            return ladder(kept[model]["reports"][group]) if group in kept[model]["reports"] else f"\n{MISSING}\n"
        case ["pair", model, first, second]:
            return pair(kept[model]["reports"]["pairs"], first, second)
        case ["setting", model]:
            return setting(kept[model])
        case [model, student, figure]:
            return one(kept[model], student, figure) if model in kept else MISSING
    sys.exit(f"{PAGE}: <!-- = {' '.join(words)} --> means nothing")


def ladder(report: Result) -> str:
    rows = [
        "| level | bits per weight | MB | KL divergence, milli-nats | more than the one above | 99th percentile "
        "| perplexity ratio | RMS Δp, % | same top token, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for student in report["students"]:
        size, d = student["model"]["size"], student["divergence"]
        cells = [
            level(student),
            f"{size['bpw']:.2f}",
            f"{size['nbytes'] / 1e6:,.0f}",
            plus_minus(d["kl"], MILLI),
            plus_minus(student["behind"], MILLI) if student.get("behind") else "",
            plus_minus(d["kl_p99"], MILLI),
            plus_minus(d["ppl_ratio"]),
            plus_minus(d["delta_p_rms"], 100),
            plus_minus(d["top1"], 100),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n" + "\n".join(rows) + "\n"


def pair(reports: list[Result], first: str, second: str) -> str:
    """Of the report on these two alone: its worse one is `behind` the other by a paired difference."""
    for report in reports:
        better, worse = report["students"]
        if {level(better), level(worse)} == {first, second}:
            sign = 1 if level(worse) == second else -1
            behind = worse["behind"]
            return plus_minus({"value": sign * behind["value"], "error": behind["error"]}, MILLI) + " milli-nats"
    return MISSING


def one(result: Result, name: str, figure: str) -> str:
    students = {level(student): student for student in result["reports"]["all"]["students"]}
    if name not in students:
        return MISSING
    size, d = students[name]["model"]["size"], students[name]["divergence"]
    match figure:
        case "bpw":
            return f"{size['bpw']:.2f}"
        case "top1" | "delta_p_rms":
            return plus_minus(d[figure], 100) + " %"
        case "kl" | "p99":
            return plus_minus(d["kl" if figure == "kl" else "kl_p99"], MILLI) + " milli-nats"
    return plus_minus(d[figure])


def setting(result: Result) -> str:
    s = result["reports"]["all"]["setting"]
    versions = ", ".join(f"{name} {number}" for name, number in s["versions"].items() if number[:1].isdigit())
    return (
        f"{s['windows']} windows of {s['context']} tokens, second half scored; text: {s['text']} "
        f"(sha256 {s['text_sha256'][:12]}); floor {s['floor']:.1e} nats; {s['device']}; {versions}; {result['date']}"
    )


def level(student: Result) -> str:
    return str(student["model"]["name"]).removesuffix(".gguf")


def plus_minus(found: Result, scale: float = 1) -> str:
    return estimate(Estimate(**found), scale)


def bits() -> str:
    rows = ["| level |" + "".join(f" {model.name} |" for model in MODELS), "|---|" + "---|" * len(MODELS)]
    for name in LEVELS:
        rows.append(f"| {name} |" + "".join(f" {bits_per_weight(model, name):.2f} |" for model in MODELS))
    return "\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    written = fill(PAGE.read_text(), results())
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text() == written else f"{PAGE} is out of date: run python scripts/quality_page.py")
    PAGE.write_text(written)
