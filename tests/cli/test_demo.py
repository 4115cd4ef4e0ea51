"""`make demo` converts whatever the Hub or the wheel gives: its commands are planned here on both kinds of source."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.demo import conversions
from tests import tiny
from tests.cli.runner import mlxquant
from tests.gguf_files import write_gguf


@pytest.mark.parametrize("kind", ["folder", "Q4_1"])
def test_what_the_demo_asks_for_can_be_done(kind: str, tmp_path: Path):
    source = tiny.make(tmp_path / "hf")
    if kind != "folder":
        source = write_gguf(source, tmp_path / "model.gguf", kind)
    for arguments in conversions(str(source)):
        planned = mlxquant(*arguments, "--dry-run")
        assert planned.code == 0, planned
