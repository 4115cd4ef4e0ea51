"""llama.cpp's own tools, for tests marked `oracle`: each call runs one, or skips the test and says what is missing.

The environment variable MLXQUANT_LLAMA_CPP names llama.cpp's folder (with build/bin), MLXQUANT_TORCH_PYTHON a Python
with torch for its converter; without them, what `make oracle` left in .oracle/ is taken.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / ".oracle"
TIMEOUT_S = 600


def quantize(src: Path, out: Path | None, type: str, *flags: str | Path) -> str:
    """llama-quantize FLAGS SRC OUT TYPE -> what it printed. No `out` for a --dry-run."""
    paths = [src] if out is None else [src, out]
    return run(_tool("llama-quantize"), *flags, *paths, type, "2")


# The converter knows tokenizers by the hash of what they make of one text, and tests train their own.
_CONVERT_AS = """
import runpy, sys
script, pre, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
runpy.run_path(script, run_name="__main__")
"""


def convert(folder: Path, out: Path, outtype: str, *flags: str, pre: str | None = None) -> str:
    """convert_hf_to_gguf.py --outtype OUTTYPE FOLDER, which never asks the Hub -> what it printed.

    `pre`: the pre-tokenizer's name for a tokenizer that the converter does not know.
    """
    script = llama_cpp() / "convert_hf_to_gguf.py"
    env = {"PYTHONPATH": f"{script.parent / 'gguf-py'}{os.pathsep}{script.parent}", "HF_HUB_OFFLINE": "1"}
    start = [script] if pre is None else ["-c", _CONVERT_AS, script, pre]
    return run(_python(), *start, "--outtype", outtype, "--outfile", out, *flags, folder, env=env)


def imatrix(model: Path, text: Path, out: Path, *flags: str) -> str:
    """llama-imatrix: activations of `model` on `text`."""
    return run(_tool("llama-imatrix"), "-m", model, "-f", text, "-o", out, "--no-ppl", "-t", "1", *flags)


def perplexity(model: Path, text: Path, *flags: str) -> str:
    """llama-perplexity: what it printed."""
    return run(_tool("llama-perplexity"), "-m", model, "-f", text, "-t", "2", *flags)


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """stdout and stderr of a command; fails the test with the end of both when the command fails."""
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{Path(command[0]).name} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def llama_cpp() -> Path:
    """llama.cpp's folder."""
    named = os.environ.get("MLXQUANT_LLAMA_CPP")
    found = [Path(named)] if named else sorted(ROOT.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not found or not found[-1].is_dir():
        pytest.skip(f"no llama.cpp at {named or ROOT}: `make oracle` builds it, or set MLXQUANT_LLAMA_CPP")
    return found[-1].resolve()


def _tool(name: str) -> Path:
    path = llama_cpp() / "build" / "bin" / name
    if not path.is_file():
        pytest.skip(f"llama.cpp at {llama_cpp()} has no build/bin/{name}: `make oracle` builds it")
    return path


def _python() -> Path:
    path = Path(os.environ.get("MLXQUANT_TORCH_PYTHON") or ROOT / "env" / "bin" / "python")
    if not path.is_file():
        pytest.skip(f"no Python with torch at {path}: `make oracle` makes one, or set MLXQUANT_TORCH_PYTHON")
    return path
