"""A model of so many parameters, where nothing else is known: the widths that models of that size have.

Proportions of published config.json files: Llama 3 (a feed-forward layer 3.5 times as wide as the hidden state, 8 heads
of keys and values), Qwen3, SmolLM2, Mixtral, gpt-oss. What is given is kept; the rest is made to fit the parameters.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import UsageError
from mlxquant.families.checkpoint import parameters
from mlxquant.units import format_count

TOLERANCE = 0.02
_FFN_TO_HIDDEN = 3.5
# (parameters up to, layers): SmolLM2 135M, Qwen3 0.6B, Qwen2.5 1.5B, Llama 3 and Qwen3 above.
_LAYERS = (
    (0.8e9, 28), (2.5e9, 28), (6e9, 36), (11e9, 32), (20e9, 40), (45e9, 64), (90e9, 80), (250e9, 88), (1e15, 126),
)  # fmt: skip
_TIED_BELOW = 2e9  # parameters below which the embedding is the output head
_SMALL = 0.5e9  # parameters below which vocabularies, heads and their number are small
_MAX_WIDTH = 2**17
_MOST_PARAMS = 10**15
_MOST_HEADS = 1024  # whose divisors are worth a hint


def config_of(
    params: int,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    ffn: int | None = None,
    vocab: int | None = None,
    experts: int | None = None,
    active: int | None = None,
    tied: bool | None = None,
) -> dict[str, Any]:
    """config.json of a llama of `params` parameters, or of a qwen3_moe where `experts` are given.

    `ffn`: the feed-forward layer's width, or one expert's. `active`: experts that a token asks. `tied`: the embedding
    is the output head, as in models below 2B. The parameters come out within 2 %; UsageError where what is given
    cannot, or contradicts itself.
    """
    if params > _MOST_PARAMS:
        raise UsageError(f"{format_count(params)} parameters are more than any model has", hint="write it like 7B")
    _refuse_contradictions(heads, kv_heads, experts, active)
    asked = _Asked(
        layers=layers or _usual_layers(params, experts, active),
        head_dim=head_dim or (hidden // heads if hidden and heads else 128 if params >= _SMALL else 64),
        vocab=vocab or (128_256 if params >= _SMALL else 49_152),
        tied=params < _TIED_BELOW if tied is None else tied,
        heads=heads,
        kv_heads=kv_heads or (None if heads or params < _SMALL else 8),
        least_heads=kv_heads or (1 if params < _SMALL else 16),
        experts=experts or 0,
        active=active or _usual_active(experts or 0),
    )
    ratio, step = _FFN_TO_HIDDEN / (asked.active or 1), 64 if params < _SMALL else 256 if params < 6e9 else 512
    width = hidden or _hidden(
        params, lambda h: parameters(asked.config(h, ffn or round(ratio * h))), 32 if ffn else step
    )
    inner = ffn or _ffn(params, lambda f: parameters(asked.config(width, f)))
    if hidden is None and ffn is None and not _near(params, parameters(asked.config(width, inner))):
        # Many experts grow by too much with each step of their width.
        width = _hidden(params, lambda h: parameters(asked.config(h, inner)), 32)
    return _checked(params, asked.config(width, inner))


def _refuse_contradictions(heads: int | None, kv_heads: int | None, experts: int | None, active: int | None) -> None:
    if active is not None and experts is None:
        raise UsageError(f"--active {active} without --experts", hint="say how many experts a layer has")
    if experts is not None and active is not None and active > experts:
        raise UsageError(f"--active {active} of --experts {experts}", hint="a token asks some of a layer's experts")
    if heads and kv_heads and heads % kv_heads:
        fitting = ", ".join(str(count) for count in range(1, min(heads, _MOST_HEADS) + 1) if heads % count == 0)
        raise UsageError(f"--heads {heads} is no multiple of --kv-heads {kv_heads}", hint=f"one of {fitting}")


@dataclass(frozen=True)
class _Asked:
    """All but the two widths."""

    layers: int
    head_dim: int
    vocab: int
    tied: bool
    heads: int | None
    kv_heads: int | None
    least_heads: int
    experts: int
    active: int

    def config(self, hidden: int, ffn: int) -> dict[str, Any]:
        heads = self.heads or self._usual_heads(hidden)
        made = {
            "model_type": "qwen3_moe" if self.experts else "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_key_value_heads": self.kv_heads or _usual_kv_heads(heads),
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "torch_dtype": "bfloat16",
        }
        return made | (self._moe(ffn) if self.experts else {})

    def _usual_heads(self, hidden: int) -> int:
        """As many as make up the hidden state, in multiples of the heads of keys and values."""
        group = self.kv_heads or 1
        return max(self.least_heads, round(hidden / self.head_dim / group) * group)

    def _moe(self, ffn: int) -> dict[str, Any]:
        return {
            "moe_intermediate_size": ffn,
            "num_experts": self.experts,
            "num_experts_per_tok": self.active,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }


def _usual_layers(params: int, experts: int | None, active: int | None) -> int:
    """A mixture is as deep as a dense model between its active and all of its parameters."""
    share = (active or _usual_active(experts)) / experts if experts else 1.0
    size = params * share**0.5
    return next(layers for limit, layers in _LAYERS if size <= limit or limit == _LAYERS[-1][0])


def _usual_active(experts: int) -> int:
    """Mixtral 2 of 8, gpt-oss 4 of 32, Qwen3 8 of 128."""
    return 0 if not experts else min(experts, 2 if experts <= 8 else 4 if experts <= 32 else 8)


def _usual_kv_heads(heads: int) -> int:
    """8, or what divides the heads next below: 3 of SmolLM2's 9, 8 of Llama 3's 32 and 64."""
    most = min(8, max(1, heads // 3))
    return next(count for count in range(most, 0, -1) if heads % count == 0)


def _hidden(params: int, count: Callable[[int], int], step: int) -> int:
    """The multiple of `step` whose count, which grows with it, comes nearest to `params`."""
    widths = range(step, _MAX_WIDTH, step)
    above = min(bisect_left(widths, params, key=count), len(widths) - 1)
    return min((widths[above], widths[max(0, above - 1)]), key=lambda width: abs(count(width) - params))


def _ffn(params: int, count: Callable[[int], int]) -> int:
    """The width that comes nearest to `params`, in the largest step that comes within half the tolerance. The count is
    linear in it."""
    least = count(32)
    width = 32 + 32 * (params - least) / (count(64) - least)
    multiples = [max(step, round(width / step) * step) for step in (256, 128, 64, 32)]
    return next((found for found in multiples if _near(params, count(found))), multiples[-1])


def _near(params: int, found: int) -> bool:
    return abs(found - params) <= TOLERANCE / 2 * params


def _checked(params: int, config: dict[str, Any]) -> dict[str, Any]:
    found = parameters(config)
    if abs(found - params) > TOLERANCE * params:
        layers, hidden, ffn = (config[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
        raise UsageError(
            f"{layers} layers, hidden {hidden}, ffn {ffn} and a vocabulary of {config['vocab_size']} make "
            f"{format_count(found)} parameters, not {format_count(params)}",
            hint=f"leave out one of them, or say --params {format_count(found)}",
        )
    return config
