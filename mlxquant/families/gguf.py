"""A GGUF file seen as a Hugging Face model: its config.json. Where each tensor lies is in gguf_tensors.py.

Only names, shapes and key-value pairs are looked at. What a file leaves unsaid is what llama.cpp takes for granted
(src/llama-model.cpp, load_hparams).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf_families import HINT, MODELS, File, Model, Shape
from mlxquant.families.gguf_metadata import Metadata
from mlxquant.families.gguf_rope import ROPE_FREQS, rope_scaling
from mlxquant.families.gguf_table import ARCHS, module_of_gguf

__all__ = ["ROPE_FREQS", "hf_config", "token_ids"]


def hf_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    rope_freqs: Sequence[float] | None = None,
    rope_factors: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, Any]:
    """config.json of the model in a GGUF file.

    `shapes`: tensor name -> shape, outermost axis first. `rope_freqs`: the values of the tensor rope_freqs.weight where
    the file has one (Llama 3.1 and later); `rope_factors`: those of rope_factors_long.weight and
    rope_factors_short.weight (Phi-3). There is no dtype in it: that is a choice of whoever decodes the blocks.

    Raises UnsupportedError for an architecture, or a setting of one, that we or stock mlx-lm do not know, SourceError
    for a missing or ill-typed key."""
    meta = Metadata(metadata)
    module = module_of_gguf(meta)
    model = MODELS[module]
    file = File(meta, ARCHS[module].name, shapes, rope_freqs, rope_factors)
    config = {
        "architectures": [model.class_name],
        "model_type": module,
        **_sizes(file, model),
        "hidden_act": model.activation,
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number("rope.freq_base", 10000.0),
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if model.head and config["tie_word_embeddings"]:
        raise file.unsupported("an output head tied to the embedding")
    if scaling := _scaling(file, model, config):
        config["rope_scaling"] = scaling
    config |= model.extra(file, config)
    if not model.own_head_dim:  # the Hugging Face config has no such entry
        _check_head_dim(file, config)
        del config["head_dim"]
    return config | token_ids(meta)


def _sizes(file: File, model: Model) -> dict[str, Any]:
    if bool(file.integer("expert_count", 0)) != model.experts:
        found = "no expert_count" if model.experts else "expert_count > 0 (mixture of experts)"
        raise file.unsupported(found)
    hidden, heads, kv_heads = _heads(file)
    ffn = None if model.experts and f"{file.arch}.feed_forward_length" not in file.meta else "feed_forward_length"
    return {
        "hidden_size": hidden,
        "intermediate_size": file.each_layer(ffn or "expert_feed_forward_length"),
        "num_hidden_layers": file.integer("block_count", least=1) - file.integer("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": _head_dim(file, model, hidden, heads),
        "max_position_embeddings": file.integer("context_length", least=1),
    }


def _heads(file: File) -> tuple[int, int, int]:
    """(hidden size, heads, key heads)."""
    heads = file.each_layer("attention.head_count")
    kv_heads = file.each_layer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise SourceError(f"GGUF: {heads} attention heads are no multiple of {kv_heads} key heads")
    return file.integer("embedding_length", least=1), heads, kv_heads


def _head_dim(file: File, model: Model, hidden: int, heads: int) -> int:
    head_dim = file.integer("attention.key_length", hidden // heads, least=1)
    for key in ("attention.value_length", *(() if model.partial else ("rope.dimension_count",))):
        if (other := file.integer(key, head_dim)) != head_dim:
            raise UnsupportedError(
                f"GGUF key {file.arch}.{key}: found {other}, supported is only the head's key length {head_dim}",
                hint=HINT,
            )
    if head_dim % 2:
        raise SourceError(f"GGUF: attention heads are {head_dim} wide, expected an even number")
    return head_dim


def _check_head_dim(file: File, config: Mapping[str, Any]) -> None:
    heads, head_dim, hidden = (config[k] for k in ("num_attention_heads", "head_dim", "hidden_size"))
    if heads * head_dim != hidden:
        raise file.unsupported(f"{heads} heads of {head_dim} beside a hidden size of {hidden}")


def _vocab_size(file: File) -> int:
    shape = file.shapes.get("token_embd.weight")
    if not shape:
        hint = "the file is incomplete, or one part of a split model"
        raise SourceError("GGUF tensor token_embd.weight is missing", hint=hint)
    tokens = len(file.meta.strings("tokenizer.ggml.tokens")) if "tokenizer.ggml.tokens" in file.meta else 0
    if tokens > shape[0]:
        raise SourceError(f"GGUF tensor token_embd.weight: {shape[0]} rows, expected one for each of {tokens} tokens")
    return shape[0]


def _scaling(file: File, model: Model, config: dict[str, Any]) -> dict[str, Any] | None:
    factors = None
    if ROPE_FREQS in file.shapes:
        if file.rope_freqs is None:
            raise SourceError(f"GGUF tensor {ROPE_FREQS} is in the file, but its values were not given")
        factors = [float(f) for f in file.rope_freqs]
    if model.partial:  # phi3 and qwen3_next read theirs themselves
        return None
    scaling = rope_scaling(file.meta, file.arch, config, factors)
    if scaling and not model.scaled:
        raise file.unsupported(f"rope scaling ({scaling['rope_type']}), which stock mlx-lm leaves out,")
    return scaling


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
