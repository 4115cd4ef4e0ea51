"""HFFolder: which files make a model, and every way in which a folder can be incomplete or lie."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxquant.errors import SourceError
from mlxquant.files.hf_folder import INDEX, HFFolder
from mlxquant.files.reading import JSON_LIMIT_BYTES
from tests import tiny

A, B, C = (np.full((4, 2), n, np.float32) for n in (1, 2, 3))


def folder(path: Path, files: dict[str, dict], index: object = None, config: str = "{}") -> Path:
    path.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, path / name)
    if index is not None:
        (path / INDEX).write_text(json.dumps(index))
    (path / "config.json").write_text(config)
    return path


SHARDS = {"model-00001-of-00002.safetensors": {"a": A, "b": B}, "model-00002-of-00002.safetensors": {"c": C}}
MAP = {name: file for file, tensors in SHARDS.items() for name in tensors}


def test_a_real_tiny_model(tmp_path):
    source = HFFolder(tiny.make(tmp_path / "m", "qwen2"))
    expected = load_file(tmp_path / "m/model.safetensors")
    assert source.config["model_type"] == "qwen2"
    assert source.specs.keys() == expected.keys()
    for name, spec in source.specs.items():
        assert source.read_rows(name, 0, spec.rows).tobytes() == expected[name].tobytes()


def test_shards_with_index(tmp_path):
    with HFFolder(folder(tmp_path / "m", SHARDS, {"weight_map": MAP})) as source:
        assert list(source.specs) == ["a", "b", "c"]
        assert source.read_rows("c", 1, 3).tolist() == [[3, 3], [3, 3]]


def test_shards_without_index(tmp_path):
    assert list(HFFolder(folder(tmp_path / "m", SHARDS)).specs) == ["a", "b", "c"]


def test_other_names_and_what_is_passed_over(tmp_path):
    assert list(HFFolder(folder(tmp_path / "w", {"weights.safetensors": {"a": A}})).specs) == ["a"]
    both = folder(tmp_path / "c", {"model.safetensors": {"a": A}, "consolidated.safetensors": {"x": B}})
    (both / "._model.safetensors").write_bytes(b"resource fork")
    assert list(HFFolder(both).specs) == ["a"]
    only = folder(tmp_path / "d", {"weights.safetensors": {"a": A}})
    (only / "._weights.safetensors").write_bytes(b"resource fork")
    assert list(HFFolder(only).specs) == ["a"]


def test_hub_cache_layout_of_links(tmp_path):
    """The Hub cache's snapshot is a folder of links into blobs/."""
    blobs = folder(tmp_path / "blobs", {"model.safetensors": {"a": A}})
    (tmp_path / "snapshot").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "snapshot" / name).symlink_to(blobs / name)
    assert HFFolder(tmp_path / "snapshot").read_rows("a", 0, 4).tobytes() == A.tobytes()


@pytest.mark.parametrize("indexed", [True, False])
def test_missing_shard(tmp_path, indexed):
    path = folder(tmp_path / "m", SHARDS, {"weight_map": MAP} if indexed else None)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model-00002-of-00002\.safetensors missing"):
        HFFolder(path)


def test_truncated_shard(tmp_path):
    path = folder(tmp_path / "m", SHARDS, {"weight_map": MAP})
    shard = path / "model-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 5)
    with pytest.raises(SourceError, match=r"model-00001.*tensors take 64 bytes, the file holds 59"):
        HFFolder(path)


def test_index_names_a_tensor_that_no_shard_has(tmp_path):
    path = folder(tmp_path / "m", SHARDS, {"weight_map": MAP | {"lost": "model-00002-of-00002.safetensors"}})
    with pytest.raises(SourceError, match="lacks tensor 'lost'"):
        HFFolder(path)


def test_index_beside_a_single_file_is_checked_too(tmp_path):
    index = {"weight_map": {"a": "model.safetensors"}}
    path = folder(tmp_path / "m", {"model.safetensors": {"a": A}}, index)
    assert list(HFFolder(path).specs) == ["a"]
    (path / INDEX).write_text(json.dumps({"weight_map": {"lost": "model.safetensors"}}))
    with pytest.raises(SourceError, match="lacks tensor 'lost'"):
        HFFolder(path)


def test_tensor_in_two_shards(tmp_path):
    twice = dict(zip(SHARDS, ({"a": A}, {"a": B}), strict=True))
    with pytest.raises(SourceError, match=r"'a' is in model-00001.* and in model-00002"):
        HFFolder(folder(tmp_path / "m", twice))


@pytest.mark.parametrize(
    "name",
    ["../m/x.safetensors", "/etc/x.safetensors", "..", "a/../../x.safetensors", "a\\x.safetensors", "", 7,
     None, "x.bin", "x\0.safetensors", "n" * 300 + ".safetensors"],
)  # fmt: skip
def test_index_that_leads_elsewhere(tmp_path, name):
    save_file({"a": A}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=r"a \.safetensors file in this folder"):
        HFFolder(folder(tmp_path / "m", {}, {"weight_map": {"a": name}}))


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, 3])
def test_index_of_another_shape(tmp_path, index):
    with pytest.raises(SourceError, match=INDEX):
        HFFolder(folder(tmp_path / "m", SHARDS, index))


@pytest.mark.parametrize(
    ("text", "says"),
    [("[]", "expected an object"), ("{", "not valid JSON"), ("", "not valid JSON"), ("[" * 99999, "deeply"),
     ('{"a": 1, "a": 2}', "appears twice"), ('{"a": ' + "9" * 5000 + "}", "not valid JSON")],
)  # fmt: skip
def test_config_that_is_no_config(tmp_path, text, says):
    with pytest.raises(SourceError, match=says):
        HFFolder(folder(tmp_path / "m", SHARDS, config=text))


def test_config_too_long(tmp_path):
    path = folder(tmp_path / "m", SHARDS)
    os.truncate(path / "config.json", JSON_LIMIT_BYTES + 1)
    with pytest.raises(SourceError, match="expected at most"):
        HFFolder(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_by_name(tmp_path, name):
    path = folder(tmp_path / "m", {})
    (path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError, match=f"only as pickle \\({name}\\)") as caught:
        HFFolder(path)
    assert caught.value.hint


def test_no_model_there(tmp_path):
    (tmp_path / "f").write_text("")
    path = folder(tmp_path / "m", {})
    for name, says in [("no", "does not exist"), ("f", "is a file"), ("m", "has no .safetensors")]:
        with pytest.raises(SourceError, match=says):
            HFFolder(tmp_path / name)
    (path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"but m\.gguf"):
        HFFolder(path)
    shutil.rmtree(path)
    path.mkdir()
    with pytest.raises(SourceError, match=r"has no config\.json"):
        HFFolder(path)


def test_descriptors_do_not_grow_with_shards(tmp_path):
    files = {f"model-{i:05d}-of-00040.safetensors": {f"t{i}": A} for i in range(1, 41)}
    source = HFFolder(folder(tmp_path / "m", files))
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208 - a descriptor folder, no path
    for name in source.specs:
        source.read_rows(name, 0, 4)
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208
