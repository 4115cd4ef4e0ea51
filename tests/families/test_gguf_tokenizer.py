"""tokenizer.json rebuilt from GGUF keys against real llama.cpp on the same file."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, trainers

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf_tokenizer import tokenizer_files
from mlxquant.files.gguf_file import GGUFFile
from tests import tiny
from tests.families.gguf_page import CHAT, PAGE
from tests.gguf_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    LlamaCpp,
    write_gguf,
    write_vocabulary,
)

TEXTS = [
    PAGE,
    CHAT,
    *PAGE.split("\n"),
    " ",
    "  ",
    "\n",
    "a",
    " a",
    "▁",
    "</s>x",
    "<s> <s>\n",
    "<0x0A>",
    "x  <pad>",
]


def rebuilt(file: Path) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_files(GGUFFile(file).metadata)["tokenizer.json"].decode())


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Runs, spaces and words in no order: what merges at equal scores would trip over."""
    rng = random.Random(seed)
    atoms = [*"aaab  --==\n\t", "the ", " the", "....", "日本", "é", "<s>", "👍🏽", *PAGE.split(" ")[:80]]
    return ["".join(rng.choices(atoms, k=60)) + rng.choice("-= a") * rng.randrange(40) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("bpe"), "llama", width=64, layers=1)


@pytest.fixture(scope="module")
def spm() -> dict[str, Any]:
    """A SentencePiece vocabulary as llama.cpp's converter writes it: <unk> <s> </s>, bytes, pieces by rank,
    letters."""
    text = PAGE.replace(" ", "▁")
    words = [line + end for line in text.split("\n") for end in ("", "▁")] + ["----====----" * 8, "▁" * 31]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(
        [w[i : i + n] for w in words for n in (6, 12, 24) for i in range(0, len(w), 5)],
        trainers.BpeTrainer(vocab_size=2500, show_progress=False, min_frequency=2),
    )
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    letters = [t for t in vocab if len(t) == 1 and 0 < ord(t) < 0x4E00]  # the others are left to their bytes
    known = set(letters)
    merged = [t for t in sorted(vocab, key=vocab.get) if len(t) > 1 and set(t) <= known]
    special = ["<unk>", "<s>", "</s>"]
    author = ["<pad>", "\n\n", "  "]
    tokens = [*special, *(f"<0x{b:02X}>" for b in range(256)), *merged, *letters, *author, "<unused0>"]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(merged) + len(letters))
    kinds += [USER_DEFINED] * len(author) + [UNUSED]
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(letters))] + [-1000.0] * len(author) + [-10000.0]
    return {
        "tokens": tokens,
        "tokenizer__ggml__model": "llama",
        "tokenizer__ggml__scores": scores,
        "tokenizer__ggml__token_type": kinds,
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
    }


def assert_same_ids(file: Path, texts: list[str]) -> None:
    ours, oracle = rebuilt(file), LlamaCpp(file)
    for text in texts:
        if text:
            assert ours.encode(text).ids == oracle.tokenize(text), repr(text[:80])


@pytest.mark.parametrize("keys", [{}, {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True}])
@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe"])
def test_bpe(bpe_folder: Path, tmp_path: Path, pre: str, keys: dict[str, Any]) -> None:
    file = write_gguf(bpe_folder, tmp_path / "bpe.gguf", pre=pre, **keys)
    assert_same_ids(file, [*TEXTS, *random_texts(20)])


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"tokenizer__ggml__add_space_prefix": False},
        {"tokenizer__ggml__add_bos_token": False, "tokenizer__ggml__add_eos_token": True},
    ],
)
def test_sentence_piece(spm: dict[str, Any], tmp_path: Path, keys: dict[str, Any]) -> None:
    file = write_vocabulary(tmp_path / "spm.gguf", **spm | keys)
    assert_same_ids(file, [*TEXTS, *random_texts(60)])


def test_sentence_piece_adds_a_bos_and_bytes_for_strange_letters(spm: dict[str, Any], tmp_path: Path) -> None:
    ids = rebuilt(write_vocabulary(tmp_path / "spm.gguf", **spm)).encode("天").ids
    assert ids == [1, spm["tokens"].index("▁"), *(3 + b for b in "天".encode())]


def test_decoding_gives_the_text_back(bpe_folder: Path, spm: dict[str, Any], tmp_path: Path) -> None:
    for file in (
        write_gguf(bpe_folder, tmp_path / "bpe.gguf"),
        write_vocabulary(tmp_path / "spm.gguf", **spm),
    ):
        tokenizer = rebuilt(file)
        for line in PAGE.split("\n"):
            if "  " in line:  # a token of the author's in the SentencePiece file: llama.cpp adds a space behind it
                continue
            assert tokenizer.decode(tokenizer.encode(line).ids) == line


def test_transformers_agrees_with_llama_cpp(bpe_folder: Path, spm: dict[str, Any], tmp_path: Path) -> None:
    """What stock mlx-lm does with the files; transformers has its own ideas about BOS and special tokens."""
    from transformers import AutoTokenizer

    keys = {"tokenizer__ggml__add_bos_token": True}
    for file in (
        write_gguf(bpe_folder, tmp_path / "bpe.gguf", pre="llama-bpe", **keys),
        write_gguf(bpe_folder, tmp_path / "nobos.gguf", pre="smollm"),
        write_vocabulary(tmp_path / "spm.gguf", **spm),
    ):
        folder = tmp_path / file.stem
        folder.mkdir()
        for name, data in tokenizer_files(GGUFFile(file).metadata).items():
            (folder / name).write_bytes(data)
        tokenizer, oracle = AutoTokenizer.from_pretrained(folder), LlamaCpp(file)
        for text in (PAGE, CHAT):
            assert tokenizer(text).input_ids == oracle.tokenize(text)
        if file.stem != "spm":
            rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
            assert rendered == "<|im_start|>user\nHi<|im_end|>\n"


def test_the_files_say_what_the_keys_say(bpe_folder: Path, tmp_path: Path) -> None:
    keys = {"tokenizer__ggml__eot_token_id": 2, "tokenizer__chat_template__tool_use": "{{ tools }}"}
    files = tokenizer_files(GGUFFile(write_gguf(bpe_folder, tmp_path / "a.gguf", **keys)).metadata)
    config = json.loads(files["tokenizer_config.json"])
    assert json.loads(files["generation_config.json"]) == {
        "bos_token_id": 0,
        "eos_token_id": [0, 2],
        "pad_token_id": 0,
    }
    assert config.pop("chat_template") == [
        {"name": "default", "template": tiny.TEMPLATE},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }


def test_phi_3_takes_spaces_behind_its_added_tokens(spm: dict[str, Any], tmp_path: Path) -> None:
    """llama.cpp goes by the name of the model."""
    texts = ["a<pad>  b</s>   c", "<s>  x<unk>  y<|endoftext|>  z", "<b>   z"]
    keys = spm | {"tokens": [*spm["tokens"][:-4], "<pad>", "<a>", "<b>", "<|endoftext|>"]}
    keys["tokenizer__ggml__token_type"] = [*spm["tokenizer__ggml__token_type"][:-1], CONTROL]
    named = write_vocabulary(tmp_path / "phi.gguf", **keys, general__name="Phi 3 Mini")
    assert_same_ids(named, texts)
    stripping = write_vocabulary(tmp_path / "phi3.gguf", **keys, general__name="Phi-3 Mini")
    assert_same_ids(stripping, texts)
    assert rebuilt(stripping).encode(texts[0]).ids != rebuilt(named).encode(texts[0]).ids


def test_a_padding_token_that_is_text_stays_text(bpe_folder: Path, tmp_path: Path) -> None:
    """Some files pad with '!'; transformers would cut every text at it."""
    file = write_gguf(bpe_folder, tmp_path / "a.gguf", tokenizer__ggml__padding_token_id=3)
    assert "pad_token" not in json.loads(tokenizer_files(GGUFFile(file).metadata)["tokenizer_config.json"])
    assert_same_ids(file, ["!!! hello! !"])


def test_an_end_token_with_the_wrong_type_is_still_found(bpe_folder: Path, tmp_path: Path) -> None:
    """llama.cpp goes by the text of <|im_end|>, whatever its type says."""
    kinds = [NORMAL] * tiny.VOCAB
    assert_same_ids(write_gguf(bpe_folder, tmp_path / "a.gguf", tokenizer__ggml__token_type=kinds), [CHAT])


def keys_of(bpe_folder: Path, tmp_path: Path, **keys: Any) -> dict[str, Any]:
    return GGUFFile(write_gguf(bpe_folder, tmp_path / "a.gguf")).metadata | {
        f"tokenizer.ggml.{key}": value for key, value in keys.items()
    }


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"model": "bert"}, UnsupportedError, r"tokenizer\.ggml\.model: 'bert' .*gpt2, llama"),
        ({"pre": "brand-new"}, UnsupportedError, r"tokenizer\.ggml\.pre: 'brand-new'"),
        ({"model": 7}, SourceError, r"tokenizer\.ggml\.model: found 7 \(int\), expected a string"),
        ({"model": None}, SourceError, r"tokenizer\.ggml\.model is missing"),
        ({"tokens": ["a", "b", "a"]}, SourceError, "'a' is there twice"),
        ({"tokens": ["a", 1]}, SourceError, "array of strings"),
        ({"token_type": [1, 1]}, SourceError, r"token_type: 2 entries, expected 512"),
        ({"merges": ["a"]}, SourceError, r"merges: 'a', expected two tokens"),
        ({"merges": ["a zzzz"]}, SourceError, r"merges: 'a zzzz', expected two tokens"),
        ({"merges": None}, SourceError, "merges is missing"),
        ({"bos_token_id": 512}, SourceError, "bos_token_id: found 512, expected less than the 512 tokens"),
        ({"bos_token_id": -1}, SourceError, "bos_token_id: found -1, expected at least 0"),
        (
            {"bos_token_id": None, "add_bos_token": True},
            SourceError,
            "add_bos_token is true, but there is no",
        ),
        ({"add_bos_token": 1}, SourceError, "add_bos_token: found 1 .*expected true or false"),
        ({"model": "llama"}, SourceError, "scores is missing"),
        ({"model": "llama", "scores": [0.0] * 512}, UnsupportedError, "all scores are equal"),
        ({"model": "llama", "scores": [float("nan")] * 512}, SourceError, "infinity or NaN"),
        (
            {"model": "llama", "tokens": ["a", "b", "x" * 5000], "scores": [0.0] * 3},
            SourceError,
            "5000 characters long",
        ),
    ],
)
def test_bad_keys(
    bpe_folder: Path, tmp_path: Path, keys: dict[str, Any], error: type[SourceError], message: str
) -> None:
    metadata = {k: v for k, v in keys_of(bpe_folder, tmp_path, **keys).items() if v is not None}
    if "tokens" in keys:
        metadata = {k: v for k, v in metadata.items() if not k.endswith(("_id", "token_type"))}
    with pytest.raises(error, match=message) as caught:
        tokenizer_files(metadata)
    assert type(caught.value) is error


@pytest.mark.parametrize("name", ["smol", "qwen"])
def test_a_real_vocabulary(name: str) -> None:
    """Runs where MLXQUANT_MODELS names a folder with smol.gguf (the demo's model) or qwen.gguf in it."""
    file = Path(os.environ.get("MLXQUANT_MODELS", "")) / f"{name}.gguf"
    if not os.environ.get("MLXQUANT_MODELS") or not file.is_file():
        pytest.skip("MLXQUANT_MODELS names no folder with this file")
    tokenizer = Tokenizer.from_str(tokenizer_files(GGUFFile(file).metadata)["tokenizer.json"].decode())
    oracle = LlamaCpp(file)
    for text in [*TEXTS, *random_texts(100)]:
        if text:
            assert tokenizer.encode(text).ids == oracle.tokenize(text), repr(text[:80])
