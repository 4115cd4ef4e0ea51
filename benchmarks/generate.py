"""Running against stock mlx-lm on the same 4-bit folder, in turn, in one run: prefill and decode, tokens per second.

    python benchmarks/generate.py [--model FOLDER] [--prompt 64] [--generate 32] [--repeats 2] [--save]

Without --model the demo model is fetched and converted to 4 bits with bfloat16 scales, as its Hub original has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measure import report, run, tool

ROOT = Path(__file__).parent.parent


def demo_model() -> Path:
    """SmolLM2-135M-Instruct at 4 bits."""
    out = ROOT / "demo-out" / "bench-4bit"
    if not out.exists():
        fetch = [sys.executable, str(ROOT / "scripts" / "fetch_demo_model.py"), str(ROOT / "demo-out")]
        source = subprocess.run(fetch, check=True, capture_output=True, text=True).stdout.strip()
        run([tool("mlxquant"), "convert", source, "-o", str(out), "--bits", "4", "--dtype", "bfloat16"])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompt", default="64")
    parser.add_argument("--generate", default="32")
    parser.add_argument("--repeats", default="2")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    model = options.model or demo_model()
    command = [tool("mlxquant"), "bench", str(model), "-p", options.prompt, "-n", options.generate]
    took = run([*command, "-r", options.repeats, "--against", "mlx-lm"])
    print(took.output)
    report("generate", json.loads(took.output.splitlines()[-1]), options.save)


if __name__ == "__main__":
    main()
