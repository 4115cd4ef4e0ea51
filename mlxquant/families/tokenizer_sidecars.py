"""The tokenizer's files of a Hugging Face folder, read without transformers: every value is somebody else's until its
type has been looked at.

What becomes of added tokens is transformers 5.23's doing (tokenization_utils_base.py, _from_pretrained;
tokenization_utils_tokenizers.py, __init__ and _post_init).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlxquant.errors import SourceError

TOKENIZER, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
SPECIAL_MAP, JINJA, TEMPLATE_JSON = "special_tokens_map.json", "chat_template.jinja", "chat_template.json"
MORE_TEMPLATES = "additional_chat_templates/"
# Far above any published vocabulary (262,144), and small enough to be padded in memory.
MAX_VOCABULARY = 2**22
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in raw text before anything else. `normalized`: found after the normalizer."""

    id: int
    text: str
    special: bool
    normalized: bool


class Sidecars:
    """`files`: name -> bytes. Every method raises SourceError naming the file for what is not as it should be."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.tokenizer = self.json(TOKENIZER)
        self.config = self.json(CONFIG)

    def json(self, name: str) -> dict[str, Any]:
        """{} when there is no such file."""
        if name not in self.files:
            return {}
        try:
            value = json.loads(self.files[name])
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{name}: not JSON ({error})", hint="download the file again") from error
        return mapping(value, name, "the file")

    def listed(self) -> list[AddedToken]:
        """What tokenizer.json lists under `added_tokens`, in its order."""
        where = (TOKENIZER, "added_tokens")
        entries = [mapping(e, *where) for e in sequence(self.tokenizer.get("added_tokens"), *where)]
        return [_added(entry, token_id(entry.get("id"), *where), *where) for entry in entries]

    def declared(self) -> list[AddedToken]:
        """`added_tokens_decoder` of tokenizer_config.json, in its order."""
        where = (CONFIG, "added_tokens_decoder")
        entries = mapping(self.config.get("added_tokens_decoder"), *where)
        return [_added(mapping(e, *where), token_id(_number(key), *where), *where) for key, e in entries.items()]

    def legacy(self) -> dict[str, int]:
        """added_tokens.json, in its order: token -> id."""
        return {string(text, ADDED, "a token"): token_id(i, ADDED, repr(text)) for text, i in self.json(ADDED).items()}

    def named(self) -> tuple[list[str], list[str]]:
        """The tokens that a file calls by a role, such as eos_token, and those it only lists as special."""
        config = dict(self.config)
        if "added_tokens_decoder" not in config:
            config |= self.json(SPECIAL_MAP)
        roles = [value for key, value in config.items() if key.endswith("_token")]
        more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        if isinstance(more, Mapping):
            roles, more = [*roles, *more.values()], []
        texts = (map(_text_of, values) for values in (roles, sequence(more, CONFIG, "extra_special_tokens")))
        named, listed = ([text for text in part if text] for part in texts)
        return named, listed

    def added(self, vocab: Mapping[str, int], size: int) -> dict[str, AddedToken]:
        """Every added token of a tokenizer.json whose model has `vocab`, as transformers has them once it is loaded.

        A new one is numbered behind all others, unless that is past `size`, the rows of the embedding."""
        found = {token.text: token for token in self.listed()}
        behind = max([len(vocab), *(token.id + 1 for token in found.values())])
        declared = sorted(self.declared(), key=lambda token: token.id)
        if "added_tokens_decoder" not in self.config:
            taken = {token.id for token in found.values()}
            declared = [AddedToken(i, text, False, True) for text, i in self.legacy().items() if i not in taken]
        for token in declared:
            i = found[token.text].id if token.text in found else vocab.get(token.text, behind)
            if i < size:
                found[token.text] = replace(token, id=i)
                behind = max(behind, i + 1)
        named, others = self.named()
        for text in (*named, *others):
            if text in found:
                found[text] = replace(found[text], special=found[text].special or text in named)
            elif (i := vocab.get(text, behind)) < size:
                found[text] = AddedToken(i, text, special=True, normalized=False)
                behind = max(behind, i + 1)
        return found

    def model(self) -> dict[str, Any]:
        return mapping(self.tokenizer.get("model"), TOKENIZER, "model")

    def vocab(self) -> dict[str, int]:
        """`model.vocab` of tokenizer.json: token -> id, without added tokens it does not hold itself."""
        what = "model.vocab"
        vocab = mapping(self.model().get("vocab"), TOKENIZER, what)
        for i in vocab.values():
            token_id(i, TOKENIZER, what)
        if len(set(vocab.values())) != len(vocab):
            raise SourceError(f"{TOKENIZER}: {what} has two tokens with one id, expected each id once")
        _unicode(vocab, TOKENIZER, what)
        return vocab

    def merges(self) -> list[tuple[str, str]]:
        """`model.merges` of tokenizer.json, in order of rank, from either of its two spellings."""
        merges = []
        for entry in sequence(self.model().get("merges"), TOKENIZER, "model.merges"):
            pair = entry.split(" ", 1) if isinstance(entry, str) else entry
            if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
                raise wrong(TOKENIZER, "a pair in model.merges", entry, "two tokens")
            merges.append((pair[0], pair[1]))
        return merges

    def chat_template(self) -> str | dict[str, str] | None:
        """One template, or named ones. The .jinja file comes first, as in transformers; `gguf` puts it last."""
        if JINJA in self.files:
            more = sorted(name for name in self.files if name.startswith(MORE_TEMPLATES) and name.endswith(".jinja"))
            if not more:
                return self._text(JINJA)
            stem = slice(len(MORE_TEMPLATES), -len(".jinja"))
            return {"default": self._text(JINJA)} | {name[stem]: self._text(name) for name in more}
        for name, file in ((CONFIG, self.config), (TEMPLATE_JSON, self.json(TEMPLATE_JSON))):
            if (template := file.get("chat_template")) is not None:
                return _templates(template, name)
        return None

    def _text(self, name: str) -> str:
        try:
            return self.files[name].decode("utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{name}: not UTF-8 ({error})", hint="download the file again") from error


def wrong(file: str, what: str, value: Any, expected: str) -> SourceError:
    return SourceError(f"{file}: {what} is {value!r:.60}, expected {expected}")


def mapping(value: Any, file: str, what: str) -> dict[str, Any]:
    """A JSON object; {} for null."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong(file, what, value, "an object")
    return value


def sequence(value: Any, file: str, what: str) -> list[Any]:
    """A JSON array; [] for null."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong(file, what, value, "an array")
    return value


def string(value: Any, file: str, what: str) -> str:
    if not isinstance(value, str):
        raise wrong(file, what, value, "a string")
    _unicode((value,), file, what)
    return value


def flag(value: Any, file: str, what: str) -> bool:
    if not isinstance(value, bool):
        raise wrong(file, what, value, "true or false")
    return value


def token_id(value: Any, file: str, what: str) -> int:
    if type(value) is not int or not 0 <= value < MAX_VOCABULARY:
        raise wrong(file, f"an id in {what}", value, f"a token id (0 to {MAX_VOCABULARY - 1})")
    return value


def _unicode(texts: Mapping[str, int] | tuple[str, ...], file: str, what: str) -> None:
    """JSON can spell half a surrogate pair, which is no text and has no bytes."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{file}: {what} holds half a surrogate pair, expected text") from error


def _number(key: str) -> int | str:
    return int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else key


def _added(entry: Mapping[str, Any], id: int, file: str, what: str) -> AddedToken:
    special = flag(entry.get("special", False), file, f"{what}: special")
    normalized = flag(entry.get("normalized", not special), file, f"{what}: normalized")
    return AddedToken(id, string(entry.get("content"), file, f"{what}: content"), special, normalized)


def _text_of(value: Any) -> str | None:
    """A token as text or as an AddedToken's {"content": ...}; None for flags and nulls."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return string(text, CONFIG, "a special token") if isinstance(text, str) else None


def _templates(template: Any, file: str) -> str | dict[str, str]:
    if isinstance(template, str):
        return string(template, file, "chat_template")
    if isinstance(template, list):
        entries = [mapping(entry, file, "chat_template") for entry in template]
        template = {string(e.get("name"), file, "a template's name"): e.get("template") for e in entries}
    templates = mapping(template, file, "chat_template")
    return {name: string(text, file, f"chat template {name!r}") for name, text in templates.items()}
