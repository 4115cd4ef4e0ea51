r"""How each `tokenizer.ggml.pre` of llama.cpp cuts text into words before byte pairs are merged.

The regular expressions are those of llama.cpp's src/llama-vocab.cpp, written for Oniguruma, the engine of
`tokenizers`. Where llama.cpp departs from a model's own tokenizer.json (it sees every letter outside ASCII as
both upper and lower case), we depart with it: the ids are to be llama.cpp's.
`tests/families/test_gguf_pretokenizers.py` compares each one.

Known difference: llama.cpp's tables are Unicode 15, Oniguruma's are newer; code points assigned since then
are letters or symbols to one and nothing to the other."""

from __future__ import annotations

from dataclasses import dataclass

from mlxquant.errors import UnsupportedError


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
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
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
