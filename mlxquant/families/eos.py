"""Which token ids end an answer.

A model that does not stop is the fault users meet most. The sources disagree with one another and stock
mlx-lm reads only some of them, so the end ids are the union: config.json (root and text_config),
generation_config.json, the tokenizer's eos_token, and the end-of-turn tokens that the chat template writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxquant.errors import SourceError

# Tokens that end a turn and do nothing else, by family: ChatML and Qwen, Llama 3 (turn, and tool call), Phi,
# Gemma, OpenChat, Llama 2 and Mistral, GPT-2 and its heirs, gpt-oss (answer, and tool call), Cohere, Granite,
# DeepSeek, OLMo. A token counts only when the tokenizer holds it as one added token and the chat template
# writes it.
END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "</s>",
    "<|endoftext|>", "<|return|>", "<|call|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>",
    "<｜end▁of▁sentence｜>", "<eos>",
)  # fmt: skip


def eos_ids(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    tokenizer_json: Mapping[str, Any],
    chat_template: str,
) -> tuple[int, ...]:
    """Every id that ends an answer, sorted; empty when no source names one. Files that are missing are {} and
    "".

    Raises SourceError naming the file and key where a value has the wrong type.
    """
    text = config.get("text_config")
    found = set(_ids(config, "config.json"))
    found |= set(_ids(text, "config.json, text_config")) if isinstance(text, Mapping) else set()
    found |= set(_ids(generation_config, "generation_config.json"))
    added = _added_tokens(tokenizer_json)
    if (token := _eos_token(tokenizer_config)) is not None:
        found |= _lookup(token, added, tokenizer_config, tokenizer_json)
    return tuple(sorted(found | _turn_ends(added, chat_template)))


def _turn_ends(added: Mapping[str, int], chat_template: str) -> set[int]:
    found = {token: added[token] for token in END_OF_TURN if token in added and token in chat_template}
    # In gpt-oss <|end|> closes each message of an answer, and only <|return|> the answer.
    if "<|return|>" in found:
        found.pop("<|end|>", None)
    return set(found.values())


def stock_eos(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any] | None = None,
    tokenizer_json: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """The ids stock mlx-lm stops at: generation_config's where it has any, else config's (`load_config`), and
    the tokenizer's eos_token, which `TokenizerWrapper` adds (only looked at when the tokenizer's files are
    given)."""
    listed = _ids(generation_config, "generation_config.json") if generation_config.get("eos_token_id") else ()
    found = set(listed or _ids(config, "config.json"))
    token = _eos_token(tokenizer_config or {})
    if token is not None:
        found |= _lookup(token, _added_tokens(tokenizer_json or {}), tokenizer_config or {}, tokenizer_json or {})
    return tuple(sorted(found))


def _ids(file: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = file.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int and one >= 0 for one in values):
        raise SourceError(f"{name}: eos_token_id is {value!r:.60}, expected a token id or a list of them")
    return tuple(values)


def _eos_token(tokenizer_config: Mapping[str, Any]) -> str | None:
    """eos_token as text: a string, or an AddedToken's {"content": ...}."""
    value = tokenizer_config.get("eos_token")
    text = value.get("content") if isinstance(value, Mapping) else value
    if value is not None and not isinstance(text, str):
        raise SourceError(f"tokenizer_config.json: eos_token is {value!r:.60}, expected a token")
    return text


def _lookup(
    token: str,
    added: Mapping[str, int],
    tokenizer_config: Mapping[str, Any],
    tokenizer_json: Mapping[str, Any],
) -> set[int]:
    """The token's id: an added token, else one of the vocabulary, else what tokenizer_config.json itself
    declares."""
    if token in added:
        return {added[token]}
    model = tokenizer_json.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, Mapping) and type(vocab.get(token)) is int:
        return {vocab[token]}
    if isinstance(vocab, list):  # Unigram: [piece, score], the id is the position
        return {i for i, piece in enumerate(vocab) if isinstance(piece, list) and piece[:1] == [token]}
    declared = tokenizer_config.get("added_tokens_decoder")
    pairs = declared.items() if isinstance(declared, Mapping) else ()
    return {
        int(i)
        for i, t in pairs
        if isinstance(i, str) and re.fullmatch(r"[0-9]{1,9}", i)
        if isinstance(t, Mapping) and t.get("content") == token
    }


def _added_tokens(tokenizer_json: Mapping[str, Any]) -> dict[str, int]:
    entries = tokenizer_json.get("added_tokens") or []
    if not isinstance(entries, list):
        raise SourceError(f"tokenizer.json: added_tokens is {entries!r:.60}, expected a list")
    found: dict[str, int] = {}
    for entry in entries:
        token, index = (entry.get("content"), entry.get("id")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(token, str) or type(index) is not int or index < 0:
            raise SourceError(f"tokenizer.json: added_tokens has {entry!r:.60}, expected an id and a content")
        found[token] = index
    return found
