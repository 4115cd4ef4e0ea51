"""How long the planning commands take from shell to answer: they load neither mlx nor transformers.

python benchmarks/startup.py [--model FOLDER] [--save]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

from measure import report, run, tool
from random_model import make

LIMIT_S, FIT_LIMIT_S = 0.5, 0.6
HERE = Path(__file__).parent
MODELS = HERE.parent / ".models"
MAC = ("--mac", "M3 Max 64GB")
BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}  # an installed package has its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    model = options.model or make("smol", MODELS / "smol-random")
    commands = {
        "import mlxquant": [sys.executable, "-c", "import mlxquant"],
        "--help": [tool("mlxquant"), "--help"],
        "convert --help": [tool("mlxquant"), "convert", "--help"],
        "convert --dry-run": [tool("mlxquant"), "convert", str(model), "--dry-run"],
        "inspect": [tool("mlxquant"), "inspect", str(model)],
        "fit": [tool("mlxquant"), "fit", str(model), *MAC],
        "fit --table": [tool("mlxquant"), "fit", str(model), "--table"],
        # The most tensors that a published checkpoint has: 45,000.
        "fit deepseek-v3": [tool("mlxquant"), "fit", str(alone("deepseek-v3")), *MAC],
    }
    median = {}
    for name, command in commands.items():
        run(command, BYTECODE)  # byte-compiles and warms the page cache
        median[name] = statistics.median(run(command, BYTECODE).wall_s for _ in range(7))
        limit_s = FIT_LIMIT_S if name.startswith("fit") else LIMIT_S
        print(f"{name:20} {median[name]:.3f} s   {'ok' if median[name] < limit_s else 'too slow'}")
    report("startup", {"median_s": median, "limit_s": LIMIT_S, "fit_limit_s": FIT_LIMIT_S}, options.save)


def alone(name: str) -> Path:
    """A folder with nothing but one of the configs of benchmarks/sizes.py."""
    folder = MODELS / name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(HERE / "sizes" / "configs" / f"{name}.json", folder / "config.json")
    return folder


if __name__ == "__main__":
    main()
