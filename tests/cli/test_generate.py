from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.tiny import make


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("cli") / "llama", "llama")


def mlxquant(*args, stdin: str = ""):
    return subprocess.run(
        [sys.executable, "-m", "mlxquant", *map(str, args)], input=stdin, capture_output=True, text=True,
        env=os.environ | {"NO_COLOR": "1"}, timeout=300, check=False,
    )  # fmt: skip


def test_streams_text_to_stdout_and_stats_to_stderr(model):
    found = mlxquant("generate", model, "-p", "Hello", "--max-tokens", "5")
    assert found.returncode == 0, found.stderr
    assert "5 tokens at" in found.stderr
    assert "ended by" in found.stderr
    assert found.stdout.endswith("\n")
    assert "tok/s" not in found.stdout


def test_json_agrees_with_stock_mlx_lm(model):
    """The whole way, template to text, against stock's own, in the folder's own dtype and on the same device."""
    same = ("--expand", "off", "--device", "cpu")
    found = mlxquant("generate", model, "-p", "Hello", "--max-tokens", "20", *same, "--json")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    from mlx_lm import load, stream_generate

    stock, tokenizer = load(str(model))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    theirs = [r.token for r in stream_generate(stock, tokenizer, prompt, max_tokens=20)]
    assert told["prompt_tokens"] == len(prompt)
    # Stock stops at token 0 only; we stop at the template's end of turn, token 2, too.
    ends = [i for i, token in enumerate(theirs) if token in (0, 2)]
    assert told["tokens"] == theirs[: ends[0] if ends else None]
    assert told["text"] == tokenizer.decode(told["tokens"])


def test_prompt_from_a_pipe_without_template(model):
    found = mlxquant("generate", model, "--no-template", "-n", "3", "--json", stdin="once upon a time")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["prompt_tokens"] < 15


def test_cache_decisions_are_printed(model):
    found = mlxquant("generate", model, "-p", "Hello", "-n", "3", "--kv-bits", "8", "--temp", "0.8", "--seed", "1")
    assert found.returncode == 0, found.stderr
    assert "cache of layer 0-1: quantized (8 bit, group size 32" in found.stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["-p", "x", "--temp", "-1"], 2, "temperature"),
        (["-p", "x", "--max-tokens", "0"], 2, "0 tokens"),
        (["-p", "", "--no-template"], 2, "empty"),
        ([], 2, "empty"),
        (["-p", "x", "--context", "0"], 2, "--context 0"),
        (["-p", "x", "--context", "5"], 2, "--context is 5"),
        (["-p", "x", "--context", "16M"], 1, "does not fit the memory"),
        (["-p", "x", "--context", "17M"], 2, "is beyond"),
        (["-p", "x", "--no-template", "--system", "y"], 2, "--system"),
        (["-p", "x", "--prefill-step", "0"], 2, "headway"),
    ],
)
def test_refusals_are_one_line_and_a_hint(model, args, code, said):
    found = mlxquant("generate", model, *args)
    assert found.returncode == code, found.stderr
    assert said in found.stderr
    assert "Traceback" not in found.stderr


def test_a_closed_stdin_is_an_empty_one(model):
    line = f"{sys.executable} -m mlxquant generate {model} <&-"
    found = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=300, check=False)
    assert (found.returncode, "the prompt is empty" in found.stderr) == (2, True), found.stderr


def test_what_is_neither_path_nor_id():
    found = mlxquant("generate", "./no-such-model", "-p", "x")
    assert (found.returncode, "neither a path" in found.stderr) == (2, True)
