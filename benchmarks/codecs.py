"""Weights encoded and decoded a second, each format against mx.quantize and mx.dequantize in the same run.

    python benchmarks/codecs.py [--dtype BF16|F16|F32] [--weights 16M] [--repeats 5]

Medians over the repeats, ours and MLX's in turn, after one run of each that compiles and warms up. MLX runs on the
CPU device. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlxquant.codecs.blocks import cores
from mlxquant.codecs.encode import decode, encode
from mlxquant.codecs.floats import narrow
from mlxquant.codecs.spec import Codec, parse_codec

LABELS = ("2g64", "3g64", "4g32", "4g64", "4g128", "5g64", "6g64", "8g64", "mxfp4", "nvfp4", "mxfp8")
MX_DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
WIDTH = 4096


def seconds(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = [], []
    for repeat in range(repeats + 1):
        for call, record in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            if repeat:
                record.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def measure(codec: Codec, values: np.ndarray, dtype: str, repeats: int) -> dict[str, float]:
    """MLX's mx modes are array operations of a few million weights a second, so it gets fewer rows of those."""
    raw = narrow(values, dtype)
    theirs_rows = len(values) if codec.mode == "affine" else max(1, len(values) // 32)
    array = mx.array(values[:theirs_rows]).astype(MX_DTYPES[dtype])
    options = codec.mlx_config()
    parts, theirs = encode(raw, dtype, dtype, codec), mx.quantize(array, **options)
    mx.eval(array, theirs)
    for mine, other in zip(parts, theirs, strict=True):
        other = np.array(other.view(mx.uint16) if other.dtype == mx.bfloat16 else other)
        if mine[:theirs_rows].tobytes() != other.tobytes():
            raise SystemExit(f"{codec.label}: the bytes differ from MLX's, so the times mean nothing")
    ours_s, mlx_s = seconds(
        lambda: encode(raw, dtype, dtype, codec), lambda: mx.eval(mx.quantize(array, **options)), repeats
    )
    decode_s, mlx_decode_s = seconds(
        lambda: decode(parts, dtype, codec), lambda: mx.eval(mx.dequantize(*theirs, **options)), repeats
    )
    mlx_weights = theirs_rows * WIDTH
    return {
        "encode_weights_per_s": values.size / ours_s,
        "mlx_encode_weights_per_s": mlx_weights / mlx_s,
        "decode_weights_per_s": values.size / decode_s,
        "mlx_decode_weights_per_s": mlx_weights / mlx_decode_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=MX_DTYPES, default="BF16")
    parser.add_argument("--weights", default="16M", help="millions of weights, like 16M")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    rows = max(32, int(args.weights.rstrip("M")) * 10**6 // WIDTH)
    values = (np.random.default_rng(0).standard_t(4, (rows, WIDTH)) * 0.02).astype(np.float32)
    print(f"{args.dtype}, {values.size / 1e6:.1f} M weights, {cores()} cores; million weights a second")
    print(f"{'format':8}{'encode':>9}{'MLX':>8}{'ratio':>8}{'decode':>10}{'MLX':>8}")
    results = {}
    for label in LABELS:
        r = results[label] = measure(parse_codec(label), values, args.dtype, args.repeats)
        e, m, d, md = (value / 1e6 for value in r.values())
        print(f"{label:8}{e:9.0f}{m:8.0f}{e / m:7.1f}x{d:10.0f}{md:8.0f}")
    machine = {"system": platform.platform(), "cores": cores(), "mlx": mx.__version__, "numpy": np.__version__}
    print(json.dumps({"benchmark": "codecs", "dtype": args.dtype, "machine": machine, "formats": results}))


if __name__ == "__main__":
    main()
