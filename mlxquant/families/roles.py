"""What each tensor does in the model, told from its shape and its neighbours; names only where these cannot
tell.

A list of names misses the next family's router, and a router at four bits ruins a model. So a router is the
matrix of (experts, hidden) beside a stack of experts, a shared expert's gate has one row, an MLA module is
one that holds a norm as wide as its latent, a recurrent module is one that holds a depthwise convolution or a
pair of per-head vectors. Names split what has one shape for several jobs: q from k, gate from up.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from mlxquant.families.layout import Target
from mlxquant.families.shape import ModelShape


class Role(StrEnum):
    EMBEDDING = "embedding"
    LAYER_EMBEDDING = "layer_embedding"  # a second table of rows by token, for all layers side by side
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    ATTN_Q = "attn_q"
    ATTN_K = "attn_k"
    ATTN_V = "attn_v"
    ATTN_O = "attn_o"
    ATTN_QKV = "attn_qkv"
    MLA_LATENT = "mla_latent"
    ROUTER = "router"
    SHARED_GATE = "shared_gate"
    FFN_GATE = "ffn_gate"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"
    FFN_GATE_UP = "ffn_gate_up"
    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    SSM = "ssm"
    CONV = "conv"
    OTHER = "other"


# At least 8 bits or float: they decide much and weigh little.
SENSITIVE = frozenset({Role.ROUTER, Role.SHARED_GATE, Role.MLA_LATENT, Role.SSM, Role.CONV})
# At least 6 bits, also where one matrix is both.
VOCABULARY = frozenset({Role.EMBEDDING, Role.HEAD})

_LONGEST_KERNEL = 16  # of the short convolutions in front of a recurrence; they have 3 or 4 taps

# The last word of a linear layer's path. Looked at only after the rules on shape and neighbours.
_BY_NAME = {
    Role.ATTN_Q: ("q_proj", "wq", "query"),
    Role.ATTN_K: ("k_proj", "wk", "key"),
    Role.ATTN_V: ("v_proj", "wv", "value"),
    Role.ATTN_O: ("o_proj", "wo", "dense", "out_proj"),
    Role.ATTN_QKV: ("qkv_proj", "wqkv", "query_key_value", "c_attn"),
    Role.FFN_GATE: ("gate_proj", "w1"),
    Role.FFN_UP: ("up_proj", "w3", "fc1", "c_fc"),
    Role.FFN_DOWN: ("down_proj", "w2", "fc2", "c_proj"),
    Role.FFN_GATE_UP: ("gate_up_proj",),
}
_NAMED = {word: role for role, words in _BY_NAME.items() for word in words}


def assign_roles(targets: Iterable[Target], shape: ModelShape) -> dict[str, Role]:
    """The role of every target, by name. Never fails: what no rule knows is Role.OTHER."""
    targets = tuple(targets)
    around = _Neighbours.of(targets, shape)
    roles: dict[str, Role] = {}
    for target in targets:
        if _in_layer(target.name):
            roles[target.name] = _layer_role(target, shape, around)
        else:
            roles[target.name] = _root_role(target, shape, taken=Role.EMBEDDING in roles.values())
    return roles


def _parts(name: str) -> tuple[tuple[str, ...], str]:
    """'a.b.c.weight' -> (('a', 'b'), 'c'), the module and the layer in it; 'a.b.A_log' -> (('a', 'b'),
    'A_log')."""
    words = name.split(".")
    if words[-1] in ("weight", "bias") and len(words) > 1:
        words = words[:-1]
    return tuple(words[:-1]), words[-1]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _in_layer(name: str) -> bool:
    return any(word.isdigit() for word in name.split("."))


def _below(module: tuple[str, ...], roots: frozenset[tuple[str, ...]]) -> bool:
    return any(module[:length] in roots for length in range(1, len(module) + 1))


@dataclass(frozen=True)
class _Neighbours:
    """Paths of the modules that something in them gives away."""

    recurrent: frozenset[tuple[str, ...]]
    latent: frozenset[tuple[str, ...]]
    moe: frozenset[tuple[str, ...]]
    routers: frozenset[tuple[str, ...]]
    altup: frozenset[tuple[str, ...]]

    @classmethod
    def of(cls, targets: tuple[Target, ...], shape: ModelShape) -> _Neighbours:
        recurrent, latent, moe, altup = set(), set(), set(), set()
        vectors: defaultdict[tuple[str, ...], Counter[int]] = defaultdict(Counter)
        for target in targets:
            module, _ = _parts(target.name)
            if _is_conv(target):
                recurrent.add(module)
            elif len(target.shape) == 1 and _leaf(target.name) == "weight":
                if shape.kv_lora_rank and target.shape[0] == shape.kv_lora_rank:
                    latent.add(module)
            elif len(target.shape) == 1 and _leaf(target.name) != "bias":
                vectors[module][target.shape[0]] += 1  # A_log, D, dt_bias: one number per head
        # gemma4 keeps its router beside the experts' module, with one number per expert.
        routers = {module for module, lengths in vectors.items() if shape.experts in lengths}
        recurrent |= {module for module, lengths in vectors.items() if max(lengths.values()) > 1}
        for target in targets:
            module, _ = _parts(target.name)
            if shape.altup_inputs and target.shape == (shape.altup_inputs, shape.hidden_size):
                altup.add(module)  # gemma3n mixes its hidden states by what this matrix says
            if _is_stack(target, shape) and module not in latent:
                moe.add(module[:-1])
        inside = frozenset(m for m in recurrent if m and not m[-1].isdigit())
        return cls(inside, frozenset(latent), frozenset(moe), frozenset(routers), frozenset(altup))


def _is_conv(target: Target) -> bool:
    """MLX's depthwise convolution, (channels, taps, 1)."""
    return len(target.shape) == 3 and target.shape[2] == 1 and target.shape[1] <= _LONGEST_KERNEL


def _is_stack(target: Target, shape: ModelShape) -> bool:
    return bool(shape.experts) and len(target.shape) == 3 and target.shape[0] == shape.experts and not _is_conv(target)


def _root_role(target: Target, shape: ModelShape, taken: bool) -> Role:
    """Outside the layers: the vocabulary's matrices, norms, biases."""
    name = target.name.lower()
    table = (shape.per_layer_vocab_size, shape.layers * shape.per_layer_size)
    if target.shape == table and "layer" in name:
        return Role.LAYER_EMBEDDING
    if target.shape == (shape.vocab_size, shape.hidden_size):
        if "embed" in name or "wte" in name:
            return Role.EMBEDDING
        return Role.HEAD if "head" in name or taken else Role.EMBEDDING
    return _vector_role(target)


def _vector_role(target: Target) -> Role:
    if _leaf(target.name).endswith("bias"):
        return Role.BIAS
    return Role.NORM if len(target.shape) == 1 and _leaf(target.name) == "weight" else Role.OTHER


def _layer_role(target: Target, shape: ModelShape, around: _Neighbours) -> Role:
    module, _ = _parts(target.name)
    if _is_conv(target):
        return Role.CONV
    if _below(module, around.recurrent):
        ordinary = len(target.shape) < 2 and _leaf(target.name) in ("weight", "bias")
        return _vector_role(target) if ordinary else Role.SSM
    if len(target.shape) < 2 or _leaf(target.name).endswith("bias"):
        return _vector_role(target)
    if module in around.latent and _is_latent(target, shape):
        return Role.MLA_LATENT
    router = module in around.routers and target.shape == (shape.experts, shape.hidden_size)
    if router or module in around.altup:
        return Role.ROUTER
    if _below(module, around.moe):
        return _moe_role(target, shape)
    return _dense_role(target, shape)


def _is_latent(target: Target, shape: ModelShape) -> bool:
    """Projections into and out of the compressed keys, values and queries, whatever they are called."""
    heads, hidden, ranks = shape.heads, shape.hidden_size, (shape.kv_lora_rank, shape.q_lora_rank or -1)
    nope, rope, value = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim
    if len(target.shape) == 3:
        return target.shape[0] == heads and ranks[0] in target.shape[1:]
    rows, width = target.shape
    into = width == hidden and (rows in ranks or rows == ranks[0] + rope)
    out_of = (rows, width) in ((heads * (nope + value), ranks[0]), (heads * (nope + rope), ranks[1]))
    return into or out_of


def _moe_role(target: Target, shape: ModelShape) -> Role:
    if len(target.shape) == 3:
        return _expert_role(target, shape)
    if target.shape == (shape.experts, shape.hidden_size):
        return Role.ROUTER
    if target.shape == (1, shape.hidden_size):
        return Role.SHARED_GATE
    return _dense_role(target, shape)


def _expert_role(target: Target, shape: ModelShape) -> Role:
    by_name = {Role.FFN_GATE: Role.EXPERT_GATE, Role.FFN_UP: Role.EXPERT_UP, Role.FFN_DOWN: Role.EXPERT_DOWN}
    named = by_name.get(_NAMED.get(_parts(target.name)[1], Role.OTHER))
    if named is not None:
        return named
    return Role.EXPERT_DOWN if target.shape[1] == shape.hidden_size != target.shape[2] else Role.EXPERT_UP


def _dense_role(target: Target, shape: ModelShape) -> Role:
    """Attention and feed-forward: by name, and by shape where the name says nothing."""
    hidden, width = shape.hidden_size, shape.intermediate_size
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if target.shape[1] == shape.head_dim != hidden and target.shape[0] in (shape.heads, shape.kv_heads):
        return Role.NORM  # one norm per head, kept as a matrix
    if (role := _NAMED.get(_parts(target.name)[1].lower())) is not None:
        return role
    by_shape = {
        (hidden, width): Role.FFN_DOWN,
        (width, hidden): Role.FFN_UP,
        (2 * width, hidden): Role.FFN_GATE_UP,
        (q + 2 * kv, hidden): Role.ATTN_QKV,
    }
    return by_shape.get((target.shape[0], target.shape[-1]), Role.OTHER)
