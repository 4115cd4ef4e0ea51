"""Published speeds as the fit sees them: measured.csv beside what each model is (models.csv).

Columns added to measured.csv: model_key (a row of models.csv), use ('decode', 'prefill', 'decode+prefill', 'ollama' or
nothing), why (the reason a row or its prefill is left out), split ('fit' or 'held-out', by model: see `halves`).
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
MEASURED, MODELS = HERE / "measured.csv", HERE / "models.csv"

# Tokens over wall time with a prompt of some words in it: 2-5 % below the decode rate (the source of the rows says so).
WALL_TIME = 1.035
SHORT_PROMPT_TOKENS = 500

# Bits a weight of (output head, what every token reads, experts) by quantization. Q4_K_M and Q5_K_M put half of attn_v
# and ffn_down in Q6_K; unsloth's UD mixtures keep all that is not an expert in Q8_0, as does ggml-org's MXFP4.
BITS: dict[str, tuple[float, float, float]] = {
    "F16": (16, 16, 16),
    "BF16": (16, 16, 16),
    "Q8_0": (8.5, 8.5, 8.5),
    "Q6_K": (6.5625, 6.5625, 6.5625),
    "Q5_K_M": (6.5625, 5.65, 5.65),
    "Q4_K_M": (6.5625, 4.82, 4.82),
    "Q4_0": (6.5625, 4.5, 4.5),
    "Q4_1": (6.5625, 5.0, 5.0),
    "IQ4_NL": (6.5625, 4.5, 4.5),
    "Q3_K_M": (6.5625, 3.9, 3.9),
    "UD Q6_K": (8.5, 8.5, 6.5625),
    "UD Q4_K_M": (8.5, 8.5, 5.04),
    "Q4_K_XL": (8.5, 8.5, 4.82),
    "MXFP4": (8.5, 8.5, 4.25),
    "MXFP4-Q4": (4.5, 4.5, 4.25),
}

# GPU cores where the source does not say. 14 CPU cores of an M4 Pro, 12 of an M3 Pro, 18 of an M5 Pro come with the
# larger GPU, 512 GB only with 80 cores, and the M3 Ultra of 256 GB is one source's, which has 60 elsewhere; where none
# of this follows, the larger part.
CORES = {
    "M1 Max": 32,
    "M2 Ultra": 76,
    "M3 Max": 40,
    "M3 Pro": 18,
    "M3 Ultra": 60,
    "M4": 10,
    "M4 Pro": 20,
    "M5 Max": 40,
    "M5 Pro": 20,
}


@dataclass(frozen=True)
class Point:
    """One measurement, in the model's own terms. Bytes and weights of one decoded token; depth in tokens."""

    line: int
    chip: str
    cores: int
    engine: str  # 'mlx' or 'gguf', as Level.format has it
    old: bool  # llama.cpp before its Metal backend ran operations concurrently
    model: str
    moe: bool
    layers: int
    weight_bytes: float
    cache_bytes: float
    active: int
    attention_flops: int
    prompt: int
    decode: float | None
    prefill: float | None
    source: str
    bits: str = ""
    recurrent: int = 0
    depth: float = 0.0
    head: int = 0
    shared: int = 0


def points(splits: Iterable[str] = ("fit",), uses: Iterable[str] = ("decode", "prefill")) -> list[Point]:
    """Points of the named splits alone: rows of another are dropped before a number in them is looked at."""
    wanted = set(splits)
    with MODELS.open(newline="") as file:
        models = {row["key"]: row for row in csv.DictReader(file)}
    with MEASURED.open(newline="") as file:
        rows = [(at, row) for at, row in enumerate(csv.DictReader(file), 2) if row["split"] in wanted]
    return [point(at, row, models[row["model_key"]]) for at, row in rows if set(row["use"].split("+")) & set(uses)]


def point(line: int, row: dict[str, str], model: dict[str, str]) -> Point:
    use, engine = row["use"], "mlx" if "mlx" in row["engine"] else "gguf"
    wall = WALL_TIME if "wall time" in row["notes"] else 1.0
    depth = float(row["context_or_depth"] or 0) + float(row["tg_tokens"] or 0) / 2
    wants_decode = "decode" in use or use == "ollama"
    return Point(
        line,
        row["chip"],
        cores(row),
        engine,
        engine == "gguf" and is_old(row["engine_version"]),
        row["model_key"],
        model["moe"] == "1",
        int(model["layers"]),
        weight_bytes(row, model, engine),
        cache_bytes(model, depth),
        int(model["active"]),
        int(model["flops"]),
        int(float(row["pp_tokens"] or 0)),
        float(row["tg_tok_s"]) * wall if wants_decode and row["tg_tok_s"] else None,
        float(row["pp_tok_s"]) if "prefill" in use and float(row["pp_tokens"]) >= SHORT_PROMPT_TOKENS else None,
        row["source"],
        row["quant"],
        int(model["recurrent"]),
        depth,
        int(model["head"]),
        int(model["shared"]),
    )


def cores(row: dict[str, str]) -> int:
    if (row["chip"], row["ram_gb"]) == ("M3 Ultra", "512"):
        return 80
    return int(row["gpu_cores"] or CORES[row["chip"]])


def weight_bytes(row: dict[str, str], model: dict[str, str], engine: str) -> float:
    """Bytes read for a token. A GGUF's own size counts where it is stated and the model is dense."""
    active, expert, head = (int(model[k]) for k in ("active", "expert", "head"))
    if engine == "mlx" and "MXFP4" not in row["quant"]:
        found = re.search(r"(\d+(?:\.\d+)?) ?(?:bpw|-?bit)", row["quant"])
        assert found, row
        bits = float(found[1]) + (0 if "bpw" in row["quant"] else 0.5)
        return active * bits / 8
    if row["file_gb"] and not expert and "gemma-4-e" not in model["key"]:
        return float(row["file_gb"]) * 1e9 * active / int(model["params"])
    name = row["quant"].removeprefix("UD-").split(" ")[0] or "Q4_K_M"
    if "UD-" in row["model"]:
        name = f"UD {name}"
    of_head, of_all, of_experts = BITS[name]
    if name == "Q4_K_XL" and not expert:
        of_head, of_all = 6.5625, 5.2
    return (head * of_head + (active - expert - head) * of_all + expert * of_experts) / 8


def cache_bytes(model: dict[str, str], depth: float) -> float:
    window = int(model["window"])
    return (
        float(model["state_bytes"]) + depth * int(model["kv_bytes"]) + min(depth, window) * int(model["window_bytes"])
    )


def is_old(version: str) -> bool:
    """Before llama.cpp pull request 15929 of September 2025, which let Metal run operations concurrently (b6441)."""
    build = re.search(r"b(\d{4,5})\b|\((\d{4,5})\)", version)
    if "Aug 2025" in version:
        return True
    return bool(build) and int(build[1] or build[2]) < 6441


def fit_lines() -> str:
    """The text of the rows that the fit reads, for its hash: a held-out row may change without a trace."""
    with MEASURED.open(newline="") as file:
        return "\n".join(",".join(row.values()) for row in csv.DictReader(file) if row["split"] == "fit")


def halves(rows: list[dict[str, str]], moe: dict[str, bool]) -> dict[str, str]:
    """{model: half}. By what a model is and how often it was measured, never by how fast it was.

    Models of one kind (with experts or not, measured with MLX, llama.cpp or both) go, the most measured first, to the
    half that has fewer rows of that kind; the hash of the name decides where both are alike.
    """
    used = [row for row in rows if row["use"] not in ("", "ollama")]
    counts = Counter(row["model_key"] for row in used)
    kinds: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    for key in counts:
        engines = {"mlx" if "mlx" in row["engine"] else "llama.cpp" for row in used if row["model_key"] == key}
        kinds.setdefault((moe[key], tuple(sorted(engines))), []).append(key)
    half = {}
    for keys in kinds.values():
        taken = {"fit": 0, "held-out": 0}
        for key in sorted(keys, key=lambda key: (-counts[key], _hash(key))):
            chosen = half[key] = min(taken, key=lambda name: (taken[name], _hash(name + key)))
            taken[chosen] += counts[key]
    return half


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
