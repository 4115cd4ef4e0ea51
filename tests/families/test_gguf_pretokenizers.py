"""Every pre-tokenizer name against real llama.cpp, on a vocabulary whose tokens run across word boundaries: a
cut in another place shows in the ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mlxquant.errors import UnsupportedError
from mlxquant.families.gguf_pretokenizers import PRE_TOKENIZERS, pre_tokenizer
from mlxquant.families.gguf_tokenizer import tokenizer_files
from mlxquant.files.gguf_file import GGUFFile
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
