"""What goes into a GGUF job beside the plan: sound norms, the source's files, progress."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from mlxquant.convert.to_gguf import to_gguf
from mlxquant.errors import SourceError, TargetError
from tests.convert.test_to_gguf import job
from tests.tiny import make


class Watch:
    """Counts bytes; `stop_after` chunks it is Ctrl-C."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.left, self.started, self.advanced = stop_after, (0, 0), 0

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self.started = (total_bytes, done_bytes)

    def advance(self, nbytes: int) -> None:
        self.advanced += nbytes
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def run(source: Path, out: Path, watch: Watch) -> None:
    made = job(source, "Q8_0")
    to_gguf(made.rows, made.plan, made.metadata, out, progress=watch)


def test_progress_adds_up_also_after_a_stop(tmp_path: Path) -> None:
    source, first, second = make(tmp_path / "m"), Watch(stop_after=6), Watch()
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "m.gguf", first)
    run(source, tmp_path / "m.gguf", second)
    total, done = second.started
    assert first.started == (total, 0)
    assert 0 < done <= first.advanced
    assert done + second.advanced == total


def test_a_source_that_has_changed_since_is_not_gone_on_with(tmp_path: Path) -> None:
    """The same headers, so the same plan; other weights."""
    source = make(tmp_path / "m")
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "m.gguf", Watch(stop_after=6))
    os.utime(source / "model.safetensors", ns=(0, 0))
    with pytest.raises(TargetError, match="another plan or source"):
        run(source, tmp_path / "m.gguf", Watch())


def test_norms_that_were_shifted_before_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", "qwen3_next")
    path = folder / "model.safetensors"
    save_file({n: a + a.dtype.type(a.ndim == 1 and "norm" in n) for n, a in load_file(path).items()}, path)
    with pytest.raises(SourceError, match="shift has been applied already"):
        job(folder, "Q8_0")
