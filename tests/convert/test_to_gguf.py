"""GGUF files from checkpoints and from GGUF: blocks are libgguf's, llama.cpp loads them, no kill leaves a trace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxquant.convert.gguf_checks import check_gguf
from mlxquant.convert.gguf_job import PLAN, SETTINGS, SOURCE, TENSORS, VERSION, GGUFJob, open_job
from mlxquant.convert.modelfile import modelfile
from mlxquant.convert.to_gguf import to_gguf
from mlxquant.errors import SourceError, UsageError
from mlxquant.files.gguf_file import GGUFFile
from mlxquant.files.imatrix import Imatrix
from mlxquant.plan.gguf_types import TypeSettings, type_settings
from tests.convert.test_memory import ALLOWED, traced_peak
from tests.convert.test_memory import source as large  # noqa: F401 - a fixture
from tests.gguf_files import LlamaCpp, read_gguf, write_gguf
from tests.libgguf_oracle import libgguf_x86
from tests.tiny import make

FLOATS = ("F32", "F16", "BF16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("source") / "tiny", width=256, layers=2, dtype="bfloat16")


def job(source: Path, type_name: str, **options: object) -> GGUFJob:
    settings = type_name if isinstance(type_name, TypeSettings) else type_settings(type_name)
    return open_job(source, None, settings, **options)


def write(source: Path, out: Path, type_name: str, **options: object) -> Path:
    split = options.pop("split_bytes", 0)
    made = job(source, type_name, **options)
    return to_gguf(made.rows, made.plan, made.metadata, out, split_bytes=split)[0]


def blocks(path: Path) -> dict[str, tuple[str, bytes]]:
    file = GGUFFile(path)
    return {name: (t.type_name, file.read_rows(name, 0, t.rows).tobytes()) for name, t in file.tensors.items()}


def importance(shapes: dict[str, tuple[int, ...]], seed: int = 3) -> Imatrix:
    rng = np.random.default_rng(seed)
    entries = {
        name: rng.random((shape[0] if len(shape) > 2 else 1, shape[-1]), np.float32) + np.float32(0.01)
        for name, shape in shapes.items()
        if name.startswith("blk.") and len(shape) > 1
    }
    return Imatrix("/home/somebody/wiki.gguf", entries, ("wiki.txt",), 7)


# -- the numbers


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_K_M"])
def test_values_are_those_of_the_gguf_packages_own_file(folder, tmp_path, type_name):
    """write_gguf: names by gguf's map, rotary order by llama.cpp's rule, nothing of ours."""
    ours = read_gguf(write(folder, tmp_path / "ours.gguf", type_name))
    theirs = read_gguf(write_gguf(folder, tmp_path / "theirs.gguf", "F32"))
    assert ours[1] == theirs[1]
    for name, values in theirs[2].items():
        if type_name in ("F32", "BF16"):
            assert np.array_equal(ours[2][name], values), name
        else:
            error = np.square(ours[2][name] - values).sum() / np.square(values).sum()
            assert error < {"F16": 1e-7, "Q8_0": 1e-4, "Q4_K_M": 0.01}[type_name], name


@pytest.mark.parametrize("with_imatrix", [False, True])
@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q3_K_L", "Q2_K", "Q5_0", "IQ4_XS"])
def test_blocks_are_libggufs(folder, tmp_path, file_type, with_imatrix):
    libgguf = libgguf_x86()
    _, shapes, values = read_gguf(write_gguf(folder, tmp_path / "f32.gguf", "F32"))
    imatrix = importance(shapes) if with_imatrix else None
    written = blocks(write(folder, tmp_path / "ours.gguf", file_type, imatrix=imatrix))
    kinds = {name: type_name for name, (type_name, _) in written.items()}
    assert len(set(kinds.values()) - {"F32"}) >= 1
    for name, (type_name, found) in written.items():
        if type_name == "F32":
            continue
        entry = imatrix.entries.get(name) if imatrix else None
        expected = libgguf.quantize_rows(
            np.ascontiguousarray(values[name]),
            gguf.GGMLQuantizationType[type_name],
            None if entry is None else entry[0],
        )
        assert found == np.asarray(expected).tobytes(), (name, type_name)


def test_each_expert_has_its_own_importance(tmp_path, monkeypatch):
    libgguf = libgguf_x86()
    source = make(tmp_path / "moe", "mixtral", width=256)
    shapes = {t.name: t.target.shape for t in job(source, "F32").plan.tensors}
    stack = next(name for name in shapes if name.endswith("ffn_up_exps.weight"))
    imatrix = importance(shapes)
    _, _, values = read_gguf(write(source, tmp_path / "f32.gguf", "F32"))
    # Chunks that begin and end inside an expert.
    monkeypatch.setattr("mlxquant.convert.gather.CHUNK_BYTES", 1)
    monkeypatch.setattr(
        "mlxquant.convert.to_gguf.chunks",
        lambda target: [(r, min(r + 7, n)) for n in [int(np.prod(target.shape[:-1]))] for r in range(0, n, 7)],
    )
    type_name, found = blocks(write(source, tmp_path / "q.gguf", "Q4_K_S", imatrix=imatrix))[stack]
    kind = gguf.GGMLQuantizationType[type_name]
    expected = [
        np.asarray(libgguf.quantize_rows(np.ascontiguousarray(matrix), kind, row)).tobytes()
        for matrix, row in zip(values[stack], imatrix.entries[stack], strict=True)
    ]
    assert len(expected) > 1
    assert found == b"".join(expected)


def test_nan_is_refused_by_name_and_row(tmp_path):
    source = make(tmp_path / "m", width=256)
    from mlxquant.files.safetensors_file import read_header

    header = read_header(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(header.offsets[name] + 2 * 256 * 5)
        file.write(np.array([0x7FC0], np.uint16).tobytes())
    for type_name in ("Q4_K_M", "BF16"):
        with pytest.raises(SourceError, match=r"blk\.1\.ffn_up\.weight: row 5: NaN"):
            write(source, tmp_path / "out.gguf", type_name)
        assert not (tmp_path / "out.gguf").exists()
        shutil.rmtree(tmp_path / "out.gguf.partial")


# -- GGUF to GGUF


def test_by_way_of_a_float_file_the_blocks_are_the_same(folder, tmp_path):
    between = write(folder, tmp_path / "bf16.gguf", "BF16")
    direct = blocks(write(folder, tmp_path / "direct.gguf", "Q4_K_M"))
    assert blocks(write(between, tmp_path / "two-steps.gguf", "Q4_K_M")) == direct
    assert list(GGUFFile(between).tensors) == list(direct)


def test_keys_are_kept_with_their_types(folder, tmp_path):
    source = write_gguf(
        folder, tmp_path / "source.gguf", "F16", general__note="späße", split__count=1, mlxquant__version="old"
    )
    before, after = GGUFFile(source).typed, GGUFFile(write(source, tmp_path / "out.gguf", "Q5_K_S")).typed
    assert (after["general.file_type"], after["general.quantization_version"]) == (np.uint32(16), np.uint32(2))
    assert "split.count" not in after
    assert after.pop(VERSION) != "old"
    ours = {VERSION, SOURCE, SETTINGS, PLAN, TENSORS, "general.file_type", "general.quantization_version"}
    kept = {key: value for key, value in before.items() if key not in (*ours, "split.count")}
    assert {key: repr(value) for key, value in after.items() if key not in ours} == {
        key: repr(value) for key, value in kept.items()
    }


def test_blocks_of_the_wanted_type_are_copied(folder, tmp_path):
    source = write_gguf(folder, tmp_path / "q8.gguf", "Q8_0")
    out = write(source, tmp_path / "out.gguf", "Q8_0")
    before, after = blocks(source), blocks(out)
    assert list(after) != list(before)  # in llama-quantize's order now
    assert after == before


def test_an_architecture_that_no_family_of_ours_has(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "source.gguf", "starcoder2")
    writer.add_block_count(1)
    writer.add_array("starcoder2.odd", [1.5, 2.5])
    rng = np.random.default_rng(0)
    for name, shape in [("token_embd.weight", (40, 256)), ("blk.0.attn_qkv.weight", (64, 256)),
                        ("blk.0.attn_qkv.bias", (64,)), ("blk.0.odd_thing", (4, 3))]:  # fmt: skip
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(write(tmp_path / "source.gguf", tmp_path / "out.gguf", "Q4_K_M"))
    types = {name: tensor.type_name for name, tensor in file.tensors.items()}
    assert (types["blk.0.odd_thing"], types["blk.0.attn_qkv.bias"], types["token_embd.weight"]) == (
        "F32", "F32", "Q6_K")  # fmt: skip
    assert file.typed["starcoder2.odd"].dtype == np.float32
    assert all(check.ok for check in check_gguf(tmp_path / "out.gguf", tmp_path / "source.gguf"))


def test_a_split_file_is_one_model(folder, tmp_path):
    whole = write(folder, tmp_path / "whole.gguf", "F16")
    first = write(folder, tmp_path / "parts.gguf", "F16", split_bytes=1_000_000)
    assert first.name == f"parts-00001-of-{len(list(tmp_path.glob('parts-*'))):05d}.gguf"
    assert blocks(first) == blocks(whole)
    assert not (tmp_path / "parts.gguf").exists()
    joined = write(first, tmp_path / "joined.gguf", "F16")
    assert blocks(joined) == blocks(whole)
    assert all(check.ok for check in check_gguf(first, folder))


# -- reproducible, resumable


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_runs_write_the_same_bytes(folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(folder, tmp_path / name / "m.gguf", "Q4_K_M")
    assert sha256(tmp_path / "a/m.gguf") == sha256(tmp_path / "b/m.gguf")


def test_stopped_anywhere_it_goes_on_and_ends_in_the_same_bytes(folder, tmp_path):
    """Also between the seal and the last rename: there nothing at all is encoded again."""
    write(folder, tmp_path / "whole.gguf", "Q4_K_M")
    made = job(folder, "Q4_K_M")
    out, encoded = tmp_path / "whole2.gguf", []

    class Stops:
        """Stops at the `at`-th chunk."""

        def __init__(self, at: int) -> None:
            self.at = at

        def start(self, total_bytes: int, done_bytes: int) -> None:
            self.todo = total_bytes - done_bytes

        def advance(self, nbytes: int) -> None:
            encoded.append(nbytes)
            self.at -= 1
            if not self.at:
                raise KeyboardInterrupt

    for at in (1, 2, 3, 5, 8):
        with pytest.raises(KeyboardInterrupt):
            to_gguf(made.rows, made.plan, made.metadata, out, progress=Stops(at))
        assert not out.exists()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mlxquant.files.place.FilesPlace.move_in", lambda *_: os.abort if 1 / 0 else None)
        with pytest.raises(ZeroDivisionError):
            to_gguf(made.rows, made.plan, made.metadata, out)
    encoded.clear()
    to_gguf(made.rows, made.plan, made.metadata, out, progress=Stops(0), resume=True)
    assert encoded == []
    assert blocks(out) == blocks(tmp_path / "whole.gguf")
    assert GGUFFile(out).metadata == GGUFFile(tmp_path / "whole.gguf").metadata


@pytest.mark.parametrize("type_name", ["Q4_0", "BF16"])
def test_a_large_tensor_passes_in_chunks(request, tmp_path, type_name):
    folder = request.getfixturevalue("large")
    made = job(folder, type_name)
    assert traced_peak(lambda: to_gguf(made.rows, made.plan, made.metadata, tmp_path / "m.gguf")) < ALLOWED
    assert traced_peak(lambda: list(check_gguf(tmp_path / "m.gguf", folder))) < ALLOWED


# -- verify


def failed(path: Path, *args: object, **options: object) -> list[str]:
    return [check.name for check in check_gguf(path, *args, **options) if not check.ok]


def test_verify_finds_any_changed_byte(folder, tmp_path):
    path = write(folder, tmp_path / "m.gguf", "Q4_K_M")
    assert failed(path, folder) == []
    good = path.read_bytes()
    tensor = GGUFFile(path).tensors["blk.1.ffn_up.weight"]
    for at, byte, expected in [
        (tensor.offset + 40, 0xA5, ["tensors", "weights"]),
        (tensor.offset + 1, 0x7E, ["tensors"]),  # the scale becomes NaN
        (good.index(b"tokenizer.chat_template") + 60, ord("~"), ["metadata"]),
    ]:
        path.write_bytes(good[:at] + bytes([byte]) + good[at + 1 :])
        names = failed(path, folder)
        assert set(expected) <= set(names), (at, names)
    path.write_bytes(good.replace(b'"pure": false', b'"pure": true '))
    assert "types" in failed(path)
    path.write_bytes(good.replace(b'"pre": null', b'"pre": 1234'))
    with pytest.raises(SourceError, match="cannot be read: 'pre is 1234'"):
        failed(path)
    path.write_bytes(good.replace(b'"file_type": "Q4_K_M"', b'"file_type": "Q4_K_X"'))
    with pytest.raises(SourceError, match="cannot be read"):
        failed(path)
    path.write_bytes(good[:-32])
    with pytest.raises(SourceError, match="ends at byte"):
        failed(path)


def test_verify_says_that_another_tool_has_rewritten_the_file(folder, tmp_path):
    """llama-quantize writes another file type and keeps the keys that it does not know, ours among them."""
    path = write(folder, tmp_path / "m.gguf", "BF16")
    key = b"general.file_type" + (4).to_bytes(4, "little")
    old, new = (key + n.to_bytes(4, "little") for n in (32, 7))
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(SourceError, match=r"is 7, and mlxquant wrote 32 \(BF16\): another tool has rewritten the file"):
        failed(path)


def test_verify_finds_another_source_and_a_missing_imatrix(folder, tmp_path):
    other = make(tmp_path / "other", width=256, seed=1)
    path = write(folder, tmp_path / "m.gguf", "Q4_K_M")
    assert failed(path, other) == ["metadata", "weights"]  # the name of the folder, the numbers
    shapes = {t.name: t.target.shape for t in job(folder, "F32").plan.tensors}
    with_imatrix = write(folder, tmp_path / "i.gguf", "Q4_K_M", imatrix=importance(shapes))
    assert failed(with_imatrix, folder, imatrix=importance(shapes)) == []
    with pytest.raises(UsageError, match=r"made with the importance matrix 'wiki\.gguf'"):
        failed(with_imatrix, folder)
    with pytest.raises(UsageError, match=r"not made with .*wiki\.gguf"):
        failed(with_imatrix, folder, imatrix=importance(shapes, seed=4))
    with pytest.raises(UsageError, match="made without an importance matrix"):
        failed(path, folder, imatrix=importance(shapes))
    keys = GGUFFile(with_imatrix).typed
    assert (keys["quantize.imatrix.file"], keys["quantize.imatrix.chunks_count"]) == ("wiki.gguf", np.uint32(7))


def test_a_file_that_is_not_ours_is_not_verified(folder, tmp_path):
    with pytest.raises(SourceError, match="was not written by mlxquant"):
        failed(write_gguf(folder, tmp_path / "m.gguf", "Q8_0"))


# -- llama.cpp, and our own loop


@pytest.mark.parametrize("type_name", ["F32", "F16"])
def test_llama_cpp_says_the_same_tokens_as_our_own_loop(folder, tmp_path, type_name):
    """Not BF16, for which llama.cpp rounds activations to bfloat16 as well."""
    pytest.importorskip("xllamacpp")
    from mlxquant.run.cache import plan_cache
    from mlxquant.run.device import prepare
    from mlxquant.run.generate import generate
    from mlxquant.run.model import load_model

    source = make(tmp_path / "m", width=256, dtype="float32" if type_name == "F32" else "bfloat16")
    path = write(source, tmp_path / "m.gguf", type_name)
    prompt = [5, 17, 200, 41]
    theirs = LlamaCpp(path).generate(prompt, 12)
    prepare()
    loaded = load_model(path, expand="on")
    ours = generate(loaded.model, prompt, plan_cache(loaded.model).make(), max_tokens=12)
    assert [token.id for token in ours] == theirs


@pytest.mark.parametrize("type_name", ["BF16", "Q4_K_M", "Q2_K", "IQ4_NL", "TQ1_0", "Q5_1"])
def test_llama_cpp_loads_the_file(folder, tmp_path, type_name):
    pytest.importorskip("xllamacpp")
    assert len(LlamaCpp(write(folder, tmp_path / "m.gguf", type_name)).generate([5, 17, 200], 4)) == 4


# -- small things


def test_modelfile():
    metadata = {
        "general.architecture": "llama", "llama.context_length": np.uint32(131072),
        "general.sampling.temp": np.float32(0.6),
        "tokenizer.ggml.tokens": ["<s>", "</s>", "<|im_end|>", 'say "x"', "\n"],
        "tokenizer.ggml.eos_token_id": np.uint32(1),
    }  # fmt: skip
    lines = modelfile("m.gguf", metadata, (1, 2, 3, 4, 99)).decode().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        "FROM ./m.gguf",
        "PARAMETER num_ctx 8192",
        "PARAMETER temperature 0.6",
        'PARAMETER stop "</s>"',
        'PARAMETER stop "<|im_end|>"',
    ]


def test_pre_is_for_tokenizers_that_are_read(folder, tmp_path):
    path = write(folder, tmp_path / "m.gguf", "F16", pre="llama-bpe")
    assert GGUFFile(path).metadata["tokenizer.ggml.pre"] == "llama-bpe"
    assert failed(path, folder) == []
    with pytest.raises(UsageError, match="--pre"):
        job(path, "Q8_0", pre="gpt-2")


def test_settings_stand_in_the_file(folder, tmp_path):
    wanted = type_settings("Q4_K_M", tensor_types=["ffn_down=q8_0"], output_tensor_type="f16")
    keys = GGUFFile(write(folder, tmp_path / "m.gguf", wanted)).metadata
    found = json.loads(keys[SETTINGS])
    assert found["tensor_types"] == [["ffn_down", "Q8_0"]]
    assert (found["output_tensor_type"], found["pre"]) == ("F16", None)
    assert json.loads(keys[SOURCE])["name"] == "tiny"
    assert replace(wanted) == wanted


def test_weights_that_overflow_a_float16_scale_are_refused_by_name(tmp_path: Path) -> None:
    """llama-quantize stops there as well, after the file is written; stored, they would decode to NaN."""
    folder = make(tmp_path / "source", width=256, dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7, :32] = 1e10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"blk\.1\.ffn_up\.weight: row 7: weights too large for the float16 scales"):
        write(folder, tmp_path / "x.gguf", "Q4_K_M")
    assert not (tmp_path / "x.gguf").exists()
