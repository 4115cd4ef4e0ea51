"""The level that a model is at already: as it lies in its folder or file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlxquant.codecs.spec import Codec
from mlxquant.families.checkpoint import header_bytes
from mlxquant.families.layout import Target
from mlxquant.families.mlx_config import is_mxfp4
from mlxquant.fit.shares import Share, experts_share, gguf_shares, mlx_shares, read_parts
from mlxquant.fit.subject import Subject
from mlxquant.fit.values import Level
from mlxquant.plan.packed import as_floats, codec_of, unpack
from mlxquant.plan.plan import lay_out, shape_remarks
from mlxquant.tensors import TensorSpec

if TYPE_CHECKING:
    from mlxquant.files.gguf_file import GGUFTensor


def stored_level(subject: Subject) -> Level:
    """The model as it is: what mlx-lm loads of a checkpoint, or llama.cpp of a GGUF file. `nbytes` counts all of its
    tensors, `loaded_bytes` those that are the model's. Raises SourceError and UnsupportedError."""
    if subject.stored is not None:
        return subject.stored
    if subject.gguf is not None:
        return stored_gguf(*subject.gguf)
    return _mxfp4_level(subject) if is_mxfp4(subject.config) else _float_level(subject)


def _float_level(subject: Subject) -> Level:
    """Reckoned by the model's own tensors: mlx-lm stacks experts when it loads them."""
    layout, shares = subject.basis.layout, mlx_shares(subject.basis)
    loaded = [TensorSpec(target.name, target.shape, target.dtype) for target in layout.targets]
    others = [subject.specs[name] for name, _ in layout.dropped]
    loaded_bytes = sum(spec.nbytes for spec in loaded)
    return Level(
        name=_commonest_dtype(loaded),
        format="mlx",
        options=(),
        nbytes=loaded_bytes + sum(spec.nbytes for spec in others),
        loaded_bytes=loaded_bytes,
        largest_bytes=max(spec.nbytes for spec in loaded),
        token_bytes=sum(shares[spec.name].of(spec.nbytes) for spec in loaded),
        size=sum(spec.size for spec in (*loaded, *others)),
        header_bytes=header_bytes("mlx", 0, subject.specs),
        remarks=tuple(shape_remarks(subject.shape, layout)),
    )


def _mxfp4_level(subject: Subject) -> Level:
    """mlx-lm parts gate from up when it loads them."""
    specs = subject.specs.values()
    sources = {spec.name: spec.nbytes for spec in specs}
    arrays = {spec.name: spec.nbytes // (2 if "gate_up_proj" in spec.name else 1) for spec in specs}
    return _level("mxfp4", read_parts(subject), sources, arrays, sum(map(_weights, specs)))


def stored_mlx(config: dict[str, Any], specs: Mapping[str, TensorSpec]) -> Level:
    """A quantized MLX folder as it is, from its config.json and the specs of its packed tensors.

    Raises SourceError (packed shapes and `quantization` block cannot both be true) and UnsupportedError.
    """
    floats, whole, _ = as_floats(config, specs)
    weights = unpack(config, specs)
    basis = lay_out(floats, whole)
    shares = mlx_shares(basis)
    parts = [(target, shares[target.name]) for target in basis.layout.targets]
    sources = {name: weight.nbytes for name, weight in weights.items()}
    size = sum(weight.spec.size for weight in weights.values())
    arrays = {name: spec.nbytes for name, spec in specs.items()}
    level = _level(mlx_name(codec_of(config, "")), parts, sources, arrays, size)
    return replace(level, remarks=tuple(shape_remarks(basis.shape, basis.layout)))


def stored_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> Level:
    """A GGUF file as it is, from its header: llama.cpp maps all of its tensors."""
    from mlxquant.plan.gguf_types import FILE_TYPES

    arch = metadata.get("general.architecture")
    used, experts = (metadata.get(f"{arch}.{key}", 0) for key in ("expert_used_count", "expert_count"))
    shares = gguf_shares({name: t.shape for name, t in tensors.items()}, experts_share(int(used), int(experts)))
    types: Counter[str] = Counter()
    for tensor in tensors.values():
        types[tensor.type_name] += tensor.nbytes
    names = {number: name for name, (number, _) in FILE_TYPES.items()}
    nbytes = types.total()
    starts: dict[int, int] = {}  # of the first tensor in each file of a split model
    for tensor in tensors.values():
        starts[tensor.part] = min(tensor.offset, starts.get(tensor.part, tensor.offset))
    return Level(
        name=names.get(int(metadata.get("general.file_type", -1)), types.most_common(1)[0][0]),
        format="gguf",
        options=(),
        nbytes=nbytes,
        loaded_bytes=nbytes,
        largest_bytes=max(t.nbytes for t in tensors.values()),
        token_bytes=sum(shares[name].of(t.nbytes) for name, t in tensors.items()),
        size=sum(t.rows * t.width for t in tensors.values()),
        header_bytes=sum(starts.values()),
    )


def mlx_name(codec: Codec, recipe: str = "balanced") -> str:
    """'4-bit', '4-bit g32 uniform', 'mxfp4', 'mixed_3_6 g32': the group of 64 and the balanced recipe go unsaid."""
    if codec.mode != "affine":
        words = [codec.mode]
    elif recipe.startswith("mixed"):
        words, recipe = [recipe], "balanced"
    else:
        words = [f"{codec.bits}-bit"]
    words += [f"g{codec.group_size}"] if codec.mode == "affine" and codec.group_size != 64 else []
    return " ".join(words + [recipe] * (recipe != "balanced"))


def _level(
    name: str,
    parts: Iterable[tuple[Target, Share]],
    sources: Mapping[str, int],
    arrays: Mapping[str, int],
    size: int,
) -> Level:
    """`sources`: bytes of each weight by name; `arrays`: of each array. A matrix that two targets are made of
    is there, and read, once."""
    loaded: dict[str, int] = {}
    for target, share in parts:
        for piece in target.pieces:
            loaded[piece.source] = max(loaded.get(piece.source, 0), share.of(sources[piece.source]))
    return Level(
        name=name,
        format="mlx",
        options=(),
        nbytes=sum(sources.values()),
        loaded_bytes=sum(sources[source] for source in loaded),
        largest_bytes=max(arrays.values()),
        token_bytes=sum(loaded.values()),
        size=size,
        header_bytes=header_bytes("mlx", 0, arrays),
    )


def _weights(spec: TensorSpec) -> int:
    """Two codes a byte, and scales that are no weights."""
    if spec.dtype != "U8":
        return spec.size
    return 2 * spec.size if spec.name.endswith("_blocks") else 0


def _commonest_dtype(specs: Iterable[TensorSpec]) -> str:
    """'bf16': of most weights."""
    counts: Counter[str] = Counter()
    for spec in specs:
        counts[spec.dtype] += spec.size
    return counts.most_common(1)[0][0].lower()
