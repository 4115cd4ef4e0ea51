"""llama-imatrix on the samples that `mlxquant convert --calibration` cuts: a yardstick for benchmarks/calibrated.py.

    python scripts/peers_imatrix.py MODEL -o imatrix.gguf --calibration FILE [--samples 128] [--type F32]

MODEL becomes a GGUF file for as long as it takes; the samples, decoded, are the text. llama-imatrix cuts that text
again, so that its chunks begin some tokens beside the samples. With the tools of `make oracle` or MLXQUANT_LLAMA_CPP.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from oracle import tool

from mlxquant.calibrate.text import calibration
from mlxquant.run.text import Text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a full-precision Hugging Face folder")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--type", default="F32", help="what llama.cpp runs: F32, F16, Q8_0")
    args = parser.parse_args()
    text = Text.load(args.model)
    samples = calibration(args.calibration, text, args.samples, args.sequence_length, args.seed)
    with tempfile.TemporaryDirectory(dir=args.out.resolve().parent) as folder:
        model, words = Path(folder) / "model.gguf", Path(folder) / "samples.txt"
        words.write_text("".join(text.tokenizer.decode(row.tolist()) for row in samples.tokens_BL))
        convert = [Path(sys.executable).parent / "mlxquant", "convert", args.model, "-o", model, "--type", args.type]
        subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
        # --process-output: the head, too, which llama-quantize then quantizes by it.
        chunks = ["-c", args.sequence_length, "--chunks", args.samples, "--no-ppl", "--process-output"]
        command = [tool("llama-imatrix"), "-m", model, "-f", words, "-o", args.out, *chunks]
        subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    main()
