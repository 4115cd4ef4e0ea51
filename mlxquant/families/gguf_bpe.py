"""The arrays of a byte-level BPE vocabulary, `tokenizer.ggml.model` gpt2, from tokenizer.json.

Behaviour of llama.cpp's conversion/base.py (get_vocab_base, does_token_look_special) and gguf-py's SpecialVocab
(merges).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf_tokenizer import Kind
from mlxquant.families.tokenizer_sidecars import TOKENIZER, AddedToken, Sidecars, wrong

_SPECIAL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SPECIAL_ENDS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


def byte_level_arrays(files: Sidecars, size: int | None) -> dict[str, Any]:
    """tokens, token_type and merges, without the prefix of their keys; `size` tokens of them, or as many as there are.

    An id that no token has becomes [PAD{id}]. Raises SourceError for ids that are taken twice or not below `size`,
    UnsupportedError for a model that is no byte-level BPE."""
    _check_model(files)
    vocab = files.vocab()
    added = files.added(vocab, size or len(vocab) + len(files.listed()))
    by_id = vocabulary(vocab, added, size)
    size = size or max(by_id, default=-1) + 1
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], np.full(size, Kind.UNUSED, np.int32)
    for i, text in by_id.items():
        tokens[i], kinds[i] = _token(added[text]) if text in added else (text, Kind.NORMAL)
    return {"tokens": tokens, "token_type": kinds, "merges": _merges(files, vocab)}


def vocabulary(vocab: Mapping[str, int], added: Mapping[str, AddedToken], size: int | None) -> dict[int, str]:
    """id -> token, added ones included."""
    by_id = {i: text for text, i in vocab.items()}
    for text, token in added.items():
        if vocab.get(text, token.id) != token.id or by_id.get(token.id, text) != text:
            raise SourceError(
                f"{TOKENIZER}: added token {text!r:.60} has id {token.id}, which is {by_id.get(token.id)!r:.60}, while "
                f"its own in model.vocab is {vocab.get(text)}; expected one id for each token"
            )
        by_id[token.id] = text
    last = max(by_id, default=-1)
    if size is not None and last >= size:
        raise SourceError(
            f"{TOKENIZER}: token {by_id[last]!r:.60} has id {last}, expected less than config.json's vocab_size {size}",
            hint="the tokenizer belongs to another model, or vocab_size is wrong",
        )
    return by_id


def looks_special(text: str) -> bool:
    """Added tokens that their authors did not mark as special (Command R, DeepSeek Coder, Gemma)."""
    return text in _SPECIAL_TEXTS or any(text.startswith(a) and text.endswith(b) for a, b in _SPECIAL_ENDS)


def _token(token: AddedToken) -> tuple[str, Kind]:
    """llama.cpp looks for added tokens in text as they are here, so what the decoder would make of one is stored."""
    text = token.text if token.normalized else decoded(token.text)
    if token.special or looks_special(text):
        return text, Kind.CONTROL
    return text.replace("▁", " "), Kind.USER_DEFINED


def decoded(text: str) -> str:
    """A token as the decoder of `tokenizers` prints it, ByteLevel: bytes where every character stands for one."""
    if not all(letter in _BYTES for letter in text):
        return text
    return bytes(_BYTES[letter] for letter in text).decode("utf-8", "replace")


def _byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: itself where that prints, else the next letter from U+0100 on."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in itself]
    return {chr(b): b for b in itself} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_letters()


def _check_model(files: Sidecars) -> None:
    model = files.model()
    if TOKENIZER not in files.files:
        raise UnsupportedError(f"{TOKENIZER} is missing", hint="download the folder again, with its tokenizer")
    kind = model.get("type", "BPE")
    if kind != "BPE" or model.get("byte_fallback"):
        what = f"model.type {kind!r:.60}" + (" with byte_fallback" if model.get("byte_fallback") else "")
        raise UnsupportedError(f"{TOKENIZER}: {what} is not supported here, expected a byte-level BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UnsupportedError(f"{TOKENIZER}: model.{name} {model[name]!r:.60} has no place in a GGUF file")
    decoder = files.tokenizer.get("decoder")
    if not isinstance(decoder, Mapping) or decoder.get("type") != "ByteLevel":
        raise UnsupportedError(f"{TOKENIZER}: decoder {decoder!r:.200} is not supported, expected ByteLevel")


def _merges(files: Sidecars, vocab: Mapping[str, int]) -> list[str]:
    pairs = files.merges()
    if not pairs:
        raise wrong(TOKENIZER, "model.merges", [], "the merges of a BPE")
    for left, right in pairs:
        if not {left, right, left + right} <= vocab.keys():
            raise wrong(TOKENIZER, "a pair in model.merges", (left, right), "two tokens whose union is a token")
    space = chr(ord(" ") + 256)  # a space inside a half is written as its byte's letter
    return [f"{left.replace(' ', space)} {right.replace(' ', space)}" for left, right in pairs]
