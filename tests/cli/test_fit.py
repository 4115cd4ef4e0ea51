"""`mlxquant fit`, from the command line down to the stand-in Hub."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from statistics import median

import pytest

from mlxquant.units import format_bytes
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
    for text in ("qwen3", "M2, 8 GB, 102 GB/s", "mlx 4-bit", "gguf Q4_K_M", "tok/s", "at 0", "first"):
        assert text in result.out, text


@pytest.mark.parametrize(("columns", "gone"), [(80, 5), (100, 3), (120, 0)])
def test_a_narrow_terminal_loses_columns_and_no_digits(columns: int, gone: int):
    shape = ("--params", "30B", "--experts", "128", "--active", "8")
    lines = on_a_terminal(columns, "fit", *shape, "--mac", "M5 Max 128GB", "--context", "12k").splitlines()
    rows = [line for line in lines if line.startswith(("mlx ", "gguf "))]
    assert len(rows) > 10
    assert max(map(len, rows)) <= columns
    heads = next(line for line in lines if line.startswith("level"))
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in (heads, *rows))
    assert "needs" in heads
    assert "at 12k" in heads
    (note,) = [line for line in lines if line.startswith("left out at this width: ")] or [""]
    assert len(note.split(", ")) == gone or (not gone and not note)


def on_a_terminal(columns: int, *arguments: str) -> str:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command, plain = [sys.executable, "-m", "mlxquant", *arguments], {"NO_COLOR": "1", "TERM": "xterm"}
    sized = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    read: list[bytes] = []
    with subprocess.Popen(command, stdin=slave, stdout=slave, env=sized | plain) as running:
        os.close(slave)
        # Linux ends a terminal nobody writes to any more in an error, macOS in nothing.
        with contextlib.suppress(OSError):
            while more := os.read(master, 65536):
                read.append(more)
    os.close(master)
    assert running.returncode == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", b"".join(read).decode())


def test_a_computer_without_a_gpu_is_not_said_to_have_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlxquant.machine.platform.system", lambda: "Linux")
    monkeypatch.setattr("mlxquant.machine._linux_memory", lambda: (25_276_513_280, 20 * 10**9))
    monkeypatch.setattr("mlxquant.machine._linux_cpu", lambda: "Some CPU")
    out = mlxquant("fit", folder).out
    assert "Some CPU, 23.54 GiB: a model may take 19 GB, 95 % of the 20 GB that are free now; no GPU was found" in out
    assert "GPU's" not in out


def test_a_context_beyond_the_models_own_is_said_to_be(folder: Path):
    assert "more than the model was made for" in mlxquant("fit", folder, *MAC, "--context", "4k").out
    assert "more than the model was made for" not in mlxquant("fit", folder, *MAC, "--context", "2k").out


def test_a_run_that_is_refused_needs_what_was_said(folder: Path):
    """`fit` here and `generate` here: the same chunks, the same bytes."""
    need = level(answer(folder, "--context", "16m"), "mlx bf16")["need"]
    said = mlxquant("generate", folder, "-p", "a", "--context", "16m").err
    assert f"cache {format_bytes(need['cache_bytes'])} + scratch {format_bytes(need['scratch_bytes'])} =" in said


def test_remarks_do_not_bury_the_table(folder: Path):
    out = mlxquant("fit", folder, *MAC).out
    assert out.count("is not a multiple of 256") == 3
    assert "more of this kind" in out


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
        (("--params", "7B", "--table", "--mac", "M2 8GB"), ("--table", "--mac")),
        (("--params", "7B", "--for", "code"), ("--for is for --pick",)),
        (("--params", "7B", "--format", "gguf"), ("--format is for --pick",)),
        (("model", "--calibrate", "--pick"), ("--calibrate", "--pick")),
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
    before = answer(folder)["levels"][0]["speed"]
    done = mlxquant("fit", folder, "--calibrate", "--json")
    assert done.code == 0, done
    kept = json.loads(done.out)
    assert Path(kept["file"]).parent == tmp_path / "state"
    (trials,) = json.loads(Path(kept["file"]).read_text())["machines"].values()
    measured = [row["decode_tok_s"] for row in kept["rows"]]
    assert [1 / trial["decode_s"] for trial in trials] == pytest.approx(measured)
    speed = answer(folder)["levels"][0]["speed"]
    assert speed["engine"].startswith("calibrated on this machine")
    if before is None:  # no published bandwidth: as long for a byte as was measured
        byte_s = median(t["decode_s"] / (t["weight_bytes"] + t["cache_bytes"]) for t in trials)
        expected = 1 / (byte_s * trials[0]["weight_bytes"])
    else:
        scale = median(trial["decode_s"] / trial["likely_s"] for trial in trials)
        expected = before["decode_tok_s"][0]["likely"] / scale
    assert speed["decode_tok_s"][0]["likely"] == pytest.approx(expected)


def test_a_calibration_reckons_with_the_cache_that_was_timed(folder: Path, tmp_path: Path):
    """On a CPU keys and values are float32, as the weights are."""
    assert mlxquant("fit", folder, "--calibrate").code == 0
    (trials,) = json.loads((tmp_path / "state" / "speeds.json").read_text())["machines"].values()
    found = answer(folder)
    per_token, first = found["cache"]["bytes_per_token"], 512 + 64 // 2
    assert [trial["cache_bytes"] for trial in trials] == [per_token * (depth + first) for depth in (0, 2048)]


def test_nothing_heavy_is_loaded(folder: Path):
    code = (
        f"import sys; sys.argv = ['mlxquant', 'fit', {str(folder)!r}, '--mac', 'M2 8GB', '--pick']\n"
        "from mlxquant.cli.main import main\nmain()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
