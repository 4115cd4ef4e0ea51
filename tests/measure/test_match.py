"""A quantized form of the teacher passes, whatever it is stored in; anything else is one line, before weights are read.

That it is before any weight is read is shown by files whose weights are missing.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxquant.convert.sources import open_source
from mlxquant.errors import PlanError
from mlxquant.measure.corpus import Corpus
from mlxquant.measure.evaluate import evaluate
from mlxquant.measure.match import Side, check_student
from mlxquant.measure.runner import How, Silent
from mlxquant.measure.windows import Protocol, cut
from mlxquant.run.device import prepare
from mlxquant.run.text import Text
from tests.cli.runner import mlxquant
from tests.gguf_files import write_gguf
from tests.run import gguf_models
from tests.tiny import FAMILIES, VOCAB, make

CORPUS = Corpus("The quick brown fox, at 17:25, jumped over <|im_end|> the lazy dog.\n" * 99, "foxes", "0" * 64)
_HOME = TemporaryDirectory(prefix="mlxquant-match-")
HOME = Path(_HOME.name)


@cache
def opened(path: Path) -> Side:
    return Side(path, open_source(path).config, Text.load(path), path.name)


@cache
def folder(family: str) -> Path:
    return make(HOME / family, family)


def check(teacher: Side, student: Side, corpus: Corpus = CORPUS, windows: int = 4) -> None:
    check_student(teacher, student, cut(teacher.text, corpus, Protocol(64, None, windows)))


def changed(side: Side, **config: object) -> Side:
    """Another config.json; in its text_config where it has one. None takes an entry out."""
    inner = side.config.get("text_config")
    merged = {k: v for k, v in ((inner or side.config) | config).items() if v is not None}
    return Side(side.path, side.config | {"text_config": merged} if inner else merged, side.text, "student")


def refused(teacher: Side, student: Side, *words: str, **options: object) -> str:
    with pytest.raises(PlanError) as caught:
        check(teacher, student, **options)
    message = caught.value.message
    assert message.startswith(f"{student.name}: "), message
    assert "\n" not in message
    assert caught.value.hint
    for word in words:
        assert word in message, message
    return message


# --- quantized forms


@pytest.mark.parametrize("family", FAMILIES)
def test_an_mlx_folder_of_every_family(family: str) -> None:
    out = HOME / f"{family}-mlx"
    assert mlxquant("convert", folder(family), "-o", out, "--bits", 4, "--recipe", "uniform").code == 0
    check(opened(folder(family)), opened(out))
    check(opened(out), opened(folder(family)))


@pytest.mark.parametrize("name", {model.family: name for name, model in gguf_models.MODELS.items()}.values())
def test_a_gguf_file_of_every_family_that_has_one(name: str) -> None:
    source = gguf_models.make(HOME / "gguf" / name, gguf_models.MODELS[name])
    file = gguf_models.write(source, HOME / "gguf" / f"{name}.gguf", "Q8_0")
    corpus = Corpus("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnop" * 99, "letters", "0" * 64)
    check(opened(source), opened(file), corpus=corpus)
    check(opened(file), opened(source), corpus=corpus)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_that_others_wrote(family: str) -> None:
    """By gguf's own writer, with a tokenizer of words, BOS added or not: the teacher decides."""
    for bos in (False, True):
        keys = {"tokenizer__ggml__add_bos_token": bos}
        file = write_gguf(folder(family), HOME / f"{family}-{bos}.gguf", "Q4_0", **keys)
        check(opened(folder(family)), opened(file))
        check(opened(file), opened(folder(family)))


def test_gemma3_with_and_without_its_vision_part() -> None:
    """The head's rows for pictures are cut off in GGUF, as llama.cpp's converter does."""
    whole, text = opened(folder("gemma3")), opened(folder("gemma3_text"))
    check(whole, changed(text))
    longer = Side(whole.path, whole.config | {"vocab_size": 576}, whole.text, "longer")
    check(longer, text)
    check(text, longer)
    shorter = Side(whole.path, whole.config | {"vocab_size": 64}, whole.text, "shorter")
    refused(text, shorter, "vocabulary of 64 tokens", "512")


def test_gemma3_is_compared_over_the_rows_that_both_have(tmp_path) -> None:
    plain, padded = (make(HOME / name, "gemma3", dtype="float32", layers=6) for name in ("plain", "padded"))
    tensors = load_file(padded / "model.safetensors")
    name = "language_model.model.embed_tokens.weight"
    tensors[name] = np.concatenate([tensors[name], np.zeros((64, tensors[name].shape[1]), np.float32)])
    save_file(tensors, padded / "model.safetensors", {"format": "pt"})
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB + 64}))
    for place, (teacher, student) in enumerate(((plain, padded), (padded, plain))):
        a, b = opened(teacher), opened(student)
        windows = cut(a.text, CORPUS, Protocol(64, None, 2))
        (found,) = evaluate(a, [b], windows, How(prepare("cpu")), tmp_path / str(place), Silent()).students
        assert found.divergence.kl.value < 1e-9
        assert found.divergence.top1.value == 1.0


# --- others


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("llama", {"num_hidden_layers": 3}, ("has 3 layers", "its teacher llama 2", "not a quantized form")),
        ("llama", {"hidden_size": 256}, ("256 columns of hidden states", "128")),
        ("llama", {"num_attention_heads": 8}, ("8 attention heads", "4")),
        ("llama", {"num_key_value_heads": 4}, ("4 heads for keys and values", "2")),
        ("llama", {"head_dim": 64}, ("64 columns in a head", "32")),
        ("llama", {"intermediate_size": 512}, ("512 columns in its feed-forward parts", "256")),
        ("llama", {"vocab_size": 640}, ("vocabulary of 640 tokens", "512")),
        ("mixtral", {"num_local_experts": 8}, ("8 experts", "4")),
        ("mixtral", {"num_experts_per_tok": 1}, ("1 experts for each token", "2")),
        ("mixtral", {"intermediate_size": 512}, ("512 columns in its experts", "256")),
        ("qwen2_moe", {"shared_expert_intermediate_size": 128}, ("128 columns in its shared expert", "64")),
        ("qwen3_moe", {"mlp_only_layers": [1]}, ("experts in layer 1",)),
        ("qwen3_next", {"full_attention_interval": 4}, ("linear attention and experts in layer 2", "full attention")),
        ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, ("in a window", "in layer 1", "full")),
        ("deepseek_v3", {"kv_lora_rank": 32}, ("32 columns in its latent keys", "64")),
        ("mamba2", {"state_size": 32}, ("rows in a recurrent state", "16")),
        ("gemma3", {"num_hidden_layers": 9}, ("has 9 layers", "2")),
    ],
)
def test_another_architecture(family: str, config: dict[str, object], words: tuple[str, ...]) -> None:
    side = opened(folder(family))
    if "kv_lora_rank" in config or "state_size" in config:
        words = words[:1]  # other numbers follow from these, and one of them may come first
        refused(side, changed(side, **config))
    else:
        refused(side, changed(side, **config), *words)
        refused(changed(side, **config), side)


def test_another_family() -> None:
    refused(opened(folder("llama")), opened(folder("qwen2")), "qwen2: is of the family 'qwen2'", "'llama'")
    refused(opened(folder("llama")), opened(folder("smollm3")), "'smollm3'")
    refused(opened(folder("mistral")), opened(folder("mixtral")), "4 experts", "0")


def test_llama_and_mistral_are_one() -> None:
    mistral = opened(folder("mistral"))
    check(mistral, changed(mistral, model_type="llama"))


def test_a_family_that_is_not_known_is_compared_by_what_its_config_says() -> None:
    side = changed(opened(folder("llama")), model_type="nobody")
    check(side, changed(side))
    check(side, changed(side, num_key_value_heads=None))  # one of them says nothing
    check(side, changed(side, rms_norm_eps=None))
    refused(side, changed(side, num_hidden_layers=5), "has 5 layers", "2")
    refused(side, changed(side, vocab_size=640), "640 tokens")
    refused(side, changed(side, model_type="somebody"), "'somebody'", "'nobody'")
    refused(side, changed(side, model_type=["nobody"]), "['nobody']")
    refused(side, changed(side, model_type=None), "None")


# --- tokenizers


def other_tokenizer(name: str, change: object) -> Side:
    """llama's folder with another tokenizer.json and no weights worth the name."""
    to = HOME / name
    shutil.copytree(folder("llama"), to)
    pipeline = json.loads((to / "tokenizer.json").read_text())
    change(pipeline)
    (to / "tokenizer.json").write_text(json.dumps(pipeline))
    side = opened(folder("llama"))
    return Side(to, side.config, Text.load(to), name)


def piece(side: Side, token: int) -> str:
    return repr(side.text.decode([token]))


def test_another_split_is_shown_at_its_first_place() -> None:
    def fewer(pipeline):
        pipeline["model"]["merges"] = pipeline["model"]["merges"][9:]

    teacher, student = opened(folder("llama")), other_tokenizer("split", fewer)
    message = refused(teacher, student, "has another tokenizer than its teacher llama: after '")
    expected, found = (s.text.tokenizer.encode(CORPUS.text, split_special_tokens=True) for s in (teacher, student))
    at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
    ours, theirs = (
        f"token {found[at]}, {piece(student, found[at])}",
        f"token {expected[at]}, {piece(teacher, expected[at])}",
    )
    assert f" comes {ours}, and there {theirs}" in message
    before = teacher.text.decode(expected[max(0, at - 8) : at])
    assert f"after {before!r}" in message


def test_the_same_pieces_under_other_ids() -> None:
    def swapped(pipeline):
        vocabulary = pipeline["model"]["vocab"]
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]

    refused(opened(folder("llama")), other_tokenizer("ids", swapped), "another tokenizer")


def test_a_difference_beyond_what_is_evaluated_is_none() -> None:
    def cap(pipeline):
        pipeline["model"]["merges"] = [m for m in pipeline["model"]["merges"] if "~" not in str(m)]
        pipeline["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": "?"}

    student = other_tokenizer("tilde", cap)
    late = Corpus(CORPUS.text + "~" * 99, "late", "0" * 64)
    check(opened(folder("llama")), student, corpus=late, windows=2)
    for before in ("", "The "):
        early = Corpus(before + "~" * 9 + CORPUS.text, "early", "0" * 64)
        refused(opened(folder("llama")), student, f"after {before!r} comes", corpus=early, windows=2)


def test_all_that_is_evaluated_is_compared() -> None:
    """Also where a token is many characters: the difference stands in the last window."""

    def cap(pipeline):
        pipeline["normalizer"] = {"type": "Replace", "pattern": {"String": "~"}, "content": "?"}

    def spaces(pipeline):
        pipeline["added_tokens"].append(
            {"id": 511, "content": " " * 40, "special": False, "normalized": False, "lstrip": False, "rstrip": False,
             "single_word": False}
        )  # fmt: skip

    def both(pipeline):
        cap(pipeline)
        spaces(pipeline)

    teacher, student = other_tokenizer("long", spaces), other_tokenizer("long-too", both)
    wide = Corpus(" " * (40 * 120) + "~" + "x" * 50, "wide", "0" * 64)
    windows = cut(teacher.text, wide, Protocol(64, None, 2))
    assert np.unique(windows.tokens_WL[0]).size == 1
    refused(teacher, student, "'~'", corpus=wide, windows=2)


def test_weights_are_not_read() -> None:
    """Headers are; the bytes behind them are gone."""
    to = HOME / "hollow"
    shutil.copytree(folder("qwen3"), to)
    side = opened(to)
    (to / "model.safetensors").unlink()
    check(opened(folder("qwen3")), side)
    refused(opened(folder("llama")), side, "'qwen3'")
