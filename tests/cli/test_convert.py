"""`convert` from the command line: what it writes, what it says, and what it refuses before the first byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.cli.progress import ByteBar
from tests.cli.runner import Result, mlxquant, refused
from tests.tiny import make


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make(tmp_path_factory.mktemp("source"))


@pytest.fixture
def copy(source, tmp_path):
    """A source folder to break."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


def test_the_folder_runs_in_stock_mlx_lm_and_stops_there(source, tmp_path):
    from mlx_lm import generate, load

    out = tmp_path / "out"
    assert mlxquant("convert", source, "-o", out).code == 0
    model, tokenizer = load(str(out))
    assert isinstance(generate(model, tokenizer, "hello", max_tokens=4), str)
    assert tokenizer.eos_token_ids == {0, 2}  # <|endoftext|> from the config, <|im_end|> from the template


def test_small_files_are_copied_byte_for_byte(source, tmp_path):
    out = tmp_path / "out"
    mlxquant("convert", source, "-o", out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_a_generation_config_that_would_lose_end_of_turn_gets_that_one_key(copy, tmp_path):
    """Stock mlx-lm lets this file overrule config.json, and here its list lacks the template's <|im_end|>."""
    from mlx_lm import load

    before = {"bos_token_id": 0, "eos_token_id": [1], "temperature": 0.6}
    (copy / "generation_config.json").write_text(json.dumps(before))
    out = tmp_path / "out"
    mlxquant("convert", copy, "-o", out)
    assert json.loads((out / "generation_config.json").read_text()) == before | {"eos_token_id": [0, 1, 2]}
    assert load(str(out))[1].eos_token_ids == {0, 1, 2}


def test_a_complete_generation_config_is_not_touched(copy, tmp_path):
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 0],   "temperature": 0.6}')
    mlxquant("convert", copy, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (copy / "generation_config.json").read_bytes()


def test_config_says_how_it_was_made(source, tmp_path):
    out = tmp_path / "out"
    mlxquant("convert", source, "-o", out, "--bits", "3", "--set", "o_proj=8g32")
    made = json.loads((out / "config.json").read_text())["mlxquant"]
    assert made["recipe"] == "balanced"
    assert (made["bits"], made["group_size"], made["sets"]) == (3, 64, ["o_proj=8g32"])
    assert len(made["plan_sha256"]) == len(made["source"]["header_sha256"]) == 64


def test_a_config_that_is_no_unicode(copy, tmp_path):
    """JSON may hold half a surrogate pair, which no UTF-8 can."""
    config = json.loads((copy / "config.json").read_text()) | {"note": "\ud800 and \u00e9"}
    (copy / "config.json").write_text(json.dumps(config))
    assert mlxquant("convert", copy, "-o", tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["note"] == config["note"]


def test_ctrl_c_is_one_line_and_the_next_run_goes_on(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(ByteBar, "advance", lambda self, nbytes: os.kill(os.getpid(), signal.SIGINT))
        result = mlxquant("convert", source, "-o", tmp_path / "out")
    assert result.code == 130
    assert result.err.strip().splitlines() == [
        f"Stopped. What is done stays in {tmp_path / 'out'}.partial; the same command goes on from there."
    ]
    assert mlxquant("convert", source, "-o", tmp_path / "out", "--resume").code == 0


def test_two_runs_write_the_same_bytes(source, tmp_path):
    for name in ("a", "b"):
        mlxquant("convert", source, "-o", tmp_path / name)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_planned_bytes_are_written_bytes(source, tmp_path):
    plan = json.loads(mlxquant("convert", source, "--dry-run", "--json").out)
    mlxquant("convert", source, "-o", tmp_path / "out")
    written = sum(a.nbytes for a in mx.load(str(tmp_path / "out" / "model.safetensors")).values())
    assert plan["bytes"] == sum(t["bytes"] for t in plan["tensors"]) == written


def test_dry_run_lists_every_tensor_and_writes_nothing(source, tmp_path):
    result = mlxquant("convert", source, "-o", tmp_path / "out", "--dry-run")
    assert result.code == 0
    for word in ("model.layers.1.mlp.down_proj.weight", "ffn_down", "4g64", "6g64", "total"):
        assert word in result.out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_loads_nothing_heavy(source):
    code = (
        "import sys; sys.argv = ['mlxquant', 'convert', sys.argv[1], '--dry-run', '--json']\n"
        "from mlxquant.cli.main import main; main()\n"
        "heavy = [m for m in ('mlx', 'mlx_lm', 'transformers', 'tokenizers', 'numba') if m in sys.modules]\n"
        "print(heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["parameters"] > 0
    assert done.stderr.strip() == "[]"


def test_from_several_shards_and_to_several(tmp_path):
    from safetensors.numpy import load_file, save_file

    single = make(tmp_path / "single", dtype="float16", width=256)
    shutil.copytree(single, tmp_path / "sharded")
    tensors = load_file(single / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, tmp_path / "sharded" / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "sharded" / "model.safetensors").unlink()
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for name in ("single", "sharded"):
        assert mlxquant("convert", tmp_path / name, "-o", tmp_path / f"{name}-out").code == 0
    assert (tmp_path / "single-out" / "model.safetensors").read_bytes() == (
        tmp_path / "sharded-out" / "model.safetensors"
    ).read_bytes()


# -- refusals


def no_trace(tmp_path: Path) -> bool:
    return not (tmp_path / "out").exists()


def test_an_existing_output_is_kept_without_force(source, tmp_path):
    mlxquant("convert", source, "-o", tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()
    refused(mlxquant("convert", source, "-o", tmp_path / "out", "--bits", "8"), "already exists", "--force")
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    assert mlxquant("convert", source, "-o", tmp_path / "out", "--bits", "8", "--force").code == 0
    assert (tmp_path / "out" / "config.json").read_bytes() != before


def test_a_partial_of_another_plan_needs_restart(copy, tmp_path):
    out = tmp_path / "out"
    good = (copy / "model.safetensors").read_bytes()
    poison(copy, "model.norm.weight")
    refused(mlxquant("convert", copy, "-o", out), "model.norm.weight", "NaN")
    assert (tmp_path / "out.partial").is_dir()
    assert no_trace(tmp_path)
    (copy / "model.safetensors").write_bytes(good)
    refused(mlxquant("convert", copy, "-o", out), "another plan", "--restart")
    assert mlxquant("convert", copy, "-o", out, "--restart").code == 0
    assert not (tmp_path / "out.partial").exists()


def poison(folder: Path, name: str) -> None:
    """Puts a NaN into a tensor of model.safetensors."""
    from mlxquant.files.safetensors_file import read_header

    header = read_header(folder / "model.safetensors")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(header.offsets[name])
        file.write(np.array([0x7FC0], np.uint16).tobytes())


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_nan_is_refused_by_name(copy, tmp_path, name):
    poison(copy, name)
    refused(mlxquant("convert", copy, "-o", tmp_path / "out"), name, "row 0")
    assert no_trace(tmp_path)


def test_norms_that_were_shifted_before_are_refused(tmp_path):
    """qwen3_next computes with 1 + w; here a tool has added the 1 already and left the experts unstacked."""
    from safetensors.numpy import load_file, save_file

    folder = make(tmp_path / "m", "qwen3_next")
    path = folder / "model.safetensors"
    shifted = {n: a + 1 if a.ndim == 1 and "norm" in n else a for n, a in load_file(path).items()}
    save_file({n: a.astype(shifted["lm_head.weight"].dtype) for n, a in shifted.items()}, path)
    result = mlxquant("convert", folder, "-o", tmp_path / "out", "--group-size", "32")
    refused(result, "1 + w shift has been applied already", "median of their means 1.")
    assert no_trace(tmp_path)


def test_a_truncated_shard(copy, tmp_path):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(mlxquant("convert", copy, "-o", tmp_path / "out"), "model.safetensors")
    assert no_trace(tmp_path)


def test_an_index_that_names_a_missing_shard(copy, tmp_path):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(mlxquant("convert", copy, "-o", tmp_path / "out"), "model-00002-of-00002.safetensors", "missing")
    assert no_trace(tmp_path)


def header_of_lies(change):
    """A function that rewrites the header of model.safetensors after `change` has edited it."""

    def write(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return write


def huge_length(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


@pytest.mark.parametrize(
    "lie",
    [
        header_of_lies(lambda h: h["model.norm.weight"].update(data_offsets=[0, 256])),
        header_of_lies(lambda h: h["model.norm.weight"].update(data_offsets=[10**15, 10**15 + 256])),
        header_of_lies(lambda h: h["model.norm.weight"].update(data_offsets=[-256, 0])),
        header_of_lies(lambda h: h["model.norm.weight"].update(shape=[2**62, 2**62])),
        header_of_lies(lambda h: h["model.norm.weight"].update(shape=[64])),
        header_of_lies(lambda h: h["model.norm.weight"].update(dtype="BF17")),
        header_of_lies(lambda h: h.update({"model.norm.weight": [1, 2, 3]})),
        huge_length,
    ],
)
def test_a_header_of_lies(copy, tmp_path, lie):
    lie(copy)
    refused(mlxquant("convert", copy, "-o", tmp_path / "out"), "model.safetensors")
    assert no_trace(tmp_path)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", "tokenizer.json"])
def test_what_may_not_be_read_is_one_line(copy, tmp_path, name):
    """In a process that may not overrule permissions, as root may."""
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if drop and not shutil.which("setpriv"):
        pytest.skip("root reads everything")
    (copy / name).chmod(0)
    try:
        command = [sys.executable, "-m", "mlxquant", "convert", str(copy), "-o", str(tmp_path / "out")]
        done = subprocess.run([*drop, *command], capture_output=True, text=True, check=False)
    finally:
        (copy / name).chmod(0o755)
    refused(Result(done.returncode, done.stdout, done.stderr), str(copy / name), "ermission denied")


def test_a_disk_that_fills_up(source, tmp_path):
    """A file-size limit stands in for a full disk: the write itself fails, in the middle."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.argv = ['mlxquant', 'convert', sys.argv[1], '-o', sys.argv[2]]\n"
        "from mlxquant.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.strip().splitlines()) <= 2
    assert no_trace(tmp_path)


def test_a_target_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    refused(mlxquant("convert", source, "-o", tmp_path / "file" / "out"), "file")
    if sys.platform == "linux":
        refused(mlxquant("convert", source, "-o", "/proc/mlxquant-out"), "/proc/mlxquant-out")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nowhere-to-be-found", "-o", "x"],
        ["nowhere-" * 40 + "/x", "-o", "x"],
        ["~nobody-of-this-name/nowhere-", "-o", "x"],
        ["--mode", "mxfp4", "--bits", "3", "-o", "x"],
        ["--resume", "--restart", "-o", "x"],
        ["--set", "down_proj", "-o", "x"],
        [],
    ],
)
def test_usage_errors_exit_with_2(source, arguments):
    arguments = arguments if "nowhere-" in "".join(arguments[:1]) else [source, *arguments]
    assert mlxquant("convert", *arguments).code == 2


def test_unreached_bits_are_an_error(tmp_path):
    folder = make(tmp_path / "m", width=192)
    result = mlxquant("convert", folder, "-o", tmp_path / "out", "--group-size", "128", "--recipe", "uniform")
    refused(result, "4g128 is not reached", "--group-size 64")
    assert no_trace(tmp_path)


def test_resume_insists_on_something_to_resume(source, tmp_path):
    refused(mlxquant("convert", source, "-o", tmp_path / "out", "--resume"), "nothing to resume")
