"""read_header and SafetensorsFile against the safetensors library, and against files made to hurt."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save_file

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.files.reading import InputFile
from mlxquant.files.safetensors_file import SafetensorsFile, read_header
from mlxquant.tensors import DTYPES

RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.normal(size=(7, 5)).astype(np.float32),
    "b": RNG.normal(size=(2, 3, 4)).astype(np.float16),
    "c": RNG.normal(size=(6, 8)).astype(ml_dtypes.bfloat16),
    "ids": np.arange(9, dtype=np.int64),
    "packed": RNG.integers(0, 2**32, size=(4, 4), dtype=np.uint32),
    "flags": np.array([True, False, True]),
    "scalar": np.array(2.5, np.float64),
    "empty": np.zeros((0, 4), np.float32),
    "a name so long that mutations often hit it and do no harm " * 4: np.zeros((3, 0), np.float32),
    "f8": RNG.normal(size=(4, 4)).astype(ml_dtypes.float8_e4m3fn),
}


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file as bytes: `header` is an object or ready text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (2,), span: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "all.safetensors", metadata={"format": "pt"})
    return tmp_path / "all.safetensors"


def test_rows_are_the_librarys_bytes(saved):
    file = SafetensorsFile(saved)
    assert file.specs.keys() == TENSORS.keys()
    assert file.header.metadata == {"format": "pt"}
    for name, expected in TENSORS.items():
        spec = file.specs[name]
        assert spec.shape == expected.shape
        assert spec.nbytes == expected.nbytes
        rows = file.read_rows(name, 0, spec.rows)
        assert rows.dtype == np.dtype(DTYPES[spec.dtype].numpy)
        assert rows.shape == (spec.rows, spec.width)
        assert rows.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (2, 5), (6, 7), (3, 3)])
def test_a_few_rows(saved, start, stop):
    assert np.array_equal(SafetensorsFile(saved).read_rows("a", start, stop), TENSORS["a"][start:stop])


def test_rows_are_read_where_the_system_has_no_preadv(saved, monkeypatch):
    """As in some builds of Python for macOS; and in as many reads as it takes."""
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.setattr("mlxquant.files.reading._ONE_READ_BYTES", 7)
    test_rows_are_the_librarys_bytes(saved)


def test_rows_that_do_not_exist(saved):
    file = SafetensorsFile(saved)
    for start, stop in [(-1, 2), (5, 8), (3, 2)]:
        with pytest.raises(ValueError, match="which has 7"):
            file.read_rows("a", start, stop)
    with pytest.raises(SourceError, match="no tensor 'zz'"):
        file.read_rows("zz", 0, 1)


GOLDEN = bytes.fromhex(
    "3800000000000000"
    "7b2278223a7b226474797065223a22463332222c227368617065223a5b325d2c22646174615f6f666673657473223a5b302c385d7d7d"
    "2020"
    "0000803f000000c0"
)


def test_golden_bytes(tmp_path):
    (tmp_path / "g.safetensors").write_bytes(GOLDEN)
    header = read_header(tmp_path / "g.safetensors")
    assert header.offsets == {"x": 64}
    assert SafetensorsFile(tmp_path / "g.safetensors").read_rows("x", 0, 1).tolist() == [[1.0, -2.0]]
    save_file({"x": np.array([1, -2], np.float32)}, tmp_path / "lib.safetensors")
    assert (tmp_path / "lib.safetensors").read_bytes() == GOLDEN


F8 = bytes(8)
HOSTILE = {
    "empty file": (b"", "too short"),
    "four bytes": (b"\x01\0\0\0", "too short"),
    "header cut": (raw({"x": entry()})[:30], "ends inside the header"),
    "header length huge": (raw({}, length=2**63), "header length 9223372036854775808"),
    "header length over the limit": (raw({}, length=100_000_001), "header length 100000001"),
    "header length zero": (raw(b""), "no JSON object"),
    "not JSON": (raw(b"{hello}"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff\xfe":1}'), "not valid JSON"),
    "a list": (raw(b"[1]"), "no JSON object"),
    "deep nesting": (raw(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "a million empty objects": (raw(b'{"x":[' + b"{}," * 1_000_000 + b"0]}"), "parts, expected at most"),
    "a number of 5000 digits": (raw(b'{"x":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "entry is a number": (raw({"x": 3}), "described by a int"),
    "entry lacks the shape": (raw({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, F8), "shape None"),
    "metadata not strings": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "unknown dtype": (raw({"x": entry("F31")}, F8), "dtype 'F31'"),
    "dtype a list": (raw({"x": entry(["F32"])}, F8), "dtype"),
    "negative dimension": (raw({"x": entry(shape=[-2])}, F8), r"shape \[-2\]"),
    "huge dimension": (raw({"x": entry(shape=[2**62])}, F8), "shape"),
    "product overflows": (raw({"x": entry(shape=[2**32, 2**32])}, F8), "takes"),
    "40 dimensions": (raw({"x": entry(shape=[2**32] * 40)}, F8), "shape"),
    "dimension a float": (raw({"x": entry(shape=[2.0])}, F8), "shape"),
    "dimension a bool": (raw({"x": entry(shape=[True, 2])}, F8), "shape"),
    "shape a number": (raw({"x": entry(shape=2)}, F8), "shape 2"),
    "one offset": (raw({"x": entry(span=[0])}, F8), "data_offsets"),
    "offset negative": (raw({"x": entry(span=[-8, 0])}, F8), "data_offsets"),
    "offsets turned round": (raw({"x": entry(span=[8, 0])}, F8), "-8 bytes"),
    "offsets do not match": (raw({"x": entry(span=[0, 4])}, F8), r"4 bytes, but F32 \[2\] takes 8"),
    "beyond the file": (raw({"x": entry()}, b"1234"), "tensors take 8 bytes, the file holds 4"),
    "overlap": (raw({"x": entry(), "y": entry(span=[4, 12])}, bytes(12)), "'y' overlaps tensor 'x'"),
    "same place": (raw({"x": entry(), "y": entry()}, F8), "overlaps"),
    "hole": (raw({"x": entry(), "y": entry(span=[16, 24])}, bytes(24)), "leaves a hole after tensor 'x'"),
    "hole before": (raw({"x": entry(span=[8, 16])}, bytes(16)), "leaves a hole after the header"),
    "bytes left over": (raw({"x": entry()}, bytes(12)), "4 bytes after the last tensor"),
    "name twice": (raw(b'{"x":%s,"x":%s}' % ((json.dumps(entry()).encode(),) * 2), F8), "appears twice"),
    "NaN, which is not JSON": (raw(b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"y":NaN}}'), "not a valid"),
    "half a character": (raw(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "not a valid"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_end_in_one_line(tmp_path, case):
    data, says = HOSTILE[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=says) as caught:
        read_header(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 700


def test_dtype_of_the_library_that_we_have_no_name_for(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(raw({"x": entry("C64", [1])}, F8))
    with pytest.raises(UnsupportedError):
        read_header(tmp_path / "c.safetensors")


def test_names_cannot_drive_the_terminal(tmp_path):
    (tmp_path / "n.safetensors").write_bytes(raw({"\x1b[2J\n\u202e" + "n" * 9999: entry("F31")}, F8))
    with pytest.raises(SourceError) as caught:
        read_header(tmp_path / "n.safetensors")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 700


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, says in [(".", "a folder"), ("none", "no such"), ("pipe", "not a regular")]:
        with pytest.raises(SourceError, match=says):
            read_header(tmp_path / name)


def test_file_that_shrinks_or_is_replaced_while_it_is_read(saved):
    file = SafetensorsFile(saved)
    os.truncate(saved, saved.stat().st_size - 1)
    with pytest.raises(SourceError, match="changed while"):
        file.read_rows("a", 0, 1)


def test_a_read_that_comes_short(tmp_path):
    (tmp_path / "f").write_bytes(bytes(10))
    with pytest.raises(SourceError, match="ends inside tensor x: 4 bytes found, 8 expected"):
        InputFile(tmp_path / "f").read_into(6, np.empty(2, np.float32), "tensor x")


def test_a_link_to_a_blob_is_fine(saved, tmp_path):
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/model.safetensors").symlink_to(saved)
    assert read_header(tmp_path / "snapshot/model.safetensors").specs == read_header(saved).specs


def mutate(rng: random.Random, good: bytes) -> bytes:
    """One to three small changes of the header's text; its length is put right in three of four cases."""
    length = int.from_bytes(good[:8], "little")
    text = bytearray(good[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(text))
        match rng.randrange(5):
            case 0:
                text[at] = rng.randrange(256)
            case 1:
                text[at] = rng.choice(b'0123456789[]{}",:')
            case 2:
                text[at] = rng.choice(b"abcxyz 0")
            case 3:
                del text[at : at + rng.randrange(1, 9)]
            case 4:
                text[at:at] = text[at : at + rng.randrange(1, 9)]
    text += b" " * (-len(text) % 8)
    stated = len(text) if rng.randrange(4) else rng.choice((0, length + 8, 2**63, 99_999_999))
    return stated.to_bytes(8, "little") + text + good[8 + length :]


def test_mutated_headers_load_or_end_in_source_error(saved, tmp_path):
    """Never another exception; what loads, the library loads too, and with the same bytes."""
    rng = random.Random(1)
    good, path = saved.read_bytes(), tmp_path / "m.safetensors"
    loaded = refused = 0
    for _ in range(400):
        path.write_bytes(mutate(rng, good))
        try:
            file = SafetensorsFile(path)
        except SourceError:
            refused += 1
            continue
        loaded += 1
        library = dict(deserialize(path.read_bytes()))
        assert library.keys() == file.specs.keys()
        for name, spec in file.specs.items():
            assert (list(spec.shape), spec.dtype) == (library[name]["shape"], library[name]["dtype"])
            assert file.read_rows(name, 0, spec.rows).tobytes() == library[name]["data"]
    assert refused > 200
    assert loaded > 20


PEAK = """
import resource, sys
from pathlib import Path
from mlxquant.files.safetensors_file import SafetensorsFile

def peak_bytes():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss: on Linux a child inherits its parent's.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

file = SafetensorsFile(Path(sys.argv[1]))
before = peak_bytes()
for start in range(0, 2**16, 256):
    file.read_rows("w", start, start + 256).any()
print(peak_bytes() - before)
"""


def test_reading_rows_keeps_memory_to_the_rows(tmp_path):
    """A tensor of 256 MB read 1 MB at a time. Pages of a mapped file would count as ours."""
    nbytes = 2**28
    head = raw({"w": entry("F32", [2**16, 2**10], [0, nbytes])})
    with (tmp_path / "big").open("wb") as out:
        out.write(head)
        out.truncate(len(head) + nbytes)
    command = [sys.executable, "-c", PEAK, tmp_path / "big"]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 16 * 2**20
