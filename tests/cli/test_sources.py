"""The same conversion from every kind of source: a folder, a Hub id, a GGUF file, a GGUF file on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.runner import mlxquant, refused
from tests.convert.test_bit_identity import assert_same
from tests.fake_hub import FakeHub
from tests.gguf_files import write_gguf


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folder(request, tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("source"), request.param, dtype="float16", tied=request.param == "llama")


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    assert mlxquant("convert", folder, "-o", out, "--bits", "5").code == 0
    return out


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_a_gguf_file_gives_the_same_tensors_as_the_folder_it_was_made_from(folder, reference, tmp_path, kind):
    """Permuted rows are back in place and nothing is rounded on the way."""
    path = write_gguf(folder, tmp_path / f"model-{kind}.gguf", kind)
    assert mlxquant("convert", path, "-o", tmp_path / "out", "--bits", "5").code == 0
    assert_same(tmp_path / "out", reference)
    result = mlxquant("verify", tmp_path / "out", "--source", path)
    assert result.code == 0, result


def test_a_quantized_gguf_file_is_decoded_and_verified(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "model-Q4_1.gguf", "Q4_1")
    command = ["convert", path, "-o", tmp_path / "out", "--bits", "8"]
    refused(mlxquant(*command), "a second loss", "--allow-requantize")
    assert mlxquant(*command, "--allow-requantize").code == 0
    assert mlxquant("verify", tmp_path / "out", "--source", path).code == 0
    origin = json.loads((tmp_path / "out" / "config.json").read_text())["mlxquant"]["source"]
    assert origin["format"] == "gguf"
    assert "Q4_1" in origin["types"]
    assert len(origin["header_sha256"]) == 64


def test_the_rebuilt_tokenizer_and_template_work_in_stock_mlx_lm(folder, tmp_path):
    from mlx_lm import load

    path = write_gguf(folder, tmp_path / "model.gguf", "F16")
    mlxquant("convert", path, "-o", tmp_path / "out")
    ours, theirs = load(str(tmp_path / "out"))[1], load(str(folder))[1]
    text = "def f(x):\n    return x * 2  # naïve — 数字 42"
    assert ours.encode(text) == theirs.encode(text)
    messages = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(messages, add_generation_prompt=True) == theirs.apply_chat_template(
        messages, add_generation_prompt=True
    )


def test_a_hub_id_is_pulled_and_its_commit_recorded(folder, reference, fake_hub: FakeHub, tmp_path):
    fake_hub.add("org/model", folder)
    result = mlxquant("convert", "org/model", "-o", tmp_path / "out", "--bits", "5")
    assert result.code == 0, result
    assert_same(tmp_path / "out", reference)
    origin = json.loads((tmp_path / "out" / "config.json").read_text())["mlxquant"]["source"]
    assert origin["name"] == "org/model"
    assert len(origin["revision"]) == 40


def test_a_dry_run_of_a_hub_id_downloads_no_weights(folder, fake_hub: FakeHub, tmp_path):
    fake_hub.add("org/model", folder)
    local = json.loads(mlxquant("convert", folder, "--dry-run", "--json").out)
    remote = json.loads(mlxquant("convert", "org/model", "--dry-run", "--json").out)
    assert remote == local
    assert fake_hub.served() < (folder / "model.safetensors").stat().st_size / 4


def test_a_quantized_mlx_folder_on_the_hub(folder, reference, fake_hub: FakeHub, tmp_path):
    """Its headers tell that it is quantized: refused in a dry run as in earnest, planned when that is allowed."""
    fake_hub.add("org/mlx", reference)
    refused(mlxquant("convert", "org/mlx", "--dry-run"), "would add a second loss")
    refused(mlxquant("convert", "org/mlx", "-o", tmp_path / "out"), "would add a second loss")
    local = json.loads(mlxquant("convert", reference, "--dry-run", "--json", "--allow-requantize").out)
    assert json.loads(mlxquant("convert", "org/mlx", "--dry-run", "--json", "--allow-requantize").out) == local


def test_a_gguf_file_on_the_hub(folder, fake_hub: FakeHub, tmp_path):
    repo = tmp_path / "repo"
    repo.mkdir()
    path = write_gguf(folder, repo / "model-F16.gguf", "F16")
    fake_hub.add("org/gguf", repo)
    local = json.loads(mlxquant("convert", path, "--dry-run", "--json").out)
    assert json.loads(mlxquant("convert", "org/gguf/model-F16.gguf", "--dry-run", "--json").out) == local
    assert mlxquant("convert", "org/gguf/model-F16.gguf", "-o", tmp_path / "out").code == 0
    assert mlxquant("verify", tmp_path / "out", "--source", "org/gguf/model-F16.gguf").code == 0


def test_a_repo_that_is_not_there(fake_hub: FakeHub, tmp_path):
    refused(mlxquant("convert", "org/nothing", "-o", tmp_path / "out"), "org/nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_path_that_is_not_there_is_not_looked_up_on_the_hub(fake_hub: FakeHub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command, *options in (["generate", "-p", "hello"], ["inspect"]):
        refused(mlxquant(command, "models/m.gguf", *options), "models/m.gguf", "org/name/file.gguf", code=2)
    assert fake_hub.record == []


def test_vision_parts_are_said_to_be_left_out(tmp_path):
    folder = tiny.make(tmp_path / "m", "gemma3")
    result = mlxquant("convert", folder, "-o", tmp_path / "out", "--group-size", "32")
    assert result.code == 0, result
    assert "vision" in result.out
    assert "only its text part is converted" in result.out
    assert "vision_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_rope_settings_of_newer_transformers_reach_stock_mlx_lm(tmp_path):
    """transformers 5 writes rope_parameters, which stock mlx-lm does not read for llama."""
    folder = tiny.make(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert mlxquant("convert", folder, "-o", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 500000.0
    assert mlxquant("verify", tmp_path / "out", "--source", folder).code == 0


def test_a_model_is_run_from_a_gguf_file_and_from_a_hub_id(folder, fake_hub: FakeHub, tmp_path):
    fake_hub.add("org/model", folder)
    said = []
    for model in (folder, write_gguf(folder, tmp_path / "model.gguf", "F16"), "org/model"):
        result = mlxquant("generate", model, "-p", "Hello", "-n", "12", "--temp", "0", "--json")
        assert result.code == 0, result
        said.append(json.loads(result.out))
        chat = mlxquant("chat", model, "-n", "4", "--temp", "0", stdin="Hello\n")
        assert chat.code == 0, chat
    assert said[0]["tokens"]
    assert said[0]["tokens"] == said[1]["tokens"] == said[2]["tokens"]
    assert said[0]["text"] == said[1]["text"] == said[2]["text"]
