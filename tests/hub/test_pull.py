"""`pull` through the real client, against the stand-in Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxquant.errors import HubError, UsageError
from mlxquant.hub.pull import pull
from tests.fake_hub import TOKEN, FakeHub
from tests.hub.repos import sharded, single


def files_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def fails(repo_id: str, revision: str | None = None) -> HubError:
    with pytest.raises(HubError) as caught:
        pull(repo_id, revision)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def test_only_what_is_needed_is_downloaded(fake_hub: FakeHub, tmp_path: Path):
    folder = single(tmp_path / "repo")
    for name in (
        "modeling_evil.py",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "consolidated.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 10_000)
    wanted = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "LICENSE", "README.md"}
    wanted.add("additional_chat_templates/tools.jinja")
    for name in wanted - files_in(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    sha = fake_hub.add("org/model", folder)
    pulled = pull("org/model")
    assert (pulled.repo_id, pulled.revision) == ("org/model", sha)
    assert files_in(pulled.path) == wanted
    for name in files_in(pulled.path):
        assert (pulled.path / name).read_bytes() == (folder / name).read_bytes()
    weights = next(f for f in pulled.files if f.name == "model.safetensors")
    assert weights.sha256 == fake_hub.repos["org/model"].commits[sha]["model.safetensors"].sha256


def test_a_sharded_repo_and_its_index(fake_hub: FakeHub, tmp_path: Path):
    folder = sharded(tmp_path / "repo")
    (folder / "model-old.safetensors").write_bytes(b"not in the index")
    fake_hub.add("org/model", folder)
    got = files_in(pull("org/model").path)
    assert {n for n in got if "safetensors" in n} == {
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_the_second_pull_downloads_nothing(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/model", single(tmp_path / "repo"))
    first = pull("org/model")
    fake_hub.record.clear()
    assert pull("org/model") == first
    assert fake_hub.served("/resolve/") + fake_hub.served("/cdn/") == 0


def test_revisions_are_branches_or_commits(fake_hub: FakeHub, tmp_path: Path):
    old = fake_hub.add("org/model", single(tmp_path / "old", seed=1))
    new = fake_hub.add("org/model", single(tmp_path / "new", seed=2), ref="v2")
    assert pull("org/model").revision == old
    assert pull("org/model", "v2").revision == new
    at_commit = pull("org/model", new)
    assert at_commit.revision == new
    assert (at_commit.path / "model.safetensors").read_bytes() == (tmp_path / "new/model.safetensors").read_bytes()


def test_progress_ends_at_the_sum_of_the_files(fake_hub: FakeHub, tmp_path: Path):
    folder = single(tmp_path / "repo")
    fake_hub.add("org/model", folder)
    seen: list[tuple[int, int]] = []
    pulled = pull("org/model", progress=lambda done, total: seen.append((done, total)))
    total = sum((folder / n).stat().st_size for n in files_in(pulled.path))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {t for _, t in seen} == {total}


def test_pulling_prints_nothing(fake_hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    fake_hub.add("org/model", single(tmp_path / "repo"))
    pull("org/model")
    assert capfd.readouterr() == ("", "")


def test_one_gguf_file(fake_hub: FakeHub, tmp_path: Path):
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "a-Q4.gguf").write_bytes(b"GGUF" * 100)
    (folder / "a-Q8.gguf").write_bytes(b"GGUF" * 200)
    fake_hub.add("org/model", folder)
    error = fails("org/model")
    assert "a-Q4.gguf, a-Q8.gguf" in error.message
    assert "org/model/a-Q4.gguf" in str(error.hint)
    pulled = pull("org/model/a-Q4.gguf")
    assert pulled.path.read_bytes() == b"GGUF" * 100
    assert fake_hub.served("Q8") == 0
    assert "a-Q4.gguf" in fails("org/model/none.gguf").message


def test_all_parts_of_a_split_gguf(fake_hub: FakeHub, tmp_path: Path):
    folder = tmp_path / "repo"
    folder.mkdir()
    parts = [f"model-Q8_0-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for name in (*parts, "model-Q4_0-00001-of-00002.gguf", "model-F16.gguf"):
        (folder / name).write_bytes(name.encode())
    fake_hub.add("org/split", folder)
    pulled = pull(f"org/split/{parts[0]}")
    assert pulled.path.name == parts[0]
    assert files_in(pulled.path.parent) == set(parts)
    assert "one of 2 parts, and the repo holds 1" in fails("org/split/model-Q4_0-00001-of-00002.gguf").message


@pytest.mark.parametrize("text", ["model", "org/model/config.json", "../up/x.gguf", "org/model/../../x.gguf", "a--b/c"])
def test_what_is_no_hub_id(text: str):
    with pytest.raises(UsageError):
        pull(text)


def test_no_weights_is_said_with_what_there_is(fake_hub: FakeHub, tmp_path: Path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/config.json").write_text("{}")
    fake_hub.add("org/empty", tmp_path / "p")
    assert "no model weights" in fails("org/empty").message
    (tmp_path / "p/pytorch_model.bin").write_bytes(b"pickle")
    fake_hub.add("org/pickle", tmp_path / "p")
    assert "pytorch_model.bin" in fails("org/pickle").message


def test_repo_and_revision_not_found(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/model", single(tmp_path / "repo"))
    error = fails("org/nobody")
    assert "org/nobody is not on" in error.message
    assert "hf auth login" in str(error.hint)
    assert "no revision 'v9'" in fails("org/model", "v9").message


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_gated_repo_names_the_page_and_never_the_token(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None
):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    fake_hub.add("org/model", single(tmp_path / "repo"))
    fake_hub.gate("org/model", allowed=False)
    error = fails("org/model")
    assert "gated" in error.message
    assert f"{fake_hub.url}/org/model" in str(error.hint)
    assert ("hf auth login" in str(error.hint)) == (token is None)
    assert TOKEN not in error.message + str(error.hint)


def test_the_token_opens_gated_and_private_repos(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_hub.add("org/model", single(tmp_path / "repo"))
    fake_hub.gate("org/model")
    fake_hub.repos["org/model"].private = True
    assert "is private" in fails("org/model").message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (pull("org/model").path / "model.safetensors").is_file()
    assert all(s.authorization is None for s in fake_hub.requests("/cdn/"))


def test_a_wrong_token_is_said(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongWRONGwrong")
    fake_hub.add("org/model", single(tmp_path / "repo"))
    error = fails("org/model")
    assert "token" in error.message
    assert "hf_wrong" not in error.message + str(error.hint)


def test_a_cut_connection_is_resumed(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # 10 MB, below which the client starts again
    folder = single(tmp_path / "repo")
    fake_hub.add("org/model", folder)
    fake_hub.fail("/cdn/org/model", cut_at=1000)
    pulled = pull("org/model")
    assert (pulled.path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    gets = fake_hub.requests("/cdn/org/model", "GET")
    assert [s.status for s in gets] == [200, 206]
    assert gets[1].body_bytes == (folder / "model.safetensors").stat().st_size - 1000


def test_content_that_is_not_what_the_hub_lists_is_refused(fake_hub: FakeHub, tmp_path: Path):
    folder = single(tmp_path / "repo")
    fake_hub.add("org/model", folder)
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # same size, one bit
    assert "sha256" in fails("org/model").message
    (folder / "model.safetensors").write_bytes(good)
    assert (pull("org/model").path / "model.safetensors").read_bytes() == good  # the bad one is gone


def test_a_disk_that_is_too_small_is_known_before_the_download(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = single(tmp_path / "repo")
    huge = {"type": "file", "path": "model-00002.safetensors", "size": 10**18, "oid": "a" * 40}
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    fake_hub.add("org/model", folder, lies=[huge])
    error = fails("org/model")
    assert "1,000,000,000 GB more" in error.message
    assert fake_hub.served("/cdn/") == 0


@pytest.mark.parametrize(
    "name", ["../../evil.json", "/etc/evil", "a/../b", "..", "a\\..\\evil", "C:evil", "a//b", "x\n"]
)
def test_hostile_file_names_are_refused(fake_hub: FakeHub, tmp_path: Path, name: str):
    row = {"type": "file", "path": name, "size": 3, "oid": "a" * 40}
    fake_hub.add("org/model", single(tmp_path / "repo"), lies=[row])
    error = fails("org/model")
    assert repr(name) in error.message
    assert fake_hub.served("/resolve/") == 0


@pytest.mark.parametrize(
    ("weight_map", "told"),
    [
        ({"a": "../../evil.safetensors"}, "does not stay inside"),
        ({"a": "/etc/passwd"}, "does not stay inside"),
        ({"a": "model-00009.safetensors"}, "does not hold"),
        ({"a": "config.json"}, "does not hold"),
        ({"a": 7}, "weight_map"),
        (["a"], "weight_map"),
        ({}, "names no files"),
    ],
)
def test_a_hostile_index(fake_hub: FakeHub, tmp_path: Path, weight_map: object, told: str):
    folder = sharded(tmp_path / "repo")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    fake_hub.add("org/model", folder)
    assert told in fails("org/model").message
    assert fake_hub.served("/cdn/") == 0


@pytest.mark.parametrize(
    "body", [b"<html>log in</html>", b"[]", b"{}", b"null", b'{"id": 3, "sha": "main"}', b"[" * 99999]
)
@pytest.mark.parametrize("path", ["/api/models/org/model", "/tree/"])
def test_answers_that_are_not_the_hubs(fake_hub: FakeHub, tmp_path: Path, path: str, body: bytes):
    fake_hub.add("org/model", single(tmp_path / "repo"))
    fake_hub.fail(path, body=body, times=9)
    fails("org/model")


def test_offline_mode_takes_the_cache_or_says_so(fake_hub: FakeHub, tmp_path: Path):
    fake_hub.add("org/model", single(tmp_path / "repo"))
    pulled = pull("org/model")
    fake_hub.record.clear()
    script = "import sys; from mlxquant.hub.pull import pull; print(pull(*sys.argv[1:]))"

    def offline(*args: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, "-c", script, *args], env=env, capture_output=True, text=True, check=False
        )

    assert offline("org/model").stdout.strip() == str(pulled)
    assert offline("org/model", pulled.revision).stdout.strip() == str(pulled)
    assert "not in the Hub cache" in offline("org/other").stderr.splitlines()[-1]
    assert "not in the Hub cache" in offline("org/model", "v2").stderr.splitlines()[-1]
    (pulled.path / "tokenizer.json").unlink()
    assert "not complete" in offline("org/model").stderr.splitlines()[-1]
    assert fake_hub.record == []


def test_a_dead_network_takes_the_cache_or_says_so(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    fake_hub.add("org/model", single(tmp_path / "repo"))
    pulled = pull("org/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert pull("org/model") == pulled
    error = fails("org/other")
    assert "http://127.0.0.1:1 cannot be reached" in error.message
    assert "not in the Hub cache" in error.message


@pytest.mark.parametrize(("status", "told"), [(429, "fewer requests"), (503, "in trouble")])
def test_a_hub_in_trouble(fake_hub: FakeHub, tmp_path: Path, status: int, told: str):
    fake_hub.add("org/model", single(tmp_path / "repo"))
    fake_hub.fail("/api/models/org/model", status=status)
    assert told in fails("org/model").message
    assert pull("org/model").path.is_dir()


def test_a_cache_that_cannot_be_written(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    fake_hub.add("org/model", single(tmp_path / "repo"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert "cannot be written" in fails("org/model").message
