"""What reads what in a layer: told from the names of its tensors, for every family of families/mlx_modules.py.

Norms that stand side by side in a layer say how its forward pass is built: a layer with input_layernorm alone gives the
same normed stream to attention and feed-forward, one with post_feedforward_layernorm norms what it writes. Sets of
norms that stand in no row below are not known, and nothing is claimed of such layers. Facts of mlx-lm 0.32,
mlx_lm/models/<module>.py; whoever relies on them checks them by running the layer (fold.py, rotate.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlxquant.families.shape import ModelShape

# The modules of a layer that read the stream and write to it.
_MIXER = ("self_attn", "linear_attn", "conv", "mixer")
_FEED_FORWARD = ("mlp", "block_sparse_moe", "feed_forward")

_SEQUENTIAL = {"input_layernorm": _MIXER, "post_attention_layernorm": _FEED_FORWARD}

# Which norms stand in front of what; then norms of what is written. A layer has exactly one of these sets.
_NORMS: tuple[tuple[dict[str, tuple[str, ...]], tuple[str, ...]], ...] = (
    (_SEQUENTIAL, ()),
    ({"input_layernorm": _MIXER + _FEED_FORWARD}, ()),
    ({"operator_norm": _MIXER, "ffn_norm": _FEED_FORWARD}, ()),
    ({"norm": _MIXER}, ()),
    (
        {"input_layernorm": _MIXER, "pre_feedforward_layernorm": _FEED_FORWARD},
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    (_SEQUENTIAL, ("post_self_attn_layernorm", "post_mlp_layernorm")),
    ({}, ("post_attention_layernorm", "post_feedforward_layernorm")),
)
_FEEDS = {frozenset((*feeds, *written)): feeds for feeds, written in _NORMS}

# The last word of a matrix's path, for those that read the stream and those that write to it.
_READS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa",
    "in_proj", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a",
    "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "c_fc", "gate", "router", "layer", "shared_expert_gate",
    "fc1_latent_proj",
)  # fmt: skip
_WRITES = ("o_proj", "dense", "out_proj", "down_proj", "w2", "fc2", "c_proj", "fc2_latent_proj")
_INNER = ("", "q_b_proj", "kv_b_proj", "embed_q", "unembed_out")

# Values pass a norm of their own on their way (gemma3n, gemma4), and some layers borrow those of others.
_NORMED_VALUES = ("gemma3n", "gemma4", "gemma4_text")
# mlx-lm's SwigluOAI clamps up and adds one to it.
_CLAMPED_UP = ("gpt_oss",)


@dataclass(frozen=True)
class Values:
    """Rows start..stop of `name` are the values: kv_heads heads of head_dim rows. `output` reads what attention mixes
    of them, `shares` query heads for each value head. gated: multiplied channel by channel before it is read.
    """

    name: str
    start: int
    stop: int
    output: str
    kv_heads: int
    head_dim: int
    shares: int
    gated: bool


@dataclass(frozen=True)
class Product:
    """activation(gate) * up, read by `down`: rows start..stop of `name` are up, of each expert where there are some."""

    name: str
    start: int
    stop: int
    down: str
    experts: int


@dataclass(frozen=True)
class Wiring:
    """Of one layer. reads: norm -> the matrices that read what leaves it. writes: matrices whose rows are channels of
    the stream. written_norms: norms of what is written. unknown: what touches the stream in a way not known here.
    """

    reads: Mapping[str, tuple[str, ...]]
    writes: tuple[str, ...]
    written_norms: tuple[str, ...]
    values: Values | None
    products: tuple[Product, ...]
    unknown: tuple[str, ...]


def wiring(shapes: Mapping[str, tuple[int, ...]], prefix: str, model: ModelShape) -> Wiring:
    """shapes: of the tensors of one layer, whose names begin with `prefix`. Claims nothing of what it does not know."""
    hidden = model.hidden_size
    direct = [n for n, shape in shapes.items() if _is_direct(n, prefix) and shape == (hidden,)]
    norms = {name.removeprefix(prefix).removesuffix(".weight") for name in direct}
    feeds = _FEEDS.get(frozenset(norms))
    readers = [n for n, shape in shapes.items() if _leaf(n) in _READS and len(shape) > 1 and shape[-1] == hidden]
    writers = [n for n, shape in shapes.items() if _leaf(n) in _WRITES and len(shape) > 1 and shape[-2] == hidden]
    reads = {
        f"{prefix}{norm}.weight": tuple(n for n in readers if _part(n, prefix) in parts)
        for norm, parts in (feeds or {}).items()
    }
    known = {*direct, *writers, *(name for names in reads.values() for name in names)} if feeds is not None else set()
    return Wiring(
        reads={norm: names for norm, names in reads.items() if names},
        writes=tuple(writers),
        written_norms=tuple(name for name in direct if name not in reads),
        values=_values(shapes, model),
        products=_products(shapes, model),
        unknown=tuple(n for n, shape in shapes.items() if n not in known and _may_touch(n, shape, prefix, hidden)),
    )


def _leaf(name: str) -> str:
    """The last word of a weight's path; '' for anything but a weight."""
    return name.removesuffix(".weight").rpartition(".")[2] if name.endswith(".weight") else ""


def _part(name: str, prefix: str) -> str:
    """The module of the layer that a tensor is in."""
    return name.removeprefix(prefix).partition(".")[0]


def _is_direct(name: str, prefix: str) -> bool:
    """A module of the layer itself."""
    return name.endswith(".weight") and name.removeprefix(prefix).count(".") == 1


def _may_touch(name: str, shape: tuple[int, ...], prefix: str, hidden: int) -> bool:
    """Whether a tensor that is no norm, reader or writer could have to do with the stream."""
    if _part(name, prefix) not in _MIXER + _FEED_FORWARD:
        return not (name.endswith(".bias") and name.removeprefix(prefix).count(".") == 1)  # a norm's bias goes with it
    return _leaf(name) not in _INNER and len(shape) > 1 and hidden in shape[-2:]


def _values(shapes: Mapping[str, tuple[int, ...]], model: ModelShape) -> Values | None:
    """None without values that a single linear layer reads as attention mixed them."""
    outputs = [
        n for n in shapes if n.endswith((".o_proj.weight", "self_attn.dense.weight", "self_attn.out_proj.weight"))
    ]
    if len(outputs) != 1 or model.module in _NORMED_VALUES or model.heads % model.kv_heads:
        return None
    module = outputs[0].removesuffix(".weight").rpartition(".")[0]
    width = shapes[outputs[0]][-1]
    head_dim, rows = width // model.heads, model.kv_heads * (width // model.heads)
    alone, fused = f"{module}.v_proj.weight", f"{module}.qkv_proj.weight"
    name, stop = (alone, rows) if alone in shapes else (fused, width + 2 * rows)
    if shapes.get(name, ())[:1] != (stop,):
        return None
    gated = shapes.get(f"{module}.q_proj.weight", (width,))[0] != width
    return Values(name, stop - rows, stop, outputs[0], model.kv_heads, head_dim, model.heads // model.kv_heads, gated)


_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def _products(shapes: Mapping[str, tuple[int, ...]], model: ModelShape) -> tuple[Product, ...]:
    if model.module in _CLAMPED_UP:
        return ()
    found = []
    for name, shape in shapes.items():
        module, leaf = name.removesuffix(".weight").rpartition(".")[0], _leaf(name)
        experts = shape[0] if len(shape) == 3 else 0
        width = shapes.get(f"{module}.down_proj.weight", (0,))[-1]
        if leaf == "gate_up_proj" and shape[-2] == 2 * width:
            found.append(Product(name, width, 2 * width, f"{module}.down_proj.weight", experts))
        for gate, up, down in _GATED:
            if leaf == up and {f"{module}.{gate}.weight", f"{module}.{down}.weight"} <= shapes.keys():
                found.append(Product(name, 0, shape[-2], f"{module}.{down}.weight", experts))
    return tuple(found)
