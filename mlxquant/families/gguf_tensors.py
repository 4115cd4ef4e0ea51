"""Which rows of which tensors become which tensor of a GGUF file, and back.

Out: the layout of the MLX model (mlx_layout.py) already accounts for every tensor of a Hugging Face checkpoint or an
MLX folder; GGUF has the same matrices under other names, some with other rows or norms. In: the same rows, names and
changes, the other way. Source of the changes: llama.cpp's conversion/*.py (`modify_tensors`), named at each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.fused_experts import views
from mlxquant.families.gguf_metadata import Metadata
from mlxquant.families.gguf_table import (
    ARCHS,
    ROPE_TENSORS,
    Arch,
    gguf_name,
    module_of_config,
    module_of_gguf,
    order,
)
from mlxquant.families.layout import Change, Layout, Piece, Target
from mlxquant.families.mlx_layout import layout
from mlxquant.families.mlx_modules import FAMILIES, sizes
from mlxquant.families.mlx_rows import Row
from mlxquant.families.shape import ModelShape
from mlxquant.tensors import TensorSpec

Shape = tuple[int, ...]

_BACK: dict[Change, Change] = {"pairs": "halves", "add_one": "subtract_one", "neg_exp": "log_neg"}
_QKVZ = ".linear_attn.in_proj_qkvz.weight"


def gguf_layout(
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    tokens: int | None = None,
    made: Layout | None = None,
) -> Layout:
    """The tensors that convert_hf_to_gguf.py makes of this checkpoint, in llama-quantize's order, shapes outermost
    axis first; and what was left out. Rope factors, which no checkpoint stores, are not among them.

    `specs`: of a Hugging Face checkpoint or of an MLX folder of the same model (floats; a packed one as plan/packed.py
    unpacks it). `tokens`: entries of the tokenizer; gemma3's embedding is cut to so many rows (conversion/gemma.py).
    `made`: what mlx_layout.layout makes of the two, where it is known.

    Raises UnsupportedError for a family, or a tensor, that has no place in GGUF; SourceError for tensors missing or
    of a shape other than config.json says.
    """
    module = module_of_config(config)
    arch, shape = ARCHS[module], ModelShape.from_config(config)
    fused, used = views(module, specs)
    if fused or made is None:
        seen = {name: spec for name, spec in specs.items() if name not in used}
        seen |= {name: TensorSpec(name, view.shape, view.dtype) for name, view in fused.items()}
        made = layout(config, seen)
    targets: list[Target] = []
    for target in made.targets:
        if not _is_copied_head(target):
            targets += _outward(arch, shape, _through(fused, target), tokens)
    return Layout(tuple(sorted(targets, key=lambda t: order(t.name))), made.dropped)


def _is_copied_head(target: Target) -> bool:
    """A head that mlx-lm wants beside a tied embedding; llama.cpp takes the embedding where there is none."""
    return target.name == "lm_head.weight" and target.pieces[0].source.endswith("embed_tokens.weight")


def _through(fused: Mapping[str, Target], target: Target) -> Target:
    """A target made of a fused tensor's view: made of the fused tensor itself."""
    view = fused.get(target.pieces[0].source)
    return target if view is None else replace(target, pieces=view.pieces, change=view.change)


def _outward(arch: Arch, shape: ModelShape, target: Target, tokens: int | None) -> Iterator[Target]:
    """The GGUF tensors made of one MLX tensor."""
    if target.name.endswith(_QKVZ):
        yield from _split_qkvz(target, shape)
        return
    name = gguf_name(arch, target.name)
    change, heads = _change(arch, name, shape.heads, shape.kv_heads)
    made = replace(target, name=name, change=change if change != "none" else target.change, heads=heads)
    if name.endswith("ssm_conv1d.weight"):
        made = replace(made, shape=(shape.conv_channels, shape.conv_kernel))
    if arch.name == "gemma3" and name == "token_embd.weight" and tokens and tokens < made.shape[0]:
        made = replace(made, shape=(tokens, made.shape[1]), pieces=(replace(made.pieces[0], count=tokens),))
    yield made


def _change(arch: Arch, name: str, heads: int, kv_heads: int) -> tuple[Change, int]:
    """What llama.cpp's converter does to the numbers or the order of rows of a tensor, and in how many heads."""
    if arch.rotary and (part := re.search(r"\.attn_([qk])\.(?:weight|bias)$", name)):
        return "pairs", heads if part[1] == "q" else kv_heads
    if arch.shifted and name.endswith("norm.weight"):
        return "add_one", 0
    return ("neg_exp" if name.endswith(".ssm_a") else "none"), 0


def _split_qkvz(target: Target, shape: ModelShape) -> Iterator[Target]:
    """in_proj_qkvz has q, k, v and z of one key head after another; llama.cpp wants all q, all k, all v, and z as a
    tensor of its own (conversion/qwen.py, Qwen3NextModel)."""
    (piece,) = target.pieces
    block = re.match(r"model\.layers\.(\d+)\.", target.name)
    assert block is not None
    bands = _qkvz_bands(shape.state_key, shape.state_value, shape.state_heads, shape.conv_channels)
    groups = bands[0][1]
    stride = sum(rows for rows, _ in bands)
    starts = [sum(rows for rows, _ in bands[:i]) for i in range(4)]
    for name, parts in (("attn_qkv", (0, 1, 2)), ("attn_gate", (3,))):
        pieces = tuple(
            Piece(piece.source, group * stride + starts[i], bands[i][0]) for i in parts for group in range(groups)
        )
        rows = sum(p.count for p in pieces)
        yield replace(target, name=f"blk.{block[1]}.{name}.weight", shape=(rows, target.shape[1]), pieces=pieces)


def _qkvz_bands(key: int, value: int, heads: int, channels: int) -> list[tuple[int, int]]:
    """(rows for one key head, key heads) of q, k, v and z."""
    groups = max(1, (channels - value * heads) // (2 * key))
    if heads % groups:
        raise SourceError(f"{heads} value heads of a gated delta net are no multiple of its {groups} key heads")
    return [(key, groups), (key, groups), (heads // groups * value, groups), (heads // groups * value, groups)]


def hf_tensors(metadata: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Target]:
    """Name -> how it is put together from the file's tensors, in reading order. Shapes are outermost axis first on both
    sides; dtype is F32, the floats that blocks stand for. Names are Hugging Face's, or MLX's where that stacks or
    splits experts: mlx_layout.layout reads both.

    Every tensor of the file is accounted for: raises UnsupportedError for one that has no place, SourceError for one
    that is missing or whose shape is not what the key-value pairs say.
    """
    meta = Metadata(metadata)
    module = module_of_gguf(meta)
    arch = ARCHS[module]
    dims = _dimensions(meta, module, shapes)
    found: dict[str, Target] = {}
    for row, name in _expected(module, dims, shapes):
        found[name] = _inward(arch, dims, shapes, row, name)
    used = {piece.source for target in found.values() for piece in target.pieces}
    if unknown := sorted(n for n in shapes.keys() - used if not _is_extra(n, dims["layers"], dims["blocks"])):
        raise UnsupportedError(
            f"GGUF tensor {unknown[0]!r:.80} ({len(unknown)} in all) has no place in a {arch.name} model",
            hint="give the model's Hugging Face folder instead",
        )
    return found


def _is_extra(name: str, layers: int, blocks: int) -> bool:
    """Rope factors, which config.json stands for, and blocks that predict further tokens, which mlx-lm does not run."""
    return name in ROPE_TENSORS or layers <= order(name)[0] < blocks


def _expected(module: str, dims: Mapping[str, int], shapes: Mapping[str, Shape]) -> Iterator[tuple[Row, str]]:
    """(row, its MLX name) for every tensor this model must have."""
    family, flags = FAMILIES[module], {"yes"}
    flags |= {"head"} if "output.weight" in shapes else set()
    flags |= {"attention_bias"} if "blk.0.attn_q.bias" in shapes else set()
    flags |= {"mlp_bias"} if "blk.0.ffn_up.bias" in shapes else set()
    root = [row for row in family.root if set(row.when.split()) <= flags]
    yield root[0], root[0].name
    for i in range(min(dims["layers"], len(shapes))):
        full, moe = (f"blk.{i}.{name}.weight" in shapes for name in ("attn_q", "ffn_gate_inp"))
        linear = module == "qwen3_next" and not full
        here = flags | {"linear" if linear else "full", "moe" if moe else "dense"}
        for row in family.layer:
            if set(row.when.split()) <= here:
                yield row, f"{family.prefix}.{i}.{row.name}"
    for row in root[1:]:
        yield row, row.name


def _inward(arch: Arch, dims: Mapping[str, int], shapes: Mapping[str, Shape], row: Row, name: str) -> Target:
    shape = sizes(row.dims, dims)
    if name.endswith(_QKVZ):
        return _join_qkvz(dims, shapes, name, shape)
    source = gguf_name(arch, name)
    change, heads = _change(arch, source, dims["heads"], dims["kv_heads"])
    rows = _checked(shapes, source, shape[:2] if row.how == "conv" else shape)
    return Target(name, shape, "F32", (Piece(source, 0, rows),), _BACK.get(change, change), heads=heads)


def _join_qkvz(dims: Mapping[str, int], shapes: Mapping[str, Shape], name: str, shape: Shape) -> Target:
    block = f"blk.{name.split('.')[2]}."
    qkv, gate = f"{block}attn_qkv.weight", f"{block}attn_gate.weight"
    _checked(shapes, qkv, (dims["cc"], dims["h"]))
    _checked(shapes, gate, (dims["so"], dims["h"]))
    bands = _qkvz_bands(dims["sk"], dims["sv"], dims["sh"], dims["cc"])
    starts = [sum(rows * groups for rows, groups in bands[:i]) for i in range(3)] + [0]
    pieces = tuple(
        Piece(gate if i == 3 else qkv, starts[i] + group * rows, rows)
        for group in range(bands[0][1])
        for i, (rows, _) in enumerate(bands)
    )
    return Target(name, shape, "F32", pieces)


def _checked(shapes: Mapping[str, Shape], name: str, expected: Shape) -> int:
    """The tensor's rows. Raises SourceError when it is missing or of another shape, but for outermost axes of 1, which
    llama.cpp drops when it writes a file (ggml_n_dims)."""
    shape = _shape(shapes, name)
    if _without_ones(shape) != _without_ones(expected):
        raise SourceError(f"GGUF tensor {name}: shape {shape}, expected {expected} by the file's own keys")
    return TensorSpec(name, shape, "F32").rows


def _without_ones(shape: Shape) -> Shape:
    return _without_ones(shape[1:]) if shape[0] == 1 and len(shape) > 1 else shape


def _shape(shapes: Mapping[str, Shape], name: str) -> Shape:
    if name not in shapes or not shapes[name]:
        raise SourceError(f"GGUF tensor {name} is missing", hint="the file is incomplete, or one part of a split model")
    return tuple(shapes[name])


def _dimensions(meta: Metadata, module: str, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The words of mlx_modules' tables as the file's keys have them, and `layers` of `blocks`."""
    arch = ARCHS[module].name
    hidden = meta.integer(f"{arch}.embedding_length", least=1)
    heads = meta.each_layer(f"{arch}.attention.head_count")
    kv_heads = meta.each_layer(f"{arch}.attention.head_count_kv", heads)
    head_dim = meta.integer(f"{arch}.attention.key_length", hidden // heads, least=1)
    if head_dim % 2:
        raise SourceError(f"GGUF: attention heads are {head_dim} wide, expected an even number")
    blocks = meta.integer(f"{arch}.block_count", least=1)
    q, kv = heads * head_dim, kv_heads * head_dim
    return {
        "h": hidden, "v": _shape(shapes, "token_embd.weight")[0], "q": q, "kv": kv, "qkv": q + 2 * kv, "hd": head_dim,
        "heads": heads, "kv_heads": kv_heads, "blocks": blocks,
        "layers": max(1, blocks - meta.integer(f"{arch}.nextn_predict_layers", 0)),
        **_widths(meta, arch), **(_recurrent(meta, arch) if module == "qwen3_next" else {}),
    }  # fmt: skip


def _widths(meta: Metadata, arch: str) -> dict[str, int]:
    """Feed-forward widths; mixtral has one key for dense layers and experts."""
    experts, key = meta.integer(f"{arch}.expert_count", 0), f"{arch}.feed_forward_length"
    dense = meta.each_layer(key) if key in meta or not experts else 0
    return {
        "f": dense,
        "e": experts,
        "m": meta.integer(f"{arch}.expert_feed_forward_length", dense),
        "s": meta.integer(f"{arch}.expert_shared_feed_forward_length", 0),
    }


def _recurrent(meta: Metadata, arch: str) -> dict[str, int]:
    """Of gated delta nets: src/llama-model.cpp reads the same keys under Mamba's names."""
    key, groups = (meta.integer(f"{arch}.ssm.{name}", least=1) for name in ("state_size", "group_count"))
    heads, inner = (meta.integer(f"{arch}.ssm.{name}", least=1) for name in ("time_step_rank", "inner_size"))
    if inner % heads:
        raise SourceError(f"GGUF: {inner} inner channels are no multiple of {heads} heads")
    channels = 2 * key * groups + inner
    _qkvz_bands(key, inner // heads, heads, channels)  # refuses heads that do not divide
    return {
        "cc": channels, "k": meta.integer(f"{arch}.ssm.conv_kernel", least=1), "sh": heads, "sk": key,
        "sv": inner // heads, "so": inner, "qkvz": channels + inner,
    }  # fmt: skip
