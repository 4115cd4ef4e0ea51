"""Rows on their way into a GGUF file: what is read, how many bytes that is, and which row an error names."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlxquant.convert.block_rows import CheckpointRows, encode_blocks
from mlxquant.convert.gguf_job import open_job
from mlxquant.errors import SourceError
from mlxquant.families.layout import Target
from mlxquant.files.imatrix import Imatrix
from mlxquant.plan.gguf_plan import PlannedBlocks
from mlxquant.plan.gguf_types import type_settings
from tests.tiny import make


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize(("type_name", "value"), [("Q4_0", np.nan), ("Q4_0", 1e30), ("F16", 1e30)])
def test_errors_count_rows_from_the_tensors_first(row: int, type_name: str, value: float) -> None:
    """A chunk begins anywhere."""
    tensor = PlannedBlocks(Target("blk.0.ffn_up.weight", (600, 32), "F32", ()), type_name, "F32")
    raw = np.ones((8, 32), np.float32)
    raw[row, 5] = value
    with pytest.raises(SourceError, match=rf"blk\.0\.ffn_up\.weight: row {512 + row}: "):
        encode_blocks(tensor, None, raw, 512)


@pytest.mark.parametrize("family", ["gemma2", "qwen2_moe", "gpt_oss", "llama3"])
def test_bytes_are_those_that_are_read(tmp_path, family: str) -> None:
    """The progress bar's: norms widened to float32, rope factors from the plan, everything else as it is stored."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    more = {"rope_scaling": {**scaling, "original_max_position_embeddings": 64}} if family == "llama3" else {}
    folder = make(tmp_path / "m", family.rstrip("3"), dtype="bfloat16", **more)
    job = open_job(folder, None, type_settings("BF16"))
    for tensor in job.plan.tensors:
        rows = 1 if len(tensor.target.shape) < 2 else int(np.prod(tensor.target.shape[:-1]))
        assert job.rows.read(tensor, 0, rows).nbytes == job.rows.nbytes(tensor), tensor.name


def test_shifted_norms_are_not_rounded_to_the_sources_dtype(tmp_path) -> None:
    """llama.cpp's converter adds 1 in float32; in bfloat16 a norm near 0 would lose half of its digits."""
    folder = make(tmp_path / "m", "gemma2", dtype="bfloat16")
    job = open_job(folder, None, type_settings("BF16"))
    tensor = next(t for t in job.plan.tensors if t.name == "output_norm.weight")
    stored = load_file(folder / "model.safetensors")["model.norm.weight"].astype(np.float32)
    assert isinstance(job.rows, CheckpointRows)
    np.testing.assert_array_equal(job.rows.read(tensor, 0, 1).reshape(-1), stored + np.float32(1))


def test_importance_that_overflows_is_named_as_a_cause() -> None:
    tensor = PlannedBlocks(Target("blk.0.ffn_up.weight", (1, 256), "F32", ()), "Q4_K", "F32", importance=True)
    entries = {tensor.name: np.full((1, 256), 3e38, np.float32)}
    with pytest.raises(SourceError, match="row 0: weights, or their importance, too large for the float16 scales"):
        encode_blocks(tensor, Imatrix("i.dat", entries, (), 1), np.linspace(-1, 1, 256, dtype=np.float32)[None], 0)


def test_blocks_that_pass_as_they_are_must_have_scales() -> None:
    tensor = PlannedBlocks(Target("blk.0.ffn_up.weight", (600, 32), "F32", ()), "Q8_0", "Q8_0")
    raw = np.zeros((8, 34), np.uint8)
    assert encode_blocks(tensor, None, raw, 512) is raw
    raw[3, :2] = 0x00, 0x7E
    with pytest.raises(SourceError, match=r"blk\.0\.ffn_up\.weight: row 515: a scale that is NaN"):
        encode_blocks(tensor, None, raw, 512)
