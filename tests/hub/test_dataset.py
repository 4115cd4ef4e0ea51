"""One file of a dataset through the real client, against the stand-in Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxquant.errors import HubError, MlxquantError, UsageError
from mlxquant.hub.dataset import DatasetFile, dataset_file, is_dataset_id
from mlxquant.hub.pull import pull
from tests.fake_hub import TOKEN, FakeHub
from tests.hub.repos import single

LIMIT = 1_000_000


def repo(folder: Path, *names: str) -> Path:
    """Each file holds its own name."""
    for name in ("README.md", ".gitattributes", "dataset_infos.json", "script.py", *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    return folder


def get(spec: str, revision: str | None = None) -> DatasetFile:
    return dataset_file(spec, revision, LIMIT)


def fails(spec: str, revision: str | None = None, kind: type[MlxquantError] = HubError) -> MlxquantError:
    with pytest.raises(kind) as caught:
        get(spec, revision)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def files_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["corpus.txt"], "corpus.txt"),
        (["data/train.jsonl", "data/validation.jsonl", "data/test.jsonl"], "data/validation.jsonl"),
        (["wiki.train.raw", "wiki.test.raw"], "wiki.test.raw"),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
          "data/test-00000-of-00001.parquet"], "data/test-00000-of-00001.parquet"),
        (["en/train.txt", "en/valid/part.txt"], "en/valid/part.txt"),
        (["latest.txt"], "latest.txt"),
        (["train.json", "eval.json"], "eval.json"),
    ],
)  # fmt: skip
def test_the_file_that_is_meant(fake_hub: FakeHub, tmp_path: Path, names: list[str], wanted: str) -> None:
    sha = fake_hub.add("datasets/org/texts", repo(tmp_path, *names))
    found = get("org/texts")
    assert (found.repo_id, found.revision, found.name) == ("org/texts", sha, wanted)
    assert found.path.read_text() == f"{wanted}\n"
    assert files_in(found.path.parents[wanted.count("/")]) == {wanted}, "nothing else is fetched"


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["a.txt", "b.txt"], "2 files"),
        (["latest.txt", "contest.txt", "devices.jsonl"], "3 files"),  # none is called after a split
        (["wikitext-103/validation.parquet", "wikitext-2/validation.parquet", "wikitext-2/test.parquet"], "2 files"),
        ([f"{i}.txt" for i in range(30)], "30 files"),
    ],
)
def test_several_files_are_refused_with_a_list(fake_hub: FakeHub, tmp_path: Path, names: list[str], count: str) -> None:
    fake_hub.add("datasets/org/texts", repo(tmp_path, *names))
    error = fails("org/texts")
    assert error.message.startswith(f"org/texts has {count} that could be meant")
    assert f"org/texts/{min(names)}" in (error.hint or "")
    assert len(error.hint or "") < 300
    assert fake_hub.served("/resolve/") == 0


def test_a_file_by_its_name(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.add("datasets/org/texts", repo(tmp_path, "a/b c.txt", "validation.txt", "notes.md"))
    assert get("org/texts/a/b c.txt").path.read_text() == "a/b c.txt\n"
    assert get("org/texts/notes.md").name == "notes.md", "whatever it is called"
    error = fails("org/texts/a/missing.txt")
    assert error.message == "org/texts has no file a/missing.txt"
    assert "validation.txt" in (error.hint or "")


def test_a_dataset_without_text(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.add("datasets/org/images", repo(tmp_path, "train/0.png"))
    assert "no files of text" in fails("org/images").message


def test_models_are_no_datasets(fake_hub: FakeHub, tmp_path: Path) -> None:
    """Two repos of one name, each in its own cache."""
    fake_hub.add("org/name", single(tmp_path / "model"))
    assert fails("org/name").message.startswith("datasets/org/name is not on ")
    fake_hub.add("datasets/org/name", repo(tmp_path / "texts", "a.txt"))
    path = get("org/name").path
    assert "datasets--org--name" in path.parts
    assert "models--org--name" in pull("org/name").path.parts


def test_revisions(fake_hub: FakeHub, tmp_path: Path) -> None:
    old = fake_hub.add("datasets/org/texts", repo(tmp_path / "old", "a.txt"))
    new = fake_hub.add("datasets/org/texts", repo(tmp_path / "new", "b.txt"), ref="v2")
    assert (get("org/texts").revision, get("org/texts").name) == (old, "a.txt")
    assert (get("org/texts", "v2").revision, get("org/texts", new).name) == (new, "b.txt")
    assert "no revision 'v3'" in fails("org/texts", "v3").message


def test_too_large_is_said_before_a_byte_comes(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = repo(tmp_path, "a.txt")
    (folder / "a.txt").write_bytes(b"x" * 2 * LIMIT)
    fake_hub.add("datasets/org/texts", folder)
    assert "org/texts/a.txt has 2 MB, expected at most 1 MB" in fails("org/texts").message
    assert fake_hub.served("/resolve/") == 0


def test_the_second_time_nothing_is_downloaded(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.add("datasets/org/texts", repo(tmp_path, "test.parquet"))
    first = get("org/texts")
    fake_hub.record.clear()
    assert get("org/texts") == first
    assert fake_hub.served("/resolve/") + fake_hub.served("/cdn/") == 0


def test_offline_takes_the_cached_file(fake_hub: FakeHub, tmp_path: Path) -> None:
    sha = fake_hub.add("datasets/org/texts", repo(tmp_path, "train.txt", "test.txt"))
    cached = get("org/texts")
    assert (cached.name, cached.revision) == ("test.txt", sha)
    code = "from mlxquant.hub.dataset import dataset_file; print(dataset_file({!r}, None, 10**6).name)"

    def offline(spec: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code.format(spec)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    assert offline("org/texts").stdout == "test.txt\n"
    assert offline("org/texts/test.txt").stdout == "test.txt\n"
    assert "is not complete in the Hub cache (train.txt)" in offline("org/texts/train.txt").stderr
    assert "org/other is not in the Hub cache" in offline("org/other").stderr


def test_what_the_hub_refuses(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.add("datasets/org/texts", repo(tmp_path, "a.txt"))
    fake_hub.gate("datasets/org/texts")
    error = fails("org/texts")
    assert error.message.startswith("datasets/org/texts is gated")
    assert f"{fake_hub.url}/datasets/org/texts" in (error.hint or "")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert get("org/texts").name == "a.txt"


def test_content_that_lies_leaves_the_cache(fake_hub: FakeHub, tmp_path: Path) -> None:
    """An LFS file of the size that was listed, with other bytes."""
    folder = repo(tmp_path, "a.txt")
    (folder / "a.txt").rename(folder / "a.bin")
    sha = fake_hub.add("datasets/org/texts", folder)
    (folder / "a.bin").write_text("A.TXT\n")
    error = fails("org/texts/a.bin")
    assert "has not the sha256 listed" in error.message
    (folder / "a.bin").write_text("a.txt\n")
    assert get("org/texts/a.bin").revision == sha


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/etc/passwd", "a\\b.txt", "C:evil.txt", "a/../../b.txt", "a\x1b[2J.txt"]
)
def test_names_that_climb_out(fake_hub: FakeHub, tmp_path: Path, name: str) -> None:
    row = {"type": "file", "path": name, "size": 1, "oid": "0" * 40}
    fake_hub.add("datasets/org/texts", repo(tmp_path, "a.txt"), lies=[row])
    assert "which does not stay inside" in fails("org/texts").message
    assert not is_dataset_id(f"org/texts/{name}")


def test_ids() -> None:
    assert is_dataset_id("org/name")
    assert is_dataset_id("Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet")
    for text in ("name", "org/", "/org/name", "org/name/", "./org/name", "org/name/../x", "a.txt", "", "org//name"):
        assert not is_dataset_id(text), text
    fails("name", kind=UsageError)
