"""What taking a GGUF file over costs a real model: mean KL divergence from the file's exactly decoded weights.

    python scripts/kl_repack.py FILE.gguf [TOKENS [SOURCE]]

Repacks the file into a temporary MLX folder, loads both as float32 on the CPU (four bytes a weight, one after the
other) and compares their next-token probabilities at each of TOKENS places (512) of what Python's own manual says.
SOURCE, the model that the file was made from, puts the figure beside what the file's own types cost.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mlxquant.convert.gguf_source import GGUFSource
from mlxquant.convert.to_mlx import to_mlx
from mlxquant.measure.agree import kl, log_probabilities
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import REPACK, settings
from mlxquant.run.device import prepare
from mlxquant.run.model import load_model
from mlxquant.run.text import Text
from mlxquant.units import format_bytes


def manual() -> str:
    """Prose and code, on every machine."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in ("assignment", "class", "exceptions", "typesmapping"))


def repack(file: Path, out: Path) -> Path:
    source = GGUFSource(file)
    plan = make_plan(source.config, source.specs, settings(recipe=REPACK), source.quantized)
    return to_mlx(source, plan, out)


def probabilities(path: Path, tokens: list[int]) -> np.ndarray:
    return log_probabilities(load_model(path, expand="on").model, tokens).astype(np.float32)


def main(file: Path, count: int = 512, source: Path | None = None) -> None:
    prepare("cpu")
    tokens = Text.load(file).encode(manual())[:count]
    with TemporaryDirectory(prefix="mlxquant-kl-", dir=".") as home:
        out = repack(file, Path(home) / "out")
        size = sum(part.stat().st_size for part in out.glob("*.safetensors"))
        exact, ours = probabilities(file, tokens), probabilities(out, tokens)
        if source:
            print(f"the file itself: mean KL {kl(probabilities(source, tokens), exact):.2e} nats from {source.name}")
    same = float((exact.argmax(-1) == ours.argmax(-1)).mean())
    print(f"{file.name}: {format_bytes(file.stat().st_size)} -> {format_bytes(size)} of MLX arrays")
    print(f"mean KL {kl(exact, ours):.2e} nats over {len(tokens)} tokens, the same best token at {100 * same:.1f} %")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:3]), *map(Path, sys.argv[3:4]))
