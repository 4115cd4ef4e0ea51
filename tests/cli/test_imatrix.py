"""`mlxquant imatrix`: what it writes is used by `convert` and by llama-quantize, whatever SRC is; what it refuses."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mlxquant.files.gguf_file import GGUFFile
from mlxquant.files.imatrix import read_imatrix
from mlxquant.run import interrupt
from tests import oracle
from tests.cli.runner import mlxquant, refused
from tests.gguf_files import write_gguf
from tests.tiny import FAMILIES, make

SHORT = ("--samples", 4, "--sequence-length", 32, "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("imatrix") / "model", "llama", width=256, dtype="float16")


@pytest.fixture(scope="module")
def written(folder: Path) -> Path:
    out = folder.parent / "imatrix.gguf"
    result = mlxquant("imatrix", folder, "-o", out, *SHORT)
    assert result.code == 0, result
    assert result.out.startswith(f"Wrote {out}: 14 weights")
    assert "128 tokens of built-in: language reference" in result.out
    return out


def test_what_is_in_it(written: Path) -> None:
    found = read_imatrix(written)
    assert found.entries.keys() == {
        f"blk.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    assert found.chunks == 4
    assert found.datasets[0].startswith("built-in: language reference")
    assert GGUFFile(written).metadata["imatrix.chunk_size"] == 32
    assert found.entries["blk.0.ffn_down.weight"].shape == (1, 512)


def test_convert_makes_use_of_it(folder: Path, written: Path, tmp_path: Path) -> None:
    with_it, without = tmp_path / "with.gguf", tmp_path / "without.gguf"
    result = mlxquant("convert", folder, "-o", with_it, "--type", "Q4_K_M", "--imatrix", written)
    assert result.code == 0, result
    assert "no entry" not in result.out
    assert mlxquant("convert", folder, "-o", without, "--type", "Q4_K_M").code == 0
    a, b = GGUFFile(with_it), GGUFFile(without)
    assert a.metadata["quantize.imatrix.entries_count"] == 14
    name = "blk.0.attn_q.weight"
    assert (a.read_rows(name, 0, 8) != b.read_rows(name, 0, 8)).any()
    assert mlxquant("verify", with_it, "--source", folder, "--imatrix", written).code == 0


def test_the_same_again_and_the_same_from_a_gguf_file(folder: Path, written: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.gguf"
    assert mlxquant("imatrix", folder, "-o", again, *SHORT).code == 0
    assert again.read_bytes() == written.read_bytes()
    model = write_gguf(folder, tmp_path / "model.gguf", "F16")
    assert mlxquant("imatrix", model, "-o", again, *SHORT, "--force").code == 0
    found, expected = read_imatrix(again).entries, read_imatrix(written).entries
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        np.testing.assert_allclose(found[name], entry, rtol=1e-5)


def test_a_quantized_source_says_so(folder: Path, tmp_path: Path) -> None:
    assert mlxquant("convert", folder, "-o", tmp_path / "4bit").code == 0
    result = mlxquant("imatrix", tmp_path / "4bit", "-o", tmp_path / "i.gguf", *SHORT, "--json")
    assert result.code == 0, result
    told = json.loads(result.out)
    assert "are quantized in SRC" in told["notes"][0]
    assert (told["entries"], told["tokens"], told["experts"]) == (14, 128, 0)
    assert len(told["text_sha256"]) == 64


def test_text_files_the_models_own_text_and_the_head(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("what it reads " * 200)
    outs = [tmp_path / f"{name}.gguf" for name in ("file", "self", "head")]
    assert mlxquant("imatrix", folder, "-o", outs[0], *SHORT, "--calibration", text).code == 0
    assert mlxquant("imatrix", folder, "-o", outs[1], *SHORT, "--calibration", "self").code == 0
    assert mlxquant("imatrix", folder, "-o", outs[2], *SHORT, "--process-output").code == 0
    file, own, head = map(read_imatrix, outs)
    assert file.datasets == ("text.txt: 4 samples of 32 tokens, seed 0",)
    assert own.datasets[0].startswith("the model's own text")
    assert "output.weight" in head.entries
    assert file.entries.keys() == own.entries.keys() == head.entries.keys() - {"output.weight"}


def last_never_asked(rng, width, layers, tied):
    """A mixtral of which a token asks one expert, and none the last: its router's row lies between the others."""
    config, tensors = FAMILIES["mixtral"](rng, width, layers, tied)
    for name in tensors:
        if name.endswith("block_sparse_moe.gate.weight"):
            tensors[name][-1] = tensors[name][:-1].mean(0)
    return config | {"num_experts_per_tok": 1}, tensors


def test_experts_that_saw_nothing_are_counted(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "mixtral", build=last_never_asked)
    result = mlxquant("imatrix", model, "-o", tmp_path / "i.gguf", *SHORT)
    assert result.code == 0, result
    entries = read_imatrix(tmp_path / "i.gguf").entries
    stacks = [entry for name, entry in entries.items() if name.endswith("_exps.weight")]
    unseen = sum(int((entry == 1).all(axis=1).sum()) for entry in stacks)
    assert unseen >= len(stacks) == 6
    assert f"{unseen} of 24 matrices of experts saw no text" in result.out
    told = mlxquant("imatrix", model, "-o", tmp_path / "i.gguf", *SHORT, "--force", "--json").out
    assert json.loads(told)["experts_unseen"] == unseen


def test_refusals_before_a_model_is_pulled(tmp_path: Path) -> None:
    refused(mlxquant("imatrix", "org/model", "-o", tmp_path / "i.dat"), "is a GGUF file", code=2)
    refused(mlxquant("imatrix", "org/model", "-o", tmp_path / "none" / "i.gguf"), "cannot be written to")
    refused(mlxquant("imatrix", "org/model", "-o", tmp_path / "i.gguf", "--calibration", "a.txt"), "a.txt", code=2)
    (tmp_path / "i.gguf").write_text("mine")
    refused(mlxquant("imatrix", "org/model", "-o", tmp_path / "i.gguf"), "exists already", "--force")
    assert (tmp_path / "i.gguf").read_text() == "mine"


def test_refusals_before_anything_is_computed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    other = make(tmp_path / "other", "starcoder2")
    refused(mlxquant("imatrix", other, "-o", out, *SHORT), "starcoder2", "GGUF")
    (tmp_path / "short.txt").write_text("too short")
    short = mlxquant("imatrix", folder, "-o", out, *SHORT, "--calibration", tmp_path / "short.txt")
    refused(short, "4 samples of 32 take 128", code=2)
    refused(mlxquant("imatrix", folder, "-o", out, "--sequence-length", 4), "--sequence-length 4", code=2)
    assert not out.exists()


def test_ctrl_c_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def interruptible():
        yield lambda: True

    monkeypatch.setattr(interrupt, "interruptible", interruptible)
    before = sorted(folder.iterdir())
    for spec in ("builtin", "self"):
        result = mlxquant("imatrix", folder, "-o", tmp_path / "i.gguf", *SHORT, "--calibration", spec)
        assert (result.code, result.out, result.err) == (130, "", "Stopped: nothing was written.\n")
    assert list(tmp_path.iterdir()) == []
    assert sorted(folder.iterdir()) == before


@pytest.mark.oracle
@pytest.mark.parametrize("experts", [False, True])
def test_llama_quantize_reads_it(experts: bool, tmp_path: Path) -> None:
    """And makes of it, and of our F32 file, what `convert` makes of it: the same bytes in every tensor."""
    config = {"mlp_only_layers": [], "num_experts_per_tok": 2} if experts else {}
    model = make(tmp_path / "model", "mixtral" if experts else "llama", width=256, dtype="float32", **config)
    matrix, floats = tmp_path / "i.gguf", tmp_path / "F32.gguf"
    assert mlxquant("imatrix", model, "-o", matrix, *SHORT).code == 0
    assert mlxquant("convert", model, "-o", floats, "--type", "F32").code == 0
    printed = oracle.quantize(floats, tmp_path / "theirs.gguf", "Q3_K_M", "--imatrix", matrix)
    assert f"have importance matrix data with {len(read_imatrix(matrix).entries)} entries" in printed
    done = mlxquant("convert", model, "-o", tmp_path / "ours.gguf", "--type", "Q3_K_M", "--imatrix", matrix)
    assert done.code == 0, done
    ours, theirs = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(tmp_path / "theirs.gguf")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].type_name == tensor.type_name, name
        rows = (ours.read_rows(name, 0, tensor.rows), theirs.read_rows(name, 0, tensor.rows))
        np.testing.assert_array_equal(*rows, err_msg=name)
