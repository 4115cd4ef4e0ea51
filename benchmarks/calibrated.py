"""What calibration is worth: students of one model by many methods, their divergence, size, time and peak memory.

    python benchmarks/calibrated.py MODEL --text FILE -o results.json [--calibration FILE] [--imatrix FILE]
        [--methods mlx_lm,search,gptq+rotate --formats 4g64,3g64,bpw4.5] [--types Q4_K_M+imatrix,Q4_K+pure+imatrix]
        [--ready NAME=PATH ...] [--windows 48] [--time-limit 1] [--beside peers.json] [--plot out.svg]

MODEL is a full-precision folder. --methods times --formats are MLX folders: `mlx_lm` is what `mlx_lm.convert -q`
writes, mlx_lm_awq, mlx_lm_gptq and mlx_lm_dynamic are scripts/peers_mlx_lm.py, every other one is `mlxquant convert
--method`. 4g64 is every tensor at 4 bits in groups of 64 (`--recipe uniform`), bpw4.5 a budget. --types are GGUF files
by `mlxquant convert --type`, the bytes of llama-quantize; --ready takes students as they are. Words after a + are
switches: --rotate, --pure; `imatrix` is --imatrix FILE, `free` leaves --calibration out. One student at a time is made,
scored by `mlxquant eval` (the teacher runs once for all), written into results.json and deleted; what is there already
is skipped, so that the same command goes on. --beside takes earlier results into ratios and plot. --untimed leaves
seconds out, for a machine that has other work. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import calibrated_plot
from measure import run, tool

MLX_LM_PEERS = Path(__file__).parent.parent / "scripts" / "peers_mlx_lm.py"
SAME_SIZE = 1e-3  # two students are of one size if they differ by less: headers, a bias more or less
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A student to be made; command: None for one that is there already."""

    method: str
    form: str
    path: Path
    command: list[str] | None

    @property
    def name(self) -> str:
        return f"{self.method} {self.form}".strip()


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    for form in split(options.formats):
        for method in split(options.methods):
            path = options.work / f"{method}-{form}"
            yield Job(method, form, path, mlx_command(options, method, form, path))
    for words in split(options.types):
        kind, *switches = words.split("+")
        path = options.work / f"{words}.gguf"
        command = [tool("mlxquant"), "convert", options.model, "-o", path, "--type", kind]
        yield Job(words, "", path, command + [word for switch in switches for word in flags(options, switch)])
    for ready in options.ready:
        name, _, path = ready.partition("=")
        yield Job(name, "", Path(path), None)


def mlx_command(options: argparse.Namespace, method: str, form: str, path: Path) -> list[Any]:
    bits, group = re.fullmatch(r"(\d)g(\d+)", form).groups() if not form.startswith("bpw") else (None, None)
    if method == "mlx_lm":
        stock = [tool("mlx_lm.convert"), "--hf-path", options.model, "--mlx-path", path, "-q"]
        return [*stock, "--q-bits", bits, "--q-group-size", group]
    size = ["--bpw", form.removeprefix("bpw")] if bits is None else ["--bits", bits, "--group-size", group]
    text = ["--calibration", options.calibration, "--samples", str(options.samples)] if options.calibration else []
    if method.startswith("mlx_lm_"):
        return [sys.executable, MLX_LM_PEERS, method.removeprefix("mlx_lm_"), options.model, "-o", path, *size, *text]
    kind, *switches = method.split("+")
    recipe = [] if bits is None else ["--recipe", "uniform"]
    more = [word for switch in switches for word in flags(options, switch)]
    more += ["--time-limit", options.time_limit] if kind == "best" and options.time_limit else []
    text = [] if kind == "rtn" or "free" in switches else text
    return [tool("mlxquant"), "convert", options.model, "-o", path, *recipe, "--method", kind, *size, *more, *text]


def flags(options: argparse.Namespace, switch: str) -> list[str]:
    return {"imatrix": ["--imatrix", str(options.imatrix)], "free": []}.get(switch, [f"--{switch}"])


def split(words: str) -> list[str]:
    return [word for word in words.split(",") if word]


def make_and_score(job: Job, options: argparse.Namespace) -> Row:
    took = None
    if job.command is not None and not job.path.exists():
        took = run([str(word) for word in job.command])
    report = evaluate(options, job.path)
    student = report["students"][0]
    size = student["model"]["size"]
    row = {
        "name": job.name,
        "method": job.method,
        "format": job.form,
        "command": None if job.command is None else shown(job.command),
        "nbytes": size["nbytes"],
        "bpw": size["bpw"],
        "sha256": student["model"]["sha256"],
        "wall_s": None if took is None or options.untimed else took.wall_s,
        "peak_rss_bytes": None if took is None else took.peak_rss_bytes,
        "divergence": student["divergence"],
        "setting": report["setting"],
    }
    if job.command is not None and not options.keep:
        shutil.rmtree(job.path) if job.path.is_dir() else job.path.unlink()
    return row


def evaluate(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    command = [tool("mlxquant"), "eval", options.model, path, "--text", options.text, "--windows", options.windows]
    took = run([str(word) for word in [*command, "--keep", options.work / "kept", "--worst", "0", "--json"]])
    return dict(json.loads(took.output))


def shown(command: list[Any]) -> str:
    """Without this machine's folders."""
    return " ".join(Path(str(word)).name for word in command)


def with_ratios(rows: list[Row], beside: list[Row]) -> list[Row]:
    """By size; each divergence by that of `mlx_lm.convert`, where that wrote a folder of the same size."""
    stock = [row for row in [*rows, *beside] if row["method"] == "mlx_lm"]
    for row in rows:
        kl = row["divergence"]["kl"]["value"]
        same = [s for s in stock if abs(s["nbytes"] / row["nbytes"] - 1) < SAME_SIZE]
        row["ratio_to_mlx_lm"] = kl / same[0]["divergence"]["kl"]["value"] if same else None
    return sorted(rows, key=lambda row: (row["bpw"], row["name"]))


def line(row: Row) -> str:
    kl, ratio = row["divergence"]["kl"], row.get("ratio_to_mlx_lm")
    cells = [
        f"{row['name']:28}{row['bpw']:6.2f} bpw{row['nbytes'] / 1e6:9.1f} MB",
        f"KLD {kl['value']:8.4f} ± {kl['error'] or 0:.4f}",
        f"{ratio:6.3f} of mlx_lm" if ratio else " " * 16,
        f"{row['wall_s']:7.1f} s" if row["wall_s"] else "",
        f"{row['peak_rss_bytes'] / 1e6:7.0f} MB peak" if row["peak_rss_bytes"] else "",
    ]
    return "   ".join(cells).rstrip()


def read(path: Path, header: dict[str, Any]) -> list[Row]:
    """What an earlier run kept, if it was of the same model and text."""
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    for key in ("model", "text", "windows"):
        if kept[key] != header[key]:
            sys.exit(f"{path}: its {key} is {kept[key]}, not {header[key]}; name another -o")
    return list(kept["rows"])


def write(path: Path, header: dict[str, Any], rows: list[Row]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")
    partial.replace(path)


def main() -> None:
    options = parse()
    header = {
        "benchmark": "calibrated",
        "model": options.model.name,
        "date": datetime.date.today().isoformat(),
        "text": options.text.name,
        "windows": options.windows,
        "calibration": options.calibration and Path(options.calibration).name,
        "samples": options.samples,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    rows = read(options.out, header)
    beside = [row for path in options.beside for row in read(path, header)]
    for job in jobs(options):
        if job.name in {row["name"] for row in rows}:
            continue
        row = make_and_score(job, options)
        rows = with_ratios([*rows, row], beside)
        write(options.out, header, rows)
        print(line(row), flush=True)
    print("\n".join(map(line, rows)))
    if options.plot:
        title = f"{options.model.name}, {options.windows} windows of {options.text.name}"
        calibrated_plot.plot([*rows, *beside], title, options.plot)
    kl = {row["name"]: row["divergence"]["kl"]["value"] for row in rows}
    print(json.dumps({"benchmark": "calibrated", "model": header["model"], "kl": kl}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="what students are scored on; never --calibration's")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--methods", default="")
    parser.add_argument("--formats", default="4g64")
    parser.add_argument("--types", default="")
    parser.add_argument("--ready", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--calibration", help="as `mlxquant convert --calibration`")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--time-limit", help="minutes that best may try recipes")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--beside", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--work", type=Path, help="where students stand [default: beside -o]")
    parser.add_argument("--keep", action="store_true", help="do not delete students")
    parser.add_argument("--untimed", action="store_true")
    parser.add_argument("--plot", type=Path, help=".svg or .png")
    options = parser.parse_args()
    if options.calibration and Path(options.calibration).resolve() == options.text.resolve():
        parser.error("--text is --calibration: a method would be scored on what it was fitted to")
    options.model, options.out = options.model.resolve(), options.out.resolve()
    options.work = (options.work or options.out.with_name(f"{options.out.stem}-students")).resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
