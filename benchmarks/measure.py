"""Runs a command as a child and says what it took. Shared by the benchmarks; no part of the package."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Took:
    """wall_s: seconds; peak_rss_bytes: the child's own largest resident set; output: its stdout."""

    wall_s: float
    peak_rss_bytes: int
    output: str


def run(command: list[str], env: dict[str, str] | None = None) -> Took:
    """The child alone: wait4 gives its resource usage, not the sum over all children. Exits when it fails."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | (env or {}))
    assert child.stdout
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.perf_counter() - began
    if child.returncode:
        sys.exit(f"{' '.join(command)} ended with exit code {child.returncode}:\n{output[-2000:]}")
    unit = 1 if platform.system() == "Darwin" else 1024
    return Took(wall_s, usage.ru_maxrss * unit, output)


def tool(name: str) -> str:
    """A console script of this environment."""
    return str(Path(sys.executable).parent / name)


def report(name: str, result: dict[str, Any], save: bool) -> None:
    """The last line on stdout is one JSON object; with `save`, it is also kept as a dated file."""
    result = {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", sys.argv[0], *(Path(a).name if "/" in a else a for a in sys.argv[1:])]),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        **result,
    }
    if save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}-{result['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
