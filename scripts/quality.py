"""What each quantization level costs on one model: makes the students, evaluates them, checks their order, keeps it.

    python scripts/quality.py SOURCE [--text FILE] [--windows N] [--formats gguf,mlx|balanced] [--work DIR] [--dry-run]

SOURCE is a full-precision model folder. Students stand in DIR under names like Q4_K_M.gguf and mlx-4bit; those that
exist are not made again, and what `mlxquant eval` scored is kept there, too, so that the same command goes on after a
stop. The ladders must come out in order, each step larger than twice its standard error (paired by position, clustered
by window); the exit code is 1 where one does not. The result goes to benchmarks/results/quality-NAME-DATE.json, from
which scripts/quality_page.py writes the tables of docs/quality.md. `--formats balanced` alone measures convert's own
recipe and keeps it as quality-NAME-balanced-DATE.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import quality_page

GGUF = {f"{level}.gguf": ("--type", level) for level in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")}
MLX = {
    f"mlx-{bits}bit": ("--bits", str(bits), "--group-size", "64", "--mode", "affine", "--recipe", "uniform")
    for bits in (8, 6, 5, 4, 3, 2)
}
# What `convert` makes unasked, where that is not what recipe uniform makes of a dense model.
BALANCED = {f"mlx-{bits}bit-balanced": ("--bits", str(bits), "--method", "rtn") for bits in (5, 4, 3)}
BESIDE = {
    "gguf": {f"{level}.gguf": ("--type", level) for level in ("Q4_0", "Q4_K_S", "IQ4_XS")},
    "mlx": {"mlx-4bit-balanced": ("--bits", "4", "--method", "rtn")},
    "balanced": {"mlx-mxfp4-balanced": ("--mode", "mxfp4", "--method", "rtn")},
}
LADDERS = {"gguf": GGUF, "mlx": MLX, "balanced": BALANCED}
# What claims compare.
PAIRS = (
    ("Q4_K_M.gguf", "mlx-4bit"),
    ("Q4_K_M.gguf", "mlx-4bit-balanced"),
    ("Q4_K_S.gguf", "IQ4_XS.gguf"),
    ("Q4_K_S.gguf", "Q4_0.gguf"),
    ("Q3_K_M.gguf", "Q4_0.gguf"),
)
Report = dict[str, Any]


def make(source: Path, work: Path, formats: list[str]) -> list[str]:
    """Names of all students. A half-made one is gone on with by `convert` itself."""
    wanted = {name: flags for kind in formats for name, flags in (LADDERS[kind] | BESIDE[kind]).items()}
    for name, flags in wanted.items():
        if not (work / name).exists():
            subprocess.run(["mlxquant", "convert", source, "-o", work / name, *flags], check=True, stdout=sys.stderr)
    return list(wanted)


def evaluate(source: Path, work: Path, names: list[str], text: str, windows: int) -> Report:
    """`mlxquant eval`; of students that were scored before, only hashes are computed again."""
    kept = work / f"kept-{Path(text).stem}-{windows}"
    paths = [source, *(work / name for name in names)]
    options = ["--text", text, "--windows", str(windows), "--keep", kept, "--worst", "0", "--json"]
    done = subprocess.run(["mlxquant", "eval", *paths, *options], check=True, stdout=subprocess.PIPE, text=True)
    report: Report = json.loads(done.stdout)
    return report


def faults(report: Report, wanted: list[str]) -> list[str]:
    """What is wrong with a ladder, its best level first; nothing if it is as it should be."""
    found = [student["model"]["name"] for student in report["students"]]
    wrong = [] if found == wanted else [f"order {' < '.join(found)}, expected {' < '.join(wanted)}"]
    for before, student in zip(found, report["students"][1:], strict=False):
        step = student["behind"]
        if step["error"] is None:
            wrong.append("one window has no error: take more --windows")
        elif step["value"] <= 2 * step["error"]:
            wrong.append(
                f"{student['model']['name']} is {step['value']:.2g} ± {step['error']:.2g} nats behind {before}"
            )
    return wrong


def keep(model: str, reports: Report) -> None:
    date = datetime.date.today().isoformat()
    given = " ".join(Path(word).name if "/" in word else word for word in sys.argv[1:])
    result = {
        "model": model,
        "date": date,
        "command": f"python scripts/quality.py {given}",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "reports": reports,
    }
    path = quality_page.RESULTS / f"quality-{model}-{date}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    page = quality_page.PAGE
    page.write_text(quality_page.fill(page.read_text(), quality_page.results()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", default="builtin", help="a text file, a Hub dataset or 'builtin'")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--formats", default="gguf,mlx")
    parser.add_argument("--work", type=Path, help="where students stand [default: SOURCE-students]")
    parser.add_argument("--dry-run", action="store_true", help="make the students and nothing else")
    options = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    source, formats = options.source.resolve(), options.formats.split(",")
    work = options.work or source.with_name(f"{source.name}-students")
    work.mkdir(parents=True, exist_ok=True)
    names = make(source, work, formats)
    if options.dry_run:
        return

    def report(students: list[str]) -> Report:
        return evaluate(source, work, students, options.text, options.windows)

    reports: Report = {"all": report(names)}
    wrong = []
    for kind in formats:
        reports[kind] = report(list(LADDERS[kind]))
        wrong += [f"{kind}: {line}" for line in faults(reports[kind], list(LADDERS[kind]))]
    reports["pairs"] = [report(list(pair)) for pair in PAIRS if set(pair) <= set(names)]
    keep(source.name + ("-balanced" if formats == ["balanced"] else ""), reports)
    print("\n".join(wrong) or "Each ladder is in order, each step larger than twice its error.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
