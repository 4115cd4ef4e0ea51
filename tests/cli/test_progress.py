"""Bars and results go to the same terminal: what it shows at the end is the results alone."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.runner import mlxquant
from tests.cli.test_markdown import Screen


def on_a_terminal(*arguments: object) -> list[str]:
    """What stays on the screen, empty lines left out."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxquant", *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=child, stderr=child, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(child)
    seen = b""
    while True:
        try:
            seen += (read := os.read(parent, 65536))
        except OSError:  # the other side has closed: what Linux says at the end of a terminal
            break
        if not read:  # and what a Mac says
            break
    os.close(parent)
    assert process.wait() == 0, seen
    screen = Screen()
    screen.feed(seen.decode())
    return [line.strip() for line in screen.lines if line.strip()]


@pytest.mark.parametrize("name", ["out", "m.gguf"])
def test_verify_leaves_its_checks_and_no_bar(name: str, tmp_path: Path):
    source, out = tiny.make(tmp_path / "hf"), tmp_path / name
    assert mlxquant("convert", source, "-o", out, *(["--type", "q8_0"] if out.suffix else [])).code == 0
    lines = on_a_terminal("verify", out)
    assert all(line.startswith("ok ") for line in lines[:-1]), lines
    assert "checks passed" in lines[-1]
