"""The arrays of a SentencePiece vocabulary, `tokenizer.ggml.model` llama, from tokenizer.model or from what
transformers made of one, a tokenizer.json with byte fallback.

Behaviour of llama.cpp's conversion/base.py (_create_vocab_sentencepiece) and conversion/phi.py (set_vocab). The format
of tokenizer.model is sentencepiece_model.proto's: ModelProto.pieces = 1 {piece = 1, score = 2, type = 3}.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf_bpe import looks_special, vocabulary
from mlxquant.families.gguf_tokenizer import Kind
from mlxquant.families.tokenizer_sidecars import MAX_VOCABULARY, TOKENIZER, AddedToken, Sidecars, mapping, sequence

MODEL = "tokenizer.model"
_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0
# What Llama's own tokenizer.model gives to runs of spaces, which it holds but does not make.
_NEVER_MERGED_SCORE = -1e9
# (type, pattern, content): all that may happen to a text is that its spaces become ▁, with or without one before it.
_SPACE = {"String": " "}
_SPACE_STEPS = (
    ("Prepend", None, None), ("Metaspace", None, None), ("Replace", _SPACE, "▁"), ("Split", _SPACE, None),
)  # fmt: skip
_NOT = ("never", False)
_BYTE = re.compile("<0x[0-9A-F]{2}>")
# Types of a piece that are a GGUF token's, too; the script takes USER_DEFINED (4) for NORMAL.
_KINDS = {2: Kind.UNKNOWN, 3: Kind.CONTROL, 5: Kind.UNUSED, 6: Kind.BYTE}


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: Kind


def is_sentence_piece(data: bytes) -> bool:
    """False for the other tokenizer.model, tiktoken's: lines of base64 and a rank (Llama 3)."""
    return not re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data[:200])


def pieces_arrays(files: Sidecars, size: int | None, phi3: bool = False) -> dict[str, Any]:
    """tokens, scores and token_type, without the prefix of their keys, from tokenizer.model and the added tokens of
    added_tokens.json and tokenizer_config.json (phi3: of tokenizer.json, too, and taken as they are).

    Pieces and added tokens from `size` on are left out, as the script does; SourceError for what is damaged."""
    pieces = read_pieces(files.files[MODEL])
    table = _Table(len(pieces) if size is None else size)
    for i, piece in enumerate(pieces):
        table.put(i, piece.text, piece.score, piece.kind)
    for text, i in files.legacy().items():
        table.put(i, text, _ADDED_SCORE, Kind.USER_DEFINED)
    for token in (*files.declared(), *(files.listed() if phi3 else ())):
        table.add(token, as_is=phi3)
    return table.arrays()


def json_arrays(files: Sidecars, size: int | None, phi3: bool = False) -> dict[str, Any]:
    """The same three from tokenizer.json alone, whose merges are in the order of scores.

    Exactly what its tokenizer.model and tokenizer_config.json give for a vocabulary that SentencePiece trained: it
    numbers the pieces, 0, -1, -2, ... llama.cpp's script writes -1000 for each, with which llama.cpp merges whatever
    comes first. Raises UnsupportedError for a tokenizer.json of another make."""
    _check(files)
    vocab = files.vocab()
    added = files.added(vocab, size or len(vocab) + len(files.listed()))
    by_id = vocabulary(vocab, added, size)
    table = _Table(size or max(by_id, default=-1) + 1)
    special = {i: text for i, text in by_id.items() if text in added or _BYTE.fullmatch(text)}
    normal = sorted(by_id.keys() - special.keys())
    scores = _scores([by_id[i] for i in normal], files.merges())
    for i, score in zip(normal, scores, strict=True):
        table.put(i, by_id[i], score, Kind.NORMAL)
    for i, text in special.items():
        if text in added:
            table.add(added[text], as_is=phi3)
        else:
            table.put(i, text, 0.0, Kind.BYTE)
    return table.arrays()


class _Table:
    """One row for each id; ids past the end are dropped."""

    def __init__(self, size: int) -> None:
        self.tokens = [f"[PAD{i}]" for i in range(size)]
        self.scores = np.full(size, _UNUSED_SCORE, np.float32)
        self.kinds = np.full(size, Kind.UNUSED, np.int32)

    def put(self, i: int, text: str, score: float, kind: Kind) -> None:
        if i < len(self.tokens):
            self.tokens[i], self.scores[i], self.kinds[i] = text, score, kind

    def add(self, token: AddedToken, as_is: bool = False) -> None:
        if token.special or (looks_special(token.text) and not as_is):
            self.put(token.id, token.text, _ADDED_SCORE, Kind.CONTROL)
        else:
            text = token.text if as_is else token.text.replace("▁", " ")
            self.put(token.id, text, _ADDED_SCORE, Kind.USER_DEFINED)

    def arrays(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "scores": self.scores, "token_type": self.kinds}


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """The score of each token, given in order of ids, so that better scores mean earlier merges.

    SentencePiece numbers what it trains in the order of ids, and Llama's tokenizer.model has runs of spaces that come
    after everything else. Where merges stand in another order, they are right: tokens are numbered by them."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    made = [k for k, token in enumerate(tokens) if token in first]
    others = [first[tokens[k]] for k in made if tokens[k].strip("▁")]
    last = max(others, default=-1)
    late = {k for k, token in enumerate(tokens) if not token.strip("▁") and first.get(token, math.inf) > last}
    for never in (set[int](), late):
        ranks = [first[tokens[k]] for k in made if k not in never]
        if ranks == sorted(ranks):
            return [_NEVER_MERGED_SCORE if k in never else -float(k) for k in range(len(tokens))]
    order = sorted(range(len(tokens)), key=lambda k: (first.get(tokens[k], math.inf), k))
    return [-float(place) for place in np.argsort(order)]


def _check(files: Sidecars) -> None:
    """Only what the script takes for Llama's (gguf-py, LlamaHfVocab), and only spaces normalized as llama.cpp does."""
    model, decoder = files.model(), files.tokenizer.get("decoder")
    found = f"model.type {model.get('type', 'BPE')!r:.60}, byte_fallback {model.get('byte_fallback')!r:.20}"
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") is not True:
        raise UnsupportedError(
            f"{TOKENIZER}: {found}, expected a BPE with byte_fallback",
            hint=f"put the model's own {MODEL} into the folder",
        )
    if not isinstance(decoder, Mapping) or decoder.get("type") != "Sequence":
        raise UnsupportedError(f"{TOKENIZER}: decoder {decoder!r:.200} is not supported, expected a Sequence")
    for step in _steps(files):
        if (step.get("type"), step.get("pattern"), step.get("content")) not in _SPACE_STEPS:
            raise UnsupportedError(
                f"{TOKENIZER}: step {step!r:.200} is not one that llama.cpp does to a SentencePiece text",
                hint=f"put the model's own {MODEL} into the folder",
            )


def prepends_space(files: Sidecars) -> bool:
    """Whether a tokenizer.json puts a space before the text."""
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", step.get("add_prefix_space")) not in _NOT)
        for step in _steps(files)
    )


def _steps(files: Sidecars) -> Iterator[Mapping[str, Any]]:
    """The steps of normalizer and pre-tokenizer, out of their sequences."""
    for name, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = mapping(files.tokenizer.get(name), TOKENIZER, name)
        steps = sequence(step.get(inner), TOKENIZER, name) if step.get("type") == "Sequence" else [step]
        yield from (found for found in (mapping(s, TOKENIZER, name) for s in steps) if found)


def read_pieces(data: bytes) -> list[Piece]:
    """The pieces of a tokenizer.model. Raises SourceError for bytes that are none, or damaged."""
    pieces: list[Piece] = []
    for field, value in _fields(data):
        if field == 1:
            pieces.append(_piece(value, len(pieces)))
            if len(pieces) > MAX_VOCABULARY:
                raise _damaged(f"more than {MAX_VOCABULARY} pieces")
    if not pieces:
        raise _damaged("no pieces")
    if len({piece.text for piece in pieces}) != len(pieces):
        raise _damaged("a piece that is there twice")
    return pieces


def _piece(data: Any, i: int) -> Piece:
    fields = dict(_fields(data)) if isinstance(data, bytes) else {}
    text, score, kind = fields.get(1), fields.get(2, 0.0), fields.get(3, 1)
    if not isinstance(text, bytes) or not text:
        raise _damaged(f"piece {i} without text")
    if not isinstance(score, float) or not math.isfinite(score) or not isinstance(kind, int) or not 1 <= kind <= 6:
        raise _damaged(f"piece {i} with score {score!r:.20} and type {kind!r:.20}")
    try:
        return Piece(text.decode("utf-8"), score, _KINDS.get(kind, Kind.NORMAL))
    except UnicodeDecodeError as error:
        raise _damaged(f"piece {i} that is not UTF-8") from error


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(number, value) of each field of a protobuf message: an int, a float (4 bytes) or bytes (everything else)."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}.get(kind, -1), at)
        if size < 0 or size > end - at:
            raise _damaged(f"a field of type {kind} and {size} bytes at byte {at} of {end}")
        chunk = data[at : at + size]
        yield key >> 3, struct.unpack("<f", chunk)[0] if kind == 5 else chunk
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise _damaged(f"a number without an end at byte {at}")


def _damaged(what: str) -> SourceError:
    return SourceError(f"{MODEL}: holds {what}, expected a SentencePiece model", hint="download the file again")
