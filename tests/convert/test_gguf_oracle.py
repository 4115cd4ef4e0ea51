"""Our GGUF files against those that llama.cpp's own tools make here and now: keys, types, bytes, order.

MLXQUANT_MODELS names a folder with `smol` (SmolLM2-135M) and `qwen` (scripts/make_model.py) for the real ones.
"""

from __future__ import annotations

import os
import pydoc_data.topics
from pathlib import Path

import pytest

from mlxquant.files.gguf_file import GGUFFile
from tests import oracle
from tests.cli.runner import mlxquant
from tests.convert import gguf_cases as cases

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("name", cases.CASES)
def test_files_of_tiny_models(name: str, tmp_path: Path) -> None:
    folder = cases.make(tmp_path / "model" / name, name)
    for wanted in cases.runs(name):
        theirs = cases.summary(cases.theirs(folder, tmp_path / "theirs", name, wanted))
        ours = cases.summary(cases.ours(folder, tmp_path / "ours", name, wanted))
        assert cases.differences(name, wanted, theirs, ours) == [], (name, wanted)
        for made in (tmp_path / "theirs", tmp_path / "ours"):
            if wanted not in (cases.BASE, *(run.source for run in cases.runs(name).values())):
                (made / f"{wanted}.gguf").unlink()


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n".join(pydoc_data.topics.topics[name] for name in ("with", "class", "try", "for")) * 2)
    return path


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_llama_imatrix_sees_the_same_model(name: str, tmp_path: Path) -> None:
    """And llama-quantize with it makes the same of our float file."""
    folder, text = cases.make(tmp_path / "model" / name, name), text_file(tmp_path)
    files = [cases.theirs(folder, tmp_path / "theirs", name, "F16"), cases.ours(folder, tmp_path / "ours", name, "F16")]
    made = []
    for file in files:
        matrix = file.with_suffix(".imatrix.gguf")
        oracle.imatrix(file, text, matrix, "-c", "128", "--chunks", "2")
        made.append(matrix.read_bytes())
    assert made[0] == made[1]
    quantized = []
    for file in files:
        out = file.with_suffix(".Q4_K_S.gguf")
        oracle.quantize(file, out, "Q4_K_S", "--imatrix", files[0].with_suffix(".imatrix.gguf"))
        quantized.append(cases.summary(out))
    assert quantized[0]["tensors"] == quantized[1]["tensors"]


def test_split_files(tmp_path: Path) -> None:
    """Theirs read by us, ours by them, whole or --keep-split."""
    name = "llama"
    folder = cases.make(tmp_path / "model" / name, name)
    whole = cases.summary(cases.ours(folder, tmp_path / "ours", name, "Q4_K_M"))
    oracle.convert(folder, tmp_path / "theirs.gguf", "bf16", "--split-max-size", "1M", pre=cases.CASES[name].pre)
    parts = sorted(tmp_path.glob("theirs-*.gguf"))
    assert len(parts) > 3
    assert mlxquant("convert", parts[0], "-o", tmp_path / "a.gguf", "--type", "Q4_K_M").code == 0
    assert cases.differences(name, "Q4_K_M", whole, cases.summary(tmp_path / "a.gguf")) == []

    command = ["convert", folder, "-o", tmp_path / "ours.gguf", "--type", "BF16", "--split-max-size", "1M"]
    assert mlxquant(*command).code == 0
    first = min(tmp_path.glob("ours-*.gguf"))
    oracle.quantize(first, tmp_path / "b.gguf", "Q4_K_M")
    assert cases.differences(name, "Q4_K_M", cases.summary(tmp_path / "b.gguf"), whole) == []
    oracle.quantize(first, tmp_path / "kept.gguf", "Q4_K_M", "--keep-split")
    kept = min(tmp_path.glob("kept-*.gguf"))
    assert len(GGUFFile(kept).parts) == len(GGUFFile(first).parts)
    assert cases.summary(kept)["tensors"] == whole["tensors"]


# -- real models


def real(name: str) -> Path:
    folder = Path(os.environ.get("MLXQUANT_MODELS", "")) / name
    if "MLXQUANT_MODELS" not in os.environ or not (folder / "config.json").is_file():
        pytest.skip(f"no model {name}: set MLXQUANT_MODELS to the folder that holds it")
    return folder


def compare(wanted: str, theirs: Path, ours: Path) -> None:
    found = cases.differences("", wanted, cases.summary(theirs), cases.summary(ours))
    assert found == [], found[:10]
    ours.unlink()


def convert(source: Path, out: Path, type_name: str, *flags: str | Path) -> Path:
    result = mlxquant("convert", source, "-o", out, "--type", type_name, *flags)
    assert result.code == 0, result
    return out


@pytest.mark.parametrize("name", ["smol", "qwen"])
def test_files_of_real_models(name: str, tmp_path: Path) -> None:
    """With the tokenizers they were published with. Minutes, and twice the model on disk."""
    folder, base = real(name), tmp_path / "base.gguf"
    for wanted in ("F32", "F16", "BF16") if name == "smol" else ("BF16",):
        theirs = base if wanted == "BF16" else tmp_path / f"{wanted}.gguf"
        oracle.convert(folder, theirs, wanted.lower())
        compare(wanted, theirs, convert(folder, tmp_path / "ours.gguf", wanted))
        if theirs != base:
            theirs.unlink()
    for form in ("gguf", "dat"):
        matrix = tmp_path / f"imatrix.{form}"
        oracle.imatrix(base, text_file(tmp_path), matrix, "--output-format", form, "-c", "128", "--chunks", "1")
    matrices = {"gguf": tmp_path / "imatrix.gguf", "dat": tmp_path / "imatrix.dat"}
    runs = [("Q4_K_M", ""), ("Q3_K_L", ""), ("Q5_K_S", ""), ("Q2_K", ""), ("Q4_K_M", "gguf")]
    for type_name, form in [*runs, *([("Q4_K_M", "dat"), ("Q2_K_S", "gguf")] if name == "smol" else [])]:
        flags = ("--imatrix", matrices[form]) if form else ()
        oracle.quantize(base, tmp_path / "theirs.gguf", type_name, *flags)
        compare(type_name, tmp_path / "theirs.gguf", convert(folder, tmp_path / "ours.gguf", type_name, *flags))
    base.unlink()  # pytest keeps what a passed test leaves
