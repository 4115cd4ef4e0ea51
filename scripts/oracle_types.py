"""Writes tests/fixtures/gguf_types/*.json: the types llama-quantize gives to each tensor of files without weights.

    python scripts/oracle_types.py [MODEL ...]

The tool is `make oracle`'s, or that of MLXQUANT_LLAMA_CPP. A file's data section is a hole, and
`llama-quantize --dry-run` reads none of it, so each of the 700 runs takes milliseconds.

In a fixture `blk.0-3,7.attn_q.weight` stands for five tensors, and "*" for all that the other types of a run and
`kept`, what no run touches, do not name.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from oracle import tool
from oracle_models import MODELS

from mlxquant.plan.gguf_types import FILE_TYPES, FLOAT_TYPES, float_type

OUT = Path(__file__).parent.parent / "tests" / "fixtures" / "gguf_types"
QUANTIZED = [name for name, (_, base) in FILE_TYPES.items() if base not in FLOAT_TYPES]
# File types whose mixture asks whether there is an importance matrix.
ASKING = ("Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS", "Q2_K_S")
MORE_RUNS: dict[str, list[list[str]]] = {
    "llama-32-gqa4": [
        *([name] for name in FLOAT_TYPES),
        *(["--imatrix", name] for name in QUANTIZED if name not in ASKING),
        *(["--pure", name] for name in ("Q4_K_M", "Q2_K", "IQ4_XS")),
        ["q3_k"], ["Q4_k"], ["Q5_K"],
        ["--output-tensor-type", "q8_0", "F16"],
        ["--token-embedding-type", "Q4_K", "BF16"],
        ["--output-tensor-type", "f16", "--token-embedding-type", "q3_K", "Q4_K_M"],
        ["--tensor-type", "attn_v=q8_0", "Q4_K_M"],
        # The mixture counts only what no override decides.
        ["--tensor-type", r"blk\.[0-3]\.attn_v=q4_0", "--tensor-type", "FFN_DOWN=iq4_nl", "Q4_K_M"],
        ["--tensor-type", r"blk\.(1|2)\.ffn_down=tq2_0", "Q4_K_S"],
        ["--tensor-type", "attn=bf16", "--tensor-type", "attn_k=q8_0", "--pure", "Q6_K"],
        ["--tensor-type", "output=q4_0", "--output-tensor-type", "q5_1", "Q5_K_S"],
    ],
    "llama-16-tied": [
        ["--output-tensor-type", "q8_0", "Q4_K_M"],
        ["--token-embedding-type", "q8_0", "Q4_K_M"],
        ["--output-tensor-type", "q5_K", "--token-embedding-type", "q4_K", "Q4_K_M"],
        ["--tensor-type", "token_embd=q5_0", "Q4_K_M"],
        ["--pure", "--output-tensor-type", "q8_0", "Q4_K_M"],
    ],
    "llama-576": [
        ["--pure", "Q4_K_M"],
        ["--pure", "Q6_K"],
        ["--output-tensor-type", "q6_K", "Q4_K_M"],
        ["--tensor-type", "attn_k=tq1_0", "--tensor-type", "attn_q=q2_K", "Q4_K_M"],
    ],
    "llama-208": [["--pure", "Q4_0"], ["--tensor-type", "ffn=f32", "Q4_K_M"]],
    "gemma3n": [
        ["--token-embedding-type", "q5_K", "Q4_K_M"],
        ["--token-embedding-type", "q5_K", "--tensor-type", "per_layer=q4_0", "Q4_K_M"],
    ],
    "phi3": [["--tensor-type", "attn_qkv=q5_0", "--output-tensor-type", "q4_K", "Q3_K_M"]],
}  # fmt: skip


def main() -> None:
    quantize = tool("llama-quantize")
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        imatrix = write_imatrix(Path(folder) / "imatrix.gguf")
        for name in sys.argv[1:] or MODELS:
            path = write_fixture(name, quantize, imatrix, Path(folder) / f"{name}.gguf")
            print(f"{path.name}: {path.stat().st_size} bytes")


def write_fixture(name: str, quantize: Path, imatrix: Path, model: Path) -> Path:
    metadata, shapes = MODELS[name]()
    stored = {tensor: float_type(tensor, shape, "F16") for tensor, shape in shapes.items()}
    write_model(model, metadata, shapes, stored)
    runs = [[t] for t in QUANTIZED] + [["--imatrix", t] for t in ASKING] + MORE_RUNS.get(name, [])
    told = [dry_run(quantize, model, imatrix, args) for args in runs]
    model.unlink()
    kept = {tensor: t for tensor, t in stored.items() if all(types[tensor] == t for types in told)}
    fixture = {
        "command": "llama-quantize --dry-run ARGS MODEL TYPE; scripts/oracle_types.py",
        "metadata": metadata,
        "shapes": {tensor: shape for shape, tensors in by_value(shapes) for tensor in tensors},
        "order_sha256": hashlib.sha256("\n".join(told[0]).encode()).hexdigest(),
        "kept": dict(by_value(kept)),
        "runs": [{"args": args, "types": shortened(types, kept)} for args, types in zip(runs, told, strict=True)],
    }
    path = OUT / f"{name}.json"
    path.write_text(one_run_a_line(fixture))
    return path


def dry_run(quantize: Path, model: Path, imatrix: Path, args: list[str]) -> dict[str, str]:
    """{tensor: type} as the tool prints them, in its order."""
    flags = [part for arg in args[:-1] for part in ([arg, str(imatrix)] if arg == "--imatrix" else [arg])]
    done = subprocess.run(
        [quantize, "--dry-run", *flags, model, args[-1]],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    line = r"^\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?$"
    output = done.stdout + done.stderr
    types = {name: (new or old).upper() for name, old, new in re.findall(line, output, re.MULTILINE)}
    if done.returncode or len(types) != len(re.findall(r"^\[ *\d+/", output, re.MULTILINE)) or not types:
        raise SystemExit(f"{' '.join(args)} on {model.name}:\n{output[-2000:]}")
    return types


def write_model(
    path: Path, metadata: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], types: dict[str, str]
) -> None:
    writer = gguf.GGUFWriter(str(path), metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            (writer.add_array if isinstance(value, list) else add)(key, value)
    end = 0
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType[types[name]]
        nbytes = int(np.prod(shape)) * (4 if types[name] == "F32" else 2)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        end += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(-(-header // 32) * 32 + end)  # a hole: no bytes on disk


def write_imatrix(path: Path) -> Path:
    """One entry is enough: a dry run asks only whether there is a matrix."""
    writer = gguf.GGUFWriter(str(path), "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    writer.add_tensor("blk.0.ffn_down.weight.in_sum2", np.ones((1, 256), np.float32))
    writer.add_tensor("blk.0.ffn_down.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_value(values: Mapping[str, Any]) -> list[tuple[Any, list[str]]]:
    """[(value, tensors)], with the layers of one kind of tensor drawn together."""
    layers: dict[tuple[str, Any], list[int]] = defaultdict(list)
    for name, value in values.items():
        found = re.fullmatch(r"blk\.(\d+)(\..*)", name)
        layers[found[2] if found else name, value] += [int(found[1])] if found else []
    grouped: dict[Any, list[str]] = defaultdict(list)
    for (name, value), numbers in layers.items():
        grouped[value].append(f"blk.{ranges(numbers)}{name}" if numbers else name)
    return list(grouped.items())


def ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def shortened(types: dict[str, str], kept: Mapping[str, str]) -> dict[str, Any]:
    grouped = dict(by_value({name: t for name, t in types.items() if name not in kept}))
    longest = max(grouped, key=lambda t: len(json.dumps(grouped[t])))
    return {longest: "*", **{t: names for t, names in grouped.items() if t != longest}}


def one_run_a_line(fixture: dict[str, Any]) -> str:
    head = json.dumps({key: value for key, value in fixture.items() if key != "runs"}, indent=1)
    runs = ",\n  ".join(json.dumps(run) for run in fixture["runs"])
    return f'{head[:-2]},\n "runs": [\n  {runs}\n ]\n}}\n'


if __name__ == "__main__":
    main()
