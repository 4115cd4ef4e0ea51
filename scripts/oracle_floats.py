"""Writes tests/fixtures/gguf_floats.json: the types convert_hf_to_gguf.py gives to the tensors of every family.

    MLXQUANT_LLAMA_CPP=FOLDER MLXQUANT_TORCH_PYTHON=PYTHON python scripts/oracle_floats.py

Names are drawn together as in scripts/oracle_types.py; the checkpoints are those of scripts/oracle_layout.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
from oracle_layout import OPTIONS, convert
from oracle_types import by_value

ROOT = Path(__file__).parent.parent
OUT = ROOT / "tests" / "fixtures" / "gguf_floats.json"
SKIPPED = ("gpt_oss-mxfp4",)  # experts that are quantized already stay so


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.families.gguf_checkpoints import VARIANTS, make

    lines = []
    for variant in (name for name in VARIANTS if name not in SKIPPED):
        with TemporaryDirectory() as temporary:
            model, out = Path(temporary) / "model", Path(temporary) / "model.gguf"
            convert(make(model, variant), out, *OPTIONS.get(variant, ()), "--outtype", "bf16")
            tensors = gguf.GGUFReader(out).tensors
            told = {t.name: (t.tensor_type.name, *(int(n) for n in reversed(t.shape))) for t in tensors}
        lines.append(f"{json.dumps(variant)}: {json.dumps(by_value(told))}")
    command = "convert_hf_to_gguf.py --outtype bf16 MODEL; scripts/oracle_floats.py"
    OUT.write_text(f'{{\n "command": {json.dumps(command)},\n ' + ",\n ".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
