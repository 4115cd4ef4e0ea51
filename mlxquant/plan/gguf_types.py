"""Which ggml type each tensor of a GGUF file gets: llama.cpp's choice, to the tensor.

Quantized files follow llama-quantize (llama.cpp, src/llama-quant.cpp: tensor_allows_quantization,
llama_tensor_get_type, tensor_type_fallback; the mixtures are in gguf_mixtures.py). What llama-quantize leaves alone,
and F32, F16 and BF16 files, follow convert_hf_to_gguf.py (conversion/base.py, prepare_tensors). Rules of
architectures that no family of ours has (GLM5-Next's, those of image and audio parts) are left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import PlanError, UsageError
from mlxquant.families import gguf_table
from mlxquant.files.gguf_file import BLOCKS
from mlxquant.plan.gguf_mixtures import TOKEN_EMBEDDINGS, Mixture, category, model

# name -> (general.file_type, type of most tensors). llama.h, enum llama_ftype; llama_ftype_get_default_type.
FILE_TYPES: dict[str, tuple[int, str]] = {
    "F32": (0, "F32"), "F16": (1, "F16"), "BF16": (32, "BF16"), "Q8_0": (7, "Q8_0"),
    "Q4_0": (2, "Q4_0"), "Q4_1": (3, "Q4_1"), "Q5_0": (8, "Q5_0"), "Q5_1": (9, "Q5_1"),
    "Q2_K": (10, "Q2_K"), "Q2_K_S": (21, "Q2_K"), "Q3_K_S": (11, "Q3_K"), "Q3_K_M": (12, "Q3_K"),
    "Q3_K_L": (13, "Q3_K"), "Q4_K_S": (14, "Q4_K"), "Q4_K_M": (15, "Q4_K"), "Q5_K_S": (16, "Q5_K"),
    "Q5_K_M": (17, "Q5_K"), "Q6_K": (18, "Q6_K"), "IQ4_NL": (25, "IQ4_NL"), "IQ4_XS": (30, "IQ4_XS"),
    "TQ1_0": (36, "TQ1_0"), "TQ2_0": (37, "TQ2_0"),
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
TENSOR_TYPES = tuple(dict.fromkeys(base for _, base in FILE_TYPES.values()))
FLOAT_TYPES = ("F32", "F16", "BF16")
# Types whose encoder looks at the importance of each column.
IMPORTANCE_TYPES = frozenset(TENSOR_TYPES) - {*FLOAT_TYPES, "Q8_0", "TQ1_0", "TQ2_0"}

# Where the width is no multiple of the type's 256 (tensor_type_fallback); then F16, if not even of 32.
_NARROWER = {
    "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip

# Parts of the names of weights that llama-quantize leaves alone (tensor_allows_quantization).
_LEFT_ALONE = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|attn_rel_b\.weight|\.position_embd"
    r"|time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|^(position_embd|token_types)\.weight$"
)
# Weights that convert_hf_to_gguf.py always writes as F32 (prepare_tensors), beside norms, vectors and biases.
_ALWAYS_F32 = re.compile(
    r"(position_embd|token_types|blk\.\d+\.(ffn_gate_inp(_shexp)?|ssm_conv1d(_[qkv])?|shortconv\.conv|indexer\.proj"
    r"|time_mix_(first|w[12]|decay_w[12]|lerp_fused)|altup_(correct|predict)_coef))\.weight"
)


@dataclass(frozen=True)
class TypeSettings:
    """What the user asked for, in llama-quantize's terms. `tensor_types`: (pattern, type), the first match counts."""

    file_type: str
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False

    @property
    def file_type_id(self) -> int:
        """The value of general.file_type."""
        return FILE_TYPES[self.file_type][0]

    @property
    def base(self) -> str:
        """The type of most tensors."""
        return FILE_TYPES[self.file_type][1]

    @property
    def quantized(self) -> bool:
        return self.base not in FLOAT_TYPES

    @property
    def rounds(self) -> bool:
        """Some tensor is to be quantized: a float file may still ask for it for embedding or head."""
        asked = (self.base, self.output_tensor_type, self.token_embedding_type)
        return any(name is not None and name not in FLOAT_TYPES for name in asked)


def type_settings(
    file_type: str,
    *,
    tensor_types: Iterable[str] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    pure: bool = False,
) -> TypeSettings:
    """Settings from the command line's words, upper or lower case; every word that means nothing is a UsageError."""
    name = ALIASES.get(file_type.upper(), file_type.upper())
    if name not in FILE_TYPES:
        raise UsageError(f"--type {file_type!r} is unknown", hint=f"one of {', '.join(FILE_TYPES)}")
    overrides = tuple(map(_parse_override, tensor_types))
    if overrides and FILE_TYPES[name][1] in FLOAT_TYPES:
        raise UsageError(
            f"--tensor-type with --type {name}: {name} files have no mixture to change",
            hint="take a quantized --type; --output-tensor-type and --token-embedding-type go with any",
        )
    output, embedding = output_tensor_type, token_embedding_type
    if output is not None:
        output = _tensor_type(output, "--output-tensor-type")
    if embedding is not None:
        embedding = _tensor_type(embedding, "--token-embedding-type")
    return TypeSettings(name, overrides, output, embedding, pure)


def _parse_override(text: str) -> tuple[str, str]:
    pattern, equals, type_name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--tensor-type {text!r} has no '='", hint="write it like --tensor-type 'ffn_down=q6_k'")
    if re.search(r"\\[A-Z]", pattern):
        raise UsageError(
            f"--tensor-type {text!r}: patterns are lower-cased, as llama-quantize does, and {pattern!r} would change",
            hint="write a class of characters, as [^.] or [^0-9]",
        )
    try:
        re.compile(pattern.lower())
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"--tensor-type {text!r}: {pattern!r} is no regular expression ({error})") from error
    return pattern.lower(), _tensor_type(type_name, f"--tensor-type {text!r}:")


def _tensor_type(text: str, where: str) -> str:
    if text.upper() not in TENSOR_TYPES:
        raise UsageError(f"{where} {text!r} is no type of a tensor", hint=f"one of {', '.join(TENSOR_TYPES)}")
    return text.upper()


def order(names: Iterable[str]) -> list[str]:
    """The order of tensors in a file of llama-quantize."""
    return sorted(names, key=gguf_table.order)


def allows_quantization(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama-quantize touches a tensor of this outermost-first shape (tensor_allows_quantization)."""
    # ggml does not count outer dimensions of 1: a (1, 2048) gate is a vector there.
    rows = next((i for i, size in enumerate(shape) if size > 1), len(shape))
    return len(shape) - rows >= 2 and name.endswith("weight") and not _LEFT_ALONE.search(name)


def float_type(name: str, shape: tuple[int, ...], file_type: str) -> str:
    """F32, F16 or BF16: what convert_hf_to_gguf.py writes under `--outtype file_type` (one of those three)."""
    vector = len(shape) <= 1 or name.endswith("_norm.weight") or not name.endswith(".weight")
    return "F32" if vector or _ALWAYS_F32.fullmatch(name) else file_type


def auto_type(source_dtype: str) -> str:
    """What `convert_hf_to_gguf.py --outtype auto` makes of a checkpoint of this dtype code: F32 becomes F16, too."""
    return "BF16" if source_dtype == "BF16" else "F16"


def tensor_types(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    settings: TypeSettings,
    imatrix_names: AbstractSet[str] | None = None,
    source_dtype: str = "BF16",
) -> tuple[dict[str, str], tuple[str, ...]]:
    """({GGUF name: ggml type} in llama-quantize's order, remarks) of a file.

    `metadata`: the file's keys; `shapes`: {GGUF name: shape, outermost first}, all of its tensors;
    `imatrix_names`: the names an importance matrix has entries for; `source_dtype`: the dtype code of the
    source's matrices, which decides the type of what is not quantized.
    Raises UsageError for an override that decides nothing, PlanError for a type that cannot hold a width that was
    asked for by name, for Q2_K_S without importance, and for metadata without a layer count.
    """
    open_to_choice = {name for name in shapes if allows_quantization(name, shapes[name])}
    _refuse_idle_overrides(settings, open_to_choice)
    float_code = auto_type(source_dtype) if settings.quantized else settings.base
    choice = _Choice(settings, metadata, shapes, bool(imatrix_names))
    types = {
        name: choice.type_of(name, shapes[name][-1])
        if name in open_to_choice and (settings.quantized or choice.asked(name))
        else float_type(name, shapes[name], float_code)
        for name in order(shapes)
    }
    return types, (*choice.remarks(), *_check_importance(types, settings, imatrix_names))


class _Choice:
    """llama_tensor_get_type: asked for by name, else by pattern, else the mixture; then what the width can hold."""

    def __init__(
        self,
        settings: TypeSettings,
        metadata: Mapping[str, Any],
        names: Iterable[str],
        has_imatrix: bool,
    ) -> None:
        self._settings = settings
        self._fallbacks: dict[tuple[int, str, str], list[str]] = defaultdict(list)
        self._mixture = None
        if settings.quantized and not settings.pure:
            output_type = settings.output_tensor_type
            self._mixture = Mixture(settings.file_type, settings.base, model(metadata, names), has_imatrix, output_type)

    def asked(self, name: str) -> str | None:
        """The type that --output-tensor-type or --token-embedding-type gives it."""
        if name == "output.weight":
            return self._settings.output_tensor_type
        if category(name) != "token_embd" or (name == TOKEN_EMBEDDINGS[1] and self._override(name)):
            return None
        return self._settings.token_embedding_type

    def type_of(self, name: str, width: int) -> str:
        """Called once for each tensor, in the file's order: the mixture counts."""
        if asked := self.asked(name):
            if width % BLOCKS[asked][0]:
                raise PlanError(
                    f"{name}: width {width} is no multiple of {BLOCKS[asked][0]}, which {asked} was asked for needs",
                    hint="ask for Q8_0 or F16, or leave the choice to --type",
                )
            return asked
        wanted = self._override(name) or self._by_mixture(name, width)
        fitting = _fit(wanted, width)
        if fitting != wanted:
            self._fallbacks[width, wanted, fitting].append(name)
        return fitting

    def _override(self, name: str) -> str | None:
        return next((type_name for pattern, type_name in self._settings.tensor_types if re.search(pattern, name)), None)

    def _by_mixture(self, name: str, width: int) -> str:
        base = self._settings.base
        return self._mixture.type_of(name, width % BLOCKS[base][0] == 0) if self._mixture else base

    def remarks(self) -> list[str]:
        return [
            f"{few(names)}: width {width} is not a multiple of {BLOCKS[wanted][0]}: {wanted} becomes {became}"
            for (width, wanted, became), names in self._fallbacks.items()
        ]


def _fit(type_name: str, width: int) -> str:
    if width % BLOCKS[type_name][0] == 0:
        return type_name
    narrower = _NARROWER.get(type_name, type_name)
    return narrower if width % BLOCKS[narrower][0] == 0 else "F16"


def _refuse_idle_overrides(settings: TypeSettings, names: AbstractSet[str]) -> None:
    for pattern, type_name in settings.tensor_types:
        if not any(re.search(pattern, name) for name in names):
            raise UsageError(
                f"--tensor-type {pattern}={type_name} matches none of the {len(names)} tensors that can be quantized",
                hint="patterns are searched for in GGUF names like blk.0.ffn_down.weight; `--dry-run` lists them",
            )


def _check_importance(
    types: Mapping[str, str], settings: TypeSettings, imatrix_names: AbstractSet[str] | None
) -> list[str]:
    """tensor_requires_imatrix, and a remark on entries that are missing. Embeddings and head seldom have one."""
    known = {*(imatrix_names or ()), *TOKEN_EMBEDDINGS, "output.weight"}
    missing = [name for name, type_name in types.items() if type_name in IMPORTANCE_TYPES and name not in known]
    starved = [name for name in missing if types[name] == "Q2_K"] if settings.file_type == "Q2_K_S" else []
    if starved:
        raise PlanError(
            f"Q2_K_S needs an importance matrix: {few(starved)} would be Q2_K without",
            hint="give --imatrix FILE (llama-imatrix makes one), or take --type Q2_K",
        )
    if imatrix_names and missing:
        return [f"{few(missing)}: no entry in the importance matrix, quantized without"]
    return []


def few(names: Sequence[str]) -> str:
    """'blk.0.ffn_down.weight and 3 more'."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
