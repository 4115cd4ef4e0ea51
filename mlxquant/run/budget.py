"""Will it fit? Weights, cache and scratch against this machine's working set, before the weights are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlxquant.errors import MemoryBudgetError
from mlxquant.machine import Machine
from mlxquant.run.cache import CachePlan
from mlxquant.units import format_bytes

# MLX itself begins to collect garbage at 95 % of the working set.
FILL = 0.95
# Head widths with a fused attention kernel for prompts (mlx 0.32, Metal); others make the score matrix.
FUSED_HEAD_WIDTHS = (64, 72, 80, 96, 128)
GPU_SCRATCH_BYTES = 700_000_000
CPU_SCRATCH_BYTES = 50_000_000
SHORT_PROMPT_TOKENS = 256
SHORT_SCRATCH_BYTES = 50_000_000


@dataclass(frozen=True)
class Shape:
    """What scratch depends on. Zeros where the config does not say: then only the flat part is reckoned."""

    heads: int
    head_width: int
    hidden: int
    ffn: int

    @classmethod
    def of(cls, config: dict[str, object]) -> Shape:
        """From config.json, or its text_config."""
        nested = config.get("text_config")
        own = {**config, **nested} if isinstance(nested, dict) else config

        def number(name: str) -> int:
            value = own.get(name)
            return value if isinstance(value, int) and not isinstance(value, bool) else 0

        heads, hidden = number("num_attention_heads"), number("hidden_size")
        return cls(
            heads,
            number("head_dim") or (hidden // heads if heads else 0),
            hidden,
            number("intermediate_size"),
        )


@dataclass(frozen=True)
class Budget:
    """Bytes of a run over `context_tokens`, and what the machine has for it."""

    context_tokens: int
    weight_bytes: int
    cache_bytes: int
    scratch_bytes: int
    limit_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.scratch_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.limit_bytes

    def describe(self) -> str:
        parts = f"weights {format_bytes(self.weight_bytes)} + cache {format_bytes(self.cache_bytes)}"
        return (
            f"{parts} + scratch {format_bytes(self.scratch_bytes)} = {format_bytes(self.total_bytes)}"
            f" of {format_bytes(self.limit_bytes)} for {self.context_tokens} tokens"
        )


Reckoned = Callable[[int], Budget]  # tokens of context -> what they take


def scratch_bytes(shape: Shape, context_tokens: int, prefill_step: int, device: str) -> int:
    """Memory of activations at the peak of prefill, beside weights and cache.

    GPU: a flat 0.6-0.8 GB was measured for prompts of 1k tokens and more on eight models of 4B-30B, whatever
    the bits, and 0.03 GB for a prompt of 34 tokens; 40 bytes per ffn column and chunk token is the larger of
    the two on wide models; where attention is not fused there is one (heads, chunk, context) score matrix of
    2 bytes.

    CPU: attention is never fused and computes in float32, so there is one such matrix of 4 bytes. SmolLM2-135M
    at 2048 tokens: 50 MB in chunks of 512, 230 MB in one; reckoned here 104 and 267.
    """
    chunk = min(prefill_step, context_tokens)
    if device == "gpu":
        flat = SHORT_SCRATCH_BYTES if context_tokens <= SHORT_PROMPT_TOKENS else GPU_SCRATCH_BYTES
        fused = shape.head_width in FUSED_HEAD_WIDTHS
        return max(flat, 40 * shape.ffn * chunk) + (0 if fused else 2 * shape.heads * chunk * context_tokens)
    columns = 4 * (3 * shape.ffn + 6 * shape.hidden)
    return CPU_SCRATCH_BYTES + columns * chunk + 4 * shape.heads * chunk * context_tokens


def reckon(
    weight_bytes: int,
    plan: CachePlan,
    shape: Shape,
    machine: Machine,
    device: str,
    context_tokens: int,
    prefill_step: int,
) -> Budget:
    """What a run takes whose prompt fills the whole context: the largest chunks and the longest cache."""
    return Budget(
        context_tokens,
        weight_bytes,
        plan.peak_bytes(context_tokens, 1, prefill_step),
        scratch_bytes(shape, context_tokens, prefill_step, device),
        int(FILL * machine.working_set_bytes),
    )


def longest_context(reckoned: Reckoned, asked_tokens: int) -> int:
    """The most tokens, at most `asked_tokens`, whose budget fits; 0 when not even one does."""
    low, high = 0, asked_tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if reckoned(middle).fits else (low, middle - 1)
    return low


def check(
    reckoned: Reckoned,
    asked_tokens: int,
    *,
    force: bool = False,
    alternatives: dict[str, Reckoned] | None = None,
) -> Budget:
    """The budget for `asked_tokens`. Raises MemoryBudgetError with the numbers and what would fit, unless
    `force`.

    alternatives: option -> what the budget would be with it (`--kv-bits 8`), tried in order for the hint.
    """
    budget = reckoned(asked_tokens)
    if budget.fits or force:
        return budget
    longest = longest_context(reckoned, asked_tokens)
    offers = [f"--context {longest}"] if longest else []
    for option, other in (alternatives or {}).items():
        if other(asked_tokens).fits:
            offers.append(option)
            break
    if not offers:
        hint = "close other programs, use a smaller model or fewer bits, or add --force to try all the same"
    else:
        hint = f"what fits: {' or '.join(offers)}; --force tries all the same"
    raise MemoryBudgetError(f"this run does not fit the memory: {budget.describe()}", hint=hint)
