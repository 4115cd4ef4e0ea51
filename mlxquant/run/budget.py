"""Will it fit? Weights, cache and scratch against this machine's working set, before the weights are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mlxquant.errors import MemoryBudgetError
from mlxquant.fit.activations import Activations
from mlxquant.fit.memory import limit_bytes, longest, mlx_need
from mlxquant.machine import Machine
from mlxquant.run.cache import CachePlan
from mlxquant.units import format_bytes


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


def reckon(
    weight_bytes: int,
    plan: CachePlan,
    made: Activations,
    machine: Machine,
    device: str,
    context_tokens: int,
    prefill_step: int,
) -> Budget:
    """What a run on `device` takes whose prompt fills the whole context, as the planner reckons it (fit/memory.py)."""
    there = replace(machine, device=device)
    need = mlx_need(weight_bytes, plan.cost, made, there, context_tokens, prefill_step)
    return Budget(context_tokens, weight_bytes, need.cache_bytes, need.scratch_bytes, limit_bytes(there))


def longest_context(reckoned: Reckoned, asked_tokens: int) -> int:
    """The most tokens, at most `asked_tokens`, whose budget fits; 0 when not even one does."""
    return longest(lambda tokens: reckoned(tokens).fits, asked_tokens)


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
