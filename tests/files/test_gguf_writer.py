"""GGUF headers against the `gguf` package's own reader and writer, written and read back in one part and in several."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from mlxquant.errors import PlanError, SourceError
from mlxquant.files.gguf_file import GGUFFile
from mlxquant.files.gguf_spec import GGUFSpec
from mlxquant.files.gguf_writer import UNSEALED, lay_out
from mlxquant.files.shards import ShardWriter

METADATA = {
    "general.architecture": "llama",
    "general.name": "",
    "a.u8": np.uint8(200), "a.i8": np.int8(-3), "a.u16": np.uint16(60000), "a.i16": np.int16(-300),
    "a.u32": np.uint32(2**32 - 1), "a.i32": np.int32(-(2**31)), "a.u64": np.uint64(2**64 - 1),
    "a.i64": np.int64(-(2**63)), "a.f32": np.float32(1e-5), "a.f64": np.float64(1e-300), "a.bool": True,
    "b.texts": ["a", "", "späße", "\u2581"], "b.bools": [True, False, True], "b.ints": np.array([1, -1], np.int32),
    "b.floats": np.array([-1000.0, 1e-3], np.float32), "b.bytes": np.array([1, 2, 255], np.uint8),
}  # fmt: skip
TENSORS = [
    GGUFSpec("output.weight", (7, 256), "Q6_K"),
    GGUFSpec("token_embd.weight", (7, 64), "Q8_0"),
    GGUFSpec("blk.0.attn_norm.weight", (3,), "F32"),
    GGUFSpec("blk.0.ffn_up_exps.weight", (2, 3, 32), "BF16"),
    GGUFSpec("blk.0.ffn_up.weight", (5, 33), "F16"),
]
SEALED = "mlxquant.tensors_sha256"


def data(spec: GGUFSpec) -> np.ndarray:
    return np.random.default_rng(len(spec.name)).integers(0, 256, spec.nbytes, np.uint8)


def write(folder: Path, limit_bytes: int = 0, sealed: str | None = None) -> list[Path]:
    folder.mkdir(exist_ok=True)
    writers = [ShardWriter(folder, shard) for shard in lay_out("m.gguf", METADATA, TENSORS, limit_bytes, sealed)]
    for writer in writers:
        for spec in TENSORS:
            if spec.name in writer.shard.specs:
                writer.write(spec.name, data(spec))
    return [writer.path for writer in writers]


def ggufs(folder: Path, limit_bytes: int = 0) -> list[Path]:
    """The same by the gguf package alone."""
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_size=limit_bytes)
    kinds = {"texts": "STRING", "bools": "BOOL", "ints": "INT32", "floats": "FLOAT32", "bytes": "UINT8"}
    scalars = {"u": "UINT", "i": "INT", "f": "FLOAT"}
    writer.add_key_value("general.name", "", gguf.GGUFValueType.STRING)
    for key, value in list(METADATA.items())[2:]:
        end = key[2:]
        if end in kinds:
            items = value if isinstance(value, list) else value.tolist()
            writer.add_key_value(key, items, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kinds[end]])
        else:
            kind = "BOOL" if end == "bool" else scalars[end[0]] + end[1:]
            writer.add_key_value(key, value, gguf.GGUFValueType[kind])
    for spec in TENSORS:
        kind = gguf.GGMLQuantizationType[spec.type_name]
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        rows = data(spec).reshape(*spec.shape[:-1], spec.shape[-1] // elements * nbytes)
        writer.add_tensor(spec.name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


@pytest.mark.parametrize("limit_bytes", [0, 500, 2000, 10**9])
def test_bytes_are_those_of_the_gguf_package(tmp_path, limit_bytes):
    ours, theirs = write(tmp_path / "ours", limit_bytes), ggufs(tmp_path / "theirs", limit_bytes)
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert len(ours) == {0: 1, 500: 4, 2000: 2, 10**9: 1}[limit_bytes]
    for path, other in zip(ours, theirs, strict=True):
        assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("limit_bytes", [0, 500])
def test_what_is_written_is_read_back_with_its_types(tmp_path, limit_bytes):
    file = GGUFFile(write(tmp_path / "m", limit_bytes)[0])
    typed = {key: value for key, value in file.typed.items() if not key.startswith("split.")}
    assert list(typed) == list(METADATA)
    for key, value in METADATA.items():
        assert type(typed[key]) is type(value), key
        assert np.array_equal(typed[key], value), key
        assert not isinstance(value, np.ndarray) or typed[key].dtype == value.dtype
    assert [(n, t.shape, t.type_name) for n, t in file.tensors.items()] == [
        (s.name, s.shape, s.type_name) for s in TENSORS
    ]
    for spec in TENSORS:
        rows = file.read_rows(spec.name, 0, file.tensors[spec.name].rows)
        assert np.array_equal(rows.reshape(-1), data(spec)), spec.name
    if limit_bytes:
        assert file.typed["split.count"].dtype == np.uint16
        assert (file.typed["split.tensors.count"].dtype, file.metadata["split.tensors.count"]) == (np.int32, 5)


def test_what_just_fits_is_not_split():
    nbytes = sum(spec.nbytes for spec in TENSORS)
    assert [len(lay_out("m.gguf", METADATA, TENSORS, limit)) for limit in (nbytes, nbytes - 1)] == [1, 2]


def test_other_parts_have_nothing_but_their_number(tmp_path):
    fields = gguf.GGUFReader(write(tmp_path / "m", 500)[2]).fields
    assert {key for key in fields if not key.startswith("GGUF.")} == {"split.no", "split.count", "split.tensors.count"}


def test_the_seal_is_the_text_of_its_key(tmp_path):
    (path,) = write(tmp_path / "m", sealed=SEALED)
    (shard,) = lay_out("m.gguf", METADATA, TENSORS, sealed=SEALED)
    before = GGUFFile(path).metadata
    assert before[SEALED] == UNSEALED
    writer = ShardWriter(tmp_path / "m", shard)
    writer.seal(b"f" * 64)
    assert GGUFFile(path).metadata == before | {SEALED: "f" * 64}
    assert writer.intact()


def test_a_text_that_imitates_the_seal():
    entry = SEALED.encode() + (8).to_bytes(4, "little") + (64).to_bytes(8, "little") + UNSEALED.encode()
    with pytest.raises(PlanError, match="stands in the metadata's texts"):
        lay_out("m.gguf", METADATA | {"general.name": entry.decode()}, TENSORS, sealed=SEALED)


@pytest.mark.parametrize("value", [5, 1.5, None, [], ["a", 1], [1, 2], np.zeros((2, 2), np.int32), np.complex64(1)])
def test_values_without_a_type(value):
    with pytest.raises(PlanError, match=r"key 'a\.key': GGUF has no type for"):
        lay_out("m.gguf", METADATA | {"a.key": value}, TENSORS)


@pytest.mark.parametrize("name", ["n" * 64, "ü" * 32])
def test_a_name_that_llama_cpp_would_not_load(name):
    with pytest.raises(PlanError, match="has 64 bytes"):
        lay_out("m.gguf", METADATA, [GGUFSpec(name, (3,), "F32")])


def test_a_source_that_was_split_or_aligned_otherwise(tmp_path):
    keys = METADATA | {"split.count": np.uint16(3), "general.alignment": np.uint32(64)}
    assert lay_out("m.gguf", keys, TENSORS) == lay_out("m.gguf", METADATA, TENSORS)


def test_parts_that_do_not_belong_together(tmp_path):
    paths = write(tmp_path / "m", 500)
    with pytest.raises(SourceError, match="is part 2 of a split model") as caught:
        GGUFFile(paths[2])
    assert "m-00001-of-00004.gguf" in str(caught.value.hint)
    paths[3].rename(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match=r"m-00004-of-00004\.gguf: is missing"):
        GGUFFile(paths[0])
    paths[3].write_bytes(paths[2].read_bytes())
    with pytest.raises(SourceError, match="is not part 4 of"):
        GGUFFile(paths[0])


def test_what_our_own_reader_would_refuse_is_not_written():
    for texts in ("ü" * 2_000_001, ["a", "x" * 4_000_001]):
        with pytest.raises(PlanError, match=r"key 'a\.key': a text of 400000[12] bytes, expected at most 4000000"):
            lay_out("m.gguf", METADATA | {"a.key": texts}, TENSORS)
    with pytest.raises(PlanError, match="1001 parts, expected at most 1000"):
        lay_out("m.gguf", METADATA, [GGUFSpec(f"t{i}", (3,), "F32") for i in range(1001)], limit_bytes=1)
