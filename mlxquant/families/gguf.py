"""A GGUF file seen as a Hugging Face model: its config.json. Where each tensor lies is in gguf_tensors.py.

Only names, shapes and key-value pairs are looked at. Key names: the GGUF specification (ggml/docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf_metadata import Metadata
from mlxquant.families.gguf_rope import rope_scaling

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """`permuted`: q and k rows are in llama.cpp's rotary order. The others: tensors that only some families
    have."""

    model_type: str
    class_name: str
    permuted: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    optional_bias: bool = False
    own_head_dim: bool = True  # heads may be wider or narrower than hidden_size / heads


FAMILIES = {
    # Llama 1 to 3.x, Mistral, SmolLM2, TinyLlama and everything else that llama.cpp converts to "llama".
    "llama": Family("llama", "LlamaForCausalLM", permuted=True, optional_bias=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, own_head_dim=False),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", qk_norm=True),
}

ROPE_FREQS = "rope_freqs.weight"


def hf_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, Shape], rope_freqs: Sequence[float] | None = None
) -> dict[str, Any]:
    """config.json of the model in a GGUF file.

    `shapes`: tensor name -> shape, outermost axis first. `rope_freqs`: the values of the tensor
    rope_freqs.weight where the file has one (Llama 3.1 and later). There is no dtype in it: that is a choice
    of whoever decodes the blocks.

    Raises UnsupportedError for an architecture, expert layers or a rope scaling that we do not know,
    SourceError for a missing or ill-typed key."""
    meta = Metadata(metadata)
    family, arch = _family(meta)
    config = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **_sizes(meta, arch),
        "hidden_act": "silu",
        "rms_norm_eps": meta.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.number(f"{arch}.rope.freq_base", 10000.0),
        "vocab_size": _vocab_size(meta, shapes),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if scaling := rope_scaling(meta, arch, config, _frequencies(shapes, rope_freqs)):
        config["rope_scaling"] = scaling
    if family.optional_bias:
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    if not family.own_head_dim:  # the Hugging Face config has no such entry
        _check_head_dim(family, config)
        del config["head_dim"]
    return config | token_ids(meta)


def token_ids(meta: Metadata) -> dict[str, Any]:
    """bos_token_id, eos_token_id (a list where end of turn or of message are given too) and pad_token_id."""
    vocab = len(meta.strings("tokenizer.ggml.tokens")) if "tokenizer.ggml.tokens" in meta else None
    spm = meta.text("tokenizer.ggml.model", "") == "llama"
    # Where the file is silent, llama.cpp takes SentencePiece's own numbering (src/llama-vocab.cpp).
    bos = _token_id(meta, "bos", vocab, 1 if spm else None)
    eos = [_token_id(meta, "eos", vocab, 2 if spm else None)]
    eos += [_token_id(meta, kind, vocab) for kind in ("eot", "eom")]
    ends = list(dict.fromkeys(i for i in eos if i is not None))
    ids = {
        "bos_token_id": bos,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": _token_id(meta, "padding", vocab),
    }
    return {key: value for key, value in ids.items() if value is not None}


def _token_id(meta: Metadata, kind: str, vocab: int | None, default: int | None = None) -> int | None:
    key = f"tokenizer.ggml.{kind}_token_id"
    if key not in meta:
        return default
    found = meta.integer(key)
    if vocab is not None and found >= vocab:
        raise SourceError(f"GGUF key {key}: found {found}, expected less than the {vocab} tokens of the vocabulary")
    return found


def _family(meta: Metadata) -> tuple[Family, str]:
    arch = meta.text("general.architecture")
    if arch not in FAMILIES:
        raise UnsupportedError(
            f"GGUF architecture {arch!r:.60} is not supported (supported: {', '.join(FAMILIES)})",
            hint="give the model's Hugging Face folder instead",
        )
    return FAMILIES[arch], arch


def _sizes(meta: Metadata, arch: str) -> dict[str, Any]:
    if meta.integer(f"{arch}.expert_count", 0):
        raise UnsupportedError(
            f"GGUF architecture {arch!r:.60} with {arch}.expert_count > 0 (mixture of experts) is not supported",
            hint="give the model's Hugging Face folder instead",
        )
    hidden, heads, kv_heads = _heads(meta, arch)
    return {
        "hidden_size": hidden,
        "intermediate_size": meta.each_layer(f"{arch}.feed_forward_length"),
        "num_hidden_layers": meta.integer(f"{arch}.block_count", least=1),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": _head_dim(meta, arch, hidden, heads),
        "max_position_embeddings": meta.integer(f"{arch}.context_length", least=1),
    }


def _heads(meta: Metadata, arch: str) -> tuple[int, int, int]:
    """(hidden size, heads, key heads)."""
    heads = meta.each_layer(f"{arch}.attention.head_count")
    kv_heads = meta.each_layer(f"{arch}.attention.head_count_kv", heads)
    if heads % kv_heads:
        raise SourceError(f"GGUF: {heads} attention heads are no multiple of {kv_heads} key heads")
    return meta.integer(f"{arch}.embedding_length", least=1), heads, kv_heads


def _vocab_size(meta: Metadata, shapes: Mapping[str, Shape]) -> int:
    rows = _shape(shapes, "token_embd.weight")[0]
    if "tokenizer.ggml.tokens" in meta and (tokens := len(meta.strings("tokenizer.ggml.tokens"))) > rows:
        raise SourceError(f"GGUF tensor token_embd.weight: {rows} rows, expected one for each of {tokens} tokens")
    return rows


def _check_head_dim(family: Family, config: Mapping[str, Any]) -> None:
    heads, head_dim, hidden = (config[k] for k in ("num_attention_heads", "head_dim", "hidden_size"))
    if heads * head_dim != hidden:
        raise UnsupportedError(
            f"GGUF: {heads} heads of {head_dim} in a {family.class_name} of {hidden} are not supported",
            hint="give the model's Hugging Face folder instead",
        )


def _head_dim(meta: Metadata, arch: str, hidden: int, heads: int) -> int:
    head_dim = meta.integer(f"{arch}.attention.key_length", hidden // heads, least=1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := meta.integer(f"{arch}.{key}", head_dim)) != head_dim:
            raise UnsupportedError(
                f"GGUF key {arch}.{key}: found {other}, supported is only the head's key length {head_dim}",
                hint="give the model's Hugging Face folder instead",
            )
    if head_dim % 2:
        raise SourceError(f"GGUF: attention heads are {head_dim} wide, expected an even number")
    return head_dim


def _shape(shapes: Mapping[str, Shape], name: str) -> Shape:
    if name not in shapes or not shapes[name]:
        raise SourceError(f"GGUF tensor {name} is missing", hint="the file is incomplete, or one part of a split model")
    return tuple(shapes[name])


def _frequencies(shapes: Mapping[str, Shape], rope_freqs: Sequence[float] | None) -> list[float] | None:
    if ROPE_FREQS not in shapes:
        return None
    if rope_freqs is None:
        raise SourceError(f"GGUF tensor {ROPE_FREQS} is in the file, but its values were not given")
    return [float(f) for f in rope_freqs]
