"""`mlxquant fit`, from the command line down to the stand-in Hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.runner import mlxquant, refused
from tests.fake_hub import FakeHub
from tests.gguf_files import write_gguf
from tests.test_imports import HEAVY

MAC = ("--mac", "M2 8GB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLXQUANT_STATE", str(tmp_path / "state"))


def answer(*arguments: object) -> dict:
    result = mlxquant("fit", *arguments, "--json")
    assert result.code == 0, result
    assert result.err == ""
    return json.loads(result.out)


def level(found: dict, key: str) -> dict:
    return next(row for row in found["levels"] if row["level"] == key)


def test_a_folder_for_people(folder: Path):
    result = mlxquant("fit", folder, *MAC)
    assert result.code == 0, result
    for text in ("qwen3", "M2, 8 GB, 102 GB/s", "mlx 4-bit", "gguf Q4_K_M", "tok/s at 0", "first token"):
        assert text in result.out, text


def test_the_bytes_are_those_of_converts_plan(folder: Path):
    found = answer(folder, *MAC, "--all")
    for row in found["levels"]:
        if not row["options"]:
            continue
        plan = json.loads(mlxquant("convert", folder, "--dry-run", "--json", *row["options"]).out)
        assert plan["bytes"] == row["bytes"], row["level"]
    assert len(found["levels"]) > 60


def test_a_config_alone_gives_the_same_levels(folder: Path, tmp_path: Path):
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    whole, alone = answer(folder, *MAC), answer(tmp_path / "config.json", *MAC)
    assert alone["levels"] == whole["levels"]
    assert answer(tmp_path, *MAC)["levels"] == whole["levels"], "a folder that holds nothing else"


def test_a_shape_in_words():
    found = answer("--params", "7B", "--layers", "32", *MAC)
    assert found["layers"] == 32
    assert level(found, "mlx 4-bit")["bytes"] == pytest.approx(7e9 * 4.8 / 8, rel=0.1)
    assert level(found, "mlx bf16")["verdict"] == "no"


def test_a_gguf_file_is_at_its_level(folder: Path, tmp_path: Path):
    path = write_gguf(folder, tmp_path / "model-Q8_0.gguf", "Q8_0")
    found = answer(path, *MAC)
    assert found["levels"][0]["level"] == "gguf Q8_0"
    assert found["levels"][0]["options"] == []
    assert "gguf Q4_K_M" in found["refused"]
    assert "levels would round again" in mlxquant("fit", path, *MAC).out


def test_the_hub_is_asked_for_headers_alone(folder: Path, fake_hub: FakeHub):
    fake_hub.add("org/model", folder)
    assert answer("org/model", *MAC)["levels"] == answer(folder, *MAC)["levels"]
    whole = (folder / "model.safetensors").stat().st_size
    assert fake_hub.served("model.safetensors") < whole / 2


def test_a_gated_repo_is_one_line(folder: Path, fake_hub: FakeHub):
    fake_hub.add("org/model", folder)
    fake_hub.gate("org/model")
    refused(mlxquant("fit", "org/model", *MAC), "org/model", "gated")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("no MODEL",)),
        (("model", "--params", "7B"), ("--params describes another",)),
        (("--layers", "32"), ("without --params",)),
        (("--params", "7Q", "--layers", "32"), ("7Q",)),
        (("--params", "7B", "--layers", "32", "--mac", "M9 8GB"), ("'m9'",)),
        (("--params", "7B", "--layers", "32", "--ram", "16XB"), ("16XB",)),
        (("--params", "7B", "--layers", "32", "--context", "0"), ("--context 0",)),
        (("--params", "7B", "--layers", "32", "--calibrate"), ("--calibrate",)),
        (("--params", "7B", "--layers", "32", "--pick", "--table"), ("--pick",)),
        (("no/such/model", "--mac", "M2 8GB"), ("no/such/model",)),
    ],
)
def test_what_makes_no_sense_is_one_line(arguments, words):
    refused(mlxquant("fit", *arguments), *words, code=2)


def test_an_unknown_family_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody"}))
    refused(mlxquant("fit", tmp_path / "config.json", *MAC), "nobody")


def test_eight_bits_of_cache_hold_less(folder: Path):
    plain, small = answer(folder, *MAC), answer(folder, *MAC, "--kv-bits", "8")
    assert small["cache"]["bytes_per_token"] < plain["cache"]["bytes_per_token"]


def test_the_grid_for_people_and_scripts(folder: Path):
    out = mlxquant("fit", folder, "--table").out
    assert "8 GB" in out
    assert "128 GB" in out
    found = answer(folder, "--table")
    assert len(found["memory_bytes"]) == 7
    for row in found["levels"]:
        assert row["longest_tokens"] == sorted(row["longest_tokens"]), "more memory never holds less"


def test_the_grid_is_drawn(folder: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert mlxquant("fit", folder, "--table", "--plot", tmp_path / "fit.svg").code == 0
    assert (tmp_path / "fit.svg").read_text().startswith("<?xml")


def test_the_pick_names_a_level_and_a_command(folder: Path):
    found = answer(folder, *MAC, "--pick")["pick"]
    assert found["command"].startswith(f"mlxquant convert {folder}")
    assert found["command"] in mlxquant("fit", folder, *MAC, "--pick").out


def test_a_calibration_is_kept_and_used(folder: Path, tmp_path: Path):
    done = mlxquant("fit", folder, "--calibrate", "--json")
    assert done.code == 0, done
    kept = json.loads(done.out)
    assert Path(kept["file"]).parent == tmp_path / "state"
    speed = answer(folder)["levels"][0]["speed"]
    assert speed["engine"].startswith("calibrated on this machine")
    measured = kept["rows"][0]["decode_tok_s"]
    assert speed["decode_tok_s"][0]["likely"] == pytest.approx(measured, rel=0.5)


def test_nothing_heavy_is_loaded(folder: Path):
    code = (
        f"import sys; sys.argv = ['mlxquant', 'fit', {str(folder)!r}, '--mac', 'M2 8GB', '--pick']\n"
        "from mlxquant.cli.main import main\nmain()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
