"""`convert --fit`: the same bytes as with the level named, chosen before anything is pulled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.runner import mlxquant, refused
from tests.fake_hub import FakeHub
from tests.tiny import make

# Llama-3.1-8B, as its config.json has it: without weights, of which `convert` would find none.
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("source") / "Tiny-1M", width=256)


@pytest.fixture
def large(tmp_path) -> Path:
    folder = tmp_path / "Llama-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {file.name: file.read_bytes() for file in files if file.is_file()}


# A model this small loses most, so that it gets 8 bits for most uses, and Q6_K where GGUF has something between.
@pytest.mark.parametrize(
    ("use", "options"), [((), ("--bits", "8")), (("--for", "extraction"), ("--bits", "8"))]
)  # fmt: skip
def test_the_same_folder_as_with_the_level_named(source, tmp_path, use, options):
    result = mlxquant("convert", source, "-o", tmp_path / "fit", "--fit", "16GB", *use)
    assert (result.code, result.err) == (0, "")
    first = result.out.splitlines()[0]
    assert first.startswith(f"For {use[-1] if use else 'chat'}: mlx 8-bit takes ")
    assert "16 GB has for it" in first
    assert mlxquant("convert", source, "-o", tmp_path / "named", *options).code == 0
    assert contents(tmp_path / "fit") == contents(tmp_path / "named")


# Of a Mac without a chip no speed is known, so that more bits than are enough cannot be said to cost nothing.
@pytest.mark.parametrize(("mac", "use", "type_name"), [("8GB", "chat", "Q6_K"), ("M2 8GB", "chat", "Q8_0")])
def test_the_same_file_as_with_the_type_named(source, tmp_path, mac, use, type_name):
    (tmp_path / "fit").mkdir()
    (tmp_path / "named").mkdir()
    result = mlxquant("convert", source, "-o", tmp_path / "fit" / "m.gguf", "--fit", mac, "--for", use)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"For {use}: gguf {type_name} takes ")
    assert mlxquant("convert", source, "-o", tmp_path / "named" / "m.gguf", "--type", type_name).code == 0
    assert contents(tmp_path / "fit" / "m.gguf") == contents(tmp_path / "named" / "m.gguf")


def test_dry_run_is_the_plan_of_the_level(source, tmp_path):
    planned = mlxquant("convert", source, "--fit", "this", "--dry-run", "--json")
    assert json.loads(planned.out) == json.loads(mlxquant("convert", source, "--bits", "8", "--dry-run", "--json").out)
    shown = mlxquant("convert", source, "-o", tmp_path / "m.gguf", "--fit", "16GB", "--dry-run")
    assert shown.out.startswith("For chat: gguf Q6_K takes ")
    assert "blk.1.ffn_down.weight" in shown.out
    assert list(tmp_path.iterdir()) == []


def test_memory_context_and_cache_decide(large):
    """An 8B model: 4 bits on 8 GB only with little context, and with a quantized cache at more."""

    def level(*words: object) -> str:
        result = mlxquant("fit", large, "--pick", "--json", *words)
        assert result.code == 0, result.err
        return json.loads(result.out)["pick"]["level"]

    assert level("--mac", "M2 16GB") == "mlx 5-bit"
    assert level("--mac", "M2 16GB", "--for", "code") == "mlx 6-bit"
    assert level("--mac", "M2 24GB", "--for", "extraction") == "mlx 8-bit"
    assert level("--mac", "M2 8GB") is None


def test_without_room_one_line_names_what_would_fit(large, tmp_path):
    result = mlxquant("convert", large, "-o", tmp_path / "out", "--fit", "M2 8GB", "--context", "16k")
    refused(result, "Nothing good enough for chat fits", "mlx mxfp4", "16,384 tokens", "M2, 8 GB")
    refused(result, "Next: ", "a Mac with 16 GB", "weights at mxfp4")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_pulled_before_a_level_is_chosen(source, tmp_path, fake_hub: FakeHub):
    fake_hub.add("org/tiny", source)
    result = mlxquant("convert", "org/tiny", "-o", tmp_path / "out", "--fit", "8GB", "--context", "900M")
    refused(result, "org/tiny", "Nothing good enough for chat fits")
    weights = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    assert fake_hub.served(".safetensors") < weights / 2
    assert list(tmp_path.iterdir()) == []
    done = mlxquant("convert", "org/tiny", "-o", tmp_path / "out", "--fit", "8GB")
    assert (done.code, done.err) == (0, "")
    assert mlxquant("convert", "org/tiny", "-o", tmp_path / "named", "--bits", "8").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "named")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--fit", "16GB", "--bits", "4"), "--bits"),
        (("--fit", "16GB", "--recipe", "uniform"), "--recipe"),
        (("--fit", "16GB", "--group-size", "32"), "--group-size"),
        (("--fit", "16GB", "--mode", "mxfp4"), "--mode"),
        (("--fit", "16GB", "--dtype", "float16"), "--dtype"),
        (("--fit", "16GB", "--set", "lm_head=keep"), "--set"),
        (("--fit", "16GB", "--type", "Q4_K_M"), "--type"),
        (("--fit", "16GB", "--pure"), "--pure"),
        (("--fit", "16GB", "--modelfile"), "--modelfile"),
        (("--fit", "16GB", "--allow-requantize"), "--allow-requantize"),
        (("--fit", "16GB", "--context", "0"), "--context 0"),
        (("--fit", "M77 16GB"), "m77"),
        (("--fit", "lots"), "lots"),
        (("--context", "8k"), "--context"),
        (("--kv-bits", "8", "--bits", "4"), "--kv-bits"),
        (("--for", "code"), "--for"),
    ],
)
def test_contradictions_are_one_line(source, tmp_path, words, named):
    refused(mlxquant("convert", source, "-o", tmp_path / "out", *words), named, code=2)
    assert list(tmp_path.iterdir()) == []


def test_what_is_quantized_already(source, tmp_path):
    """An MLX folder is not quantized again; a GGUF file's codes are taken over, which is all that can be had."""
    assert mlxquant("convert", source, "-o", tmp_path / "four").code == 0
    result = mlxquant("convert", tmp_path / "four", "-o", tmp_path / "out", "--fit", "16GB")
    refused(result, "--fit has nothing to choose from")
    assert mlxquant("convert", source, "-o", tmp_path / "m.gguf", "--type", "Q4_0").code == 0
    done = mlxquant("convert", tmp_path / "m.gguf", "-o", tmp_path / "out", "--fit", "16GB")
    assert (done.code, done.err) == (0, "")
    assert mlxquant("convert", tmp_path / "m.gguf", "-o", tmp_path / "named").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "named")
