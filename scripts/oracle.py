"""Builds llama.cpp's own tools and runs the tests that ask them: `make oracle`.

    llama-cpp-python's source, a fixed version and hash -> .oracle/llama_cpp_python-VERSION/vendor/llama.cpp
    cmake: llama-quantize, llama-imatrix, llama-perplexity -> build/bin there   (plain x86-64 or arm64, no GPU)
    a Python environment with torch for convert_hf_to_gguf.py -> .oracle/env

Each step is left out where its result stands. It needs a C++ compiler and a package index, 15 minutes on two cores, and
on Linux 6 GB, most of it CUDA for torch: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves 5 GB.
MLXQUANT_LLAMA_CPP and MLXQUANT_TORCH_PYTHON name an existing llama.cpp and Python. Arguments go to pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORACLE = ROOT / ".oracle"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity")
# No code for this very machine and no OpenMP: what the tools compute must be the same everywhere.
OPTIONS = (
    "CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "GGML_NATIVE=OFF", "GGML_OPENMP=OFF", "GGML_METAL=OFF",
    "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_BUILD_SERVER=OFF",
)  # fmt: skip
CONVERTER_NEEDS = ("torch", "transformers", "sentencepiece", "safetensors", "protobuf", "numpy", "pyyaml")


def main() -> int:
    llama_cpp = Path(os.environ.get("MLXQUANT_LLAMA_CPP") or fetch())
    if missing := [tool for tool in TOOLS if not (llama_cpp / "build" / "bin" / tool).is_file()]:
        print(f"Building {', '.join(missing)} in {llama_cpp}", flush=True)
        build(llama_cpp)
    python = Path(os.environ.get("MLXQUANT_TORCH_PYTHON") or converter_python())
    env = {**os.environ, "MLXQUANT_LLAMA_CPP": str(llama_cpp), "MLXQUANT_TORCH_PYTHON": str(python)}
    arguments = sys.argv[1:] or ["-q"]
    return subprocess.run([sys.executable, "-m", "pytest", "-m", "oracle", *arguments], cwd=ROOT, env=env).returncode


def tool(name: str) -> Path:
    """One of TOOLS, for the scripts that write fixtures."""
    llama_cpp = os.environ.get("MLXQUANT_LLAMA_CPP") or ORACLE / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    path = Path(llama_cpp) / "build" / "bin" / name
    if not path.is_file():
        raise SystemExit(f"{path} is missing: run `make oracle`, or set MLXQUANT_LLAMA_CPP to a built llama.cpp")
    return path


def fetch() -> Path:
    """The unpacked source. pip checks the hash before it looks inside."""
    folder = ORACLE / f"llama_cpp_python-{VERSION}"
    if not folder.is_dir():
        print(f"Downloading llama-cpp-python {VERSION}, which carries llama.cpp's source", flush=True)
        downloads = ORACLE / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        wanted = downloads / "requirements.txt"
        wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
        pip(sys.executable, "download", "--no-deps", "--no-binary", ":all:", "-r", wanted, "-d", downloads)
        unpacking = ORACLE / "unpacking"
        shutil.rmtree(unpacking, ignore_errors=True)
        with tarfile.open(downloads / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
            archive.extractall(unpacking, filter="data")
        (unpacking / folder.name).rename(folder)
    return folder / "vendor" / "llama.cpp"


def build(llama_cpp: Path) -> None:
    cmake = shutil.which("cmake") or installed("cmake")
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    flags = [f"-D{option}" for option in OPTIONS]
    run(cmake, "-S", llama_cpp, "-B", llama_cpp / "build", *generator, *flags)
    run(cmake, "--build", llama_cpp / "build", "-j", os.cpu_count() or 2, "--target", *TOOLS)


def installed(tool: str) -> Path:
    """A program that comes as a wheel."""
    python = environment(ORACLE / "tools")
    pip(python, "install", tool)
    return python.parent / tool


def converter_python() -> Path:
    python = environment(ORACLE / "env")
    ready = ORACLE / "env" / ".ready"
    if not ready.exists():
        print("Installing torch and transformers for convert_hf_to_gguf.py", flush=True)
        pip(python, "install", *CONVERTER_NEEDS)
        ready.touch()
    return python


def environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    return python


def pip(python: Path | str, *arguments: str | Path) -> None:
    run(python, "-m", "pip", arguments[0], "-q", "--disable-pip-version-check", *arguments[1:])


def run(*command: object) -> None:
    """Ends here when a step fails: its own output has said why."""
    done = subprocess.run(list(map(str, command)))
    if done.returncode:
        raise SystemExit(f"{Path(str(command[0])).name} ended with {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
