"""Importance matrices: what llama-imatrix wrote (tests/fixtures/imatrix, made by scripts/oracle_imatrix.py), what
llama-quantize made of it, and files that lie."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from mlxquant.errors import SourceError
from mlxquant.files.imatrix import Imatrix, read_imatrix
from tests import oracle
from tests.files.imatrix_model import EXPERTS, WIDTH, shapes, weights
from tests.libgguf_oracle import libgguf_x86

FIXTURES = Path(__file__).parent.parent / "fixtures" / "imatrix"
RUNS = json.loads((FIXTURES / "quantized.json").read_text())["runs"]
STACK = "blk.0.ffn_up_exps.weight"


@pytest.mark.parametrize("run", RUNS)
def test_importance_is_what_llama_quantize_passes_on(run):
    """Rows encoded by ggml's reference encoder with our importance are its file's, byte for byte."""
    libgguf = libgguf_x86()
    form, _ = run.split()
    matrix = read_imatrix(FIXTURES / f"moe.{form}")
    for name, (kind, expected) in RUNS[run]["tensors"].items():
        shape, found = shapes()[name], hashlib.sha256()
        rows = weights(name, shape).astype(np.float32).reshape(-1, shape[-2], shape[-1])
        importance = matrix.importance(name, shape)
        for i, expert in enumerate(rows):
            column = None if importance is None else importance[i]
            found.update(libgguf.quantize_rows(expert, gguf.GGMLQuantizationType[kind], imatrix=column).tobytes())
        assert found.hexdigest()[:16] == expected, (name, kind)


@pytest.mark.parametrize("run", RUNS)
def test_keys_are_llama_quantizes(run):
    form, _ = run.split()
    matrix = read_imatrix(FIXTURES / f"moe.{form}")
    keys = Imatrix(f"moe.{form}", matrix.entries, matrix.datasets, matrix.chunks).metadata()
    told = RUNS[run]["keys"]
    assert list(keys) == list(told)
    for key, (kind, value) in told.items():
        assert keys[key] == value
        assert type(keys[key]) is {"STRING": str, "UINT32": np.uint32}[kind]


def test_both_forms_and_a_foreign_reader_agree():
    matrix, legacy = read_imatrix(FIXTURES / "moe.gguf"), read_imatrix(str(FIXTURES / "moe.dat"))
    assert matrix.datasets == legacy.datasets == ("text.txt",)
    assert matrix.chunks == legacy.chunks == 3
    assert matrix.entries.keys() == legacy.entries.keys()
    assert {entry.dtype for entry in matrix.entries.values()} == {np.dtype(np.float32)}
    libgguf = pytest.importorskip("libgguf")
    for file, ours in (("moe.gguf", matrix), ("moe.dat", legacy)):
        theirs = libgguf.load_imatrix(FIXTURES / file)
        assert theirs.keys() == ours.entries.keys()
        for name, entry in ours.entries.items():
            np.testing.assert_array_equal(entry.reshape(-1), np.asarray(theirs[name]).reshape(-1), name)


def test_an_expert_never_asked_counts_all_columns_alike():
    entry = read_imatrix(FIXTURES / "moe.gguf").entries[STACK]
    assert entry.shape == (EXPERTS, WIDTH)
    assert (entry[-1] == 1).all()
    assert (entry[:-1] != 1).all()


def test_sizes_are_checked_as_llama_quantize_does():
    matrix = read_imatrix(FIXTURES / "moe.dat")
    assert matrix.importance(STACK, (EXPERTS, 100, WIDTH)).shape == (EXPERTS, WIDTH)
    assert matrix.importance("blk.7.ffn_up.weight", (8, WIDTH)) is None
    matrix.check("blk.7.ffn_up.weight", (8, WIDTH))
    for shape in ((100, WIDTH), (EXPERTS, 100, 32), (8, 100, WIDTH)):
        with pytest.raises(SourceError, match=rf"moe\.dat: {STACK} has 256 values, expected"):
            matrix.check(STACK, shape)
        with pytest.raises(SourceError, match="256 values"):
            matrix.importance(STACK, shape)
    odd = Imatrix("x", {"token_embd.weight": np.ones((1, 8), np.float32)}, (), 0)
    assert odd.importance("token_embd.weight", (512, 64)) is None  # llama-quantize leaves it out without a word


def test_texts_are_cut_at_127_bytes_and_never_inside_a_letter():
    one = {"x": np.ones((1, 1), np.float32)}
    keys = Imatrix("a" * 126 + "é", one, ("b" * 200, "c"), 0).metadata()
    assert keys["quantize.imatrix.file"] == "a" * 126
    assert keys["quantize.imatrix.dataset"] == "b" * 127
    assert "quantize.imatrix.chunks_count" not in keys
    assert Imatrix("a\udcff", one, (), 0).metadata()["quantize.imatrix.file"] == "a"
    assert list(Imatrix("a", one, (), 2).metadata()) == [
        "quantize.imatrix.file", "quantize.imatrix.entries_count", "quantize.imatrix.chunks_count"
    ]  # fmt: skip


def write(path: Path, tensors: dict[str, np.ndarray], without: str = "", **keys) -> Path:
    writer = gguf.GGUFWriter(str(path), "imatrix")
    values = {"datasets": ["t"], "chunk_count": 2, "chunk_size": 512} | keys
    for key, value in values.items():
        if key != without:
            add = {list: writer.add_array, str: writer.add_string}.get(type(value), writer.add_uint32)
            add(f"imatrix.{key}", value)
    for name, value in tensors.items():
        writer.add_tensor(name, np.asarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(sums, counts) -> dict[str, np.ndarray]:
    return {"a.in_sum2": np.asarray(sums, np.float32), "a.counts": np.asarray(counts, np.float32)}


def test_counts_are_rounded_before_they_divide(tmp_path):
    counts = [[3.0], [2.5], [0.4], [0.0], [-2.0]]
    sums = np.full((5, 2), 7, np.float32)
    entry = read_imatrix(write(tmp_path / "i.gguf", pair(sums, counts))).entries["a"]
    third = np.float32(7) / np.float32(3)
    np.testing.assert_array_equal(entry, np.array([[third] * 2, [third] * 2, [1, 1], [1, 1], [1, 1]], np.float32))


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        (pair([[1, 2]], [[1]]), {"without": "chunk_size"}, "has no imatrix.chunk_size: not an importance matrix"),
        (pair([[1, 2]], [[1]]), {"chunk_count": "two"}, "imatrix.chunk_count 'two'"),
        (pair([[1, 2]], [[1]]), {"chunk_count": 2**32 - 1}, "imatrix.chunk_count 4294967295"),
        (pair([[1, 2]], [[1]]), {"datasets": "one"}, "imatrix.datasets 'one'"),
        ({"a.in_sum2": np.ones((1, 2), np.float32)}, {}, "'a.counts' is missing"),
        ({"a.counts": np.ones((1, 1), np.float32)}, {}, "'a.in_sum2' is missing"),
        ({**pair([[1]], [[1]]), "a.in_sum2": np.ones((1, 2), np.float16)}, {}, "'a.in_sum2' is F16, expected F32"),
        (pair([[1, 2, 3]], [[1], [1]]), {}, "'a' has 3 sums for 2 matrices"),
        (pair([[1, np.nan]], [[1]]), {}, "'a' has importance below 0 or not finite"),
        (pair([[1, np.inf]], [[1]]), {}, "not finite"),
        (pair([[1, -1]], [[1]]), {}, "below 0"),
        (pair([[1, 1]], [[np.nan]]), {}, "'a' has a count that is not finite"),
        ({"other": np.ones(4, np.float32)}, {}, "without entries"),
    ],
)
def test_gguf_files_that_lie_end_in_one_line(tmp_path, tensors, keys, message):
    path = write(tmp_path / "i.gguf", tensors, **keys)
    with pytest.raises(SourceError) as caught:
        read_imatrix(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def dat(*entries: tuple[bytes, int, list[float]], count: int | None = None, rest: bytes = b"") -> bytes:
    parts = [struct.pack("<i", len(entries) if count is None else count)]
    for name, calls, values in entries:
        parts += [struct.pack("<i", len(name)), name, struct.pack("<ii", calls, len(values))]
        parts.append(struct.pack(f"<{len(values)}f", *values))
    return b"".join(parts) + rest


def read_bytes(tmp_path: Path, data: bytes) -> Imatrix:
    (tmp_path / "i.dat").write_bytes(data)
    return read_imatrix(tmp_path / "i.dat")


def test_old_files_end_where_theirs_did(tmp_path):
    entry = (b"a", 3, [1.0, 2.0])
    plain = read_bytes(tmp_path, dat(entry, (b"b", 0, [4.0])))
    np.testing.assert_array_equal(plain.entries["a"], np.float32([[1, 2]]) / np.float32(3))
    np.testing.assert_array_equal(plain.entries["b"], np.float32([[4]]))  # no calls: values as they are
    assert (plain.datasets, plain.chunks) == ((), 0)
    assert read_bytes(tmp_path, dat(entry, rest=struct.pack("<i", 9))).chunks == 9
    named = read_bytes(tmp_path, dat(entry, rest=struct.pack("<ii", 9, 4) + b"wiki"))
    assert (named.datasets, named.chunks) == (("wiki",), 9)
    cut = read_bytes(tmp_path, dat(entry, rest=struct.pack("<ii", 9, 40) + b"wiki"))
    assert (cut.datasets, cut.chunks) == ((), 9)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends inside the number of entries"),
        (b'{"a": 1, "b": [1, 2, 3, 4, 5]}', "neither GGUF nor a .dat file"),
        (dat(count=0), "0 entries"),
        (dat((b"a", 1, [1.0]), count=-1), "-1 entries"),
        (dat((b"a", 1, [1.0]), count=2**31 - 1), "2147483647 entries in 21 bytes"),
        (dat((b"a", 1, [1.0] * 8), count=2), "ends inside the name of entry 1"),
        (dat((b"a" * 300, 1, [1.0])), "the name of entry 0 has 300 bytes"),
        (dat((b"", 1, [1.0, 1.0])), "the name of entry 0 has 0 bytes"),
        (dat((b"\xff\xfe", 1, [1.0])), "not UTF-8"),
        (dat((b"a", 1, [1.0]), (b"a", 1, [1.0])), "'a' stands there twice"),
        (dat((b"abcdef", 1, [])), "'abcdef' has 0 values"),
        (dat((b"a", 1, [1.0] * 9))[:-4], "'a' has 9 values, 32 bytes are left"),
        (dat((b"a", 1, [1.0, float("nan")])), "'a' has importance below 0 or not finite"),
        (dat((b"a", 1, [-1.0])), "'a' has importance below 0"),
    ],
)
def test_dat_files_that_lie_end_in_one_line(tmp_path, data, message):
    with pytest.raises(SourceError) as caught:
        read_bytes(tmp_path, data)
    assert message in caught.value.message
    assert "i.dat" in caught.value.message
    assert "\n" not in caught.value.message


def test_every_cut_of_a_real_file_is_read_or_refused(tmp_path):
    """Up to what counts: a .dat's chunks and dataset are optional, a GGUF's last number is padded to 32 bytes."""
    for form, optional_bytes in (("gguf", 32 - 4), ("dat", 4 + 4 + len("text.txt"))):
        data = (FIXTURES / f"moe.{form}").read_bytes()
        path, read = tmp_path / f"i.{form}", []
        for size in [*range(0, len(data) - 40, 23), *range(len(data) - 40, len(data))]:
            path.write_bytes(data[:size])
            try:
                read_imatrix(path)
                read.append(size)
            except SourceError as error:
                assert str(path) in error.message  # noqa: PT017
        whole = len(data) - optional_bytes
        assert read == list(range(whole, len(data))), form


def test_a_flipped_byte_ends_in_an_error_line_or_in_finite_importance(tmp_path):
    rng = np.random.default_rng(0)
    for form in ("gguf", "dat"):
        data = np.frombuffer((FIXTURES / f"moe.{form}").read_bytes(), np.uint8)
        for _ in range(150):
            damaged = data.copy()
            damaged[rng.integers(len(data) // 2, size=2)] = rng.integers(256, size=2)
            try:
                found = read_bytes(tmp_path, damaged.tobytes())
            except SourceError:
                continue
            assert all(np.isfinite(entry).all() for entry in found.entries.values())


@pytest.mark.oracle
def test_a_fresh_importance_matrix_of_a_real_tool(tmp_path):
    """llama-imatrix and llama-quantize run here and now, on a path too long for llama-quantize's own key."""
    from tests import gguf_files, tiny

    model = gguf_files.write_gguf(tiny.make(tmp_path / "tiny", layers=2), tmp_path / "model.gguf")
    (tmp_path / "text.txt").write_text("with a pinch of salt and a word of thanks, " * 60)
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    matrix = folder / "i.gguf"
    oracle.imatrix(model, tmp_path / "text.txt", matrix, "-c", "64", "--chunks", "2")
    oracle.quantize(model, tmp_path / "out.gguf", "Q4_0", "--imatrix", matrix)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    ours = read_imatrix(matrix)
    told = {k: field.contents() for k, field in reader.fields.items() if k.startswith("quantize.imatrix.")}
    assert ours.metadata() == told
    libgguf = libgguf_x86()
    source = {t.name: t.data.astype(np.float32) for t in gguf.GGUFReader(model).tensors}
    quantized = [t for t in reader.tensors if t.tensor_type.name not in ("F32", "F16")]
    assert len(quantized) > 14
    for t in quantized:
        importance = ours.importance(t.name, source[t.name].shape)
        column = None if importance is None else importance[0]
        assert libgguf.quantize_rows(source[t.name], t.tensor_type, imatrix=column).tobytes() == t.data.tobytes()
