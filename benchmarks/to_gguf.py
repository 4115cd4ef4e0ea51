"""GGUF output against llama.cpp's own tools, in turn, in one run: wall time and peak resident memory.

    MLXQUANT_LLAMA_CPP=FOLDER MLXQUANT_TORCH_PYTHON=PYTHON python benchmarks/to_gguf.py MODEL [--imatrix FILE] [--save]

MODEL is a full-precision Hugging Face folder of a family that both know. FOLDER is llama.cpp with build/bin, PYTHON has
what convert_hf_to_gguf.py needs; `make oracle` leaves both in .oracle/. Two threads on both sides. Compared:

    quantize           a BF16 GGUF file -> Q4_K_M; with --imatrix also that
    from checkpoint    the folder -> Q4_K_M in one step, against convert_hf_to_gguf.py and llama-quantize

The tensors of each pair of files are compared byte for byte before anything is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from measure import Took, report, run, tool

from mlxquant.files.gguf_file import GGUFFile

ORACLE = Path(__file__).parent.parent / ".oracle"
LLAMA_CPP = Path(os.environ.get("MLXQUANT_LLAMA_CPP", ORACLE / "llama.cpp"))
PYTHON = os.environ.get("MLXQUANT_TORCH_PYTHON", str(ORACLE / "venv" / "bin" / "python"))
TYPE = "Q4_K_M"


def warm(path: Path) -> None:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    for file_path in files:
        with file_path.open("rb") as file:
            while file.read(1 << 24):
                pass


def mlxquant(source: Path, out: Path, type_name: str, *flags: str) -> Took:
    out.unlink(missing_ok=True)
    warm(source)
    return run([tool("mlxquant"), "convert", str(source), "-o", str(out), "--type", type_name, "--json", *flags])


def llama_quantize(source: Path, out: Path, *flags: str) -> Took:
    out.unlink(missing_ok=True)
    warm(source)
    return run([str(LLAMA_CPP / "build/bin/llama-quantize"), *flags, str(source), str(out), TYPE, "2"])


def convert_hf(source: Path, out: Path) -> Took:
    out.unlink(missing_ok=True)
    warm(source)
    script = LLAMA_CPP / "convert_hf_to_gguf.py"
    env = {"PYTHONPATH": str(LLAMA_CPP / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    return run([PYTHON, str(script), "--outtype", "bf16", "--outfile", str(out), str(source)], env)


def check_equal(ours: Path, theirs: Path) -> None:
    a, b = GGUFFile(ours), GGUFFile(theirs)
    for name, tensor in b.tensors.items():
        if a.tensors[name].type_name != tensor.type_name:
            sys.exit(f"{name}: {a.tensors[name].type_name} here, {tensor.type_name} there")
        step = max(1, (1 << 24) // tensor.row_bytes)
        for start in range(0, tensor.rows, step):
            rows = name, start, min(start + step, tensor.rows)
            if a.read_rows(*rows).tobytes() != b.read_rows(*rows).tobytes():
                sys.exit(f"{name}: other bytes from row {start} on")


class Runs:
    """What each tool took, over the repeats."""

    def __init__(self) -> None:
        self.took: dict[str, list[Took]] = {}

    def add(self, name: str, took: Took) -> None:
        self.took.setdefault(name, []).append(took)

    def wall(self, *names: str) -> float:
        """Median seconds; of several names, one after the other."""
        return sum(statistics.median(t.wall_s for t in self.took[name]) for name in names)

    def peak(self, *names: str) -> int:
        return max(t.peak_rss_bytes for name in names for t in self.took[name])

    def compare(self, label: str, ours: str, *theirs: str) -> dict[str, float]:
        row = {
            "wall_s": self.wall(ours),
            "their_wall_s": self.wall(*theirs),
            "wall_ratio": self.wall(ours) / self.wall(*theirs),
            "peak_rss_bytes": self.peak(ours),
            "their_peak_rss_bytes": self.peak(*theirs),
            "peak_ratio": self.peak(ours) / self.peak(*theirs),
        }
        print(f"{label:24} {row['wall_s']:6.1f} s against {row['their_wall_s']:6.1f} s: {row['wall_ratio']:.2f}x   "
              f"peak {row['peak_rss_bytes'] / 1e6:5.0f} MB against {row['their_peak_rss_bytes'] / 1e6:5.0f} MB: "
              f"{row['peak_ratio']:.2f}x")  # fmt: skip
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    runs, weighted = Runs(), ["--imatrix", str(options.imatrix)] if options.imatrix else []
    with tempfile.TemporaryDirectory(dir=options.model.parent) as folder:
        ours, theirs, floats = (Path(folder) / f"{name}.gguf" for name in ("ours", "theirs", "floats"))
        for flags in ([], weighted):  # compiles the kernels, once per installation; not counted
            mlxquant(options.model, ours, TYPE, *flags)
        for _ in range(options.repeats):
            runs.add("convert_hf", convert_hf(options.model, floats))
            runs.add("one_step", mlxquant(options.model, ours, TYPE))
            runs.add("quantize", mlxquant(floats, ours, TYPE))
            runs.add("llama_quantize", llama_quantize(floats, theirs))
            check_equal(ours, theirs)
            if weighted:
                runs.add("quantize_imatrix", mlxquant(floats, ours, TYPE, *weighted))
                runs.add("llama_quantize_imatrix", llama_quantize(floats, theirs, *weighted))
                check_equal(ours, theirs)
    rows = {"quantize": runs.compare("BF16 -> Q4_K_M", "quantize", "llama_quantize")}
    if weighted:
        rows["imatrix"] = runs.compare("the same with imatrix", "quantize_imatrix", "llama_quantize_imatrix")
    rows["from_checkpoint"] = runs.compare("checkpoint -> Q4_K_M", "one_step", "convert_hf", "llama_quantize")
    report("to_gguf", {"model": options.model.name, "repeats": options.repeats, **rows}, options.save)


if __name__ == "__main__":
    main()
