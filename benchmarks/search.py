"""What searching scale and bias gains over minimum and maximum, what a slow search would still find, and its speed.

    python benchmarks/search.py [SOURCE] [--formats 4g64,...] [--rows 256] [--weights 16M]

SOURCE: a Hugging Face folder; rows are then also taken from its projections. Squared errors are relative to rtn's
(`encode`), of rows rounded to bfloat16, over all rows. With weights, columns count exp(N(0, 1)). `slow`: the search's
error relative to the least that a grid of 13 x 13 ranges with 12 fits each in float64 finds, over the first 256 groups.
`output`: squared error of x @ w.T relative to rtn's where the columns of x are correlated (half its variance lies in an
eighth of its directions), weights all alike. M/s: speed where all count alike, and where columns count exp(2 N(0, 1)),
for which is looked longer. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from itertools import product
from pathlib import Path

import numpy as np

from mlxquant.codecs.blocks import cores
from mlxquant.codecs.encode import decode, encode
from mlxquant.codecs.floats import Array, narrow, widen
from mlxquant.codecs.search import search
from mlxquant.codecs.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, Codec, parse_codec
from mlxquant.files.hf_folder import HFFolder

ALL = [*(f"{bits}g{group}" for bits, group in product(AFFINE_BITS, AFFINE_GROUP_SIZES)), "mxfp4"]
DTYPE = "BF16"
SLOW_GROUPS = 256


def grid(w_NI: Array, u_NI: Array, n: int) -> Array:
    """The least weighted squared error of each group (N,) that any of 169 ranges leads to, in float64."""
    lo, hi = w_NI.min(-1)[:, None, None], w_NI.max(-1)[:, None, None]
    ends = np.linspace(0, 0.4, 13)
    below, above = (end.reshape(1, -1, 1) for end in np.meshgrid(ends, ends))
    bias, scale = lo + below * (hi - lo), (hi - lo) * (1 - below - above) / n
    w, u, best = w_NI[:, None, :], u_NI[:, None, :], np.full(len(w_NI), np.inf)
    mass = u.sum(-1, keepdims=True)
    for _ in range(12):
        scale, bias = (widen(narrow(v.astype(np.float32), DTYPE), DTYPE).astype(np.float64) for v in (scale, bias))
        q = np.clip(np.rint((w - bias) / scale), 0, n)
        best = np.minimum(best, (u * (w - (scale * q + bias)) ** 2).sum(-1).min(-1))
        q_mean, w_mean = (u * q).sum(-1, keepdims=True) / mass, (u * w).sum(-1, keepdims=True) / mass
        spread = (u * (q - q_mean) ** 2).sum(-1, keepdims=True)
        fitted = (u * (q - q_mean) * (w - w_mean)).sum(-1, keepdims=True) / np.where(spread > 0, spread, 1)
        scale = np.where(spread > 0, fitted, scale)
        bias = w_mean - scale * q_mean
    return best


def errors(raw: Array, codec: Codec, weight: Array | None) -> dict[str, float]:
    w = widen(raw, DTYPE).astype(np.float64)
    u = np.broadcast_to(1.0 if weight is None else weight.astype(np.float64), w.shape)
    own = decode(encode(raw, DTYPE, DTYPE, codec), DTYPE, codec)
    found = decode(search(raw, DTYPE, DTYPE, codec, weight), DTYPE, codec)
    result = {"rtn": float((u * (w - found) ** 2).sum() / (u * (w - own) ** 2).sum())}
    if codec.mode == "affine":
        groups = (-1, codec.group_size)
        some = [array.reshape(groups)[:SLOW_GROUPS] for array in (w, u, found)]
        slow = grid(some[0], some[1], 2**codec.bits - 1).sum()
        result["slow"] = float((some[1] * (some[0] - some[2]) ** 2).sum() / slow)
    return result


def output_error(raw: Array, codec: Codec, rng: np.random.Generator) -> float:
    w = widen(raw, DTYPE).astype(np.float64)
    width = w.shape[1]
    few = rng.normal(size=(512, width // 8)) @ rng.normal(size=(width // 8, width)) / np.sqrt(width // 8)
    x = few + rng.normal(size=(512, width))
    own, found = (decode(f(raw, DTYPE, DTYPE, codec), DTYPE, codec) for f in (encode, search))
    return float((((w - found) @ x.T) ** 2).sum() / (((w - own) @ x.T) ** 2).sum())


def real_rows(source: Path, rows: int, rng: np.random.Generator) -> Array:
    """Rows of all projections in the ratio of their sizes, 512 wide."""
    folder = HFFolder(source)
    names = [name for name in folder.specs if name.endswith("_proj.weight")]
    pieces = []
    for name in rng.choice(names, min(len(names), 32), replace=False):
        spec = folder.specs[str(name)]
        raw = folder.read_rows(spec.name, 0, min(spec.rows, 64))
        pieces.append(narrow(widen(raw, spec.dtype), DTYPE)[:, : spec.width // 512 * 512].reshape(-1, 512))
    every = np.concatenate(pieces)
    return np.ascontiguousarray(every[rng.permutation(len(every))[:rows]])


def speed(codec: Codec, weights: int, counted: bool) -> float:
    """Weights a second, wall clock, best of three. counted: columns count unlike, for which is looked longer."""
    rng = np.random.default_rng(0)
    raw = narrow((rng.normal(size=(weights // 4096, 4096)) * 0.02).astype(np.float32), DTYPE)
    weight = np.exp(2 * rng.normal(size=4096)).astype(np.float32) if counted else None
    search(raw[:16], DTYPE, DTYPE, codec, weight)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        search(raw, DTYPE, DTYPE, codec, weight)
        times.append(time.perf_counter() - start)
    return raw.size / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("--formats", default=",".join(ALL))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--weights", default="16M", help="that are timed; 0M: none")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (args.rows, 512)
    kinds = {name: narrow((draw(size=shape) * 0.02).astype(np.float32), DTYPE)
             for name, draw in (("gauss", rng.normal), ("laplace", rng.laplace))}  # fmt: skip
    if args.source:
        kinds["real"] = real_rows(args.source, args.rows, rng)
    weight = np.exp(rng.normal(size=512)).astype(np.float32)
    timed = int(args.weights.rstrip("M")) * 10**6
    print(
        f"{'format':8}{'rows':9}{'rtn':>7}{'slow':>7}{'weighted':>10}{'slow':>7}{'output':>8}{'M/s':>6}{'counted':>9}"
    )
    results: dict[str, dict[str, object]] = {}
    for label in args.formats.split(","):
        codec = parse_codec(label)
        rate, counting = (speed(codec, timed, counted) if timed else 0.0 for counted in (False, True))
        results[label] = {"weights_per_s": rate, "weights_per_s_counted": counting}
        for name, raw in kinds.items():
            plain, counted = errors(raw, codec, None), errors(raw, codec, weight)
            out = output_error(raw, codec, np.random.default_rng(1))
            results[label][name] = {"alike": plain, "weighted": counted, "output": out}
            slow = [f"{e['slow']:7.3f}" if "slow" in e else f"{'':7}" for e in (plain, counted)]
            figures = f"{plain['rtn']:7.3f}{slow[0]}{counted['rtn']:10.3f}{slow[1]}{out:8.3f}"
            print(f"{label:8}{name:9}{figures}{rate / 1e6:6.0f}{counting / 1e6:9.0f}", flush=True)
    machine = {"system": platform.platform(), "cores": cores(), "numpy": np.__version__}
    print(json.dumps({"benchmark": "search", "dtype": DTYPE, "machine": machine, "formats": results}))


if __name__ == "__main__":
    main()
