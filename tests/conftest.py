"""No test touches the user's Hugging Face cache, token or network.

`huggingface_hub` reads its settings when it is imported, so they are set here, before any test module: an
empty HF_HOME and a stand-in Hub on localhost. Subprocesses inherit them.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub

_HOME = Path(tempfile.mkdtemp(prefix="mlxquant-test-hf-"))
_HUB = FakeHub()
_HUB.__enter__()
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)

for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
    del os.environ[_name]
os.environ |= {"HF_HOME": str(_HOME), "HF_ENDPOINT": _HUB.url, "HF_HUB_DISABLE_XET": "1"}
os.environ["NO_PROXY"] = "127.0.0.1,localhost"


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    """The session's stand-in Hub with no repos in it, and an empty Hub cache."""
    _HUB.reset()
    shutil.rmtree(_HOME / "hub", ignore_errors=True)
    yield _HUB
    _HUB.reset()
