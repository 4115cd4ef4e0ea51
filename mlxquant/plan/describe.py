"""What a model is, told from its config and tensor headers alone: the answer of `mlxquant inspect`.

Pure: names, shapes and dtypes in, one Description out. A model that mlxquant cannot convert is described too,
as far as its config goes, and the reason stands in `remarks`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mlxquant.errors import SourceError
from mlxquant.families.gguf import ROPE_FREQS, hf_config
from mlxquant.families.gguf_tensors import hf_tensors
from mlxquant.families.mlx_layout import layout
from mlxquant.families.roles import assign_roles
from mlxquant.families.shape import ModelShape
from mlxquant.plan.facts import Facts
from mlxquant.plan.packed import unpack
from mlxquant.plan.provenance import provenance
from mlxquant.tensors import TensorSpec

if TYPE_CHECKING:
    from mlxquant.files.gguf_file import GGUFTensor

LEFT_OUT = "left out"
# No parameters of their own where a model leaves them unused: a copy of the embedding, computed tables.
_UNCOUNTED = ("lm_head.weight", "rotary_emb.inv_freq", ROPE_FREQS)

Sums = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Stored:
    """One weight as it is stored, its scales and biases included in `nbytes`.

    shape: of the weight, whatever it is packed into. format: its dtype, codec or ggml type. role: what it
    does in the model, LEFT_OUT, or None where no rule could be applied. counted: it adds to the parameters.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    role: str | None = None
    counted: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Description:
    """`container` is safetensors or gguf; `quantization` the scheme that the source itself declares.

    left_out: (reason, tensors, weights) of what a conversion would not take. made: of a GGUF file, provenance.py.
    """

    container: str
    architecture: str | None
    model_type: str | None
    facts: Facts
    modalities: tuple[str, ...]
    quantization: dict[str, Any] | None
    tensors: tuple[Stored, ...]
    left_out: tuple[tuple[str, int, int], ...]
    remarks: tuple[str, ...]
    made: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """A tied output head, stored twice or once, counts once."""
        return sum(t.size for t in self.tensors if t.counted)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def bpw(self) -> float | None:
        """Bits per weight over all that adds to the parameters; None where nothing does."""
        counted = sum(t.nbytes for t in self.tensors if t.counted)
        return 8 * counted / self.parameters if self.parameters else None

    def by_format(self) -> Sums:
        """{format: (tensors, weights, bytes)}, most bytes first."""
        return _sums((t.format, t) for t in self.tensors)

    def by_role(self) -> Sums:
        """{role: (tensors, weights, bytes)}, most bytes first."""
        return _sums((t.role or "unknown", t) for t in self.tensors)

    def to_json(self, tensors: bool = False) -> dict[str, Any]:
        """Plain values; `tensors` adds the list of them."""
        found: dict[str, Any] = {
            "format": self.container,
            "architecture": self.architecture,
            "model_type": self.model_type,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "bpw": self.bpw,
            **asdict(self.facts),
            "modalities": list(self.modalities),
            "quantization": self.quantization,
            "made": dict(self.made),
            "formats": {key: _named(sums) for key, sums in self.by_format().items()},
            "roles": {key: _named(sums) for key, sums in self.by_role().items()},
            "left_out": [{"reason": r} | _named((n, size, None)) for r, n, size in self.left_out],
            "remarks": list(self.remarks),
        }
        if tensors:
            found["tensors"] = [
                {
                    "name": t.name,
                    "role": t.role,
                    "shape": list(t.shape),
                    "format": t.format,
                    "bytes": t.nbytes,
                }
                for t in self.tensors
            ]
        return found


def describe(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Description:
    """A Hugging Face or MLX folder, from config.json and the specs of its tensors.

    Raises SourceError only where packed weights and the `quantization` block cannot both be true.
    """
    weights, facts = unpack(config, specs), Facts.of(config)
    roles, left_out, remarks = _roles(config, {name: w.spec for name, w in weights.items()})
    scheme = _scheme(config, weights)
    if scheme and (method := scheme.get("quant_method")):
        remarks.append(f"quantized by {method}: packed tensors are counted as they are stored")
    stored = (Stored(name, w.spec.shape, w.format, w.nbytes) for name, w in weights.items())
    names = config.get("architectures")
    return Description(
        container="safetensors",
        architecture=_text(names[0]) if isinstance(names, list) and names else None,
        model_type=_text(config.get("model_type")),
        facts=facts,
        modalities=("text", *(kind for kind in ("vision", "audio") if config.get(f"{kind}_config"))),
        quantization=scheme,
        tensors=_with_roles(stored, roles, guess_tied=facts.tied is True),
        left_out=left_out,
        remarks=tuple(remarks),
    )


def describe_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor], rope_freqs: list[float] | None = None
) -> Description:
    """A GGUF file, from its header. `rope_freqs`: the values of that tensor where the file has one."""
    shapes = {name: t.shape for name, t in tensors.items()}
    arch = _text(metadata.get("general.architecture"))
    roles: dict[str, str] = {}
    try:
        origins = hf_tensors(metadata, shapes)
        config = hf_config(metadata, shapes, rope_freqs)
    except SourceError as error:
        remarks = [_cannot(error)]
        config = {k.removeprefix(f"{arch}."): v for k, v in metadata.items()}
        config |= {"vocab_size": shapes.get("token_embd.weight", (None,))[0]}
        config |= {"tie_word_embeddings": "output.weight" not in shapes}
    else:
        specs = {name: TensorSpec(name, origin.shape, "F32") for name, origin in origins.items()}
        found, _, remarks = _roles(config, specs)
        roles = {piece.source: role for name, role in found.items() for piece in origins[name].pieces}
    stored = (Stored(name, t.shape, t.type_name, t.nbytes) for name, t in tensors.items())
    return Description(
        container="gguf",
        architecture=arch,
        model_type=_text(config.get("model_type")),
        facts=Facts.of(config),
        modalities=("text",),
        quantization=None,
        tensors=_with_roles(stored, roles, guess_tied=False),
        left_out=(),
        remarks=tuple(remarks),
        made=provenance(metadata),
    )


def _roles(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, str], tuple[tuple[str, int, int], ...], list[str]]:
    """(role of each tensor that has one, what is left out, why there is nothing of both)."""
    try:
        found = layout(config, specs)
        by_target = assign_roles(found.targets, ModelShape.from_config(config))
    except SourceError as error:
        return {}, (), [_cannot(error)]
    roles = {piece.source: by_target[t.name].value for t in found.targets for piece in t.pieces}
    roles |= {name: LEFT_OUT for name, _ in found.dropped}
    tensors: Counter[str] = Counter(reason for _, reason in found.dropped)
    sizes: Counter[str] = Counter()
    for name, reason in found.dropped:
        sizes[reason] += specs[name].size
    return roles, tuple((reason, n, sizes[reason]) for reason, n in tensors.items()), []


def _with_roles(stored: Iterable[Stored], roles: Mapping[str, str], guess_tied: bool) -> tuple[Stored, ...]:
    """guess_tied: what to make of an lm_head that no rule has seen."""

    def counted(tensor: Stored) -> bool:
        role = roles.get(tensor.name)
        unused = role == LEFT_OUT or tensor.name == ROPE_FREQS or (role is None and guess_tied)
        return not (unused and tensor.name.endswith(_UNCOUNTED))

    return tuple(replace(t, role=roles.get(t.name), counted=counted(t)) for t in stored)


def _cannot(error: SourceError) -> str:
    return f"cannot be converted: {error.message}"


def _scheme(config: Mapping[str, Any], weights: Iterable[str]) -> dict[str, Any] | None:
    """The source's quantization block; MLX's entries for single modules are only counted, in `overrides`."""
    block = config.get("quantization", config.get("quantization_config"))
    if not isinstance(block, dict):
        return None
    modules = {name.removesuffix(".weight") for name in weights} & block.keys()
    plain = {k: v for k, v in block.items() if isinstance(v, str | int | float) and k not in modules}
    return plain | ({"overrides": len(modules)} if modules else {})


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _sums(pairs: Iterable[tuple[str, Stored]]) -> Sums:
    sums: Sums = {}
    for key, tensor in pairs:
        tensors, weights, nbytes = sums.get(key, (0, 0, 0))
        sums[key] = (tensors + 1, weights + tensor.size, nbytes + tensor.nbytes)
    return dict(sorted(sums.items(), key=lambda item: -item[1][2]))


def _named(sums: tuple[int, int, int | None]) -> dict[str, int]:
    named = zip(("tensors", "weights", "bytes"), sums, strict=True)
    return {name: value for name, value in named if value is not None}
