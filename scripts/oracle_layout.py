"""What llama.cpp's own converter makes of the tiny checkpoints of tests/families/gguf_checkpoints.py.

    MLXQUANT_LLAMA_CPP=FOLDER MLXQUANT_TORCH_PYTHON=PYTHON python scripts/oracle_layout.py [VARIANT ...]

FOLDER is llama.cpp's source, PYTHON an interpreter with torch and transformers (what convert_hf_to_gguf.py asks for).
Writes tests/fixtures/gguf_layout/VARIANT.json: shape, type and a sha256 of the bytes of every tensor of
`convert_hf_to_gguf.py --outtype f32`. The converter runs as it is, but for its tokenizer: the checkpoints have none.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
FIXTURES = ROOT / "tests" / "fixtures" / "gguf_layout"

# Runs the converter with every class's set_vocab taken out.
WITHOUT_VOCABULARY = """
import runpy, sys
folder = sys.argv[1]
sys.path[:0] = [folder + "/gguf-py", folder]
import conversion
found = conversion.get_model_class
def plain(*args, **kwargs):
    cls = found(*args, **kwargs)
    cls.set_vocab = lambda self: None
    return cls
conversion.get_model_class = plain
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""
OPTIONS = {
    "qwen3_next": ["--no-mtp"]
}  # mlx-lm does not run the layers that predict further tokens, nor do we write them


def convert(model: Path, out: Path, *options: str) -> None:
    """Raises CalledProcessError with the converter's last words."""
    python, source = os.environ.get("MLXQUANT_TORCH_PYTHON", sys.executable), os.environ["MLXQUANT_LLAMA_CPP"]
    subprocess.run(
        [python, "-c", WITHOUT_VOCABULARY, source, str(model), "--outfile", str(out), "--outtype", "f32", *options],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def tensors(path: Path) -> dict[str, dict[str, object]]:
    """Name -> shape (outermost axis first), type and digest, in the file's order. -exp(A_log) is kept as numbers:
    torch's exponential is not rounded correctly, and not the same on every machine."""
    found: dict[str, dict[str, object]] = {}
    for t in gguf.GGUFReader(path).tensors:
        shape = [int(n) for n in reversed(t.shape)]
        found[t.name] = {
            "shape": shape,
            "type": t.tensor_type.name,
            "sha256": hashlib.sha256(t.data.tobytes()).hexdigest(),
        }
        if t.name.endswith(".ssm_a"):
            found[t.name] = {"shape": shape, "type": t.tensor_type.name, "values": t.data.tolist()}
    return found


def as_json(command: str, found: dict[str, dict[str, object]]) -> str:
    """One line a tensor."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
    return f'{{\n "command": {json.dumps(command)},\n "tensors": {{\n{lines}\n }}\n}}\n'


def main() -> None:
    from tests.families.gguf_checkpoints import VARIANTS, make

    FIXTURES.mkdir(parents=True, exist_ok=True)
    for variant in sys.argv[1:] or VARIANTS:
        with TemporaryDirectory() as temporary:
            model, out = Path(temporary) / "model", Path(temporary) / "model.gguf"
            try:
                convert(make(model, variant), out, *OPTIONS.get(variant, ()))
            except subprocess.CalledProcessError as error:
                print(f"{variant}: the converter failed\n{error.stderr[-2000:]}", file=sys.stderr)
                continue
            options = " ".join(("--outtype f32", *OPTIONS.get(variant, ())))
            made = {
                "command": f"convert_hf_to_gguf.py {options} MODEL; scripts/oracle_layout.py",
                "tensors": tensors(out),
            }
            (FIXTURES / f"{variant}.json").write_text(json.dumps(made, indent=1) + "\n")
            print(variant, len(made["tensors"]))


if __name__ == "__main__":
    main()
