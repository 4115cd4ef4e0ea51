"""ggml's reference encoder as the `libgguf` wheel carries it, where its bytes are the promised ones."""

from __future__ import annotations

import platform
from types import ModuleType

import pytest


def libgguf_x86() -> ModuleType:
    """The module, or the test is skipped: without a wheel, and on ARM, where compilers fuse ggml's multiplications with
    its additions, so that some of its bytes are not those of the x86-64 build. Kept hashes hold the encoders there.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("ggml's bytes are promised as its x86-64 build has them")
    module: ModuleType = pytest.importorskip("libgguf")
    return module
