"""Whatever config.json holds and whoever reads the answer: `fit` answers or ends in one line, in bounded time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.cli.runner import mlxquant, refused
from tests.families import checkpoints
from tests.families.test_hostile import VALUES

MAC = ("--mac", "M2 8GB")
BOUNDED = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
SHAPES = (("--pick",), ("--json",), ("--kv-bits", "8"), ("--context", "1M", "--prefill-step", "1"))


def config_file(folder: Path, family: str, **changes: object) -> Path:
    path = folder / "config.json"
    about = checkpoints.config(checkpoints.folder(family, family in tiny.ALWAYS_TIED))
    path.write_text(json.dumps({**about, **changes}))
    return path


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
@BOUNDED
@given(data=st.data())
def test_any_value_under_any_key(family, data, tmp_path):
    path = config_file(tmp_path, family)
    about = json.loads(path.read_text())
    inner = about.get("text_config", about)
    for place in (about, inner):
        place[data.draw(st.sampled_from(sorted({*place, "quantization_config"} - {"model_type"})))] = data.draw(VALUES)
    path.write_text(json.dumps(about))
    found = mlxquant("fit", path, *MAC, *data.draw(st.sampled_from(SHAPES)))
    if found.code:
        refused(found)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3_moe", {"num_hidden_layers": 1000, "num_experts": 65536}, ("1000 layers of 65536 experts",)),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 5}, ("num_experts_per_tok is 5", "1 to 4")),
        ("qwen3", {"num_hidden_layers": 4096}, ("num_hidden_layers is 4096",)),
        ("nemotron_h", {"n_routed_experts": None}, ("how many experts",)),
    ],
)
def test_what_no_model_has_is_one_line(tmp_path: Path, family, changes, words):
    refused(mlxquant("fit", config_file(tmp_path, family, **changes), *MAC), *words)


@pytest.mark.parametrize("value", [[[]], 0, "every", 1.5, -4])
@pytest.mark.parametrize(
    ("family", "key"), [("smollm3", "no_rope_layer_interval"), ("gemma2", "sliding_window_pattern")]
)
def test_an_interval_that_is_none_refuses_gguf_alone(tmp_path: Path, family, key, value):
    found = mlxquant("fit", config_file(tmp_path, family, **{key: value}), *MAC, "--json")
    assert found.code == 0, found
    if value or key == "no_rope_layer_interval":  # 0 is transformers' word for the default
        assert key in json.loads(found.out)["refused"]["gguf Q4_K_M"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("partial_rotary_factor", 2**31), ("partial_rotary_factor", -1), ("linear_value_head_dim", 2**31 - 1)],
)
def test_what_no_gguf_key_can_hold_refuses_gguf_alone(tmp_path: Path, key, value):
    found = mlxquant("fit", config_file(tmp_path, "qwen3_next", **{key: value}), *MAC, "--json")
    assert found.code == 0, found
    assert key in json.loads(found.out)["refused"]["gguf Q4_K_M"]


@pytest.mark.parametrize("name", ["a" * 300, "a" * 300 + ".json", "a" * 300 + ".gguf"])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path: Path, name):
    refused(mlxquant("fit", tmp_path / name), "aaa", code=2)
    refused(mlxquant("fit", tmp_path / name / "b"), "aaa", code=2)
    refused(mlxquant("fit", "--params", "7B", "--plot", tmp_path / name / "b.svg"), "there is no folder")
    refused(mlxquant("fit", "--params", "7B", "--plot", tmp_path / (name + ".svg")), "cannot be written")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (("--params", "7B", "--heads", "9999999967", "--kv-heads", "2"), ("no multiple",)),
        (("--params", "7B", "--layers", "100000"), ("num_hidden_layers is 100000",)),
        (("--params", "7B", "--vocab", "9999999999"), ("vocab_size is 9999999999",)),
        (("--params", "1000000000000B"), ("than any model",)),
    ],
)
def test_shapes_that_no_model_has_are_one_line(shape, words):
    refused(mlxquant("fit", *shape, *MAC), *words, code=2)


@pytest.mark.parametrize("form", [MAC, (*MAC, "--pick"), ("--table",)])
def test_a_name_is_nothing_for_the_terminal_to_act_on(tmp_path: Path, form):
    folder = tmp_path / "a\x1b[31m[red]\nname\udcff"
    folder.mkdir()
    config_file(folder, "qwen3")
    found = mlxquant("fit", folder, *form)
    assert found.code == 0, found
    assert "a\\x1b[31m[red]\\nname\\udcff" in found.out
    refused(mlxquant("inspect", folder), "a\\x1b[31m[red]\\nname\\udcff")


def test_a_closed_stdout_hears_nothing():
    done = told("fit --params 7B --ram 16GB >&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("form", ["--ram 16GB", "--ram 16GB --json", "--table"])
def test_a_full_disk_behind_stdout_is_one_line(form):
    done = told(f"fit --params 7B {form} > /dev/full")
    assert (done.returncode, done.stderr) == (1, "Error: the output cannot be written: No space left on device\n")


def test_a_reader_that_went_away_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    done = told("fit --params 7B --ram 16GB --json", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def told(line: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'"$0" -m mlxquant {line}', sys.executable]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
