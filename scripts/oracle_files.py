"""Writes tests/fixtures/gguf_files: what llama.cpp's tools make of the tiny models of tests/convert/gguf_cases.py.

    python scripts/oracle_files.py [CASE ...]        with the tools of `make oracle`

CASE.json                 every key, and type, shape and sha256 of every tensor, of the files by convert_hf_to_gguf.py
                          and by llama-quantize from them
CASE.imatrix.gguf .dat    importance matrices by llama-imatrix; kept as they are, since its floats are this machine's

CASE.json holds one file whole; of the others, what differs from it, and a sha256 of the order.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import sys
import tempfile
from pathlib import Path
from typing import Any

import oracle

ROOT = Path(__file__).parent.parent
os.environ.setdefault("MLXQUANT_LLAMA_CPP", str(oracle.tool("llama-quantize").parents[2]))
os.environ.setdefault("MLXQUANT_TORCH_PYTHON", str(oracle.ORACLE / "env" / "bin" / "python"))
sys.path.insert(0, str(ROOT))

from tests import oracle as tools  # noqa: E402
from tests.convert import gguf_cases as cases  # noqa: E402

# One plain, one mixture of experts, and one whose experts are narrower than a block of 256.
IMATRICES = {"llama": ("gguf", "dat"), "mixtral": ("gguf", "dat"), "qwen3_moe": ("gguf",)}


def main() -> None:
    cases.FIXTURES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or cases.CASES:
        with tempfile.TemporaryDirectory() as scratch:
            folder, made = cases.make(Path(scratch, "model", name), name), Path(scratch, "made")
            make_imatrices(name, folder, made)
            told = {run: cases.summary(cases.theirs(folder, made, name, run)) for run in cases.runs(name)}
        (cases.FIXTURES / f"{name}.json").write_text(as_json(name, told), "utf-8")
        print(name, len(told), flush=True)


def make_imatrices(name: str, folder: Path, made: Path) -> None:
    for form in IMATRICES.get(name, ()):
        out = cases.imatrix_file(name, form)
        model = cases.theirs(folder, made, name, "F16")
        here = Path.cwd()
        os.chdir(made)  # the text's name, as it is given, becomes a key
        try:
            Path("text.txt").write_text(pydoc_data.topics.topics["with"] * 2)
            tools.imatrix(model, Path("text.txt"), out, "--output-format", form, "-c", "128", "--chunks", "4")
        finally:
            os.chdir(here)


def as_json(name: str, told: dict[str, Any]) -> str:
    """One line a key and a tensor: a change is seen in `git diff`."""
    command = (
        "convert_hf_to_gguf.py --outtype f16|bf16|f32 MODEL; llama-quantize FLAGS MODEL-BF16.gguf OUT.gguf TYPE; "
        f"scripts/oracle_files.py {name}"
    )
    files = ",\n".join(f"  {json.dumps(run)}: {lines(made)}" for run, made in cases.condensed(told).items())
    return f'{{\n "command": {json.dumps(command)},\n "files": {{\n{files}\n }}\n}}\n'


def lines(made: dict[str, dict[str, Any]]) -> str:
    parts = []
    for part, entries in made.items():
        inside = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in entries.items())
        parts.append(f'   "{part}": {{\n{inside}\n   }}')
    return "{\n" + ",\n".join(parts) + "\n  }"


if __name__ == "__main__":
    main()
