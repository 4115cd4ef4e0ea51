"""`convert -o NAME.gguf --type TYPE` and `verify NAME.gguf`: what they write, say and refuse."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from mlxquant.cli.convert_gguf import parse_split
from mlxquant.cli.progress import ByteBar
from mlxquant.errors import UsageError
from mlxquant.files.gguf_file import GGUFFile
from tests.cli.runner import mlxquant, refused
from tests.fake_hub import FakeHub
from tests.gguf_files import write_gguf
from tests.tiny import make


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("source") / "Tiny-1M", width=256)


def test_convert_verify_and_what_they_say(source, tmp_path):
    out = tmp_path / "m.gguf"
    result = mlxquant("convert", source, "-o", out, "--type", "q4_k_m")
    assert (result.code, result.err) == (0, "")
    assert f"Next: mlxquant verify {out}   or   mlxquant chat {out}" in result.out
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert gguf.GGUFReader(out).get_field("general.file_type").contents() == 15
    checked = mlxquant("verify", out)
    assert "all 3 checks passed (add --source" in checked.out, checked
    checked = mlxquant("verify", out, "--source", source)
    assert "all 6 checks passed" in checked.out, checked


def test_json(source, tmp_path):
    plan = json.loads(mlxquant("convert", source, "--type", "q5_k_s", "--dry-run", "--json").out)
    result = json.loads(mlxquant("convert", source, "-o", tmp_path / "m.gguf", "--type", "q5_k_s", "--json").out)
    assert result["files"] == [result["out"]] == [str(tmp_path / "m.gguf")]
    written = sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    assert plan["bytes"] == result["bytes"] == written
    checks = json.loads(mlxquant("verify", tmp_path / "m.gguf", "--json").out)["checks"]
    assert [c["name"] for c in checks if c["ok"]] == ["keys", "types", "tensors"]


def test_dry_run_lists_every_tensor_and_writes_nothing(source, tmp_path):
    result = mlxquant("convert", source, "-o", tmp_path / "m.gguf", "--type", "Q4_K_M", "--dry-run")
    for word in ("blk.1.ffn_down.weight", "Q6_K", "BF16", "total"):
        assert word in result.out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_loads_nothing_heavy(source, tmp_path):
    path = write_gguf(source, tmp_path / "m.gguf", "F16")
    code = (
        "import sys; sys.argv = ['mlxquant', 'convert', sys.argv[1], '--type', 'q4_k_m', '--dry-run', '--json']\n"
        "from mlxquant.cli.main import main; main()\n"
        "heavy = [m for m in ('mlx', 'mlx_lm', 'transformers', 'tokenizers', 'numba') if m in sys.modules]\n"
        "print(heavy, file=sys.stderr)"
    )
    for given in (source, path):
        done = subprocess.run([sys.executable, "-c", code, str(given)], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["parameters"] > 0
        assert done.stderr.strip() == "[]"


def test_a_hub_id_is_planned_from_its_headers(source, tmp_path, fake_hub: FakeHub):
    fake_hub.add("org/tiny", source)
    write_gguf(source, tmp_path / "m.gguf", "F16")
    fake_hub.add("org/gguf", tmp_path)
    local = json.loads(mlxquant("convert", source, "--type", "q4_k_m", "--dry-run", "--json").out)
    for repo in ("org/tiny", "org/gguf/m.gguf"):
        plan = json.loads(mlxquant("convert", repo, "--type", "q4_k_m", "--dry-run", "--json").out)
        assert {t["name"]: t["type"] for t in plan["tensors"]} == {t["name"]: t["type"] for t in local["tensors"]}


def test_a_hub_id_is_pulled_and_its_commit_recorded(source, tmp_path, fake_hub: FakeHub):
    sha, out = fake_hub.add("org/tiny", source), tmp_path / "m.gguf"
    assert mlxquant("convert", "org/tiny", "-o", out, "--type", "q4_k_m").code == 0
    keys = GGUFFile(out).metadata
    found = json.loads(keys["mlxquant.source"])
    assert (found["name"], found["revision"], keys["general.name"]) == ("org/tiny", sha, "Tiny")
    assert mlxquant("verify", out, "--source", "org/tiny").code == 0


def test_options_decide_types(source, tmp_path):
    out = tmp_path / "m.gguf"
    options = [
        "--tensor-type",
        r"blk\.0\.ffn_down=q8_0",
        "--output-tensor-type",
        "q5_0",
        "--token-embedding-type",
        "f16",
    ]
    assert mlxquant("convert", source, "-o", out, "--type", "q4_k_m", *options).code == 0
    types = {name: t.type_name for name, t in GGUFFile(out).tensors.items()}
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["blk.1.ffn_down.weight"] != "Q8_0"
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q5_0", "F16")
    assert mlxquant("verify", out, "--source", source).code == 0
    assert mlxquant("convert", source, "-o", tmp_path / "p.gguf", "--type", "q4_0", "--pure").code == 0
    assert {t.type_name for t in GGUFFile(tmp_path / "p.gguf").tensors.values()} == {"Q4_0", "F32"}


def imatrix(folder: Path, path: Path, weight: float = 100) -> Path:
    """As llama-imatrix writes one."""
    plan = json.loads(mlxquant("convert", folder, "--type", "f16", "--dry-run", "--json").out)
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    rng = np.random.default_rng(0)
    for tensor in plan["tensors"]:
        if len(tensor["shape"]) == 2 and tensor["name"].startswith("blk."):
            sums = rng.random((1, tensor["shape"][1]), np.float32) * np.float32(weight)
            writer.add_tensor(tensor["name"] + ".in_sum2", sums)
            writer.add_tensor(tensor["name"] + ".counts", np.full((1, 1), 64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_importance_matrix(source, tmp_path):
    matrix, out = imatrix(source, tmp_path / "wiki.imatrix.gguf"), tmp_path / "m.gguf"
    refused(mlxquant("convert", source, "-o", out, "--type", "q2_k_s"), "--imatrix")
    result = mlxquant("convert", source, "-o", out, "--type", "q2_k_s", "--imatrix", matrix)
    assert "with importance matrix" in result.out
    listed = mlxquant("convert", source, "--dry-run", "--type", "q2_k_s", "--imatrix", matrix).out
    types = dict(line.split()[0::3][:2] for line in listed.splitlines() if line.startswith(("blk.0.ffn_up", "token_")))
    assert types == {"blk.0.ffn_up.weight": "Q2_K*", "token_embd.weight": "Q2_K"}
    keys = GGUFFile(out).metadata
    assert keys["quantize.imatrix.file"] == "wiki.imatrix.gguf"
    assert mlxquant("verify", out, "--source", source, "--imatrix", matrix).code == 0
    checked = mlxquant("verify", out, "--source", source)
    refused(checked, "importance matrix 'wiki.imatrix.gguf'", "add --imatrix", code=2)
    other = imatrix(source, tmp_path / "other.gguf", weight=2.0)
    refused(mlxquant("verify", out, "--source", source, "--imatrix", other), "was not made with", code=2)
    assert mlxquant("convert", source, "-o", tmp_path / "x.gguf", "--type", "q4_k_m", "--imatrix", "none").code == 1
    plain = mlxquant("convert", source, "-o", tmp_path / "x.gguf", "--type", "f16", "--imatrix", matrix)
    assert "no tensor makes use of the importance matrix" in plain.out
    assert "no tensor makes use" not in result.out


def test_split_files(source, tmp_path):
    command = ["convert", source, "-o", tmp_path / "m.gguf", "--type", "q8_0", "--split-max-size", "300K"]
    result = mlxquant(*command)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert len(files) > 2
    assert files[0] == f"m-00001-of-{len(files):05d}.gguf"
    assert f"mlxquant verify {tmp_path / files[0]}" in result.out
    assert mlxquant("verify", tmp_path / files[0], "--source", source).code == 0
    refused(mlxquant(*command), "already exists", "--force")
    refused(mlxquant("verify", tmp_path / files[1]), "give the first one")
    (tmp_path / files[2]).unlink()
    refused(mlxquant("verify", tmp_path / files[0]), "is missing")
    assert mlxquant(*command, "--force").code == 0
    assert mlxquant("verify", tmp_path / files[0]).code == 0


@pytest.mark.parametrize(
    ("text", "size"), [("5G", 5 * 10**9), ("500M", 5 * 10**8), ("7k", 7000), ("1234", 1234), ("2GB", 2 * 10**9)]
)
def test_split_sizes(text, size):
    assert parse_split(text) == size


@pytest.mark.parametrize("text", ["0", "0G", "-1G", "G", "five", ""])
def test_split_sizes_that_are_none(text):
    with pytest.raises(UsageError):
        parse_split(text)


def test_a_modelfile_beside_it(source, tmp_path):
    out = tmp_path / "m.gguf"
    result = mlxquant("convert", source, "-o", out, "--type", "f16", "--modelfile")
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert "FROM ./m.gguf" in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert any("ollama show --template" in line for line in lines)
    assert all(line.startswith(("#", "FROM ", "PARAMETER ")) for line in lines)
    assert f"ollama create NAME -f {tmp_path / 'Modelfile'}" in result.out
    refused(
        mlxquant("convert", source, "-o", tmp_path / "n.gguf", "--type", "f16", "--modelfile"), "Modelfile: already"
    )
    result = mlxquant("convert", source, "-o", out, "--type", "f16", "--modelfile", "--split-max-size", "5G", "--force")
    assert result.code == 0  # it fits into one file
    result = mlxquant(
        "convert", source, "-o", tmp_path / "n.gguf", "--type", "f16", "--modelfile", "--split-max-size", "100K"
    )
    refused(result, "Ollama reads no split file", code=2)


def test_ctrl_c_is_one_line_and_the_next_run_goes_on(source, tmp_path, monkeypatch):
    out = tmp_path / "m.gguf"
    with monkeypatch.context() as patched:
        patched.setattr(ByteBar, "advance", lambda self, nbytes: os.kill(os.getpid(), signal.SIGINT))
        result = mlxquant("convert", source, "-o", out, "--type", "q4_k_m")
    assert result.code == 130
    assert result.err.strip().splitlines() == [
        f"Stopped. What is done stays in {out}.partial; the same command goes on from there."
    ]
    assert not out.exists()
    refused(mlxquant("convert", source, "-o", out, "--type", "q4_k_s"), "another plan", "--restart")
    assert mlxquant("convert", source, "-o", out, "--type", "q4_k_m", "--resume").code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_disk_that_fills_up(source, tmp_path):
    """A file-size limit stands in for a full disk: the write itself fails, in the middle."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "sys.argv = ['mlxquant', 'convert', sys.argv[1], '-o', sys.argv[2], '--type', 'q8_0']\n"
        "from mlxquant.cli.main import main; main()"
    )
    out = tmp_path / "m.gguf"
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.strip().splitlines()) <= 2
    assert not out.exists()


# -- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "m.gguf"], ["--type Q4_K_M"]),
        (["-o", "m", "--type", "q4_k_m"], ["does not end in .gguf", "-o m.gguf"]),
        (["-o", "m.gguf", "--type", "q4_k_m", "--bits", "4"], ["--bits is for MLX folders"]),
        (["-o", "m.gguf", "--type", "q4_k_m", "--mode", "affine"], ["--mode is for MLX folders"]),
        (["-o", "m", "--imatrix", "x"], ["--imatrix is for GGUF files"]),
        (["-o", "m", "--pure"], ["--pure is for GGUF files"]),
        (["-o", "m.gguf", "--type", "q4_k_x"], ["unknown", "Q4_K_M"]),
        (["-o", "m.gguf", "--type", "q4_k_m", "--tensor-type", "nothing=q8_0"], ["matches none"]),
        (["-o", "m.gguf", "--type", "q4_k_m", "--split-max-size", "big"], ["--split-max-size", "'big'", "5G"]),
        (["--type", "q4_k_m"], ["no output"]),
    ],
)
def test_contradictions_name_the_way_out(source, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    refused(mlxquant("convert", source, *arguments), *words, code=2)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_gguf_file_is_not_quantized_again_unasked(source, tmp_path):
    path = write_gguf(source, tmp_path / "q8.gguf", "Q8_0")
    command = ["convert", path, "-o", tmp_path / "m.gguf", "--type", "q4_k_m"]
    refused(mlxquant(*command), "second loss", "--allow-requantize")
    result = mlxquant(*command, "--allow-requantize")
    assert "(Q8_0): they are rounded a second time" in result.out
    assert mlxquant("verify", tmp_path / "m.gguf", "--source", path).code == 0


def test_a_quantized_gguf_file_becomes_floats_unasked(source, tmp_path):
    path = write_gguf(source, tmp_path / "q8.gguf", "Q8_0")
    command = ["convert", path, "-o", tmp_path / "m.gguf", "--type", "f16"]
    refused(mlxquant(*command, "--output-tensor-type", "q4_k"), "second loss", "--allow-requantize")
    result = mlxquant(*command)
    assert "(Q8_0): that loss stays, in more bytes" in result.out
    assert mlxquant("verify", tmp_path / "m.gguf", "--source", path).code == 0


def test_an_mlx_folder_as_source(source, tmp_path):
    assert mlxquant("convert", source, "-o", tmp_path / "mlx", "--bits", "8").code == 0
    command = ["convert", tmp_path / "mlx", "-o", tmp_path / "m.gguf", "--type", "q4_k_m"]
    refused(mlxquant(*command), "8g64 in the source", "--allow-requantize")
    assert mlxquant(*command, "--allow-requantize").code == 0
    assert mlxquant("verify", tmp_path / "m.gguf", "--source", tmp_path / "mlx").code == 0


def test_the_source_is_never_overwritten(source, tmp_path):
    path = write_gguf(source, tmp_path / "m.gguf", "F16")
    before = path.read_bytes()
    refused(mlxquant("convert", path, "-o", path, "--type", "q8_0", "--force"), "is the source file")
    assert path.read_bytes() == before


def test_force_replaces_gguf_files_only(source, tmp_path):
    out = tmp_path / "m.gguf"
    out.write_text("my thesis")
    refused(mlxquant("convert", source, "-o", out, "--type", "q8_0"), "already exists")
    refused(mlxquant("convert", source, "-o", out, "--type", "q8_0", "--force"), "is no GGUF file")
    out.unlink()
    for _ in range(2):
        assert mlxquant("convert", source, "-o", out, "--type", "q8_0", "--force").code == 0


def test_an_unknown_pre_tokenizer_names_the_flag(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "odd+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}  # fmt: skip
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = ["convert", copy, "-o", tmp_path / "m.gguf", "--type", "q8_0"]
    refused(mlxquant(*command), "--pre", "odd+")
    refused(mlxquant(*command, "--dry-run"), "--pre", "odd+")
    assert mlxquant(*command, "--pre", "gpt-2").code == 0
    assert mlxquant("verify", tmp_path / "m.gguf", "--source", copy).code == 0


def test_verify_with_another_source(source, tmp_path):
    other = make(tmp_path / "Other-1M", width=256, layers=1)
    assert mlxquant("convert", source, "-o", tmp_path / "m.gguf", "--type", "q8_0").code == 0
    checked = mlxquant("verify", tmp_path / "m.gguf", "--source", other)
    refused(checked, "give the source that this file was made from")
    assert "'general.basename' is 'Tiny', and the source gives 'Other'" in checked.out


def test_verify_of_other_files(source, tmp_path):
    refused(mlxquant("verify", write_gguf(source, tmp_path / "m.gguf", "F16")), "was not written by mlxquant")
    refused(mlxquant("verify", tmp_path / "none.gguf"), "none.gguf")
    refused(mlxquant("verify", source, "--imatrix", "x"), "--imatrix is for GGUF files", code=2)


def test_help_tells_the_two_outputs_apart():
    text = mlxquant("convert", "--help").out
    mlx, of_gguf = text.index("For an MLX folder:"), text.index("For a GGUF file:")
    assert mlx < text.index("--bits") < of_gguf < text.index("--imatrix")
    assert re.search(r"--dry-run\s", text[:mlx])
