"""The plan of a GGUF file: every tensor, its type and its bytes, made before any weight is read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mlxquant.codecs.ggml import ENCODED, known_types
from mlxquant.errors import PlanError, SourceError
from mlxquant.families.gguf_keys import architecture, model_keys, quantized_keys
from mlxquant.families.gguf_limits import unsaid
from mlxquant.families.gguf_rope import rope_tensors
from mlxquant.families.gguf_tensors import gguf_layout
from mlxquant.families.layout import Layout, Piece, Target
from mlxquant.families.mlx_config import is_mxfp4
from mlxquant.files.gguf_file import GGUFTensor
from mlxquant.files.gguf_spec import SPLIT_KEYS, GGUFSpec
from mlxquant.files.imatrix import Imatrix
from mlxquant.files.reading import shown
from mlxquant.plan.gguf_types import (
    FLOAT_TYPES,
    IMPORTANCE_TYPES,
    TypeSettings,
    allows_quantization,
    few,
    order,
    tensor_types,
)
from mlxquant.plan.plan import left_out_remark, refuse_quantized_source
from mlxquant.tensors import DTYPES, TensorSpec

OWN_KEYS = "mlxquant."
TOKEN_EMBEDDING = "token_embd.weight"
MXFP4 = "MXFP4"  # gpt-oss's experts are published so: kept as they are, like any block that is already quantized


@dataclass(frozen=True)
class PlannedBlocks:
    """One tensor of the file. `source_type` is what its rows come in: a dtype code or a ggml type. `importance`: the
    imatrix has an entry that counts. `values`: the numbers themselves, where no source has them (rope factors).
    """

    target: Target
    type_name: str
    source_type: str
    importance: bool = False
    values: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def copied(self) -> bool:
        """Blocks pass as they are; floats do, too, but are looked at."""
        return self.type_name == self.source_type and self.type_name not in FLOAT_TYPES

    @property
    def spec(self) -> GGUFSpec:
        return GGUFSpec(self.name, self.target.shape, self.type_name)

    @property
    def size(self) -> int:
        return self.spec.size

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


@dataclass(frozen=True)
class GGUFPlan:
    """Everything the executor needs, and nothing it has to decide.

    `metadata`: of a checkpoint, the architecture's keys alone; of a GGUF source, all keys that are kept. `tensors` in
    the file's order. `source_dtype`: of most of the source's matrices. `remarks` are the surprises, one line each.
    """

    settings: TypeSettings
    metadata: Mapping[str, Any]
    tensors: tuple[PlannedBlocks, ...]
    source_dtype: str
    imatrix: Imatrix | None = field(default=None, compare=False)
    allow_requantize: bool = False
    dropped: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def size(self) -> int:
        return sum(t.size for t in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.nbytes / self.size

    def bytes_by_type(self) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for tensor in self.tensors:
            sums[tensor.type_name] += tensor.nbytes
        return dict(sums.most_common())

    def settings_json(self) -> dict[str, Any]:
        """What the types follow from, beside names, shapes and metadata: written into the file, read by verify."""
        return asdict(self.settings) | {
            "source_dtype": self.source_dtype,
            "allow_requantize": self.allow_requantize,
            "imatrix_sha256": imatrix_sha256(self.imatrix) if self.imatrix else None,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json` and the digest."""
        return {
            "architecture": self.architecture,
            "settings": self.settings_json(),
            "parameters": self.size,
            "bytes": self.nbytes,
            "bpw": self.bpw,
            "bytes_by_type": self.bytes_by_type(),
            "tensors": [
                {
                    "name": t.name,
                    "shape": list(t.target.shape),
                    "type": t.type_name,
                    "source": t.source_type,
                    "importance": t.importance,
                    "bytes": t.nbytes,
                }
                for t in self.tensors
            ],
            "dropped": [list(pair) for pair in self.dropped],
            "remarks": list(self.remarks),
        }

    def digest(self) -> str:
        """sha256 of the plan, source rows and metadata included: two plans with one digest write the same tensors."""
        rows = [[asdict(t.target), list(t.values)] for t in self.tensors]
        keys = [[key, *plain_value(value)] for key, value in self.metadata.items()]
        return hashlib.sha256(json.dumps([self.to_json(), rows, keys]).encode()).hexdigest()


def plain_value(value: Any) -> tuple[str, Any]:
    """(type, value) of one value of metadata, for JSON; NaN and infinity, which JSON lacks, as Python writes them."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}[]", value.tolist()
    return type(value).__name__, value.item() if isinstance(value, np.generic) else value


def imatrix_sha256(imatrix: Imatrix) -> str:
    digest = hashlib.sha256()
    for name, entry in sorted(imatrix.entries.items()):
        digest.update(f"{name} {entry.shape}\n".encode() + np.ascontiguousarray(entry, "<f4").tobytes())
    return digest.hexdigest()


def plan_checkpoint(
    config: dict[str, Any],
    specs: Mapping[str, TensorSpec],
    settings: TypeSettings,
    *,
    imatrix: Imatrix | None = None,
    tokens: int | None = None,
    rounded: Mapping[str, str] | None = None,
    allow_requantize: bool = False,
) -> GGUFPlan:
    """The plan of a Hugging Face checkpoint, or of an MLX folder of floats, as one GGUF file.

    `tokens`: entries of the tokenizer, where it is known. `rounded`: {source tensor: format} of what has been
    quantized before. Raises UnsupportedError (unknown family or tensor), SourceError (config, headers or imatrix do
    not agree), PlanError and UsageError (what was asked cannot be done).
    """
    basis = lay_out_checkpoint(config, specs, tokens)
    return choose_types(basis, settings, imatrix, rounded, allow_requantize=allow_requantize)


@dataclass(frozen=True)
class GGUFBasis:
    """What every plan of one checkpoint has in common, whatever the settings: the walk over all source tensors, made
    once. `constants`: the tensors that config.json stands for, among `targets` too."""

    config: dict[str, Any]
    layout: Layout
    constants: Mapping[str, np.ndarray[Any, Any]]
    targets: tuple[Target, ...]
    source_types: Mapping[str, str]


def lay_out_checkpoint(
    config: dict[str, Any],
    specs: Mapping[str, TensorSpec],
    tokens: int | None = None,
    made: Layout | None = None,
) -> GGUFBasis:
    """`made`: the MLX model's layout, where it is known. Raises UnsupportedError and SourceError."""
    refuse_quantized_source(_without_mxfp4(config))
    laid_out = gguf_layout(config, specs, tokens, made)
    architecture(config)
    constants = rope_tensors(config)
    source_types = {t.name: MXFP4 if t.change == "mxfp4" else t.dtype for t in laid_out.targets}
    source_types |= dict.fromkeys(constants, "F32")
    targets = (*laid_out.targets, *(Target(name, values.shape, "F32", ()) for name, values in constants.items()))
    return GGUFBasis(config, laid_out, constants, targets, source_types)


def choose_types(
    basis: GGUFBasis,
    settings: TypeSettings,
    imatrix: Imatrix | None = None,
    rounded: Mapping[str, str] | None = None,
    *,
    allow_requantize: bool = False,
) -> GGUFPlan:
    """The plan of a checkpoint that is laid out already. Raises PlanError and UsageError as `plan_checkpoint`."""
    _refuse_second_loss(settings, rounded, allow_requantize)
    config = basis.config
    keys = {"general.architecture": architecture(config)} | model_keys(config, settings.file_type_id)
    kept = {name: MXFP4 for name, type_ in basis.source_types.items() if type_ == MXFP4 and not allow_requantize}
    plan = _planned(basis.targets, keys, settings, basis.source_types, kept, imatrix)
    values = {name: tuple(array.tolist()) for name, array in basis.constants.items()}
    tensors = tuple(replace(t, values=values[t.name]) if t.name in values else t for t in plan.tensors)
    remarks = (*unsaid(config), *plan.remarks, *_checkpoint_remarks(settings, basis.layout, kept, rounded or {}))
    return replace(
        plan, tensors=tensors, dropped=basis.layout.dropped, remarks=remarks, allow_requantize=allow_requantize
    )


def _refuse_second_loss(settings: TypeSettings, rounded: Mapping[str, str] | None, allow_requantize: bool) -> None:
    if rounded and settings.rounds and not allow_requantize:
        raise PlanError(
            f"{few(list(rounded))}: {_kinds(rounded.values())} in the source, and quantizing them again adds a "
            "second loss",
            hint="start from the full-precision model, or add --allow-requantize",
        )


def _without_mxfp4(config: dict[str, Any]) -> dict[str, Any]:
    """The one scheme of quantized checkpoints that GGUF has as well; the layout knows its tensors."""
    if is_mxfp4(config):
        return {key: value for key, value in config.items() if key != "quantization_config"}
    return config


def _checkpoint_remarks(
    settings: TypeSettings, laid_out: Layout, kept: Mapping[str, str], rounded: Mapping[str, str]
) -> Iterable[str]:
    if kept:
        yield f"{few(list(kept))}: MXFP4 in the source, copied exactly (--allow-requantize quantizes them again)"
    if rounded:
        yield f"{few(list(rounded))}: {_before(rounded.values(), settings.rounds)}"
    for reason, count in Counter(reason for _, reason in laid_out.dropped).items():
        yield left_out_remark(reason, count)


def plan_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, GGUFTensor],
    settings: TypeSettings,
    *,
    imatrix: Imatrix | None = None,
    allow_requantize: bool = False,
) -> GGUFPlan:
    """The plan of a GGUF file of any architecture as one of other types, as llama-quantize makes it: names, order and
    keys stay (`metadata`: with their types), split.* goes, and blocks of the type that is wanted are copied.

    Raises PlanError for quantized tensors that would be quantized again unasked, and as `plan_checkpoint`.
    """
    _check_source(metadata, tensors)
    source_types = {name: tensor.type_name for name, tensor in tensors.items()}
    kept = {n: tensor.type_name for n, tensor in tensors.items() if not allows_quantization(n, tensor.shape)}
    targets = [Target(name, tensor.shape, "F32", (Piece(name, 0, tensor.rows),)) for name, tensor in tensors.items()]
    keys = {k: v for k, v in metadata.items() if k not in SPLIT_KEYS and not k.startswith(OWN_KEYS)}
    plan = _planned(targets, quantized_keys(keys, settings.file_type_id), settings, source_types, kept, imatrix)
    if unread := [t.name for t in plan.tensors if not t.copied and t.source_type not in known_types()]:
        kinds = _kinds(source_types[name] for name in unread)
        raise PlanError(
            f"{few(unread)}: {kinds} in the source, which mlxquant does not read",
            hint="start from an F32, F16 or BF16 file of this model",
        )
    again = [t.name for t in plan.tensors if t.source_type not in FLOAT_TYPES and t.source_type != t.type_name]
    if again and settings.rounds and not allow_requantize:
        kinds = _kinds(source_types[name] for name in again)
        raise PlanError(
            f"{few(again)}: {kinds} in the source, and quantizing them again adds a second loss",
            hint="start from an F32, F16 or BF16 file of this model, or add --allow-requantize",
        )
    remarks = [f"{few(again)}: {_before((source_types[n] for n in again), settings.rounds)}"] if again else []
    return replace(plan, remarks=(*plan.remarks, *remarks), allow_requantize=allow_requantize)


def _check_source(metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> None:
    """What the rules and the writer rely on. Raises SourceError."""
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise SourceError(f"GGUF key general.architecture: found {shown(repr(arch))}, expected a text")
    for key in ("block_count", "attention.head_count", "attention.head_count_kv", "expert_count"):
        value = metadata.get(f"{arch}.{key}", np.uint32(0))
        kind = value.dtype.kind if isinstance(value, (np.ndarray, np.generic)) else ""
        if kind not in ("i", "u") or (key == "block_count" and np.ndim(value)):
            raise SourceError(f"GGUF key {shown(arch)}.{key}: found {shown(repr(value))}, expected an integer")
    if not any(tensor.nbytes for tensor in tensors.values()):
        raise SourceError("the GGUF file holds no weights", hint="a vocabulary alone cannot be quantized")
    tokens, embedding = metadata.get("tokenizer.ggml.tokens"), tensors.get(TOKEN_EMBEDDING)
    if isinstance(tokens, list) and embedding and len(tokens) > embedding.rows:
        raise SourceError(f"GGUF tensor {TOKEN_EMBEDDING}: {embedding.rows} rows for {len(tokens)} tokens")
    if empty := [name for name, tensor in tensors.items() if not tensor.nbytes or not tensor.shape]:
        raise SourceError(f"GGUF tensor {shown(empty[0])} holds nothing", hint="take another file of this model")


def _planned(
    targets: Iterable[Target],
    keys: Mapping[str, Any],
    settings: TypeSettings,
    source_types: Mapping[str, str],
    kept: Mapping[str, str],
    imatrix: Imatrix | None,
) -> GGUFPlan:
    by_name = {target.name: target for target in targets}
    shapes = {name: target.shape for name, target in by_name.items()}
    source_dtype = _most_common_dtype(by_name, source_types)
    names = imatrix.entries.keys() if imatrix else None
    types, remarks = tensor_types(keys, shapes, settings, names, source_dtype)
    types |= kept
    tensors = []
    for name in order(by_name):
        importance = types[name] in IMPORTANCE_TYPES and imatrix is not None
        counts = importance and imatrix is not None and imatrix.importance(name, shapes[name]) is not None
        tensors.append(PlannedBlocks(by_name[name], types[name], source_types[name], counts))
    _refuse_unwritable(tensors)
    if imatrix and not any(tensor.importance for tensor in tensors):
        remarks = (*remarks, "no tensor makes use of the importance matrix")
    return GGUFPlan(settings, keys, tuple(tensors), source_dtype, imatrix, remarks=remarks)


def _refuse_unwritable(tensors: Iterable[PlannedBlocks]) -> None:
    for t in tensors:
        if t.type_name not in ENCODED and t.type_name != t.source_type:
            raise PlanError(
                f"{t.name}: {t.type_name} is a type that mlxquant does not write", hint="take another --type"
            )


def _most_common_dtype(targets: Mapping[str, Target], source_types: Mapping[str, str]) -> str:
    counts: Counter[str] = Counter()
    for name, target in targets.items():
        if len(target.shape) > 1 and (source_types[name] in DTYPES or source_types[name] in FLOAT_TYPES):
            counts[source_types[name]] += GGUFSpec(name, target.shape, "F32").size
    return counts.most_common(1)[0][0] if counts else "F16"


def _before(formats: Iterable[str], rounds: bool) -> str:
    """What becomes of weights that have been quantized already."""
    again = "they are rounded a second time" if rounds else "that loss stays, in more bytes"
    return f"quantized before ({_kinds(formats)}): {again}"


def _kinds(formats: Iterable[str]) -> str:
    """'4g32, 8g32': the most frequent first."""
    return ", ".join(name for name, _ in Counter(formats).most_common())
