"""Converting and verifying hold a few row chunks at a time, however large a tensor is."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxquant.convert.checks import check_folder
from mlxquant.convert.gather import CHUNK_BYTES
from mlxquant.convert.sources import open_source
from mlxquant.convert.to_mlx import to_mlx
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings
from tests.gguf_files import write_gguf
from tests.tiny import make

ROWS, WIDTH = 2**17, 512
TENSOR_BYTES = ROWS * WIDTH * 2
# A chunk read ahead, one at work and one being written; `verify` widens, decodes and bounds one: ten times its bytes.
ALLOWED = 12 * CHUNK_BYTES


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model whose embedding alone is 16 chunks."""
    folder = make(tmp_path_factory.mktemp("large"), width=WIDTH, layers=1, tied=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = np.ones((ROWS, WIDTH), ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": ROWS}))
    return folder


def traced_peak(work: Callable[[], object]) -> int:
    """numpy tells tracemalloc of its arrays, in every thread."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("sets", [(), ("embed_tokens=keep",)], ids=["quantized", "kept"])
def test_a_large_tensor_passes_in_chunks(source, tmp_path, sets):
    assert TENSOR_BYTES > ALLOWED, "else reading it whole would not show"
    opened = open_source(source)
    plan = make_plan(opened.config, opened.specs, settings(sets=sets))
    assert traced_peak(lambda: to_mlx(opened, plan, tmp_path / "out")) < ALLOWED
    assert traced_peak(lambda: list(check_folder(tmp_path / "out", opened))) < ALLOWED


def test_a_large_tensor_of_a_gguf_file_passes_in_chunks(source, tmp_path):
    opened = open_source(write_gguf(source, tmp_path / "large.gguf", "F16"))
    plan = make_plan(opened.config, opened.specs, settings())
    assert traced_peak(lambda: to_mlx(opened, plan, tmp_path / "out")) < ALLOWED
