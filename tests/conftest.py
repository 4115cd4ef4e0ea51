"""No test touches the user's Hugging Face cache, token or network, and in-process MLX computes on the CPU.

`huggingface_hub` reads its settings when it is imported, so they are set here, before any test module: an
empty HF_HOME and a stand-in Hub on localhost. Subprocesses inherit them.

Bits, close bounds and equal tokens are promised for the CPU device. mlx-lm binds its stream to the device that
is the default when it is imported, and a command run by an earlier test leaves a Mac's GPU as the default: so the
CPU is chosen here, before any import of mlx-lm, and again before each test. Subprocesses choose as a user's would.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxquant.run.device import prepare
from tests.fake_hub import FakeHub

_HOME = Path(tempfile.mkdtemp(prefix="mlxquant-test-hf-"))
_HUB = FakeHub()
_HUB.__enter__()
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)

for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
    del os.environ[_name]
os.environ |= {"HF_HOME": str(_HOME), "HF_ENDPOINT": _HUB.url, "HF_HUB_DISABLE_XET": "1"}
os.environ["NO_PROXY"] = "127.0.0.1,localhost"

prepare("cpu")  # the BLAS, too, must be loaded before any test imports mlx


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A hook, not a fixture: fixtures of a wider scope would be set up before it."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    """The session's stand-in Hub with no repos in it, and an empty Hub cache."""
    _HUB.reset()
    shutil.rmtree(_HOME / "hub", ignore_errors=True)
    yield _HUB
    _HUB.reset()
