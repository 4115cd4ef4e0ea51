"""Folders with small real tokenizers, of every kind that a GGUF file can hold: what scripts/oracle_vocab.py shows to
llama.cpp's converter, and what the tests compare with its answer.

`CASES[name]` is (config.json, {file: bytes}). They are made from three small tokenizers in tests/fixtures/gguf_vocab,
which scripts/oracle_vocab.py trains: bpe.json, spm.model and spm.json (transformers' own conversion of spm.model)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent.parent / "fixtures" / "gguf_vocab"
Case = tuple[dict[str, Any], dict[str, bytes]]
TYPES = {"int32": "INT32", "float32": "FLOAT32"}
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3",
    "phi3": "Phi3", "smollm3": "SmolLM3", "olmo2": "Olmo2", "granite": "Granite", "gpt_oss": "GptOss",
}  # fmt: skip
BOS, EOS, PAD = 0, 1, 2  # of the small BPE: <|endoftext|>, <|eos|>, <|pad|>
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


def config(model_type: str, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 128, "head_dim": 16}
    base = {"architectures": [f"{CLASSES[model_type]}ForCausalLM"], "model_type": model_type, **sizes}
    return {key: value for key, value in (base | {"rms_norm_eps": 1e-5} | more).items() if value is not None}


def added(id: int, content: str, special: bool = False, **more: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, **flags, "special": special, **more}


def special(text: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": 0}}


def template(single: list[Any], pair: list[Any], ids: Mapping[str, int]) -> dict[str, Any]:
    tokens = {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in ids.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


A, B = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
# As in Llama 3's.
_BOS = template(
    [special("<|endoftext|>"), A], [special("<|endoftext|>"), A, special("<|endoftext|>"), B], {"<|endoftext|>": BOS}
)
_BOTH = template(
    [special("<|endoftext|>"), A, special("<|eos|>")],
    [special("<|endoftext|>"), A, special("<|eos|>"), B, special("<|eos|>")],
    {"<|endoftext|>": BOS, "<|eos|>": EOS},
)
_NAMED = {"bos_token": "<|endoftext|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
# Tokens that the decoder, the rules for control tokens or ▁ would change.
_ODD = ["éé", "ÃīÃī", "Ġx", "a▁b", " y", "<|call|>", "<｜c｜>", "<unused7>", "<mask>", "日本", "<tool_call>"]


def bpe(
    model_type: str,
    tokenizer_config: Mapping[str, Any] | None = _NAMED,
    files: Mapping[str, bytes] | None = None,
    more: list[dict[str, Any]] | None = None,
    model: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    **entries: Any,
) -> Case:
    """`more`: added tokens; `model`, `entries`: of tokenizer.json; `settings`: of config.json."""
    tokenizer = json.loads((FIXTURES / "bpe.json").read_bytes())
    tokenizer |= entries
    tokenizer["model"] |= model or {}
    tokenizer["added_tokens"] += more or []
    count = len(tokenizer["model"]["vocab"]) + len(more or [])
    made = {"tokenizer.json": _json(tokenizer)}
    # The class of a family adds tokens that its published vocabularies have, and this one has not.
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    made |= {} if tokenizer_config is None else {"tokenizer_config.json": _json(fast | dict(tokenizer_config))}
    return config(model_type, **({"vocab_size": count} | dict(settings or {}))), made | dict(files or {})


def spm(
    model_type: str,
    tokenizer_config: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
    json_too: bool = True,
    **settings: Any,
) -> Case:
    made = {"tokenizer.model": (FIXTURES / "spm.model").read_bytes()}
    made |= {"tokenizer.json": (FIXTURES / "spm.json").read_bytes()} if json_too else {}
    made |= {} if tokenizer_config is None else {"tokenizer_config.json": _json(tokenizer_config)}
    made |= {name: value if isinstance(value, bytes) else _json(value) for name, value in (files or {}).items()}
    defaults = {"vocab_size": pieces(), "bos_token_id": 1, "eos_token_id": 2}
    return config(model_type, **defaults | settings), made


def pieces() -> int:
    return len(json.loads((FIXTURES / "spm.json").read_bytes())["model"]["vocab"])


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _cases() -> dict[str, Case]:
    n, s = len(json.loads((FIXTURES / "bpe.json").read_bytes())["model"]["vocab"]), pieces()
    vocab = json.loads((FIXTURES / "bpe.json").read_bytes())["model"]
    merges = [m if isinstance(m, list) else m.split(" ") for m in vocab["merges"]]
    odd = [added(n + i, text) for i, text in enumerate(_ODD)]
    spaced = {"vocab": vocab["vocab"] | {"a b": n}, "merges": [*merges, ["a", " b"]]}
    spaced["vocab"] |= {" b": n + 1}
    decoder = {str(i): {k: v for k, v in added(i, text, i < 3).items() if k != "id"} for i, text in enumerate(
        ["<unk>", "<s>", "</s>", "<user>", "▁▁"])}  # fmt: skip
    late = {str(s + i): {k: v for k, v in added(0, text, i == 0).items() if k != "id"} for i, text in enumerate(
        ["<|im_end|>", "<|tool|>", "▁x ▁", "[INST]"])}  # fmt: skip
    sp = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    as_object = {"__type": "AddedToken", **{k: v for k, v in added(0, "<|endoftext|>").items() if k != "id"}}
    llama3 = {"post_processor": _BOS, "model": {"ignore_merges": True}}
    eos_list = {"bos_token_id": BOS, "eos_token_id": [EOS, PAD]}
    return {
        "llama3": bpe("llama", {"bos_token": as_object, "eos_token": "<|eos|>"}, settings=eos_list, **llama3),
        "llama-prefix": bpe("llama", _NAMED | {"add_prefix_space": False, "add_bos_token": True}),
        "llama-49152": bpe("llama", settings={"vocab_size": 49152}),
        "qwen2": bpe("qwen2", _NAMED | {"chat_template": TEMPLATE}, settings={"vocab_size": n + 17}),
        "qwen2-ids": bpe("qwen2", {}, settings={"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": None}),
        "qwen2_moe": bpe("qwen2_moe", {}, settings={"eos_token_id": EOS, "pad_token_id": 7}),
        "qwen3": bpe("qwen3", post_processor={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                                              "use_regex": False}),
        "qwen3_moe": bpe("qwen3_moe", _NAMED | {"chat_template": [{"name": "default", "template": TEMPLATE},
                                                                  {"name": "tool use", "template": "{{ tools }}"}]}),
        "odd": bpe("olmo2", more=odd),
        "odd-normalized": bpe("olmo2", more=[t | {"normalized": True} for t in odd]),
        "odd-special": bpe("olmo2", more=[t | {"special": True} for t in odd]),
        "spaces": bpe("olmo2", model=spaced, settings={"vocab_size": n + 2}),
        "old-merges": bpe("granite", model={"merges": [" ".join(m) for m in merges]}),
        "decoder": bpe("granite", _NAMED | {"extra_special_tokens": ["<tool_call>", "<new>"], "added_tokens_decoder": {
            str(n): {"content": "éé", "special": True}, str(n + 20): {"content": "<late>", "special": False}}},
            more=odd, settings={"vocab_size": n + 40}),
        "legacy": bpe("qwen3", {"eos_token": "<|eos|>"}, {
            "special_tokens_map.json": _json({"bos_token": {"content": "<|endoftext|>"}, "pad_token": "<fresh>",
                                              "additional_special_tokens": ["<tool_call>"]}),
            "added_tokens.json": _json({"<legacy>": n + 10})}, more=odd, settings={"vocab_size": n + 40}),
        "gpt_oss": bpe("gpt_oss", {"bos_token": "<|endoftext|>", "eos_token": "<|pad|>"}, post_processor=_BOTH),
        "gpt_oss-silent": bpe("gpt_oss", None, post_processor=_BOTH, settings={"pad_token_id": PAD}),
        "smollm3": bpe("smollm3", _NAMED, {"chat_template.jinja": TEMPLATE.encode(),
                                           "additional_chat_templates/tool-use.jinja": b"{{ tools }}"}),
        "phi4": bpe("phi3", _NAMED | {"tokenizer_class": "GPT2Tokenizer"}),
        "roberta": bpe("olmo2", {"cls_token": "<|endoftext|>", "sep_token": "<|eos|>"}, post_processor={
            "type": "RobertaProcessing", "sep": ["<|eos|>", EOS], "cls": ["<|endoftext|>", BOS], "trim_offsets": True,
            "add_prefix_space": False}),
        "llama2": spm("llama", sp),
        "llama2-legacy": spm("llama", sp | {"add_prefix_space": True},
                             {"added_tokens.json": {"<pad>": s, "far": s + 9}}, vocab_size=s + 4),
        "llama2-decoder": spm("llama", sp | {"added_tokens_decoder": decoder | late}, vocab_size=s + 7),
        "llama2-alone": spm("llama", None, json_too=False, pad_token_id=0),
        "llama2-cut": spm("llama", sp, vocab_size=s - 40),
        "code-llama": spm("llama", sp, vocab_size=32016),
        "mixtral": spm("mixtral", sp | {"chat_template": TEMPLATE}, vocab_size=s),
        "mistral": spm("mistral", sp | {"added_tokens_decoder": late}, vocab_size=s + 4),
        "granite-spm": spm("granite", sp, vocab_size=49152),
        "qwen2-spm": spm("qwen2", sp, vocab_size=s + 1),
        "gemma": spm("gemma", sp | {"added_tokens_decoder": decoder | late}, vocab_size=s + 4),
        "gemma2": spm("gemma2", sp | {"chat_template": TEMPLATE}, vocab_size=None),
        "gemma3": spm("gemma3_text", sp | {"added_tokens_decoder": decoder}, eos_token_id=[1, 5]),
        "phi3": spm("phi3", sp | {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": late},
                    {"added_tokens.json": {"▁legacy": s + 5}}, vocab_size=s + 8),
    }  # fmt: skip


CASES = _cases() if (FIXTURES / "spm.json").exists() else {}


def summary(keys: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Keys as they are kept: [GGUF type, value], of arrays [type, length, sha256 of the values]."""
    return {key: _summary(value) for key, value in keys.items()}


def _summary(value: Any) -> list[Any]:
    if isinstance(value, list):
        return _array("STRING", [text.encode() for text in value])
    if isinstance(value, np.ndarray):
        return _array(TYPES[value.dtype.name], [value.tobytes()], len(value))
    if isinstance(value, np.uint32):
        return ["UINT32", int(value)]
    return [{bool: "BOOL", str: "STRING"}[type(value)], value]


def _array(kind: str, parts: list[bytes], count: int | None = None) -> list[Any]:
    digest = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts))
    return [f"ARRAY {kind}", len(parts) if count is None else count, digest.hexdigest()[:16]]
