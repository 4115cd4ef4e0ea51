"""The tokenizer inside a GGUF file as Hugging Face files that tokenize as llama.cpp does (control tokens
parsed).

Behaviour from llama.cpp's src/llama-vocab.cpp. Two kinds are known: `gpt2`, byte-level BPE, and `llama`,
SentencePiece, which llama.cpp runs as a merge of the pair with the best-scored result; the merges follow from
the scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf import token_ids
from mlxquant.families.gguf_metadata import Metadata
from mlxquant.families.gguf_pretokenizers import pre_tokenizer

# Longer than any token of a published vocabulary; the cost of finding merges grows with its square.
MAX_TOKEN_CHARS = 4096


class Kind(IntEnum):
    """tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Texts that llama.cpp takes for control tokens whatever their type says: ends of generation and
# fill-in-the-middle.
_ALWAYS_CONTROL = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[", "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>",
    "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>",
    "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
    "<|code_middle|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
))  # fmt: skip


class Vocabulary:
    """Tokens, their kinds and what is put around a text. Raises SourceError for arrays that do not belong
    together."""

    def __init__(self, meta: Metadata) -> None:
        self.model = meta.text("tokenizer.ggml.model")
        # llama.cpp names empty tokens like this, too.
        self.tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(meta.strings("tokenizer.ggml.tokens"))]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(t for i, t in enumerate(self.tokens) if self.ids[t] != i)
            raise SourceError(f"GGUF key tokenizer.ggml.tokens: {twice!r:.60} is there twice, expected each token once")
        self.kinds = self._kinds(meta)
        ids = token_ids(meta)
        ends = ids.get("eos_token_id")
        self.bos: int | None = ids.get("bos_token_id")
        self.eos: int | None = ends[0] if isinstance(ends, list) else ends
        self.pad: int | None = ids.get("pad_token_id")
        key = "tokenizer.ggml.unknown_token_id"
        self.unknown: int | None = meta.integer(key, 0) if key in meta or self.model == "llama" else None
        # llama.cpp goes by the name of the model, too, in src/llama-vocab.cpp.
        name = meta.text("general.name", "").lower()
        self.strips = "phi-3" in name or "phi3" in name
        for name, i in (("unknown", self.unknown), ("bos", self.bos), ("eos", self.eos)):
            if i is not None and i >= len(self.tokens):
                raise SourceError(f"GGUF: {name} token {i}, expected less than the {len(self.tokens)} tokens")

    def _kinds(self, meta: Metadata) -> list[int]:
        kinds = [int(Kind.NORMAL)] * len(self.tokens)
        if "tokenizer.ggml.token_type" in meta:
            kinds = [int(k) for k in meta.numbers("tokenizer.ggml.token_type", len(self.tokens))]
        for token in _ALWAYS_CONTROL & self.ids.keys():
            kinds[self.ids[token]] = Kind.CONTROL
        return kinds

    def named(self) -> dict[str, int]:
        """token -> id without the padding behind the last token, which a model's own tokenizer.json has not either."""
        count = len(self.tokens)
        while count and self.kinds[count - 1] == Kind.UNUSED and self.tokens[count - 1] == f"[PAD{count - 1}]":
            count -= 1
        return {token: i for token, i in self.ids.items() if i < count}

    def text(self, i: int | None) -> str | None:
        return None if i is None else self.tokens[i]

    def special(self, i: int) -> bool:
        return self.kinds[i] in (Kind.CONTROL, Kind.UNKNOWN)

    def strips_after(self, i: int) -> bool:
        """Whether spaces behind an added token belong to it, as in Phi-3's own tokenizer."""
        return self.strips and self.tokens[i] not in ("<unk>", "<s>", "<|endoftext|>")

    def added(self, i: int) -> bool:
        """Whether the token is looked for in raw text, before any merge."""
        return self.special(i) or self.kinds[i] == Kind.USER_DEFINED


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json (with the chat template), generation_config.json: name -> bytes.

    Raises UnsupportedError for a kind of tokenizer or pre-tokenizer that is not known, SourceError for
    missing, ill-typed or contradictory keys. Not reproduced: SentencePiece vocabularies in which a token has
    characters that are no tokens themselves (llama.cpp merges over them), and ties between scores of
    different tokens.
    """
    meta = Metadata(metadata)
    builders = {"gpt2": _byte_level, "llama": _sentence_piece}
    model = meta.text("tokenizer.ggml.model")
    if model not in builders:
        raise UnsupportedError(
            f"GGUF key tokenizer.ggml.model: {model!r:.60} is not supported (supported: {', '.join(builders)})",
            hint="give the model's Hugging Face folder instead: it has its own tokenizer.json",
        )
    vocabulary = Vocabulary(meta)
    try:
        tokenizer, adds = builders[model](meta, vocabulary)
        _add_tokens(tokenizer, vocabulary)
        _around(tokenizer, vocabulary, *adds)
    except SourceError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for whatever it will not take
        raise SourceError(f"GGUF: no tokenizer can be built from the file's vocabulary: {error}") from error
    ids = token_ids(meta)
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": _json(_config(meta, vocabulary, *adds)),
        "generation_config.json": _json(ids),
    }


def _byte_level(meta: Metadata, vocabulary: Vocabulary) -> tuple[Any, tuple[bool, bool]]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = pre_tokenizer(meta.text("tokenizer.ggml.pre", "default"))
    merges = _written_merges(meta, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.named(), merges=merges, ignore_merges=pre.ignore_merges))
    steps: list[Any] = [pre_tokenizers.Split(Regex(e), behavior="isolated") for e in pre.expressions]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, _adds(meta, pre.add_bos)


def _written_merges(meta: Metadata, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The file's merges in order of rank; of two equal ones the first counts."""
    merges: dict[tuple[str, str], None] = {}
    for line in meta.strings("tokenizer.ggml.merges"):
        cut = line.find(" ", 1)  # as llama.cpp cuts: the left half may begin with a space
        pair = (line[:cut], line[cut + 1 :])
        if cut < 0 or not {*pair, pair[0] + pair[1]} <= vocabulary.ids.keys():
            raise SourceError(
                f"GGUF key tokenizer.ggml.merges: {line[:80]!r}, expected two tokens whose union is a token"
            )
        merges[pair] = None
    return list(merges)


def _sentence_piece(meta: Metadata, vocabulary: Vocabulary) -> tuple[Any, tuple[bool, bool]]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = vocabulary.text(vocabulary.unknown)
    scores = meta.numbers("tokenizer.ggml.scores", len(vocabulary.tokens))
    merges = _scored_merges(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.named(), merges=merges, byte_fallback=True, unk_token=unknown))
    spaces = normalizers.Replace(" ", "▁")
    decoding: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if meta.flag("tokenizer.ggml.add_space_prefix", True):
        # Both here and in llama.cpp the space comes before the text and again after each control token.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer, _adds(meta, True)


def _scored_merges(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best-scored result first.

    llama.cpp takes the leftmost of equal scores, which ranks cannot say; for the ways to one token it makes no
    difference (300 small vocabularies, trained or with shuffled scores, 18,000 texts: none came out otherwise).
    """
    ids, merges = vocabulary.named(), []
    for i, token in enumerate(vocabulary.tokens):
        if len(token) > MAX_TOKEN_CHARS:
            raise SourceError(
                f"GGUF key tokenizer.ggml.tokens: token {i} is {len(token)} characters long, "
                f"expected at most {MAX_TOKEN_CHARS}"
            )
        if vocabulary.kinds[i] not in (Kind.NORMAL, Kind.UNUSED) or token not in ids:
            continue
        for cut in range(len(token) - 1, 0, -1):
            if (left := token[:cut]) in ids and (right := token[cut:]) in ids:
                merges.append((-scores[i], cut, left, right))
    if len(merges) > 1 and len({m[0] for m in merges}) == 1:
        raise UnsupportedError(
            "GGUF key tokenizer.ggml.scores: all scores are equal, so the order of merges is lost",
            hint="give the model's Hugging Face folder instead: it has its own tokenizer",
        )
    merges.sort(key=lambda m: (m[0], -m[1]))
    return [(left, right) for _, _, left, right in merges]


def _adds(meta: Metadata, add_bos: bool) -> tuple[bool, bool]:
    """Whether a text gets BOS before and EOS after it."""
    return (
        meta.flag("tokenizer.ggml.add_bos_token", add_bos),
        meta.flag("tokenizer.ggml.add_eos_token", False),
    )


def _add_tokens(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """What is found in raw text before anything else: control tokens and those of the model's author."""
    from tokenizers import AddedToken

    for i, token in enumerate(vocabulary.tokens):
        if vocabulary.added(i):
            special = vocabulary.special(i)
            add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
            add([AddedToken(token, special=special, normalized=False, rstrip=vocabulary.strips_after(i))])


def _around(tokenizer: Any, vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> None:
    """BOS and EOS as a post-processor, so that every user of the file adds what llama.cpp adds."""
    from tokenizers import processors

    if not (add_bos or add_eos):
        if vocabulary.model == "gpt2":
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    used: list[tuple[str, int]] = []
    for wanted, name, i in ((add_bos, "bos", vocabulary.bos), (add_eos, "eos", vocabulary.eos)):
        if wanted and i is None:
            raise SourceError(f"GGUF: add_{name}_token is true, but there is no tokenizer.ggml.{name}_token_id")
        if wanted and i is not None:
            used.append((vocabulary.tokens[i], i))
    before = [f"{used[0][0]}:0"] if add_bos else []
    after = [f"{used[-1][0]}:0"] if add_eos else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before, "$A:0", "$B:1", *after],
        special_tokens=list(dict(used).items()),
    )


def _config(meta: Metadata, vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> dict[str, Any]:
    named = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "pad_token": vocabulary.pad,
        "unk_token": vocabulary.unknown,
    }
    # transformers makes a special token of whatever is named here, and some files pad with "!".
    named = {name: i for name, i in named.items() if i is not None and vocabulary.added(i)}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: vocabulary.text(i) for name, i in named.items()},
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
    }
    if template := _chat_template(meta):
        config["chat_template"] = template
    return {key: value for key, value in config.items() if value is not None}


def _chat_template(meta: Metadata) -> str | list[dict[str, str]] | None:
    """The template; where the file has named ones beside it, the list of all that tokenizer_config.json
    takes."""
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): meta.text(key) for key in meta.values if key.startswith(prefix)}
    default = meta.text("tokenizer.chat_template", "")
    if not named:
        return default or None
    every = ({"default": default} if default else {}) | named
    return [{"name": name, "template": template} for name, template in every.items()]


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
