"""The `tokenizer.*` keys of a GGUF file from the tokenizer of a Hugging Face folder: the inverse of gguf_tokenizer.py.

What llama.cpp's convert_hf_to_gguf.py writes, in its order and with its types (conversion/base.py, and set_vocab of
conversion/llama.py, gemma.py, phi.py, qwen.py), read from the files alone: no transformers, nobody's code. On purpose
it differs in this:

- `tokenizer.ggml.pre` follows from what tokenizer.json does to text, not from the ids of one text;
- scores of a SentencePiece vocabulary that has no tokenizer.model (gguf_spm.py, json_arrays);
- chat_template.jinja comes before tokenizer_config.json, as in transformers, and needs none beside it;
- special ids that no token has are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mlxquant.errors import SourceError, UsageError
from mlxquant.families.gguf_bpe import byte_level_arrays
from mlxquant.families.gguf_hparams import DEFAULTS
from mlxquant.families.gguf_pretokenizers import check_name, expressions_of, name_of
from mlxquant.families.gguf_special import adds_bos, special_keys
from mlxquant.families.gguf_spm import MODEL, is_sentence_piece, json_arrays, pieces_arrays, prepends_space
from mlxquant.families.tokenizer_sidecars import CONFIG, MAX_VOCABULARY, Sidecars, flag

_LLAMAS = ("llama", "mistral", "mixtral", "granite", "smollm3")
_GEMMAS = ("gemma", "gemma2", "gemma3", "gemma3_text")
# The families whose tokenizer.model the script reads; the others' is not what their tokenizer runs on.
_SENTENCE_PIECE = (*_LLAMAS, *_GEMMAS, "qwen2", "phi3")
# Vocabulary sizes by which the script knows CodeLlama and small Granites, and ends of turn that it knows by heart.
_CODE_LLAMA, _SMALL_GRANITE = 32016, 49152
_CODE_LLAMA_END, _GEMMA_END = 32010, 107


def vocabulary_keys(config: Mapping[str, Any], sidecars: Mapping[str, bytes], pre: str | None = None) -> dict[str, Any]:
    """`tokenizer.*` keys in file order, values typed as docs/architecture.md says.

    `config`: config.json. `sidecars`: the files beside the weights, name -> bytes (tokenizer.json, tokenizer.model,
    tokenizer_config.json, added_tokens.json, special_tokens_map.json, chat templates). `pre`: the `tokenizer.ggml.pre`
    to write, where the structure of tokenizer.json is not one we know.

    Raises UnsupportedError for a tokenizer that has no GGUF form we know, SourceError for files that are damaged or
    contradict one another or config.json, UsageError for a `pre` that llama.cpp does not know or that has no place.
    """
    files, family = Sidecars(sidecars), _family(config)
    size, kind = _vocab_size(config, family), _kind(files, family)
    if kind == "bpe":
        arrays = byte_level_arrays(files, size)
    elif pre is not None:
        raise UsageError("--pre is for a byte-level BPE, and this tokenizer is SentencePiece", hint="leave --pre out")
    else:
        arrays = (pieces_arrays if kind == "pieces" else json_arrays)(files, size, family == "phi3")
    count = len(arrays["tokens"])
    special = special_keys(files, config, count)
    keys: dict[str, Any] = {}
    if family in _LLAMAS and files.config.get("add_prefix_space") is not None:
        keys["add_space_prefix"] = flag(files.config["add_prefix_space"], CONFIG, "add_prefix_space")
    keys["model"] = "gpt2" if kind == "bpe" else "llama"
    keys["pre"] = "default" if kind != "bpe" else _pre(files, family, arrays["tokens"], special, pre)
    prefixed = _prefixed(keys | arrays | special) | _templates(files.chat_template())
    return prefixed | _prefixed(_of_family(files, family, kind, size, count))


def _family(config: Mapping[str, Any]) -> str:
    family = config.get("model_type")
    if not isinstance(family, str):
        raise SourceError(f"config.json: model_type is {family!r:.60}, expected a family's name such as 'llama'")
    return family


def _vocab_size(config: Mapping[str, Any], family: str) -> int | None:
    """The rows of the embedding; a silent config means what transformers' class takes for granted."""
    inner = config.get("text_config")
    given = [part.get("vocab_size") for part in (inner, config) if isinstance(part, Mapping)]
    defaults = DEFAULTS.get("gemma3_text" if family == "gemma3" else family, {})
    size = next((size for size in given if size is not None), defaults.get("vocab_size"))
    if size is not None and (type(size) is not int or not 0 < size <= MAX_VOCABULARY):
        raise SourceError(f"config.json: vocab_size is {size!r:.60}, expected 1 to {MAX_VOCABULARY}")
    return size


def _kind(files: Sidecars, family: str) -> Literal["bpe", "pieces", "json"]:
    """Where the tokens come from: tokenizer.json with a byte-level BPE, tokenizer.model, or tokenizer.json with what
    was made of one."""
    if family not in _SENTENCE_PIECE or (family == "phi3" and files.config.get("tokenizer_class") == "GPT2Tokenizer"):
        return "bpe"
    if MODEL in files.files and is_sentence_piece(files.files[MODEL]):
        return "pieces"
    return "json" if files.model().get("byte_fallback") is True else "bpe"


def _pre(files: Sidecars, family: str, tokens: Sequence[str], special: Mapping[str, Any], pre: str | None) -> str:
    if pre is not None:
        return check_name(pre)
    ignore_merges = files.model().get("ignore_merges") is True
    return name_of(expressions_of(files.tokenizer), ignore_merges, adds_bos(special), family, tokens)


def _of_family(files: Sidecars, family: str, kind: str, size: int | None, count: int) -> dict[str, Any]:
    """What set_vocab of a family's class adds, over what is there."""
    more: dict[str, Any] = {}
    if family == "gemma" and count > _GEMMA_END:
        more["eot_token_id"] = np.uint32(_GEMMA_END)
    if family in _GEMMAS and kind != "bpe":
        more["add_space_prefix"] = False
    if family in _LLAMAS and size == _CODE_LLAMA:
        more["eot_token_id"] = np.uint32(_CODE_LLAMA_END)
    if family in _LLAMAS and size == _SMALL_GRANITE:
        more["add_bos_token"] = False
    if kind == "json" and not prepends_space(files):
        more["add_space_prefix"] = False
    return more


def _prefixed(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def _templates(template: str | dict[str, str] | None) -> dict[str, Any]:
    """tokenizer.chat_template, and those beside it by name (gguf-py, add_chat_template)."""
    if template is None:
        return {}
    named = {"default": template} if isinstance(template, str) else template
    clean = {re.sub("[^a-zA-Z0-9]", "_", name): text for name, text in named.items() if name}
    default = clean.pop("default", None)
    keys: dict[str, Any] = {f"tokenizer.chat_template.{name}": text for name, text in clean.items()}
    keys |= {"tokenizer.chat_templates": list(clean)} if clean else {}
    return keys | ({"tokenizer.chat_template": default} if default is not None else {})
