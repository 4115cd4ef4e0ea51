"""`verify` of GGUF files that are whole and wrong: made by to_gguf from a plan or keys that convert would not make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from mlxquant.convert.gguf_checks import check_gguf
from mlxquant.convert.gguf_job import GGUFJob
from mlxquant.convert.to_gguf import to_gguf
from mlxquant.files.gguf_file import GGUFFile
from tests.convert.test_to_gguf import importance, job, write
from tests.families.gguf_checkpoints import gpt_oss_mxfp4
from tests.tiny import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source") / "tiny", width=256, layers=1)


def another_order(made: GGUFJob) -> GGUFJob:
    return replace(made, plan=replace(made.plan, tensors=made.plan.tensors[::-1]))


def more_tokens(made: GGUFJob) -> GGUFJob:
    tokens = [*made.metadata["tokenizer.ggml.tokens"], *(f"more {i}" for i in range(1000))]
    return replace(made, metadata={**made.metadata, "tokenizer.ggml.tokens": tokens})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_order, "not in llama.cpp's order"),
        (more_tokens, "tokens, but token_embd.weight has"),
    ],
)
def test_keys_that_loaders_rely_on(
    folder: Path, tmp_path: Path, change: Callable[[GGUFJob], GGUFJob], words: str
) -> None:
    made = change(job(folder, "Q4_K_M"))
    to_gguf(made.rows, made.plan, made.metadata, tmp_path / "m.gguf")
    wrong = [check for check in check_gguf(tmp_path / "m.gguf") if not check.ok]
    assert [check.name for check in wrong] == ["keys"]
    assert words in wrong[0].detail


def test_a_number_that_is_not_finite_is_named(folder: Path, tmp_path: Path) -> None:
    path = write(folder, tmp_path / "m.gguf", "Q4_K_M")
    data, tensor = bytearray(path.read_bytes()), GGUFFile(path).tensors["blk.0.ffn_up.weight"]
    data[tensor.offset + 1] = 0x7E  # the first scale becomes NaN
    path.write_bytes(data)
    details = {check.name: check.detail for check in check_gguf(path) if not check.ok}
    assert details.keys() == {"tensors"}
    assert "blk.0.ffn_up.weight': NaN or infinity in rows 0.." in details["tensors"]


def test_types_that_an_importance_matrix_makes_possible(folder: Path, tmp_path: Path) -> None:
    shapes = {t.name: t.target.shape for t in job(folder, "F32").plan.tensors}
    path = write(folder, tmp_path / "m.gguf", "Q2_K_S", imatrix=importance(shapes))
    assert all(check.ok for check in check_gguf(path))


def test_types_that_were_left_alone(tmp_path: Path) -> None:
    """MXFP4 experts of a checkpoint; and of a GGUF file what llama-quantize does not touch, float16 here."""
    experts = make(tmp_path / "experts", "gpt_oss", width=256, build=gpt_oss_mxfp4)
    path = write(experts, tmp_path / "experts.gguf", "Q4_K_M")
    assert GGUFFile(path).tensors["blk.0.ffn_up_exps.weight"].type_name == "MXFP4"
    assert all(check.ok for check in check_gguf(path, experts))
    writer = gguf.GGUFWriter(tmp_path / "source.gguf", "starcoder2")
    writer.add_block_count(1)
    for name in ("token_embd.weight", "position_embd.weight"):
        writer.add_tensor(name, np.ones((40, 256), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = write(tmp_path / "source.gguf", tmp_path / "out.gguf", "Q4_K_M")
    assert GGUFFile(path).tensors["position_embd.weight"].type_name == "F16"
    assert all(check.ok for check in check_gguf(path, tmp_path / "source.gguf"))
