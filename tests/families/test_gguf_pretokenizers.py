"""Every pre-tokenizer name against real llama.cpp, on a vocabulary whose tokens run across word boundaries: a
cut in another place shows in the ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mlxquant.errors import UnsupportedError, UsageError
from mlxquant.families.gguf_pretokenizers import (
    MORE_NAMES,
    PRE_TOKENIZERS,
    check_name,
    expressions_of,
    name_of,
    pre_tokenizer,
)
from mlxquant.families.gguf_tokenizer import tokenizer_files
from mlxquant.files.gguf_file import GGUFFile
from tests import oracle
from tests.families.gguf_page import PAGE
from tests.gguf_files import LlamaCpp, write_vocabulary

CHUNKS = [PAGE, *PAGE.split("\n"), "   ", "\n", " a", "1234567", "a  \n  b"]


@pytest.fixture(scope="module")
def boundless() -> tuple[list[str], list[str]]:
    """(tokens, merges) of a byte-level BPE trained on the page with no words at all. Some merges are left
    out, so that `ignore_merges` shows as well: their tokens are reached as whole words only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = [line + "\n" for line in PAGE.split("\n")]
    pieces = [line[i : i + n] for line in lines for n in (3, 5, 8, 13) for i in range(0, len(line), 2)]
    tokenizer.train_from_iterator(
        pieces,
        trainers.BpeTrainer(vocab_size=6000, initial_alphabet=alphabet, show_progress=False, min_frequency=1),
    )
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(m) for i, m in enumerate(model["merges"]) if i % 7]


def ids_of(path: Path, pre: str, boundless: tuple[list[str], list[str]]) -> tuple[list[list[int]], Path]:
    tokens, merges = boundless
    file = write_vocabulary(
        path / f"{pre}.gguf",
        tokens,
        tokenizer__ggml__model="gpt2",
        tokenizer__ggml__pre=pre,
        tokenizer__ggml__merges=merges,
        tokenizer__ggml__bos_token_id=0,
        tokenizer__ggml__eos_token_id=1,
    )
    tokenizer = Tokenizer.from_str(tokenizer_files(GGUFFile(file).metadata)["tokenizer.json"].decode())
    return [tokenizer.encode(chunk).ids for chunk in CHUNKS if chunk], file


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_ids_are_llama_cpps(pre: str, boundless: tuple[list[str], list[str]], tmp_path: Path) -> None:
    ours, file = ids_of(tmp_path, pre, boundless)
    oracle = LlamaCpp(file)
    assert ours == [oracle.tokenize(chunk) for chunk in CHUNKS if chunk]


def test_the_page_tells_all_pre_tokenizers_apart(boundless: tuple[list[str], list[str]], tmp_path: Path) -> None:
    """So the test above fails when two are mixed up."""
    first = {(pre.expressions, pre.ignore_merges): name for name, pre in PRE_TOKENIZERS.items()}
    ids = {name: str(ids_of(tmp_path, name, boundless)[0]) for name in first.values()}
    assert len(set(ids.values())) == len(first)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"'brand-new' is not supported .*qwen2.*smollm") as caught:
        pre_tokenizer("brand-new")
    assert "folder" in str(caught.value.hint)


def split(expression: str, **more: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False} | more


def byte_level(use_regex: bool = False, add_prefix_space: bool = False) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}


def steps(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}, **more}


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = CL100K.replace("{1,3}", "")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}", r"[^\s\p{L}\p{M}\p{N}")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")
LING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
SEED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+"
SEED += "|\\s+(?!\\S)|\\s+"
DIGITS = {"type": "Digits", "individual_digits": True}
NFC = {"normalizer": {"type": "NFC"}}
FIM = ["<|endoftext|>", "<fim_prefix>"]

# tokenizer.json as published (model, its structure, what name_of is told), and the name that llama.cpp's converter
# gives to its ids.
PUBLISHED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("GPT-2", {"pre_tokenizer": byte_level(True)}, {}, "gpt-2"),
    ("SmolLM2", steps(DIGITS, byte_level(True)), {"model_type": "llama"}, "smollm"),
    ("Granite 3", steps(DIGITS, byte_level(True)), {"model_type": "granite", "tokens": FIM}, "refact"),
    ("Granite Code", steps(DIGITS, byte_level(True)), {"model_type": "llama", "tokens": FIM}, "refact"),
    ("StarCoder2", steps(DIGITS, byte_level(True)), {"model_type": "starcoder2", "tokens": FIM}, "starcoder"),
    ("Command R", steps(DIGITS, byte_level(True)), {"model_type": "cohere"}, "command-r"),
    ("Llama 3", steps(split(CL100K), byte_level()), {"ignore_merges": True, "adds_bos": True}, "llama-bpe"),
    ("SmolLM3", steps(split(CL100K), byte_level()), {"ignore_merges": True, "model_type": "smollm3"}, "smaug-bpe"),
    ("OLMo 2", steps(split(CL100K), byte_level()), {"model_type": "olmo2"}, "dbrx"),
    ("Phi-4", steps(split(CL100K, behavior="Removed", invert=True), byte_level()), {"model_type": "phi3"}, "dbrx"),
    ("Qwen2.5", steps(split(QWEN2), byte_level(), **NFC), {"model_type": "qwen2"}, "qwen2"),
    ("DeepSeek-R1 Qwen", steps(split(QWEN2), byte_level()), {"adds_bos": True}, "deepseek-r1-qwen"),
    ("Ling", steps(split(LING), byte_level()), {}, "qwen2"),
    ("Qwen3.5", steps(split(QWEN35), byte_level(), **NFC), {}, "qwen35"),
    ("Mistral Nemo", steps(split(TEKKEN), byte_level()), {"ignore_merges": True, "adds_bos": True}, "tekken"),
    ("gpt-oss", steps(split(O200K), byte_level()), {"ignore_merges": True, "model_type": "gpt_oss"}, "gpt-4o"),
    ("Phi-4-mini", steps(split(O200K), byte_level()), {"model_type": "phi3"}, "gpt-4o"),
    ("DeepSeek-V3", steps(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK3), byte_level()),
     {"adds_bos": True}, "deepseek-v3"),
    ("Seed-Coder", steps(split(SEED), byte_level()), {}, "seed-coder"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "structure", "told", "name"), PUBLISHED)
def test_published_structures(model: str, structure: dict[str, Any], told: dict[str, Any], name: str) -> None:
    assert name_of(expressions_of(structure), **told) == name


@pytest.mark.parametrize(("model", "structure", "told", "name"), PUBLISHED)
def test_the_name_cuts_as_the_structure_does(
    model: str, structure: dict[str, Any], told: dict[str, Any], name: str
) -> None:
    """On ASCII; beyond it llama.cpp takes every letter for upper and lower case, and so do our expressions."""
    page = PAGE.encode("ascii", "ignore").decode()
    theirs = Tokenizer.from_str(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}} | structure))
    ours = [split(e) for e in PRE_TOKENIZERS[name].expressions]
    rebuilt = steps(*ours, byte_level())
    again = Tokenizer.from_str(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}} | rebuilt))
    assert again.pre_tokenizer.pre_tokenize_str(page) == theirs.pre_tokenizer.pre_tokenize_str(page)


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_what_we_write_is_read_as_what_it_cuts_like(
    pre: str, boundless: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    tokens, merges = boundless
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges}
    files = tokenizer_files({f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1})  # fmt: skip
    tokenizer = json.loads(files["tokenizer.json"])
    named = name_of(expressions_of(tokenizer), tokenizer["model"]["ignore_merges"], PRE_TOKENIZERS[pre].add_bos)
    assert PRE_TOKENIZERS[named].expressions == PRE_TOKENIZERS[pre].expressions
    # glm4 alone: whole words first and no BOS, for which the converter's name of Llama 3 without its BOS stands.
    assert PRE_TOKENIZERS[named].ignore_merges == PRE_TOKENIZERS[pre].ignore_merges or pre == "glm4"


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (steps(split(r"\w+"), byte_level()), r"expression \\w\+ is not one"),
        (steps(split(QWEN2), split(r"\p{N}"), byte_level()), "order of expressions"),
        (steps(split(QWEN2, behavior="MergedWithNext"), byte_level()), "MergedWithNext"),
        (steps({"type": "Punctuation", "behavior": "Contiguous"}, byte_level()), "Punctuation"),
        (steps({"type": "Digits", "individual_digits": False}, byte_level()), "individual_digits"),
        (steps(split(QWEN2), byte_level(add_prefix_space=True)), "add_prefix_space"),
        (steps(split(QWEN2), {"type": "Metaspace"}), "Metaspace"),
        (steps(split(QWEN2), byte_level(), normalizer={"type": "Lowercase"}), "normalizer .*Lowercase"),
        (steps(), "pretokenizers"),
        ({"pre_tokenizer": None}, "pre_tokenizer null"),
        ({"pre_tokenizer": "x"}, "pre_tokenizer"),
        (steps(split("x" * 5000), byte_level()), "expression x"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [1]}}, "pre_tokenizer"),
    ],
)
def test_unknown_structures_are_refused_with_the_flag(structure: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        name_of(expressions_of(structure))
    assert "--pre NAME" in str(caught.value.hint)
    assert "qwen2" in str(caught.value.hint)
    assert len(caught.value.message) < 600


def test_names_that_can_be_given() -> None:
    assert {check_name(name) for name in (*PRE_TOKENIZERS, *MORE_NAMES)}
    assert not PRE_TOKENIZERS.keys() & MORE_NAMES
    with pytest.raises(UsageError, match="'qwen7'"):
        check_name("qwen7")


@pytest.mark.oracle
def test_llama_cpp_knows_the_names() -> None:
    source = (oracle.llama_cpp() / "src" / "llama-vocab.cpp").read_text("utf-8")
    assert [name for name in (*PRE_TOKENIZERS, *MORE_NAMES) if f'tokenizer_pre == "{name}"' not in source] == []
