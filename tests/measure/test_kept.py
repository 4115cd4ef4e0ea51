"""Kept records: killed, cut short, damaged, of another run, on a full disk. What was whole is never lost."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mlxquant.errors import SourceError, TargetError
from mlxquant.measure.kept import Kept

HEADER = {"teacher": "0a1b", "text": "ffee", "expanded": True}
SHAPE = (5, 7)
RECORD = (np.float32, SHAPE)
SCORES = np.dtype([("kl", "<f8"), ("best", "<i4")])


def record(i, shape=SHAPE):
    return np.random.default_rng(i).normal(size=shape).astype(np.float32)


def filled(path, count=4):
    with Kept.open(path, HEADER, RECORD) as kept:
        for i in range(count):
            kept.append(record(i))
    return path


def same(kept, count):
    assert len(kept) == count
    for i in range(count):
        np.testing.assert_array_equal(kept.read(i), record(i))
    assert kept.all().shape == (count, *SHAPE)


def test_records_come_back(tmp_path):
    path = filled(tmp_path / "new" / "folder" / "a.states")
    with Kept.open(path, HEADER, RECORD) as kept:
        same(kept, 4)
        kept.append(record(4))
        same(kept, 5)
        with pytest.raises(IndexError):
            kept.read(5)
    with Kept.open(path, dict(reversed(HEADER.items())), RECORD) as kept:
        same(kept, 5)


def test_records_of_several_fields(tmp_path):
    rows = np.zeros(3, SCORES)
    rows["kl"], rows["best"] = [0.5, np.nan, 2.0], [1, 2, 3]
    for count in (1, 2):
        with Kept.open(tmp_path / "a", HEADER, np.dtype((SCORES, (3,)))) as kept:
            kept.append(rows)
            assert kept.all().tobytes() == rows.tobytes() * count
            assert kept.read(count - 1).dtype == SCORES


def test_an_empty_file_has_no_records(tmp_path):
    with Kept.open(tmp_path / "a", HEADER, RECORD) as kept:
        assert len(kept) == 0
        assert kept.all().shape == (0, *SHAPE)


@pytest.mark.parametrize("wrong", [np.zeros(SHAPE), np.zeros((7, 5), np.float32), np.zeros(SHAPE, SCORES)])
def test_a_record_of_another_kind_is_our_mistake(tmp_path, wrong):
    with Kept.open(tmp_path / "a", HEADER, RECORD) as kept, pytest.raises(ValueError, match="are kept"):
        kept.append(wrong)


# --- torn and damaged


def test_cut_anywhere_whole_records_stay(tmp_path):
    whole = filled(tmp_path / "whole").read_bytes()
    start = whole.index(b"\n") + 1
    each = (len(whole) - start) // 4
    cuts = [*range(start + 2), *random.Random(0).sample(range(start, len(whole)), 40)]
    for cut in [*cuts, *(start + i * each for i in range(5))]:
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        count = max(0, cut - start) // each
        with Kept.open(path, HEADER, RECORD) as kept:
            same(kept, count)
            kept.append(record(count))
        with Kept.open(path, HEADER, RECORD) as kept:
            same(kept, count + 1)


def test_a_damaged_record_and_all_after_it_are_computed_again(tmp_path):
    whole = filled(tmp_path / "whole").read_bytes()
    start = whole.index(b"\n") + 1
    each = (len(whole) - start) // 4
    for at in random.Random(1).sample(range(start, len(whole)), 40):
        bad = bytearray(whole)
        bad[at] ^= 1 << at % 8
        (tmp_path / "bad").write_bytes(bad)
        with Kept.open(tmp_path / "bad", HEADER, RECORD) as kept:
            same(kept, (at - start) // each)
        assert (tmp_path / "bad").stat().st_size == start + (at - start) // each * each


def test_a_record_in_anothers_place_is_none(tmp_path):
    path = filled(tmp_path / "a", 3)
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    each = (len(whole) - start) // 3
    first, second, third = (whole[start + i * each : start + (i + 1) * each] for i in range(3))
    path.write_bytes(whole[:start] + first + third + second)
    with Kept.open(path, HEADER, RECORD) as kept:
        same(kept, 1)


def test_damage_while_it_is_open_is_seen(tmp_path):
    path = filled(tmp_path / "a")
    with Kept.open(path, HEADER, RECORD) as kept:
        with path.open("r+b") as file:
            file.seek(-20, os.SEEK_END)
            file.write(b"\xff" * 4)
        same_before = kept.read(2)
        np.testing.assert_array_equal(same_before, record(2))
        with pytest.raises(SourceError, match="record 4 changed"):
            kept.read(3)


# --- another run's, or nobody's


@pytest.mark.parametrize(
    ("header", "kind", "words"),
    [
        (HEADER | {"teacher": "9f9f"}, RECORD, "another teacher: found '0a1b', expected '9f9f'"),
        (HEADER | {"text": "9", "expanded": False}, RECORD, "another text: found 'ffee', expected '9'"),
        (HEADER | {"student": "9"}, RECORD, "another student: found None, expected '9'"),
        ({k: v for k, v in HEADER.items() if k != "text"}, RECORD, "another text: found 'ffee', expected None"),
        (HEADER, (np.float32, (7, 5)), r"another shape: found \[5, 7\], expected \[7, 5\]"),
        (HEADER, (np.float64, SHAPE), "another dtype: found '<f4', expected '<f8'"),
    ],
)
def test_another_header_is_refused_and_left_alone(tmp_path, header, kind, words):
    path = filled(tmp_path / "a.states")
    before = path.read_bytes()
    with pytest.raises(SourceError, match=words) as caught:
        Kept.open(path, header, kind)
    assert str(path) in caught.value.message
    assert "--keep" in (caught.value.hint or "")
    assert path.read_bytes() == before
    with Kept.open(path, HEADER, RECORD) as kept:  # the refusal let go of the lock
        same(kept, 4)


def test_another_format_version_is_refused(tmp_path):
    path = filled(tmp_path / "a")
    path.write_bytes(path.read_bytes().replace(b'"kept": 1', b'"kept": 2', 1))
    with pytest.raises(SourceError, match="another file format: found 2, expected 1"):
        Kept.open(path, HEADER, RECORD)


@pytest.mark.parametrize(
    "garbage",
    [b"x", b"\x00" * 100_000, b"{}\n", b"[1]\n" * 50_000, b'{"kept": 1, "header": 3, "dtype": 0, "shape": 0}\n',
     b'{"a": ' * 20_000, b'{"kept": 1, "kept": 1}\n', b"\n", b"{" + b"9" * 70_000 + b"\n", json.dumps(HEADER).encode()],
)  # fmt: skip
def test_garbage_is_refused_and_left_alone(tmp_path, garbage):
    path = tmp_path / "a"
    path.write_bytes(garbage)
    with pytest.raises(SourceError, match="is no file that eval has kept"):
        Kept.open(path, HEADER, RECORD)
    assert path.read_bytes() == garbage


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="no regular file"):
        Kept.open(tmp_path / "pipe", HEADER, RECORD)
    (tmp_path / "folder").mkdir()
    with pytest.raises(TargetError, match="folder"):
        Kept.open(tmp_path / "folder", HEADER, RECORD)
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError):
        Kept.open(tmp_path / "file" / "a", HEADER, RECORD)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    path = filled(tmp_path / "a")
    path.chmod(0o444)
    with pytest.raises(TargetError, match="permission denied"):
        Kept.open(path, HEADER, RECORD)


def test_a_full_disk_keeps_what_was_whole(tmp_path):
    """A limit on the length of files stands for it: write() fails after some bytes of a record."""
    with Kept.open(tmp_path / "a", HEADER, RECORD) as kept:
        kept.append(record(0))
        size = (tmp_path / "a").stat().st_size
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 60, before[1]))
        try:
            with pytest.raises(TargetError, match="cannot be written"):
                kept.append(record(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert (tmp_path / "a").stat().st_size == size
        same(kept, 1)
        kept.append(record(1))
        same(kept, 2)


# --- other processes

WRITER = """
import sys
import numpy as np
from pathlib import Path
from mlxquant.measure.kept import Kept

with Kept.open(Path(sys.argv[1]), {"teacher": "0a1b"}, (np.float32, (300, 1000))) as kept:
    print(len(kept), flush=True)
    for i in range(len(kept), 10_000):
        kept.append(np.full((300, 1000), i, np.float32))
        print(i + 1, flush=True)
"""


def writer(path):
    command, pipe = [sys.executable, "-c", WRITER, str(path)], subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    first = process.stdout.readline()
    if not first:
        return process, None
    return process, int(first)


def test_killed_at_any_moment_it_goes_on(tmp_path):
    """kill -9 while records of 1.2 MB are written: all that were said to be kept are there, and go on."""
    path, said, draw = tmp_path / "a", 0, random.Random(2)
    for _ in range(6):
        process, found = writer(path)
        assert found is not None
        assert found in (said, said + 1)  # the last may have been whole though it was not said
        time.sleep(draw.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        said = int(out.split()[-1]) if out.split() else found
    with Kept.open(path, {"teacher": "0a1b"}, (np.float32, (300, 1000))) as kept:
        assert len(kept) in (said, said + 1)
        assert len(kept) > 6
        for i in range(len(kept)):
            assert (kept.read(i) == i).all()


def test_one_process_at_a_time(tmp_path):
    path = filled(tmp_path / "a")
    with Kept.open(path, HEADER, RECORD) as kept:
        with pytest.raises(TargetError, match="another process is writing it"):
            Kept.open(path, HEADER, RECORD)
        process, found = writer(path)
        assert found is None
        assert "another process is writing it" in process.communicate()[1]
        same(kept, 4)
    Kept.open(path, HEADER, RECORD).close()
