"""Writes tests/fixtures/imatrix: what llama-imatrix made of a tiny mixture of experts, and llama-quantize of that.

    python scripts/oracle_imatrix.py        with the tools of `make oracle` or MLXQUANT_LLAMA_CPP

moe.gguf, moe.dat     the two forms of one importance matrix
quantized.json        sha256 of each tensor's bytes in the files quantized with them, and their quantize.imatrix.* keys
"""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from oracle import tool

ROOT = Path(__file__).parent.parent
OUT = ROOT / "tests" / "fixtures" / "imatrix"
TYPES = ("Q4_0", "Q5_1", "IQ4_NL")


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, text = folder / "model.gguf", folder / "text.txt"
        write_model(model, folder)
        text.write_text(pydoc_data.topics.topics["with"] * 2)
        told: dict[str, Any] = {}
        for form in ("gguf", "dat"):
            matrix = folder / f"moe.{form}"
            made = ["-m", model, "-f", text.name, "-o", matrix.name, "--output-format", form, "--no-ppl", "-c", "64"]
            run(folder, tool("llama-imatrix"), *made, "--chunks", "3", "-t", "1", "--process-output")
            for kind in TYPES:
                out = folder / f"{kind}.gguf"
                run(folder, tool("llama-quantize"), "--imatrix", matrix.name, model, out, kind, "1")
                told[f"{form} {kind}"] = read(out)
            shutil.copy(matrix, OUT)
    command = "llama-quantize --imatrix moe.FORM MODEL OUT TYPE; scripts/oracle_imatrix.py"
    runs = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in told.items())
    (OUT / "quantized.json").write_text(f'{{\n "command": {json.dumps(command)},\n "runs": {{\n  {runs}\n }}\n}}\n')


def write_model(path: Path, folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from tests import gguf_files, tiny
    from tests.files.imatrix_model import EXPERTS, HEADS, KV_HEADS, LAYERS, VOCAB, WIDTH, shapes, weights

    tiny.tokenizer(folder)
    config = {
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "hidden_size": WIDTH, "intermediate_size": WIDTH, "vocab_size": VOCAB, "max_position_embeddings": 512,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    writer = gguf_files.Writer(path, "llama")
    gguf_files.write_config(writer, config, gguf_files.FILE_TYPES["F16"])
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(1)
    gguf_files.write_bpe(writer, folder, "gpt-2")
    for name, shape in shapes().items():
        writer.add_tensor(name, weights(name, shape))
    writer.close()


def read(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    keys = {
        key: [field.types[0].name, field.contents()]
        for key, field in reader.fields.items()
        if key.startswith("quantize.")
    }
    tensors = {
        t.name: [t.tensor_type.name, hashlib.sha256(np.ascontiguousarray(t.data).tobytes()).hexdigest()[:16]]
        for t in reader.tensors
        if t.tensor_type.name not in ("F32", "F16")
    }
    return {"keys": keys, "tensors": tensors}


def run(folder: Path, *command: str | Path) -> None:
    """In `folder`, so that the names it records are those of files."""
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
