"""mlx-lm's own calibrated quantization, on text of ours: a yardstick for benchmarks/calibrated.py.

    python scripts/peers_mlx_lm.py awq|gptq|dynamic MODEL -o OUT --calibration FILE [--samples 128] [--bits 4] ...

`mlx_lm.awq`, `mlx_lm.gptq` and `mlx_lm.dynamic_quant` fetch one text from the web and read nothing else. Their
functions are called here as their `main` calls them, with the samples that `mlxquant convert --calibration` cuts from
FILE. Two things differ. MLX on a CPU has no fast bfloat16 product, so the model computes in float32 and is cast back
before it is saved, with codes as they were chosen. And what a method leaves aside (embeddings; awq: the head, too) gets
--rest-bits and --rest-group-size, which are --bits and --group-size unless given, so that all tensors are of one
format; mlx-lm's own defaults are 4 and 32 for awq, 6 and 64 for gptq. gptq writes 2, 4 and 8 bits only. dynamic deals
out --high-bits (5) where it helps most, within --bpw, and --bits (the most that are less than --bpw) elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.quant import awq, dynamic_quant, gptq
from mlx_lm.utils import compute_bits_per_weight, load, quantize_model, save

from mlxquant.calibrate.text import calibration
from mlxquant.run.text import Text


def by_awq(model: Any, config: dict[str, Any], tokens_BL: mx.array, args: argparse.Namespace) -> Any:
    kind = config["model_type"]
    if kind not in awq.AWQ_MODEL_CONFIGS:
        sys.exit(f"mlx_lm.awq has no table for {kind}; it knows {', '.join(awq.AWQ_MODEL_CONFIGS)}")
    awq.awq_quantize(
        model,
        tokens_BL,
        awq.AWQ_MODEL_CONFIGS[kind],
        bits=args.bits,
        group_size=args.group_size,
        embed_bits=args.rest_bits,
        embed_group_size=args.rest_group_size,
        n_grid=args.grid,
    )
    return model, awq.update_config(model, config)


def by_gptq(model: Any, config: dict[str, Any], tokens_BL: mx.array, args: argparse.Namespace) -> Any:
    rest = args.rest_bits, args.rest_group_size
    model, config["quantization"] = gptq.gptq_quantize(model, tokens_BL, args.bits, args.group_size, *rest)
    return model, config


def by_dynamic(model: Any, config: dict[str, Any], tokens_BL: mx.array, args: argparse.Namespace) -> Any:
    low, high = (args.bits, args.group_size), (args.high_bits, args.group_size)
    found = dict(
        dynamic_quant.estimate_sensitivities(model, tokens_BL, *low, *high, gradient_checkpoint=args.checkpoint)
    )
    model.set_dtype(args.stored)  # scales count as they are stored
    threshold = dynamic_quant.estimate_threshold(model, found, args.bpw, *low, *high)

    def chosen(path: str, module: Any) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": high[0], "group_size": high[1]} if found[path] > threshold else True

    return quantize_model(model, config, group_size=low[1], bits=low[0], quant_predicate=chosen)


METHODS = {"awq": by_awq, "gptq": by_gptq, "dynamic": by_dynamic}


def main() -> None:
    args = _options()
    mx.random.seed(123)  # as their commands do
    model, tokenizer, config = load(args.model, return_config=True)
    args.stored = model.layers[0].input_layernorm.weight.dtype
    model.set_dtype(mx.float32)
    samples = calibration(args.calibration, Text.load(args.model), args.samples, args.sequence_length, args.seed)
    print(f"{samples.label}, tokens' sha256 {samples.sha256[:12]}", file=sys.stderr)
    model, config = METHODS[args.method](model, config, mx.array(samples.tokens_BL), args)
    model.set_dtype(args.stored)
    print(f"{compute_bits_per_weight(model):.3f} bits per weight", file=sys.stderr)
    save(args.out, args.model, model, tokenizer, config)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("model", type=Path, help="a full-precision Hugging Face folder")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--calibration", required=True, help="as `mlxquant convert --calibration`")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", type=int, help="[default: 4]")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rest-bits", type=int)
    parser.add_argument("--rest-group-size", type=int)
    parser.add_argument("--grid", type=int, default=20, help="awq: factors tried")
    parser.add_argument("--high-bits", type=int, default=5, help="dynamic")
    parser.add_argument("--bpw", type=float, default=5.0, help="dynamic: of the whole model")
    parser.add_argument("--checkpoint", action="store_true", help="dynamic: less memory, more time")
    args = parser.parse_args()
    overhead_bits = 32 / args.group_size  # a scale and a bias of 16 bits
    below = max(bits for bits in (2, 3, 4) if bits + overhead_bits < args.bpw)
    args.bits = args.bits or (below if args.method == "dynamic" else 4)
    args.rest_bits, args.rest_group_size = args.rest_bits or args.bits, args.rest_group_size or args.group_size
    return args


if __name__ == "__main__":
    main()
