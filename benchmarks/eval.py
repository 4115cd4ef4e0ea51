"""What `mlxquant eval` takes: peak memory against the two models it runs, time against their forward passes alone.

    [MLXQUANT_LLAMA_CPP=FOLDER] python benchmarks/eval.py MODEL [--windows 32] [--repeats 3] [--save]

MODEL is a full-precision Hugging Face folder; the students are a 4-bit MLX folder and a Q8_0 file of it.

    memory   peak resident memory of the command, in a process of its own, against both models as they are loaded
             (float32 on a CPU) and 1 GB
    time     scoring all windows against `model(tokens)` of both models over the same windows, evaluated, in turn in one
             process; loading, hashing and tokenizing are outside of both
    theirs   where MLXQUANT_LLAMA_CPP names llama.cpp with build/bin: llama-perplexity on the F16 and Q8_0 files and the
             same windows, its two runs after one another, and the size of its file of log-probabilities

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import report, run, tool

from mlxquant.run.device import prepare

DEVICE = prepare()  # the BLAS must be loaded before mlx is

from mlxquant.convert.sources import open_source  # noqa: E402
from mlxquant.measure.corpus import load_corpus  # noqa: E402
from mlxquant.measure.evaluate import evaluate  # noqa: E402
from mlxquant.measure.match import Side  # noqa: E402
from mlxquant.measure.runner import How, Silent  # noqa: E402
from mlxquant.measure.windows import Protocol, Windows, cut  # noqa: E402
from mlxquant.run.ready import make_ready  # noqa: E402
from mlxquant.run.text import Text  # noqa: E402

GB = 10**9
STUDENTS = {"mlx-4bit": ("--bits", "4"), "Q8_0.gguf": ("--type", "Q8_0"), "F16.gguf": ("--type", "F16")}


def make(model: Path, folder: Path) -> dict[str, Path]:
    for name, flags in STUDENTS.items():
        run([tool("mlxquant"), "convert", str(model), "-o", str(folder / name), *flags])
    return {name: folder / name for name in STUDENTS}


def command(teacher: Path, students: list[Path], text: str, windows: int, kept: Path) -> list[str]:
    options = ["--text", text, "--windows", str(windows), "--keep", str(kept), "--worst", "0", "--json"]
    return [tool("mlxquant"), "eval", str(teacher), *map(str, students), *options]


def memory(teacher: Path, students: list[Path], windows: int, folder: Path) -> dict[str, Any]:
    took = run(command(teacher, students, "builtin", windows, folder / "kept-memory"))
    found = json.loads(took.output)
    sizes = [found["teacher"]["size"], max((s["model"]["size"] for s in found["students"]), key=loaded_bytes)]
    allowed = sum(map(loaded_bytes, sizes)) + GB
    return {
        "peak_rss_bytes": took.peak_rss_bytes,
        "models_bytes": allowed - GB,
        "allowed_bytes": allowed,
        "peak_ratio": took.peak_rss_bytes / allowed,
        "wall_s": took.wall_s,
    }


def loaded_bytes(size: dict[str, Any]) -> int:
    """As float32 on a CPU, where `--expand auto` expands what fits; elsewhere as stored."""
    return int(4 * size["parameters"] if DEVICE.kind == "cpu" else size["nbytes"])


class Clock(Silent):
    """Seconds between a stage's beginning and its last window, over stages that count windows."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def stage(self, label: str, total: int, unit: str) -> None:
        self._since = time.perf_counter() if unit == "windows" else None

    def advance(self, count: int, note: str = "") -> None:
        if self._since is not None:
            now = time.perf_counter()
            self.seconds, self._since = self.seconds + now - self._since, now


class Timing:
    """Both models plain, and both under `evaluate`, over the same windows."""

    def __init__(self, teacher: Path, student: Path, windows: int) -> None:
        self._how, self._corpus = How(DEVICE, worst=0), load_corpus("builtin")
        self._sides = [Side(p, open_source(p).config, Text.load(p), p.name) for p in (teacher, student)]
        began = time.perf_counter()
        ready = [make_ready(s.path, self._how.device, s.text, context_tokens=512) for s in self._sides]
        self.loading_s = time.perf_counter() - began
        self._models = [each.loaded.model for each in ready]
        self._windows = self._cut(windows)

    def _cut(self, windows: int) -> Windows:
        return cut(self._sides[0].text, self._corpus, Protocol(windows=windows))

    def forwards(self) -> float:
        import mlx.core as mx

        began = time.perf_counter()
        for tokens_L in self._windows.tokens_WL:
            for model in self._models:
                mx.eval(model(mx.array(tokens_L)[None]))
        return time.perf_counter() - began

    def scoring(self, windows: Windows | None = None) -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory() as work:
            chosen = windows or self._windows
            evaluate(self._sides[0], self._sides[1:], chosen, self._how, Path(work), clock)
        return clock.seconds

    def compare(self, repeats: int) -> dict[str, Any]:
        """Medians. One short round before that compiles and touches everything once."""
        self.scoring(self._cut(2))
        forwards, scoring = [], []
        for _ in range(repeats):
            forwards.append(self.forwards())
            scoring.append(self.scoring())
        return {
            "loading_s": self.loading_s,
            "forwards_s": statistics.median(forwards),
            "scoring_s": statistics.median(scoring),
            "ratio": statistics.median(s / f for s, f in zip(scoring, forwards, strict=True)),
            "ratios": [s / f for s, f in zip(scoring, forwards, strict=True)],
        }


def theirs(files: dict[str, Path], windows: int, folder: Path) -> dict[str, Any]:
    """Wall time of whole commands, loading included on both sides, one after the other."""
    text, base, kept = folder / "text.txt", folder / "base.kld", folder / "kept-theirs"
    text.write_text(load_corpus("builtin").text, encoding="utf-8")
    tool_path = Path(os.environ["MLXQUANT_LLAMA_CPP"]) / "build" / "bin" / "llama-perplexity"
    options = ["-f", str(text), "-c", "512", "--chunks", str(windows), "-t", str(os.cpu_count())]
    options += ["--kl-divergence-base", str(base)]
    first = run([str(tool_path), "-m", str(files["F16.gguf"]), *options])
    second = run([str(tool_path), "-m", str(files["Q8_0.gguf"]), *options, "--kl-divergence"])
    ours = run(command(files["F16.gguf"], [files["Q8_0.gguf"]], str(text), windows, kept))
    return {
        "wall_s": ours.wall_s,
        "their_wall_s": first.wall_s + second.wall_s,
        "wall_ratio": ours.wall_s / (first.wall_s + second.wall_s),
        "peak_rss_bytes": ours.peak_rss_bytes,
        "their_peak_rss_bytes": max(first.peak_rss_bytes, second.peak_rss_bytes),
        "kept_bytes": sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()),
        "their_file_bytes": base.stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.model.resolve().parent) as name:
        folder, count = Path(name), options.windows
        files = make(options.model, folder)
        students = [files["mlx-4bit"], files["Q8_0.gguf"]]
        result: dict[str, Any] = {"model": options.model.resolve().name, "windows": count}
        result["memory"] = m = memory(options.model, students, count, folder)
        print(
            f"peak {m['peak_rss_bytes'] / 1e6:,.0f} MB; both models and 1 GB: {m['allowed_bytes'] / 1e6:,.0f} MB",
            flush=True,
        )
        if os.environ.get("MLXQUANT_LLAMA_CPP"):
            result["theirs"] = o = theirs(files, count, folder)
            print(f"eval {o['wall_s']:.1f} s, llama-perplexity {o['their_wall_s']:.1f} s: {o['wall_ratio']:.2f}x; "
                  f"kept {o['kept_bytes'] / 1e6:,.0f} MB, its file {o['their_file_bytes'] / 1e6:,.0f} MB")  # fmt: skip
        # Last: on Linux the peak of a child counts what its parent held when it was started.
        result["time"] = t = Timing(options.model, files["mlx-4bit"], count).compare(options.repeats)
        print(f"scoring {t['scoring_s']:.1f} s, forward passes {t['forwards_s']:.1f} s: {t['ratio']:.3f}x", flush=True)
    report("eval", result, options.save)


if __name__ == "__main__":
    main()
