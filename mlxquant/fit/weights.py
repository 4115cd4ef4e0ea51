"""How many bytes of weights a machine has room for beside the cache and scratch of a run: what a bit budget is solved
for by `convert --fit`.
"""

from __future__ import annotations

from mlxquant.errors import MemoryBudgetError
from mlxquant.families.shape import ModelShape
from mlxquant.fit.activations import activations
from mlxquant.fit.memory import EASE, FILL, cache_on, limit_bytes, longest, mlx_need
from mlxquant.fit.values import Asked, Need
from mlxquant.machine import Machine
from mlxquant.units import format_bytes


def budget_bytes(shape: ModelShape, machine: Machine, asked: Asked) -> int:
    """The most bytes of MLX weights with which the run that is asked for fits at ease there, as `fit` says it.

    Raises MemoryBudgetError where cache and scratch alone are too much.
    """
    cache, made = cache_on(machine, shape, asked.kv_bits), activations(shape)
    limit = int(limit_bytes(machine) * EASE / FILL)

    def needed(weight_bytes: int) -> Need:
        return mlx_need(weight_bytes, cache, made, machine, asked.context_tokens, asked.chunk_tokens)

    bare = needed(0)
    found = longest(lambda weight_bytes: needed(weight_bytes).total_bytes <= limit, limit)
    if bare.largest_buffer_bytes > machine.max_buffer_bytes:
        most = format_bytes(machine.max_buffer_bytes)
        raise _no_room(asked, f"one buffer of {format_bytes(bare.largest_buffer_bytes)}, and none may be above {most}")
    if not found:
        raise _no_room(asked, f"{format_bytes(bare.total_bytes)} without any weights, of {format_bytes(limit)}")
    return found


def _no_room(asked: Asked, why: str) -> MemoryBudgetError:
    return MemoryBudgetError(
        f"a context of {asked.context_tokens} tokens takes {why}",
        hint="ask for a shorter --context, or for --kv-bits 8",
    )
