"""Runs in a process of its own: takes each mutant through everything that reads a GGUF file, and says how it ended.

python -m tests.convert.hostile_worker FOLDER      one JSON line for each *.gguf in FOLDER
"""

from __future__ import annotations

import json
import signal
import sys
import tracemalloc
from pathlib import Path

from mlxquant.convert.gather import chunks, rows
from mlxquant.convert.sources import open_source
from mlxquant.errors import MlxquantError
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings

SECONDS = 20


def read_all(path: Path) -> int:
    """Config, tokenizer, plan and every row, as `convert` and `chat` read them. Returns the plan's bytes."""
    source = open_source(path)
    source.sidecars()
    plan = make_plan(source.config, source.specs, settings(recipe="repack"), source.quantized)
    for tensor in plan.tensors:
        for start, stop in chunks(tensor.target):
            rows(source, tensor.target, start, stop)
    return plan.nbytes


def outcome(path: Path) -> dict[str, object]:
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    signal.alarm(SECONDS)
    try:
        ended, said = "read", str(read_all(path))
    except MlxquantError as error:
        ended, said = "refused", error.message
    except Exception as error:  # the very thing looked for
        ended, said = "crashed", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return {"file": path.name, "ended": ended, "said": said, "peak": tracemalloc.get_traced_memory()[1] - before}


if __name__ == "__main__":
    tracemalloc.start()
    files = sorted(Path(sys.argv[1]).glob("*.gguf"))
    outcome(Path(sys.argv[1]) / "good.gguf")  # imports and caches count for nobody
    for file in files:
        print(json.dumps(outcome(file)), flush=True)
