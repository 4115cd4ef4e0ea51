"""GGUFFile against gguf.GGUFReader, and against files made to hurt."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mlxquant.errors import SourceError
from mlxquant.files.gguf_file import ELEMENT_LIMIT, GGML_TYPES, GGUFFile

RNG = np.random.default_rng(0)
Q = gguf.GGMLQuantizationType


def write(path: Path, alignment: int | None = None) -> Path:
    """Every kind of value, and tensors of plain and block types."""
    out = gguf.GGUFWriter(path, "llama")
    if alignment:
        out.add_custom_alignment(alignment)
    out.add_uint8("u8", 200)
    out.add_int8("i8", -100)
    out.add_uint16("u16", 60000)
    out.add_int16("i16", -30000)
    out.add_uint32("u32", 4_000_000_000)
    out.add_int32("i32", -2_000_000_000)
    out.add_uint64("u64", 2**63 + 1)
    out.add_int64("i64", -(2**62))
    out.add_float32("f32", 1.1)
    out.add_float64("f64", 1.1)
    out.add_bool("yes", True)
    out.add_string("text", "für 日本 \n\0 end")
    out.add_array("tokens", ["a", "", "Ġhello", "\u2581日"] * 50)
    out.add_array("scores", [0.5, -1.25, 3.0])
    out.add_array("kinds", [1, -2, 3])
    out.add_array("flags", [True, False])
    for name, shape in (("f32.weight", (3, 64)), ("vector", (5,)), ("stack", (2, 3, 32))):
        out.add_tensor(name, RNG.normal(size=shape).astype(np.float32))
    out.add_tensor("half", RNG.normal(size=(4, 8)).astype(np.float16))
    for kind in (Q.Q4_0, Q.Q8_0, Q.Q6_K, Q.Q4_1):
        row_bytes = 256 // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
        blocks = RNG.integers(0, 256, size=(7, row_bytes), dtype=np.uint8)
        out.add_tensor(kind.name, blocks, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "good.gguf")


@pytest.mark.parametrize("alignment", [None, 64, 256])
def test_the_same_as_gguf_reader(tmp_path, alignment):
    path = write(tmp_path / "m.gguf", alignment)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    fields = {k: v.contents() for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert {k: type(v) for k, v in ours.metadata.items()} == {k: type(v) for k, v in fields.items()}
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for expected in theirs.tensors:
        tensor = ours.tensors[expected.name]
        assert tensor.shape == tuple(reversed(expected.shape.tolist()))
        assert tensor.type_name == expected.tensor_type.name
        assert (tensor.offset, tensor.nbytes) == (expected.data_offset, expected.n_bytes)
        rows = ours.read_rows(expected.name, 0, tensor.rows)
        assert rows.shape == (tensor.rows, tensor.row_bytes)
        assert rows.tobytes() == expected.data.tobytes()
        last = ours.read_rows(expected.name, tensor.rows - 1, tensor.rows)
        assert last.tobytes() == rows[-1].tobytes()


def test_type_table_is_ggufs():
    theirs = {int(k): (k.name, *gguf.GGML_QUANT_SIZES[k]) for k in gguf.GGMLQuantizationType}
    assert {k: v for k, v in theirs.items() if k in GGML_TYPES} == GGML_TYPES


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def header(n_tensors: int = 0, n_keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_keys)


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + data


def info(name: str, shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def one(*infos: bytes, data: int = 64, keys: tuple[bytes, ...] = ()) -> bytes:
    head = header(len(infos), len(keys)) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32 + data)


def alignment(value: int, kind: int = 4) -> bytes:
    return key("general.alignment", kind, value.to_bytes({4: 4, 10: 8}[kind], "little"))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with GGUF"),
    "short": (b"GGUF\3\0\0\0", "does not begin with GGUF"),
    "magic": (header(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (header(version=1), "version 1"),
    "version 999": (header(version=999), "version 999"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2**63 tensors": (header(2**63), "claims 9223372036854775808 tensors"),
    "2**63 keys": (header(0, 2**63), "claims 9223372036854775808 metadata keys"),
    "1000 keys in no bytes": (header(0, 1000), "claims 1000 metadata keys"),
    "key length": (header(0, 1) + b"\xff" * 8 + bytes(9), "wants 18446744073709551615 bytes"),
    "key not UTF-8": (header(0, 1) + key(b"\xff\xfe", 4, bytes(4)), "not UTF-8"),
    "value type": (header(0, 1) + key("k", 13, bytes(8)), "value type 13"),
    "string length": (header(0, 1) + key("k", 8, struct.pack("<Q", 2**40)), "wants 1099511627776 bytes"),
    "array of 2**60": (header(0, 1) + key("k", 9, array(4, 2**60)), f"at most {ELEMENT_LIMIT}"),
    "array cut": (header(0, 1) + key("k", 9, array(4, 1000, bytes(100))), "wants 4000 bytes"),
    "array of strings cut": (header(0, 1) + key("k", 9, array(8, 99, text("a") * 3)), "wants 8 bytes, 0"),
    "array of arrays": (header(0, 1) + key("k", 9, array(9, 1, array(4, 0))), "array of value type 9"),
    "key twice": (header(0, 2) + key("k", 4, bytes(4)) * 2, "key 'k' twice"),
    "alignment 0": (header(0, 1) + alignment(0), "alignment is 0"),
    "alignment 24": (header(0, 1) + alignment(24), "alignment is 24"),
    "alignment of 64 bits": (header(0, 1) + alignment(32, 10), "alignment"),
    "tensor twice": (one(info("t"), info("t", offset=32)), "tensor 't' twice"),
    "5 dimensions": (one(info("t", (1, 1, 1, 1, 8))), "5 dimensions"),
    "2**32 - 1 dimensions": (one(text("t") + b"\xff" * 4), "4294967295 dimensions"),
    "type removed": (one(info("t", kind=4)), "ggml type 4"),
    "type unknown": (one(info("t", kind=1000)), "ggml type 1000"),
    "width no block divides": (one(info("t", (33,), kind=2)), r"\(33,\), which Q4_0 blocks of 32"),
    "dimension of 2**63": (one(info("t", (2**63, 2))), "shape"),
    "shape overflows 64 bits": (one(info("t", (2**32, 2**32, 2))), "ends at byte"),
    "offset not aligned": (one(info("t", offset=8)), "expected a multiple of 32"),
    "offset beyond the file": (one(info("t", offset=2**63)), "ends at byte"),
    "data cut": (one(info("t", (64,)), data=200), "ends at byte"),
    "overlap": (one(info("t", (16,)), info("u", (8,), offset=32), data=128), "'u' overlaps tensor 't'"),
    "split": (one(keys=(key("split.count", 2, b"\3\0"),)), "one of 3 parts"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_end_in_one_line(tmp_path, case):
    data, says = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=says) as caught:
        GGUFFile(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert "\n" not in caught.value.message


def test_the_hostile_cases_are_one_fault_away_from_good(tmp_path):
    """The builders above do make files that read: else the table would prove nothing."""
    (tmp_path / "ok.gguf").write_bytes(one(info("t", (8, 2)), keys=(alignment(32),)))
    ok = GGUFFile(tmp_path / "ok.gguf")
    assert ok.tensors["t"].shape == (2, 8)
    assert ok.read_rows("t", 1, 2).tobytes() == bytes(32)


def test_one_part_of_a_split_gguf_is_refused_with_the_next_step(tmp_path):
    (tmp_path / "s.gguf").write_bytes(HOSTILE["split"][0])
    with pytest.raises(SourceError, match=r"name like MODEL-00001-of-00003\.gguf") as caught:
        GGUFFile(tmp_path / "s.gguf")
    assert "names back" in str(caught.value.hint)


def test_zero_size_and_scalar_tensors(tmp_path):
    (tmp_path / "z.gguf").write_bytes(one(info("none", (32, 0)), info("scalar", ())))
    file = GGUFFile(tmp_path / "z.gguf")
    assert file.read_rows("none", 0, 0).shape == (0, 128)
    assert file.read_rows("scalar", 0, 1).shape == (1, 4)


def test_rows_that_do_not_exist(good):
    file = GGUFFile(good)
    with pytest.raises(ValueError, match="which has 7"):
        file.read_rows("Q4_0", 5, 8)
    with pytest.raises(SourceError, match="no tensor"):
        file.read_rows("nothing", 0, 1)


def test_mutated_headers_read_or_end_in_source_error(good, tmp_path):
    """300 seeded mutations: never another exception, and never more memory than the file is long."""
    rng = random.Random(2)
    data = good.read_bytes()
    end = min(t.offset for t in GGUFFile(good).tensors.values())
    path = tmp_path / "m.gguf"
    read = refused = 0
    for _ in range(300):
        mutant = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(4, end)
            match rng.randrange(3):
                case 0:
                    mutant[at] = rng.randrange(256)
                case 1:
                    mutant[at : at + 8] = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
                case 2:
                    del mutant[at : at + rng.randrange(1, 9)]
        path.write_bytes(mutant)
        try:
            file = GGUFFile(path)
        except SourceError:
            refused += 1
            continue
        read += 1
        values: list[Any] = [file.read_rows(name, 0, t.rows) for name, t in file.tensors.items()]
        assert sum(v.nbytes for v in values) <= len(data)
    assert read > 10
    assert refused > 100
