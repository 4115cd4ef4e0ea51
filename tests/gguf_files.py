"""Tiny GGUF files for tests, written by the `gguf` package from a Hugging Face folder as llama.cpp's
converter would.

`write_gguf(folder, path)` takes what tests/tiny.py makes. Names come from gguf's own map, the rotary order of
q and k is llama.cpp's (conversion/llama.py, permute), blocks come from gguf's quantizer: nothing here is
mlxquant's. The files load in real llama.cpp and generate; `LlamaCpp(path)` asks it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def write_gguf(folder: Path, path: Path, type: str = "F16", *, pre: str = "gpt-2", **keys: Any) -> Path:
    """The model of `folder` (llama, qwen2, qwen3) as one GGUF file: matrices of `type`, vectors F32.

    `pre`: the pre-tokenizer's name. `keys`: more key-value pairs, or other values, with __ for a dot
    (`tokenizer__ggml__add_bos_token=True`); None leaves a key out.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = Writer(path, config["model_type"], _keys(keys))
    write_config(writer, config, FILE_TYPES[type])
    write_bpe(writer, folder, pre)
    write_tensors(writer, folder, config, type)
    writer.close()
    return path


class Writer(gguf.GGUFWriter):
    """A GGUFWriter in which `keys` win over what is added later."""

    def __init__(self, path: Path, arch: str, keys: dict[str, Any] | None = None) -> None:
        super().__init__(str(path), arch)
        self._keys = keys or {}
        for key, value in self._keys.items():
            if value is not None:
                super().add_key_value(
                    key,
                    value,
                    _type(value),
                    gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None,
                )

    def add_key_value(self, key: str, val: Any, vtype: Any, sub_type: Any = None) -> None:
        if key not in getattr(self, "_keys", {}):
            super().add_key_value(key, val, vtype, sub_type)

    def close(self) -> None:
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file()
        super().close()


def write_config(writer: gguf.GGUFWriter, config: dict[str, Any], file_type: int) -> None:
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(file_type)


def write_bpe(writer: gguf.GGUFWriter, folder: Path, pre: str) -> None:
    """Tokens, merges, special ids and chat template of a byte-level BPE tokenizer.json."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {t["id"]: t for t in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | {t["content"]: i for i, t in added.items()}
    tokens = sorted(ids, key=lambda t: ids[t])
    kinds = [NORMAL if i not in added else CONTROL if added[i]["special"] else USER_DEFINED for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(ids[config["bos_token"]])
    writer.add_eos_token_id(ids[config["eos_token"]])
    writer.add_pad_token_id(ids[config["pad_token"]])
    writer.add_add_bos_token(False)
    if "chat_template" in config:
        writer.add_chat_template(config["chat_template"])


def write_tensors(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any], type: str) -> None:
    arch = {a: i for i, a in gguf.MODEL_ARCH_NAMES.items()}[config["model_type"]]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for hf_name, values in read_folder(folder).items():
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise KeyError(hf_name)
        part = hf_name.split(".")[-2]
        if config["model_type"] == "llama" and part in heads:
            values = permute(values, heads[part])
        kind = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else type]
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def write_vocabulary(path: Path, tokens: Sequence[str], **keys: Any) -> Path:
    """The smallest llama that llama.cpp loads (one layer of zeros), for the sake of its tokenizer."""
    width, config = 32, dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    config |= {"hidden_size": width, "intermediate_size": width, "head_dim": width, "vocab_size": len(tokens)}
    config |= {"max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5}
    writer = Writer(path, "llama", _keys(keys))
    write_config(writer, config, FILE_TYPES["F32"])
    writer.add_token_list(list(tokens))
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), width), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(width, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((width, width), np.float32))
    writer.close()
    return path


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's rotary order -> llama.cpp's: (2 halves, pairs) of each head become (pairs, 2 halves)."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder as float32."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            tensors |= {name: opened.get_tensor(name).astype(np.float32) for name in opened.keys()}  # noqa: SIM118
    return tensors


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
    """(metadata, shapes outermost first, float32 tensors) as gguf's own reader sees the file."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    values = {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(shapes[t.name]) for t in reader.tensors}
    return metadata, shapes, values


class LlamaCpp:
    """Real llama.cpp on one GGUF file, answering on loopback. `exact`: its cache in float32 instead of float16."""

    def __init__(self, path: Path, exact: bool = False) -> None:
        import pytest  # here, since scripts import this module, too

        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.port, params.verbosity = 512, 1, 0, 1
        params.warmup = params.fit_params = False
        params.cpuparams.n_threads = 1
        params.n_gpu_layers, params.no_op_offload = 0, True  # a virtual Mac's Metal device lacks what llama.cpp needs
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)
        self._wait_for_its_loop()

    def _wait_for_its_loop(self) -> None:
        """A server freed before its worker loop has begun misses the stop signal and is joined for ever: on a busy
        machine the suite then hangs. The loop itself answers /slots, while /tokenize needs none."""
        with urllib.request.urlopen(self._server.listening_address + "/slots", timeout=120) as answer:
            answer.read()

    def tokenize(self, text: str) -> list[int]:
        """With BOS where the file wants it, control tokens parsed."""
        return self._post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy tokens after a prompt of token ids."""
        return self._post(
            "/completion", prompt=list(prompt), n_predict=count, temperature=0, top_k=1, return_tokens=True,
            cache_prompt=False, ignore_eos=True,
        )["tokens"]  # fmt: skip

    def probabilities(self, prompt: Sequence[int], count: int, top: int = 10) -> list[tuple[int, dict[int, float]]]:
        """Greedy tokens after a prompt, each with the natural logarithms of the probabilities of the `top` likeliest at
        its place. None for a token that ends inside a character: use a vocabulary without them."""
        answer = self._post(
            "/completion", prompt=list(prompt), n_predict=count, temperature=0, return_tokens=True, n_probs=top,
            cache_prompt=False,
        )  # fmt: skip
        places = answer.get("completion_probabilities", [])
        found = [(p["id"], {t["id"]: t["logprob"] for t in p["top_logprobs"]}) for p in places]
        if [token for token, _ in found] != answer["tokens"]:
            raise ValueError("llama.cpp gave no probabilities for some of its tokens")
        return found

    def _post(self, endpoint: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + endpoint,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)


def _keys(keys: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in keys.items()}


def _type(value: Any) -> gguf.GGUFValueType:
    """llama.cpp wants token ids and counts as UINT32, and token types as INT32 inside arrays."""
    kind = gguf.GGUFValueType.get_type(value)
    return gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind
