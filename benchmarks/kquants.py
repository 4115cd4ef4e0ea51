"""Weights encoded a second, each ggml type, against llama.cpp's own encoder on the same rows and threads in one run.

    [MLXQUANT_LLAMA_CPP=FOLDER] python benchmarks/kquants.py [--types Q4_K,Q6_K] [--weights 4M] [--threads N] [--save]

Medians over the repeats, taken in turn: ours, libgguf's reference backend and, where MLXQUANT_LLAMA_CPP names a folder
of llama.cpp with build/bin, ggml_quantize_chunk of its libggml-base, which is what llama-quantize runs. Each with and
without importance; the bytes are compared first. Compiling starts from an empty cache here and is counted apart: a user
pays it once. Decoding is ours against libgguf's. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_CACHE = tempfile.TemporaryDirectory(prefix="kquants-")
os.environ["NUMBA_CACHE_DIR"] = _CACHE.name  # before numba is imported

import libgguf  # noqa: E402
import numpy as np  # noqa: E402
from measure import report  # noqa: E402

from mlxquant.codecs import blocks  # noqa: E402
from mlxquant.codecs.ggml import block, decode_rows, encode_rows  # noqa: E402

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
TYPES = (*LEGACY, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0")
UNWEIGHTED = ("Q8_0", "TQ1_0", "TQ2_0")  # take no notice of importance
WIDTH = 4096
Encode = Callable[[np.ndarray, str, np.ndarray | None], np.ndarray]


def by_libgguf(rows: np.ndarray, name: str, importance: np.ndarray | None) -> np.ndarray:
    return np.asarray(libgguf.quantize_rows(rows, libgguf.GGMLQuantizationType[name], importance))


def by_llama_cpp(folder: Path) -> Encode:
    library = next((folder / "build" / "bin").glob("libggml-base.*"))
    chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    chunk.restype, chunk.argtypes = ctypes.c_size_t, [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]

    def encode(rows: np.ndarray, name: str, importance: np.ndarray | None) -> np.ndarray:
        elements, size = block(name)
        out = np.empty((len(rows), rows.shape[1] // elements * size), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        chunk(int(libgguf.GGMLQuantizationType[name]), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)
        return out

    return encode


def on_threads(encode: Encode, pool: ThreadPoolExecutor, threads: int) -> Encode:
    """Rows in four parts a thread, as llama-quantize deals them out; both libraries let go of Python's lock."""

    def split(rows: np.ndarray, name: str, importance: np.ndarray | None) -> np.ndarray:
        parts = np.array_split(rows, 4 * threads)
        return np.concatenate(list(pool.map(lambda part: encode(part, name, importance), parts)))

    return split


def rates(calls: dict[str, Callable[[], object]], weights: int, repeats: int) -> dict[str, float]:
    """Weights a second of each, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {f"{name}_weights_per_s": weights / statistics.median(taken) for name, taken in times.items()}


def ours(rows: np.ndarray, name: str, importance: np.ndarray | None) -> np.ndarray:
    return encode_rows(rows, "F32", name, importance)


def measure(
    name: str, rows: np.ndarray, importance: np.ndarray | None, others: dict[str, Encode], repeats: int
) -> dict[str, float]:
    raw = ours(rows, name, importance)
    for other, encode in others.items():
        if encode(rows, name, importance).tobytes() != raw.tobytes():
            raise SystemExit(f"{name}: the bytes differ from {other}'s, so the times mean nothing")
    encoders = {"mlxquant": ours, **others}
    calls = {other: lambda e=encode: e(rows, name, importance) for other, encode in encoders.items()}
    result = rates(calls, rows.size, repeats)
    best = max(rate for key, rate in result.items() if not key.startswith("mlxquant"))
    result["ratio"] = result["mlxquant_weights_per_s"] / best  # to the faster of the others
    return result


def first_call(name: str, rows: np.ndarray) -> float:
    """Seconds, nearly all of them the compiler's. The first type pays for what all share, loading numba included."""
    began = time.perf_counter()
    ours(rows[:1], name, None)
    return round(time.perf_counter() - began, 2)


def measure_decoding(name: str, rows: np.ndarray, repeats: int) -> dict[str, float]:
    raw, kind = ours(rows, name, None), libgguf.GGMLQuantizationType[name]
    decode_rows(raw[:1], name, WIDTH)
    calls = {"mlxquant": lambda: decode_rows(raw, name, WIDTH), "libgguf": lambda: libgguf.dequantize_rows(raw, kind)}
    return rates(calls, rows.size, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--weights", default="4M", help="millions of weights, like 4M")
    parser.add_argument("--threads", type=int, default=blocks.cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    args = parser.parse_args()
    blocks.cores = lambda: args.threads
    rng = np.random.default_rng(0)
    count = max(8 * args.threads, int(args.weights.rstrip("M")) * 10**6 // WIDTH)
    rows = (rng.standard_t(4, (count, WIDTH)) * 0.02).astype(np.float32)
    importance = rng.exponential(size=WIDTH).astype(np.float32)
    pool = ThreadPoolExecutor(args.threads)
    others = {"libgguf": on_threads(by_libgguf, pool, args.threads)}
    if folder := os.environ.get("MLXQUANT_LLAMA_CPP"):
        others["llama_cpp"] = on_threads(by_llama_cpp(Path(folder)), pool, args.threads)
    print(f"{rows.size / 1e6:.1f} M weights, {args.threads} threads; million weights a second")
    print(
        f"{'type':8}{'importance':>11}{'compile':>10}" + "".join(f"{n:>11}" for n in ("mlxquant", *others)) + "  ratio"
    )
    results: dict[str, dict[str, object]] = {}
    shared_s = first_call("F32", rows)
    for name in args.types.split(","):
        results[name] = {"compile_s": first_call(name, rows)}
        for label, weights in (("without", None), ("with", importance)):
            if label == "with" and name in UNWEIGHTED:
                continue
            r = results[name][label] = measure(name, rows, weights, others, args.repeats)
            speeds = "".join(f"{rate / 1e6:11.1f}" for key, rate in r.items() if key != "ratio")
            print(f"{name:8}{label:>11}{results[name]['compile_s']:>8} s{speeds}{r['ratio']:6.1f}x", flush=True)
        results[name]["decode"] = measure_decoding(name, rows, args.repeats)
    result = {"threads": args.threads, "weights": rows.size, "shared_compile_s": shared_s, "types": results}
    report("kquants", result, args.save)


if __name__ == "__main__":
    main()
