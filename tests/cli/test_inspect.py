"""`mlxquant inspect`, from the command line down to the stand-in Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from mlxquant import __version__
from tests import tiny
from tests.cli.runner import mlxquant, refused
from tests.fake_hub import FakeHub
from tests.gguf_files import write_gguf
from tests.hub.repos import sharded, tensors
from tests.test_imports import HEAVY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def gguf_path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "model-Q8_0.gguf", "Q8_0")


def answer(*arguments: object) -> dict:
    result = mlxquant("inspect", *arguments, "--json")
    assert result.code == 0, result
    assert result.err == ""
    assert result.out.count("\n") == 1
    return json.loads(result.out)


def test_a_folder_for_people(folder: Path):
    result = mlxquant("inspect", folder)
    assert result.code == 0
    for text in ("Qwen3ForCausalLM", "16.00", "bfloat16", "attn_q", "4, 2 for keys and values"):
        assert text in result.out
    assert "model.layers.0" not in result.out


def test_tensors_are_listed_on_request(folder: Path):
    out = mlxquant("inspect", folder, "--tensors").out
    row = next(line for line in out.splitlines() if "model.layers.1.mlp.down_proj.weight" in line)
    assert row.split()[1:] == ["ffn_down", "128", "x", "256", "bfloat16", "65,536"]


def test_json_is_one_object_with_every_tensor(folder: Path):
    found = answer(folder, "--tensors")
    assert found["path"] == str(folder)
    assert found["parameters"] == sum(np.prod(t["shape"]) for t in found["tensors"])
    assert (
        found["bytes"] == sum(t["bytes"] for t in found["tensors"]) == sum(r["bytes"] for r in found["roles"].values())
    )
    assert "tensors" not in answer(folder)


def test_a_gguf_file(gguf_path: Path, folder: Path):
    found = answer(gguf_path)
    assert found["format"] == "gguf"
    assert found["parameters"] == answer(folder)["parameters"]
    assert set(found["formats"]) == {"Q8_0", "F32"}


def test_a_gguf_file_says_how_it_was_made(gguf_path: Path, tmp_path: Path):
    ours = tmp_path / "m.gguf"
    assert mlxquant("convert", gguf_path, "-o", ours, "--type", "f16").code == 0
    made = {"file_type": "F16", "made_by": f"mlxquant {__version__}", "made_from": gguf_path.name}
    assert answer(ours)["made"] == made
    rows = [line.split() for line in mlxquant("inspect", ours).out.splitlines()]
    assert ["file", "type", "F16"] in rows
    assert ["made", "from", gguf_path.name] in rows


def test_a_hub_id_costs_the_headers_alone(fake_hub: FakeHub, tmp_path: Path):
    sha = fake_hub.add("org/model", big(tmp_path / "repo"))
    found = answer("org/model")
    assert (found["id"], found["revision"]) == ("org/model", sha)
    assert found["bytes"] == 2 * found["parameters"] > 15_000_000
    assert fake_hub.served() < found["bytes"] / 100
    assert {f["name"] for f in found["files"]} == {"model.safetensors"}
    assert all(len(f["sha256"]) == 64 for f in found["files"])


def big(path: Path) -> Path:
    return tiny.make(path, "llama", width=512, layers=4)


def test_a_sharded_hub_id_at_a_revision(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/model", sharded(tmp_path / "old"))
    sha = fake_hub.add("org/model", sharded(tmp_path / "new", seed=2), ref="v2")
    found = answer("org/model", "--revision", "v2")
    assert found["revision"] == sha
    assert found["parameters"] == sum(t.size for t in tensors().values())
    assert "unknown" not in found["roles"]


def test_a_gguf_on_the_hub_costs_its_header(fake_hub: FakeHub, tmp_path: Path):
    repo = tmp_path / "repo"
    repo.mkdir()
    local = write_gguf(big(tmp_path / "hf"), repo / "model-F16.gguf")
    fake_hub.add("org/model", repo)
    remote = answer("org/model/model-F16.gguf")
    same = answer(local)
    for key in ("path", "id", "revision", "files"):
        remote.pop(key, None)
        same.pop(key, None)
    assert remote == same
    assert fake_hub.served() < local.stat().st_size / 10


def test_a_gguf_header_longer_than_the_first_request(fake_hub: FakeHub, tmp_path: Path):
    repo = tmp_path / "repo"
    repo.mkdir()
    writer = gguf.GGUFWriter(str(repo / "long.gguf"), "newarch")
    writer.add_array("tokenizer.ggml.tokens", [f"token number {i}" for i in range(250_000)])
    writer.add_block_count(3)
    writer.add_tensor("a", np.zeros((1024, 4096), np.float32))
    writer.add_tensor("b", np.zeros((64, 64), np.float16))
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    fake_hub.add("org/model", repo)
    found = answer("org/model/long.gguf", "--tensors")
    assert found["layers"] == 3
    assert [(t["name"], t["shape"]) for t in found["tensors"]] == [("a", [1024, 4096]), ("b", [64, 64])]
    assert fake_hub.served() < 17 * 2**20 < (repo / "long.gguf").stat().st_size


def test_a_gguf_header_cut_where_zeros_would_do(fake_hub: FakeHub, tmp_path: Path):
    """The first request ends before the last tensor's type: zeros in its place are an F32 tensor."""
    repo = tmp_path / "repo"
    repo.mkdir()

    def write(padding: int) -> bytes:
        writer = gguf.GGUFWriter(str(repo / "cut.gguf"), "newarch")
        writer.add_string("general.description", "x" * padding)
        writer.add_tensor("only", np.zeros((1024, 1024), np.float64))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (repo / "cut.gguf").read_bytes()

    type_at = write(1).index(b"only") - 1 + 4 + 4 + 2 * 8  # after the name, the number of axes and two axes
    assert write(2**20 - type_at)[2**20 :].startswith((28).to_bytes(4, "little"))
    fake_hub.add("org/model", repo)
    assert answer("org/model/cut.gguf")["formats"].keys() == {"F64"}


@pytest.mark.parametrize("content", [b"GGUF", b"<html>log in</html>" * 99, b"GGUF" + b"\xff" * 4000, b""])
def test_a_hub_file_that_is_no_gguf(fake_hub: FakeHub, tmp_path: Path, content: bytes):
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "m.gguf").write_bytes(content)
    fake_hub.add("org/model", repo)
    refused(mlxquant("inspect", "org/model/m.gguf"), "org/model/m.gguf")


def test_refusals_are_one_line(fake_hub: FakeHub, tmp_path: Path, folder: Path):
    refused(mlxquant("inspect", "org/nobody"), "org/nobody")
    refused(mlxquant("inspect", "no such thing"), "neither a path", code=2)
    refused(mlxquant("inspect", folder, "--revision", "v2"), "--revision", code=2)
    refused(mlxquant("inspect", tmp_path), "config.json")
    fake_hub.add("org/model", sharded(tmp_path / "repo"))
    (tmp_path / "repo/model-00001-of-00002.safetensors").write_bytes((10**9).to_bytes(8, "little"))
    fake_hub.add("org/model", tmp_path / "repo")
    refused(mlxquant("inspect", "org/model"), "1,000,000,000 bytes")


def test_what_files_say_reaches_the_terminal_without_control_characters(folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["[bold]x\x1b[31m\nFAKE"]}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
    out = mlxquant("inspect", copy).out
    assert "[bold]x?[31m?FAKE" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("what", ["folder", "gguf", "hub"])
def test_nothing_heavy_is_loaded(what: str, folder: Path, gguf_path: Path, fake_hub: FakeHub):
    fake_hub.add("org/model", folder)
    model = {"folder": str(folder), "gguf": str(gguf_path), "hub": "org/model"}[what]
    script = (
        "import sys; from mlxquant.cli.main import main\n"
        f"sys.argv = ['mlxquant', 'inspect', {model!r}, '--tensors']\nmain()\n"
        f"sys.exit(','.join(m for m in {(*HEAVY, 'gguf')!r} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert "attn_q" in done.stdout
