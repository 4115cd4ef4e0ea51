"""llama.cpp's mixtures: which tensors of a quantized GGUF file get more bits than the rest, or fewer.

The rules of llama_tensor_get_type_impl (llama.cpp, src/llama-quant.cpp) for the file types of plan/gguf_types.py.
Two of them count: the attn_v tensors and, in models without experts, the ffn_down tensors seen so far. So
tensors are asked for in the file's order (`gguf_types.order`), and only those that no override has decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import PlanError
from mlxquant.families.gguf_table import layer_of

TOKEN_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
# Categories by what stands in the name, the first that fits (tensor_get_category). Fused attn_qkv and MLA's
# attn_kv_b follow the rule of attn_v; biases never come here, they are not quantized.
_CATEGORIES = (
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_output.weight", "attn_output"),
    ("ffn_down", "ffn_down"),
)
# What LLM_TYPE_70B means to these rules: architecture -> number of layers (load_arch_hparams in src/models/*.cpp).
_LAYERS_OF_70B = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
_OUTPUT_OF_8_EXPERTS = {"Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "IQ4_XS", "Q4_K_S", "Q4_K_M"}


@dataclass(frozen=True)
class Model:
    """What the rules ask about a model. `gqa`: query heads to one key head in layer 0 (0 where it has none)."""

    arch: str
    layers: int
    gqa: int
    experts: int
    is_70b: bool
    tied: bool
    n_attention_v: int


def model(metadata: Mapping[str, Any], names: Iterable[str]) -> Model:
    """Reads the keys as llama_model_base::load_hparams does. Raises PlanError where block_count is missing."""
    names = set(names)
    arch = str(metadata.get("general.architecture"))
    layers = metadata.get(f"{arch}.block_count")
    if layers is None:
        raise PlanError(f"the metadata has no {arch}.block_count, which the types of its tensors depend on")
    heads = _first(metadata.get(f"{arch}.attention.head_count", 0))
    kv_heads = _first(metadata.get(f"{arch}.attention.head_count_kv", heads))
    experts = int(metadata.get(f"{arch}.expert_count", 0))
    is_70b = _LAYERS_OF_70B.get(arch) == int(layers)
    if arch.startswith("llama"):  # the 65B model of the same depth has as many key heads as query heads
        is_70b = is_70b and heads != kv_heads
    n_attention_v = sum(category(name) == "attn_v" for name in names)
    gqa = heads // kv_heads if kv_heads else 0
    return Model(arch, int(layers), gqa, experts, is_70b, "output.weight" not in names, n_attention_v)


def category(name: str) -> str:
    """output, token_embd, attn_v, attn_k, attn_output, ffn_down or other."""
    if name == "output.weight":
        return "output"
    if name in TOKEN_EMBEDDINGS:
        return "token_embd"
    return next((category for part, category in _CATEGORIES if part in name), "other")


class Mixture:
    """One pass over the tensors of one file. `base` is the file type's own tensor type."""

    def __init__(self, file_type: str, base: str, model: Model, has_imatrix: bool, output_type: str | None) -> None:
        self._file_type, self._base, self._model = file_type, base, model
        self._has_imatrix, self._output_type = has_imatrix, output_type
        self._attention_v_seen = self._ffn_down_seen = 0

    def type_of(self, name: str, base_fits: bool) -> str:
        """`base_fits`: whether the base type's blocks divide the width. The width's own fallback comes after this."""
        kind = category(name)
        if kind == "output" or (kind == "token_embd" and self._model.tied):
            return self._output(base_fits)
        if kind == "token_embd":
            return "Q4_K" if self._base in ("TQ1_0", "TQ2_0") else self._base
        if kind == "attn_v":
            self._attention_v_seen += 1
            return self._attention_v(self._attention_v_seen - 1)
        if kind == "attn_k":
            return "Q8_0" if self._model.experts == 8 else self._base
        if kind == "attn_output":
            return self._attention_output()
        if kind == "ffn_down":
            self._ffn_down_seen += 1
            layer = self._layer(name) if self._model.experts > 1 else self._ffn_down_seen - 1
            return self._ffn_down(layer, self._model.layers)
        return self._base

    def _output(self, base_fits: bool) -> str:
        if self._output_type:
            return self._output_type
        return "Q8_0" if self._model.arch == "falcon" or not base_fits or self._base == "Q8_0" else "Q6_K"

    def _attention_v(self, i: int) -> str:
        type_name = self._attention_v_of_any(i)
        if self._model.experts == 8:
            return "Q8_0"
        return "Q5_K" if self._model.is_70b and type_name in ("Q3_K", "Q4_K") else type_name

    def _attention_v_of_any(self, i: int) -> str:
        shared = self._model.gqa >= 4  # few key heads: attn_v is small, and more bits are cheap
        match self._file_type:
            case "Q2_K":
                return "Q4_K" if shared else "Q3_K"
            case "Q2_K_S" if shared:
                return "Q4_K"
            case "Q3_K_M":
                return "Q5_K" if i < 2 else "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "IQ4_NL" | "IQ4_XS" if shared:
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if more_bits(i, self._model.n_attention_v):
                return "Q6_K"
            case "Q4_K_S" if i < 4:
                return "Q5_K"
        return self._base

    def _attention_output(self) -> str:
        if self._model.arch == "falcon":
            return "Q4_K" if self._file_type == "Q3_K_L" else self._base
        if self._model.experts == 8:
            return "Q5_K" if self._file_type in _OUTPUT_OF_8_EXPERTS else self._base
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self._file_type, self._base)

    def _ffn_down(self, i: int, n: int) -> str:
        falcon = self._model.arch == "falcon"
        match self._file_type:
            case "Q2_K":
                return "Q3_K"
            case "Q2_K_S" if i < n // 8:
                return "Q4_K"
            case "Q3_K_M":
                if i < n // 16:
                    return "Q5_K"
                return "Q3_K" if falcon and not more_bits(i, n) else "Q4_K"
            case "Q3_K_L":
                return "Q4_K" if falcon else "Q5_K"
            case "Q4_K_M" if falcon:
                return "Q6_K" if i < n // 16 else "Q5_K" if more_bits(i, n) else "Q4_K"
            case "Q4_K_M" | "Q5_K_M" if more_bits(i, n):
                return "Q6_K"
            case "IQ4_NL" | "IQ4_XS" if i < n // 8 and not self._has_imatrix:
                return "Q5_K"
            case "Q4_K_S" if i < n // 8 and not falcon:
                return "Q5_K"
            case "Q4_0" | "Q5_0" if i < n // 8 and self._has_imatrix:
                return "Q4_1" if self._file_type == "Q4_0" else "Q5_1"
        return self._base

    def _layer(self, name: str) -> int:
        """With experts llama.cpp reads the layer off the name: old files hold an expert a tensor."""
        layer, layers = layer_of(name), self._model.layers
        if not 0 <= layer < layers:
            raise PlanError(f"{name}: its name gives no layer below {layers}, which its type depends on")
        return layer


def more_bits(i: int, n: int) -> bool:
    """The first and last eighth, and every third in between (use_more_bits)."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _first(value: Any) -> int:
    """Per-layer counts: the rules look at layer 0."""
    return int(value if not hasattr(value, "__len__") else value[0] if len(value) else 0)
