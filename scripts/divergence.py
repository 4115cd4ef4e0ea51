"""Writes mlxquant/fit/divergence.json, what `mlxquant fit --pick` knows of quality, from what scripts/quality.py kept.

    python scripts/divergence.py [--check]

For each model that was measured: level -> mean KL divergence from the full-precision model in nats, its standard error
(clustered by window), the share of positions with the same best token, the perplexity ratio, and bits per weight.
docs/quality.md says on what text, and what these figures do not say. --check fails when the file is not what this
would write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from quality_page import RESULTS, results

TARGET = Path(__file__).resolve().parent.parent / "mlxquant" / "fit" / "divergence.json"
# Name of the kept result -> what people call the model, and from how many weights on its figures are used. Between the
# two nothing was measured: below 1e9 weights the smaller model's stand, which loses more at every level.
MODELS = {"qwen": ("Qwen2.5-Coder-1.5B", 10**9), "smol": ("SmolLM2-135M", 0)}


def main() -> None:
    kept = results()
    found = {
        "written_by": "python scripts/divergence.py",
        "models": [
            of([kept[n] for n in (name, f"{name}-balanced") if n in kept], title, least)
            for name, (title, least) in MODELS.items()
        ],
    }
    text = json.dumps(found, indent=1) + "\n"
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
    elif not TARGET.exists() or TARGET.read_text() != text:
        sys.exit(f"{TARGET} is not what {RESULTS} says: run python scripts/divergence.py")


def of(results: list[dict[str, Any]], title: str, least_weights: int) -> dict[str, Any]:
    reports = [result["reports"]["all"] for result in results]
    students = [student for report in reports for student in report["students"]]
    return {
        "model": title,
        "weights": reports[0]["teacher"]["size"]["parameters"],
        "from_weights": least_weights,
        "date": results[-1]["date"],
        "commands": [result["command"] for result in results],
        "levels": {key(student["model"]["name"]): figures(student) for student in students},
    }


def key(student: str) -> str:
    """As fit names levels: 'Q4_K_M.gguf' -> 'gguf Q4_K_M', 'mlx-4bit' (by recipe uniform) -> 'mlx 4-bit uniform',
    'mlx-4bit-balanced' (what `convert` makes unasked) -> 'mlx 4-bit', 'mlx-mxfp4-balanced' -> 'mlx mxfp4'.
    """
    if student.endswith(".gguf"):
        return f"gguf {student.removesuffix('.gguf')}"
    _, bits, *recipe = student.split("-")
    return f"mlx {bits.replace('bit', '-bit')}" + ("" if recipe == ["balanced"] else " uniform")


def figures(student: dict[str, Any]) -> dict[str, float]:
    found = student["divergence"]
    return {
        "kl": found["kl"]["value"],
        "kl_error": found["kl"]["error"],
        "top1": found["top1"]["value"],
        "ppl_ratio": found["ppl_ratio"]["value"],
        "bpw": student["model"]["size"]["bpw"],
    }


if __name__ == "__main__":
    main()
