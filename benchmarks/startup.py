"""How long the planning commands take from shell to answer: they load neither mlx nor transformers.

python benchmarks/startup.py [--model FOLDER] [--save]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from measure import report, run, tool
from random_model import make

LIMIT_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    model = options.model or make("smol", Path(__file__).parent.parent / ".models" / "smol-random")
    commands = {
        "import mlxquant": [sys.executable, "-c", "import mlxquant"],
        "--help": [tool("mlxquant"), "--help"],
        "convert --help": [tool("mlxquant"), "convert", "--help"],
        "convert --dry-run": [tool("mlxquant"), "convert", str(model), "--dry-run"],
        "inspect": [tool("mlxquant"), "inspect", str(model)],
    }
    median = {}
    for name, command in commands.items():
        run(command)  # byte-compiles and warms the page cache
        median[name] = statistics.median(run(command).wall_s for _ in range(7))
        print(f"{name:20} {median[name]:.3f} s   {'ok' if median[name] < LIMIT_S else 'too slow'}")
    report("startup", {"median_s": median, "limit_s": LIMIT_S}, options.save)


if __name__ == "__main__":
    main()
