"""Workspace: OUT whole or not at all, whoever dies when; nothing is overwritten unasked."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlxquant.errors import TargetError
from mlxquant.files.place import FilesPlace
from mlxquant.files.publish import Workspace
from mlxquant.files.shards import assign
from mlxquant.tensors import TensorSpec
from tests.files.kill_points import GROUPS, folder, old

SHARDS = assign(GROUPS)


def opened(out: Path, digest: str = "digest", **options: object) -> Workspace:
    return Workspace.open(out, digest, SHARDS, **options)


def fill(work: Workspace, groups: int = len(GROUPS)) -> None:
    for group in GROUPS[:groups]:
        for spec in group:
            work.write(spec.name, np.ones(spec.size, {"U32": "<u4", "F16": "<f2"}[spec.dtype]))
        work.finish(group[0].name, [spec.name for spec in group])


def begun(out: Path, groups: int = 2) -> Path:
    """An interrupted conversion."""
    with opened(out) as work:
        fill(work, groups)
    return out


def test_out_appears_only_at_the_end(tmp_path):
    out = tmp_path / "new" / "deep" / "out"
    with opened(out) as work:
        fill(work)
        work.write_file("config.json", b"{}")
        work.write_file("templates/tool.jinja", b"x")
        assert not out.exists()
        work.publish()
    assert sorted(p.name for p in out.rglob("*")) == [
        "config.json", "model.safetensors", "templates", "tool.jinja"]  # fmt: skip
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert work.checksums.keys() == {spec.name for group in GROUPS for spec in group}


def test_an_exception_keeps_what_is_finished(tmp_path):
    out = tmp_path / "out"

    def interrupted() -> None:
        with opened(out) as work:
            fill(work, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not out.exists()
    with opened(out, resume=True) as work:
        assert work.resumed == 3
        assert [work.done(group[0].name) for group in GROUPS] == [True, True, True, False]
        assert len(work.checksums) == 6


@pytest.mark.parametrize(
    ("how", "output"),
    [
        *((how, "folder") for how in ("each", "force", "restart", "chain")),
        *((how, "files") for how in ("each", "force", "chain")),
        *((how, "file") for how in ("each", "force")),
    ],
)
def test_killed_anywhere_and_run_again(tmp_path, how, output):
    script = Path(__file__).with_name("kill_points.py")
    done = subprocess.run([sys.executable, script, tmp_path, how, output], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if how == "chain":
        assert result["kills"] >= 20
    else:
        assert result["points"] > 50
        assert {"0", "1", "2", "3", "4"} <= result["outcomes"].keys()  # all numbers of groups were taken over


def test_bytes_that_a_power_cut_lost_are_made_again(tmp_path):
    out = begun(tmp_path / "out", 3)
    weights = tmp_path / "out.partial/model/model.safetensors"
    with weights.open("r+b") as file:
        file.seek(SHARDS[0].offsets["1.weight"] + 5)
        file.write(b"\xff")
    with opened(out) as work:
        assert [work.done(group[0].name) for group in GROUPS] == [True, False, True, False]


@pytest.mark.parametrize("harm", ["header", "length", "gone"])
def test_a_shard_that_is_not_intact_is_made_again(tmp_path, harm):
    out = begun(tmp_path / "out", 3)
    weights = tmp_path / "out.partial/model/model.safetensors"
    if harm == "header":
        with weights.open("r+b") as file:
            file.write(b"\0")
    elif harm == "length":
        os.truncate(weights, 100)
    else:
        weights.unlink()
    with opened(out) as work:
        assert work.resumed == 0
        fill(work)
        work.publish()
    with opened(tmp_path / "other") as work:
        fill(work)
        work.publish()
    assert folder(out) == folder(tmp_path / "other")


@pytest.mark.parametrize(
    "tail", [b'{"group": "2.wei', b"\0\0\0\0", b"[1]\n", b'{"group": 3, "sha256": {}}\n', b"\xff\n"]
)
def test_torn_lines_of_the_journal_are_passed_over(tmp_path, tail):
    out = begun(tmp_path / "out", 2)
    journal = tmp_path / "out.partial/journal"
    with journal.open("ab") as file:
        file.write(tail)
    with opened(out) as work:
        assert work.resumed == 2
        for spec in GROUPS[2]:
            work.write(spec.name, np.ones(spec.size, {"U32": "<u4", "F16": "<f2"}[spec.dtype]))
        work.finish("2.weight", [spec.name for spec in GROUPS[2]])
    with opened(out) as work:
        assert work.resumed == 3


def test_another_plan_or_version_needs_restart(tmp_path, monkeypatch):
    out = begun(tmp_path / "out")
    with pytest.raises(TargetError, match="begun with another plan") as caught:
        opened(out, "another digest")
    assert "--restart" in str(caught.value.hint)
    monkeypatch.setattr("mlxquant.files.journal.__version__", "9.9")
    with pytest.raises(TargetError, match="begun with mlxquant"):
        opened(out)
    monkeypatch.undo()
    with opened(out) as work:
        assert work.resumed == 2  # the refusals harmed nothing
    with opened(out, "another digest", restart=True) as work:
        assert work.resumed == 0
        assert not list(work.folder.iterdir())


def test_resume_insists_on_something_to_resume(tmp_path):
    with pytest.raises(TargetError, match="nothing to resume"):
        opened(tmp_path / "out", resume=True)
    assert not list(tmp_path.iterdir())


def test_a_partial_folder_that_is_not_ours(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/thesis.txt").write_text("")
    for restart in (False, True):
        with pytest.raises(TargetError, match="no journal"):
            opened(tmp_path / "out", restart=restart)
    assert [p.name for p in (tmp_path / "out.partial").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("where", ["out.partial", "out.partial/model"])
def test_a_source_named_like_the_partial_folder_is_not_emptied(tmp_path, where):
    (tmp_path / where).parent.mkdir(exist_ok=True)
    old(tmp_path / where)
    (tmp_path / "out.partial/journal").write_text("")
    with pytest.raises(TargetError, match="source"):
        opened(tmp_path / "out", source=tmp_path / where, restart=True)
    assert (tmp_path / where / "config.json").exists()


def test_a_replacement_killed_between_its_renames_gives_the_old_one_back(tmp_path):
    """Whatever is asked for next; here nothing that would replace it."""
    out = begun(tmp_path / "out")
    old(tmp_path / "out.partial/replaced")
    with pytest.raises(TargetError, match="already exists"):
        opened(out, restart=True)
    assert (out / "config.json").read_text() == '{"made": "before"}'


def test_a_lock_that_was_published_away(tmp_path, monkeypatch):
    """The other process publishes after we have opened its lock and before we have it."""

    def flock(fd: int, how: int) -> None:
        shutil.rmtree(tmp_path / "out.partial")
        real(fd, how)

    real = fcntl.flock
    monkeypatch.setattr("mlxquant.files.locking.fcntl.flock", flock)
    with pytest.raises(TargetError, match="another process"):
        opened(tmp_path / "out")


def test_two_processes(tmp_path):
    with opened(tmp_path / "out"), pytest.raises(TargetError, match="another process is writing"):
        opened(tmp_path / "out")
    opened(tmp_path / "out").close()


def test_out_exists(tmp_path):
    old(tmp_path / "out")
    with pytest.raises(TargetError, match="already exists") as caught:
        opened(tmp_path / "out")
    assert "--force" in str(caught.value.hint)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_replaces_only_when_published(tmp_path):
    out = tmp_path / "out"
    old(out)
    with opened(out, force=True) as work:
        fill(work)
        work.write_file("config.json", b"{}")
        assert (out / "config.json").read_text() == '{"made": "before"}'
        work.publish()
    assert (out / "config.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_out_that_came_into_being_meanwhile_is_not_replaced(tmp_path):
    with opened(tmp_path / "out") as work:
        fill(work)
        old(tmp_path / "out")
        with pytest.raises(TargetError, match="already exists"):
            work.publish()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["config.json"]


def test_force_does_not_replace_what_is_no_model(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("")
    with pytest.raises(TargetError, match="no model folder"):
        opened(tmp_path / "home", force=True)


def test_places_that_are_refused(tmp_path):
    source = tmp_path / "source"
    old(source)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "outer").mkdir()
    old(tmp_path / "outer/in")
    (tmp_path / "outer/config.json").write_text("{}")
    for out, given, says in [
        (source, source, "is the source folder"),
        (source / "a/b", source, "lies inside the source folder"),
        (tmp_path / "link/out", source, "lies inside the source folder"),
        (source / ".." / "source", source, "is the source folder"),
        (tmp_path / "outer", tmp_path / "outer/in", "holds the source in"),
        (tmp_path / "file", source, "is a file"),
        (tmp_path / "file/out", source, "a part of the path is a file"),
        (tmp_path / "dangling", source, "is a link"),
        (tmp_path / "link", source, "is a link"),
        (Path("/"), source, "no folder to write"),
        (tmp_path / ("n" * 250), source, "name is too long"),
    ]:
        with pytest.raises(TargetError, match=says) as caught:
            opened(out, source=given, force=True)
        assert caught.value.hint
    assert {p.name for p in source.iterdir()} == {"config.json"}


def test_beside_the_source_is_fine(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    opened(tmp_path / "out", source=tmp_path / "m.gguf").close()
    old(tmp_path / "source")
    opened(tmp_path / "source-4bit", source=tmp_path / "source").close()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc refuses new folders even to root")
def test_a_parent_that_nobody_can_write():
    with pytest.raises(TargetError, match=r"/proc/out\.partial: cannot be written") as caught:
        opened(Path("/proc/out"))
    assert caught.value.hint


def test_too_little_space_leaves_no_trace(tmp_path):
    huge = assign([[TensorSpec("huge", (2**30, 2**24), "F32")]])
    with pytest.raises(TargetError, match="free on this disk"):
        Workspace.open(tmp_path / "out", "digest", huge)
    assert not list(tmp_path.iterdir())


def test_unfinished_work_is_not_published(tmp_path):
    with opened(tmp_path / "out") as work:
        fill(work, 3)
        work.write("3.weight", np.ones((40, 8), "<u4"))
        with pytest.raises(ValueError, match="2 tensors not finished, the first 3"):
            work.publish()
        with pytest.raises(ValueError, match="0 bytes written"):
            work.finish("3.weight", ["3.weight", "3.scales"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "", ".", "..", "a/../x", "a//b", "a\\b", "a\0b", "a\nb", "model.safetensors", "n" * 300],
)
def test_names_that_would_leave_the_folder(tmp_path, name):
    with opened(tmp_path / "out") as work, pytest.raises(TargetError, match="is no name for a file"):
        work.write_file(name, b"")


def test_small_files_of_an_earlier_run_do_not_stay(tmp_path):
    out = tmp_path / "out"
    with opened(out) as work:
        work.write_file("old_template.jinja", b"x")
        work.write_file("sub/old.json", b"x")
        fill(work, 1)
    with opened(out) as work:
        assert [p.name for p in work.folder.iterdir()] == ["model.safetensors"]
        assert work.resumed == 1


FILES = ["model-00002-of-00002.gguf", "model-00001-of-00002.gguf"]


def files_place(folder: Path) -> FilesPlace:
    return FilesPlace(folder / "model.gguf", FILES)


def test_files_that_are_refused(tmp_path):
    first = tmp_path / FILES[1]
    for make, says in [
        (lambda: first.mkdir(), "is a folder"),
        (lambda: first.symlink_to(tmp_path / "nothing"), "is a link"),
        (lambda: first.write_text("my thesis"), "is no GGUF file"),
    ]:
        make()
        with pytest.raises(TargetError, match=says) as caught:
            Workspace.open(files_place(tmp_path), "digest", SHARDS, force=True)
        assert caught.value.hint
        first.rmdir() if first.is_dir() and not first.is_symlink() else first.unlink()
    first.write_bytes(b"GGUF and more")
    with pytest.raises(TargetError, match="is the source file"):
        Workspace.open(files_place(tmp_path), "digest", SHARDS, source=first, force=True)
    with pytest.raises(TargetError, match=r"00001-of-00002\.gguf: already exists"):
        Workspace.open(files_place(tmp_path), "digest", SHARDS)
    assert [p.name for p in tmp_path.iterdir()] == [first.name]


@pytest.mark.parametrize("note", [b"", b"{}", b'["../x"]', b"[1]", b"\0\0"])
def test_a_note_of_moves_that_a_power_cut_took(tmp_path, note):
    partial = begun(tmp_path / "model.gguf").with_name("model.gguf.partial")
    (partial / "moving").write_bytes(note)
    with opened(tmp_path / "model.gguf") as work:
        assert work.resumed == 2


def test_a_seal_is_not_part_of_what_makes_a_header_intact(tmp_path):
    """Killed between the seal and the last rename, nothing is made again."""
    (shard,) = SHARDS
    sealed = replace(shard, seal=(9, 11))
    for data in (b"ab", b"cd"):
        with Workspace.open(tmp_path / "out", "digest", [sealed]) as work:
            assert work.resumed == (0 if data == b"ab" else len(GROUPS))
            if data == b"ab":
                fill(work)
            work.seal(data)
            with pytest.raises(ValueError, match="seal of 2"):
                work.seal(b"abc")
    with Workspace.open(tmp_path / "out", "digest", [sealed]) as work:
        work.publish()
    assert (tmp_path / "out" / shard.file).read_bytes()[:12] == shard.header[:9] + b"cd" + shard.header[11:12]
