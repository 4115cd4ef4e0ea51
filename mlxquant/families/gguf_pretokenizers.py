r"""How each `tokenizer.ggml.pre` of llama.cpp cuts text into words before byte pairs are merged.

The regular expressions are those of llama.cpp's src/llama-vocab.cpp, written for Oniguruma, the engine of
`tokenizers`. Where llama.cpp departs from a model's own tokenizer.json (it sees every letter outside ASCII as
both upper and lower case), we depart with it: the ids are to be llama.cpp's.
`tests/families/test_gguf_pretokenizers.py` compares each one.

Known difference: llama.cpp's tables are Unicode 15, Oniguruma's are newer; code points assigned since then
are letters or symbols to one and nothing to the other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import UnsupportedError, UsageError


@dataclass(frozen=True)
class Pre:
    """Each expression cuts the pieces that the one before left: matches and what lies between them are
    pieces.

    `ignore_merges`: a word that is a token is that token, whatever the merges say. `add_bos`: what holds
    where the file does not say it."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_DIGIT = r"\p{N}"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACES
_CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_OTHER_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
# A word with at most one change from capitals to small letters; only a-z and A-Z count as cased.
_CAMEL_A = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+"
_CAMEL_B = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*"
_JAIS2_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")) + r"|\s{1}"


def _any(*alternatives: str) -> str:
    return "|".join(alternatives)


_GPT2 = _any(r"'s|'t|'re|'ve|'m|'ll|'d", r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", _SPACES)
_QWEN2 = _any(_CONTRACTION, _WORD, _DIGIT, _OTHER, _LINES)
_QWEN35 = _any(_CONTRACTION, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", _DIGIT, r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _LINES)
_LLAMA3 = _any(_CONTRACTION, _WORD, r"\p{N}{1,3}", _OTHER, _LINES)
_JAIS2 = _any(_CONTRACTION, _WORD, r"\p{N}{1,3}", _OTHER, r"\s*[\r\n]+", _JAIS2_SPACES)
_SEED = _any(_CONTRACTION, _WORD, _DIGIT, r" ?[^\s\p{L}\p{N}\r\n]+", _LINES)
_TEKKEN = _any(_CAMEL_A, _CAMEL_B, _DIGIT, _OTHER_SLASH, _LINES)
_GPT4O = _any(f"{_CAMEL_A}{_CONTRACTION}?", f"{_CAMEL_B}{_CONTRACTION}?", r"\p{N}{1,3}", _OTHER_SLASH, _LINES)
_DEEPSEEK3 = _any(
    '[!"' + r"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    _LINES,
)

_BY_PRE: tuple[tuple[Pre, str], ...] = (
    # What llama.cpp does where the file names none.
    (Pre((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")), "default"),
    (Pre((_GPT2,)), "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum"),
    (Pre((_DIGIT, _GPT2)), "smollm starcoder refact command-r codeshell exaone minerva-7b"),
    (
        Pre((_LLAMA3,), ignore_merges=True, add_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    ),
    (Pre((_LLAMA3,), ignore_merges=True), "glm4"),
    (Pre((_LLAMA3,)), "dbrx smaug-bpe chatglm-bpe"),
    # The last three have an expression of their own in llama.cpp, which cuts in the same places.
    (
        Pre((_QWEN2,)),
        "qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan solar-open grok-2 kormo bailingmoe bailingmoe2 llada-moe",
    ),
    (Pre((_QWEN35,)), "qwen35"),
    (Pre((_TEKKEN,), ignore_merges=True, add_bos=True), "tekken"),
    (Pre((_GPT4O,)), "gpt-4o llama4 kanana2 minimax-m2"),
    (Pre((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)), "deepseek-v3 hunyuan-dense joyai-llm"),
    (Pre((_SEED,)), "seed-coder"),
    (Pre((_JAIS2,)), "jais-2"),
)
PRE_TOKENIZERS: dict[str, Pre] = {name: pre for pre, names in _BY_PRE for name in names.split()}


def pre_tokenizer(name: str) -> Pre:
    """Raises UnsupportedError for a `tokenizer.ggml.pre` that is not in the table."""
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedError(
            f"GGUF key tokenizer.ggml.pre: {name[:60]!r} is not supported (supported: {known})",
            hint="give the model's Hugging Face folder instead: it has its own tokenizer.json",
        )
    return PRE_TOKENIZERS[name]


# Names that llama.cpp knows (src/llama-vocab.cpp) and whose cuts we cannot rebuild as a tokenizer.json: `--pre` takes
# them, and nothing else does.
MORE_NAMES = frozenset((
    "afmoe", "bloom", "chameleon", "cohere2moe", "deepseek-coder", "deepseek-llm", "exaone-moe", "f2llmv2", "falcon",
    "gpt3-finnish", "granite-embed-multi-97m", "hy_v4", "jina-v5-nano", "kimi-k2", "laguna", "mellum2", "minicpm5",
    "modern-bert", "poro-chat", "spark2_5", "superbpe", "talkie", "tiny_aya", "ufakzeka", "viking", "youtu",
))  # fmt: skip

# What a tokenizer.json says where llama.cpp's expression, and so ours, is spelled in another way.
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _CONTRACTION),
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTION),
    (r"[^\r\n\p{L}\p{N}]?" + _CASED[0] + "*" + _CASED[1] + "+", _CAMEL_A),
    (r"[^\r\n\p{L}\p{N}]?" + _CASED[0] + "+" + _CASED[1] + "*", _CAMEL_B),
    (r"\p{N}{1}|", r"\p{N}|"),
    # bailingmoe: possessive quantifiers, and \s* before one \n takes those before it; the cuts are the same.
    (r"[^\r\n\p{L}\p{N}]?+\p{L}+", _WORD),
    (r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|", _OTHER + r"|\s*[\r\n]+|"),
)

_NOTHING = {"type": "Sequence", "normalizers": []}


def expressions_of(tokenizer_json: Mapping[str, Any]) -> tuple[str, ...]:
    """How a tokenizer.json with a byte-level BPE cuts text, as in `Pre.expressions`.

    Raises UnsupportedError where llama.cpp has no such thing: steps of other kinds, normalizers other than NFC."""
    if (normalizer := tokenizer_json.get("normalizer")) not in (None, {"type": "NFC"}, _NOTHING):
        raise _unknown(f"normalizer {_shown(normalizer)}")
    *splits, last = _steps(tokenizer_json.get("pre_tokenizer"))
    expressions = tuple(_expression(step) for step in splits)
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True) is not False:
        raise _unknown(f"pre_tokenizer {_shown(last)}")
    return (*expressions, _GPT2) if last.get("use_regex", True) else expressions


def _steps(pre_tokenizer: Any) -> list[Mapping[str, Any]]:
    """At least one step."""
    sequence = isinstance(pre_tokenizer, Mapping) and pre_tokenizer.get("type") == "Sequence"
    steps = pre_tokenizer.get("pretokenizers") if sequence else [pre_tokenizer]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, Mapping) for step in steps):
        raise _unknown(f"pre_tokenizer {_shown(pre_tokenizer)}")
    return steps


def _expression(step: Mapping[str, Any]) -> str:
    if step.get("type") == "Digits" and step.get("individual_digits") is True:
        return _DIGIT
    pattern = step.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    # To remove what does not match is to keep it all: with `invert` the pieces are what matches.
    isolated = step.get("behavior") == "Isolated" or (step.get("behavior") == "Removed" and step.get("invert") is True)
    if step.get("type") != "Split" or not isolated or not isinstance(expression, str):
        raise _unknown(f"pre_tokenizer {_shown(step)}")
    for theirs, ours in _SPELLINGS:
        expression = expression.replace(theirs, ours)
    return expression


def name_of(
    expressions: tuple[str, ...],
    ignore_merges: bool = False,
    adds_bos: bool = False,
    model_type: str = "",
    tokens: Sequence[str] = (),
) -> str:
    """The `tokenizer.ggml.pre` of a tokenizer.json that cuts text by `expressions`; `tokens`: its vocabulary.

    Where several names cut alike, the one that convert_hf_to_gguf.py gives to the models we know: it goes by the ids
    of a text (conversion/base.py, get_vocab_base_pre), so names tell vocabularies apart. Raises UnsupportedError
    naming the expression that no name stands for."""
    names = [name for name, pre in PRE_TOKENIZERS.items() if pre.expressions == expressions]
    if not names:
        known = {e for pre in PRE_TOKENIZERS.values() for e in pre.expressions}
        strange = next((e for e in expressions if e not in known), None)
        raise _unknown(f"expression {strange:.400}" if strange else f"order of expressions {expressions!r:.400}")
    if expressions == (_LLAMA3,):
        if adds_bos and ignore_merges:
            return "llama-bpe"
        return "smaug-bpe" if ignore_merges and model_type not in ("olmo2", "phi3") else "dbrx"
    if expressions == (_DIGIT, _GPT2):
        named = {"starcoder2": "starcoder", "cohere": "command-r"}.get(model_type, names[0])
        return "refact" if named == names[0] and list(tokens[1:2]) == ["<fim_prefix>"] else named
    return "deepseek-r1-qwen" if expressions == (_QWEN2,) and adds_bos else names[0]


def check_name(name: str) -> str:
    """Raises UsageError for a `--pre NAME` that llama.cpp would not load."""
    if name not in PRE_TOKENIZERS and name not in MORE_NAMES:
        raise UsageError(f"--pre {name[:60]!r} is no pre-tokenizer of llama.cpp", hint=f"it knows {_known()}")
    return name


def _known() -> str:
    return ", ".join(sorted(PRE_TOKENIZERS.keys() | MORE_NAMES))


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 400 else shown[:397] + "..."


def _unknown(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"tokenizer.json: {what} is not one that llama.cpp is known to have a name for",
        hint=f"if you know the name, give it with --pre NAME: {_known()}",
    )
