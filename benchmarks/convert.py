"""Conversion against stock `mlx_lm.convert`, same settings, in turn, in one run: wall time and peak resident memory.

    python benchmarks/convert.py [--large FOLDER] [--small FOLDER] [--repeats 3] [--save]

`--large` and `--small` are full-precision Hugging Face folders (1.5B and 135M in the kept results); without them,
folders of those shapes with random weights are made under .models/. Every run begins with the source in the page cache.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from measure import report, run, tool
from random_model import make

MODELS = Path(__file__).parent.parent / ".models"


def warm(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def ours(source: Path, out: Path):
    return run(
        [tool("mlxquant"), "convert", str(source), "-o", str(out), "--bits", "4", "--recipe", "uniform", "--json"]
    )


def default(source: Path, out: Path):
    return run([tool("mlxquant"), "convert", str(source), "-o", str(out), "--json"])


def theirs(source: Path, out: Path):
    command = ["mlx_lm.convert", "--hf-path", str(source), "--mlx-path", str(out), "-q", "--q-bits", "4"]
    return run([tool(command[0]), *command[1:], "--q-group-size", "64"])


def once(convert, source: Path, scratch: Path):
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    warm(source)
    took = convert(source, out)
    shutil.rmtree(out)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", type=Path)
    parser.add_argument("--small", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    large = options.large or make("qwen", MODELS / "qwen-random")
    small = options.small or make("smol", MODELS / "smol-random")
    with tempfile.TemporaryDirectory(dir=large.parent) as folder:
        scratch = Path(folder)
        once(ours, small, scratch)  # compiles the kernels, once per installation; not counted
        rows = {"ours": [], "theirs": [], "balanced": [], "small": []}
        for _ in range(options.repeats):
            rows["theirs"].append(once(theirs, large, scratch))
            rows["ours"].append(once(ours, large, scratch))
            rows["balanced"].append(once(default, large, scratch))
            rows["small"].append(once(ours, small, scratch))
    wall = {k: statistics.median(t.wall_s for t in v) for k, v in rows.items()}
    peak = {k: max(t.peak_rss_bytes for t in v) for k, v in rows.items()}
    for key, label in (("theirs", "mlx_lm.convert, large"), ("ours", "mlxquant uniform, large"),
                       ("balanced", "mlxquant balanced, large"), ("small", "mlxquant uniform, small")):  # fmt: skip
        walls = " ".join(f"{t.wall_s:.1f}" for t in rows[key])
        print(f"{label:26} {wall[key]:6.1f} s ({walls})   peak {peak[key] / 1e6:7.0f} MB")
    result = {
        "wall_s": wall,
        "peak_rss_bytes": peak,
        "wall_ratio": wall["ours"] / wall["theirs"],
        "peak_ratio": peak["ours"] / peak["theirs"],
        "large_over_small_peak": peak["ours"] / peak["small"],
        "repeats": options.repeats,
    }
    print(f"wall {result['wall_ratio']:.2f}x, peak {result['peak_ratio']:.2f}x of mlx-lm's; "
          f"large peak {result['large_over_small_peak']:.2f}x of small")  # fmt: skip
    report("convert", result, options.save)


if __name__ == "__main__":
    main()
