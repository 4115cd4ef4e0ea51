"""`verify` passes what `convert` wrote, and fails for each thing that can be wrong with it, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mlxquant.convert.checks import check_folder
from mlxquant.convert.manifest import sha256
from mlxquant.convert.sources import open_source
from mlxquant.convert.to_mlx import to_mlx
from mlxquant.errors import SourceError
from mlxquant.files.hf_folder import HFFolder
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings
from tests.tiny import make


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make(tmp_path_factory.mktemp("source"), "qwen2")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    opened = open_source(source)
    plan = make_plan(opened.config, opened.specs, settings(bits=4, group_size=32, method="rtn"))
    return to_mlx(opened, plan, tmp_path_factory.mktemp("out") / "model")


@pytest.fixture
def out(converted, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def failures(out: Path, source: Path | None) -> dict[str, str]:
    opened = open_source(source) if source else None
    return {c.name: c.detail for c in check_folder(out, opened) if not c.ok}


def rewrite(out: Path, change) -> None:
    """Changes tensors (name -> array) and makes every checksum agree: what a careful forger or a bad tool leaves."""
    folder = HFFolder(out)
    arrays = {}
    for name, spec in folder.specs.items():
        raw = folder.read_rows(name, 0, spec.rows).reshape(spec.shape).copy()
        arrays[name] = raw.view(ml_dtypes.bfloat16) if spec.dtype == "BF16" else raw
    change(arrays)
    save_file(arrays, out / "model.safetensors", metadata={"format": "mlx"})
    manifest = json.loads((out / "mlxquant.json").read_text())
    manifest["tensors"] = {n: sha256(np.ascontiguousarray(a).tobytes()) for n, a in arrays.items()}
    (out / "mlxquant.json").write_text(json.dumps(manifest))


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def reseal(out: Path, *names: str) -> None:
    """Makes the manifest agree with changed small files."""
    edit_json(out / "mlxquant.json", lambda m: m["files"].update({n: sha256((out / n).read_bytes()) for n in names}))


def test_what_convert_wrote_passes(converted, source):
    assert failures(converted, source) == {}
    assert failures(converted, None) == {}
    names = [c.name for c in check_folder(converted, open_source(source))]
    assert names == ["specs", "config", "checksums", "files", "head", "eos", "plan", "weights", "norms"]


def test_a_flipped_bit(out):
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert "have changed" in failures(out, None)["checksums"]


def test_a_missing_tensor(out):
    rewrite(out, lambda a: a.pop("model.layers.1.mlp.up_proj.scales"))
    edit_json(out / "model.safetensors.index.json", lambda i: i["weight_map"].pop("model.layers.1.mlp.up_proj.scales"))
    assert "up_proj.scales': found nothing" in failures(out, None)["specs"]


def test_another_dtype(out):
    name = "model.norm.weight"
    rewrite(out, lambda a: a.update({name: a[name].astype(np.float32)}))
    assert name in failures(out, None)["specs"]


def test_a_wrong_weight_with_right_checksums(out, source):
    def change(arrays):
        arrays["model.layers.0.mlp.down_proj.weight"][3, 0] ^= 0x0000000F

    rewrite(out, change)
    assert "model.layers.0.mlp.down_proj.weight: row 3" in failures(out, source)["weights"]


def test_a_scale_that_is_no_number(out, source):
    """NaN is not greater than any bound."""
    name = "model.layers.0.mlp.down_proj.scales"
    rewrite(out, lambda a: a[name].__setitem__((3, 0), np.nan))
    assert "model.layers.0.mlp.down_proj.weight: row 3" in failures(out, source)["weights"]


def test_swapped_projections(out, source):
    def change(arrays):
        for part in ("weight", "scales", "biases"):
            k, v = (f"model.layers.0.self_attn.{n}_proj.{part}" for n in "kv")
            arrays[k], arrays[v] = arrays[v], arrays[k]

    rewrite(out, change)
    assert "k_proj" in failures(out, source)["weights"]


def test_a_norm_shifted_twice(out, source):
    name = "model.layers.1.input_layernorm.weight"
    rewrite(out, lambda a: a.update({name: (a[name].astype(np.float32) + 1).astype(ml_dtypes.bfloat16)}))
    found = failures(out, source)
    assert name in found["norms"]
    assert name in found["weights"]


def test_a_tied_head_that_has_a_head(out):
    edit_json(out / "config.json", lambda c: c.update(tie_word_embeddings=True))
    reseal(out, "config.json")
    assert "ties the head" in failures(out, None)["head"]


def test_an_untied_head_that_is_gone(out):
    parts = [f"lm_head.{p}" for p in ("weight", "scales", "biases")]
    rewrite(out, lambda a: [a.pop(p) for p in parts])
    edit_json(out / "model.safetensors.index.json", lambda i: [i["weight_map"].pop(p) for p in parts])
    assert "no lm_head is stored" in failures(out, None)["head"]


def test_a_lost_end_of_turn(out):
    for name in ("config.json", "generation_config.json"):
        edit_json(out / name, lambda c: c.update(eos_token_id=0))
    reseal(out, "config.json", "generation_config.json")
    assert "would not stop at [2]" in failures(out, None)["eos"]


def test_no_end_at_all(out):
    edit_json(out / "tokenizer_config.json", lambda c: [c.pop("eos_token"), c.pop("chat_template")])
    for name in ("config.json", "generation_config.json"):
        edit_json(out / name, lambda c: c.pop("eos_token_id"))
    assert "answers would never stop" in failures(out, None)["eos"]


def test_a_changed_tokenizer(out, source):
    path = out / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert "tokenizer.json: changed" in failures(out, None)["files"]
    reseal(out, "tokenizer.json")
    assert "tokenizer.json: not the source's" in failures(out, source)["files"]


def test_a_lost_template(out, source):
    (out / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json: missing" in failures(out, source)["files"]


def test_a_wrong_declaration(out):
    edit_json(out / "config.json", lambda c: c["quantization"].pop("lm_head"))
    reseal(out, "config.json")
    assert "lm_head: config.json says" in failures(out, None)["config"]


def test_another_source(converted, tmp_path):
    other = make(tmp_path / "other", "qwen2", seed=1)
    assert "weights" in failures(converted, other)
    wider = make(tmp_path / "wider", "qwen2", layers=3)
    assert "not this source" in failures(converted, wider)["plan"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"plan": {"tensors": [{"name": 1}]}}', '{"plan": 3, "tensors": {}}'])
def test_a_manifest_that_is_none(out, text):
    (out / "mlxquant.json").write_text(text)
    with pytest.raises(SourceError, match="not a manifest"):
        list(check_folder(out, None))


@pytest.mark.parametrize(
    "lie",
    [
        lambda m: m.pop("plan_sha256"),
        lambda m: m["plan"]["settings"].update(mode=[]),
        lambda m: m["plan"]["settings"].update(recipe="best"),
        lambda m: m["plan"]["settings"].update(dtype="F99"),
        lambda m: m["plan"]["settings"].update(sets=[["(", "8g32"]]),
        lambda m: m["plan"]["tensors"][0].update(name="\x1b[2J"),
        lambda m: m["plan"]["tensors"][0].update(shape=[]),
        lambda m: m["plan"]["tensors"][0].pop("role"),
        lambda m: m["files"].update({"../../outside": "0" * 64}),
        lambda m: m["files"].update({"n" * 5000: "0" * 64}),
        lambda m: m["files"].update({"/etc/hostname": "0" * 64}),
    ],
)
def test_a_manifest_of_lies_is_one_line(out, source, lie):
    edit_json(out / "mlxquant.json", lie)
    with pytest.raises(SourceError, match="not a manifest") as caught:
        list(check_folder(out, open_source(source)))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("name", ["model-extra.safetensors", "chat_template.jinja", "special_tokens_map.json"])
def test_a_file_that_was_added(out, name):
    """Stock mlx-lm would load it, over what we wrote."""
    shutil.copy(out / "model.safetensors", out / name)
    assert name in failures(out, None)["files"]


def test_files_that_no_loader_reads_may_be_added(out):
    for name in ("README.md", "LICENSE", "._model.safetensors", ".DS_Store"):
        (out / name).write_text("")
    assert not failures(out, None)


def test_a_norm_of_another_shape_and_one_that_is_gone(out, source):
    rewrite(out, lambda a: a.update({"model.norm.weight": a["model.norm.weight"][:5]}))
    assert failures(out, source).keys() == {"specs"}
    edit_json(out / "model.safetensors.index.json", lambda index: index["weight_map"].pop("model.norm.weight"))
    reseal(out, "model.safetensors.index.json")
    rewrite(out, lambda a: a.pop("model.norm.weight"))
    assert failures(out, source).keys() == {"specs"}


def test_a_folder_of_others(source):
    with pytest.raises(SourceError, match="not written by mlxquant"):
        list(check_folder(source, None))


@pytest.fixture(scope="module")
def searched(source, tmp_path_factory):
    opened = open_source(source)
    plan = make_plan(opened.config, opened.specs, settings(bits=3, group_size=32, method="search"))
    return to_mlx(opened, plan, tmp_path_factory.mktemp("searched") / "model")


def details(out: Path, source: Path) -> dict[str, str]:
    return {c.name: c.detail for c in check_folder(out, open_source(source))}


NUDGED = "model.layers.0.mlp.down_proj.weight"


def nudge(arrays) -> None:
    """One code by one: within any bound of single weights."""
    arrays[NUDGED][3, 0] ^= 1


def test_what_search_wrote_passes_and_is_no_rtn(searched, converted, source):
    assert failures(searched, source) == {}
    assert "as search finds them" in details(searched, source)["weights"]
    manifest = json.loads((searched / "mlxquant.json").read_text())
    assert manifest["plan"]["settings"]["method"] == "search"
    assert json.loads((searched / "config.json").read_text())["mlxquant"]["method"] == "search"
    assert "method" not in json.loads((converted / "mlxquant.json").read_text())["plan"]["settings"]


def test_a_code_that_search_did_not_choose(searched, source, tmp_path):
    out = Path(shutil.copytree(searched, tmp_path / "copy"))
    rewrite(out, nudge)
    assert f"{NUDGED}: row 3 is not what search finds" in failures(out, source)["weights"]


def test_another_versions_search_is_held_against_rtn(searched, source, tmp_path):
    out = Path(shutil.copytree(searched, tmp_path / "copy"))
    edit_json(out / "mlxquant.json", lambda m: m.update(mlxquant="0.0.1"))
    assert failures(out, source) == {}
    assert "no further from the source than rtn's" in details(out, source)["weights"]

    def scale_up(arrays):
        arrays["model.layers.0.mlp.down_proj.scales"][3, 0] *= 1.5

    rewrite(out, scale_up)
    assert f"{NUDGED}: row 3 is further from the source than rtn's" in failures(out, source)["weights"]


def calibrate(out: Path, **calibration) -> None:
    """As the manifest of a folder is whose codes were chosen by text; the codes here are the search's."""
    edit_json(out / "mlxquant.json", lambda m: m.update(calibration=calibration))


def test_calibrated_codes_are_bounded_by_tensor_only(searched, source, tmp_path):
    out = Path(shutil.copytree(searched, tmp_path / "copy"))
    rewrite(out, nudge)
    calibrate(out)
    assert failures(out, source) == {}
    assert "no closer bound" in details(out, source)["weights"]

    def swap(arrays):
        for part in ("weight", "scales", "biases"):
            gate, up = (f"model.layers.0.mlp.{n}_proj.{part}" for n in ("gate", "up"))
            arrays[gate], arrays[up] = arrays[up], arrays[gate]

    rewrite(out, swap)
    assert "proj.weight: its squared error is" in failures(out, source)["weights"]


def test_transformed_weights_are_not_compared_and_that_is_said(searched, source, tmp_path):
    out = Path(shutil.copytree(searched, tmp_path / "copy"))
    rewrite(out, lambda a: a.update({"model.norm.weight": a["model.norm.weight"] * 2}))
    assert "norms" in failures(out, source)
    calibrate(out, transforms=["rotate"])
    assert failures(out, source) == {}
    assert "not compared: weights were transformed before (rotate)" in details(out, source)["weights"]


@pytest.mark.parametrize(
    "lie", [{"calibration": 3}, {"calibration": {"transforms": 3}}, {"calibration": {"transforms": ["\x1b[2J"]}}]
)
def test_a_calibration_of_lies_is_one_line(out, source, lie):
    edit_json(out / "mlxquant.json", lambda m: m.update(lie))
    with pytest.raises(SourceError, match="not a manifest") as caught:
        list(check_folder(out, open_source(source)))
    assert caught.value.message.isprintable()
