"""The special ids of a GGUF vocabulary and what is put around a text.

Behaviour of gguf-py's SpecialVocab (gguf/vocab.py of llama.cpp; the `gguf` package is older), quirks included: names
from tokenizer_config.json, corrected by the post-processor of tokenizer.json, then ids from config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlxquant.families.tokenizer_sidecars import CONFIG, NAMED, TOKENIZER, Sidecars, flag, mapping, sequence, token_id

# cls has no key. The spelling of seperator is GGUF's.
_ID_KEYS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "sep": "seperator_token_id",
    "pad": "padding_token_id", "mask": "mask_token_id", "eot": "eot_token_id", "eom": "eom_token_id",
}  # fmt: skip
_ADD_KEYS = {kind: f"add_{kind}_token" for kind in ("bos", "eos", "sep")}


def special_keys(files: Sidecars, config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Ids as uint32, then add_*_token as bool, without the prefix of their keys. Ids not below `count`, the tokens that
    there are, are left out: some models name a padding token that they have no row for."""
    roles = _Roles(files)
    ids = roles.ids(count)
    for kind in roles.kinds:
        found = _configured(config, kind)
        if found is not None and found < count:
            ids.setdefault(kind, found)
    keys: dict[str, Any] = {_ID_KEYS[kind]: np.uint32(i) for kind, i in ids.items() if kind in _ID_KEYS}
    return keys | {_ADD_KEYS[kind]: value for kind, value in roles.adds.items() if kind in _ADD_KEYS}


def adds_bos(keys: Mapping[str, Any]) -> bool:
    return keys.get(_ADD_KEYS["bos"]) is True


class _Roles:
    """Which token has which role: as text, as an AddedToken's object, or null. `adds`: which stand around a text."""

    def __init__(self, files: Sidecars) -> None:
        self.files = files
        self.silent = not files.config
        self.named = {kind: files.config.get(f"{kind}_token") for kind in NAMED}
        self.kinds = list(NAMED)
        self.adds: dict[str, bool] = {}
        if files.tokenizer:
            self.named["bos"] = self.named["bos"] or self.named["cls"]
            self.named["eos"] = self.named["eos"] or self.named["sep"]
            self._read(mapping(files.tokenizer.get("post_processor"), TOKENIZER, "post_processor"))

    def ids(self, count: int) -> dict[str, int]:
        """The ids of the roles that tokenizer_config.json names, among the added tokens of tokenizer.json."""
        ids: dict[str, int] = {}
        added = {token.text: token.id for token in reversed(self.files.listed())}
        for kind in [] if self.silent else self.kinds:
            wanted, entry = self.files.config.get(f"add_{kind}_token"), self.named[kind]
            if wanted is not None:
                self.adds.setdefault(kind, flag(wanted, CONFIG, f"add_{kind}_token"))
            text = entry.get("content") if isinstance(entry, Mapping) else entry
            if isinstance(text, str) and added.get(text, count) < count:
                ids[kind] = added[text]
        return ids

    def _read(self, processor: Mapping[str, Any]) -> None:
        """A post-processor, or the sequence of them."""
        what = "post_processor"
        for step in sequence(processor.get("processors", [processor]), TOKENIZER, what):
            kind = mapping(step, TOKENIZER, what).get("type")
            if kind == "ByteLevel":
                self.adds = {"bos": False, "eos": False} | self.adds
            elif kind == "RobertaProcessing":
                self.adds |= {"bos": True, "eos": True, "sep": True}
                for role, default in (("cls", "bos"), ("sep", "eos")):
                    pair = sequence(step.get(role), TOKENIZER, what) or [self.named[default]]
                    self.named[role] = self.named[role] or pair[0]
            elif kind == "TemplateProcessing":
                self._read_template(*(_pieces(step.get(name)) for name in ("single", "pair")))

    def _read_template(self, single: list[Mapping[str, Any]], pair: list[Mapping[str, Any]]) -> None:
        first = _id(single[0], "SpecialToken") if len(single) > 1 else None
        last = _id(single[-1], "SpecialToken") if len(single) > 1 else None
        if first:
            self._starts_with(first)
        if last:
            self._ends_with(last)
        start = 1 if first and pair and _id(pair[0], "SpecialToken") == first else 0
        stop = -1 if last and pair and _id(pair[-1], "SpecialToken") == last else None
        match pair[start:stop]:
            case [a, *middle, b] if middle and (_id(a, "Sequence"), _id(b, "Sequence")) == ("A", "B"):
                self._separates([_id(piece, "SpecialToken") for piece in middle], last is not None)

    def _starts_with(self, first: str) -> None:
        named = self.named
        if self.silent:
            named["bos"] = first
        elif first not in (named["bos"], named["cls"]):
            named["bos"], named["cls"] = named["bos"] or first, named["cls"] or first
        self.adds["bos"] = first in (named["bos"], named["cls"])

    def _ends_with(self, last: str) -> None:
        """What stands behind a text is the EOS; the one that was named ends a turn."""
        if not self.silent and last != self.named["eos"]:
            more = next((kind for kind in ("eot", "eom") if kind not in self.kinds), None)
            if more:
                self.kinds.append(more)
                self.named[more] = self.named["eos"]
        self.named["eos"] = last
        self.adds["eos"] = True

    def _separates(self, middle: list[str | None], ended: bool) -> None:
        ends = [text for text in (self.named["sep"], self.named["eos"]) if text]
        adds = (middle[0] in ends and not ended) or (len(middle) == 2 and middle[1] in ends)
        self.adds["sep"] = adds
        if adds:
            self.named["sep"] = self.named["sep"] or self.named["eos"]


def _pieces(value: Any) -> list[Mapping[str, Any]]:
    where = (TOKENIZER, "post_processor")
    return [mapping(piece, *where) for piece in sequence(value, *where)]


def _id(piece: Mapping[str, Any], kind: str) -> str | None:
    found = mapping(piece.get(kind), TOKENIZER, "post_processor").get("id")
    return found if isinstance(found, str) else None


def _configured(config: Mapping[str, Any], kind: str) -> int | None:
    """An id of config.json. A list of them, or the -1 of early Llamas, says nothing of one token."""
    inner = config.get("text_config")
    found = config.get(f"{kind}_token_id")
    if found is None and isinstance(inner, Mapping):
        found = inner.get(f"{kind}_token_id")
    if found is None or isinstance(found, list) or (type(found) is int and found == -1):
        return None
    return token_id(found, "config.json", f"{kind}_token_id")
