"""From a path to a model that is ready to run: open, plan the cache, check the budget, and only then read the
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxquant.errors import UsageError
from mlxquant.fit.activations import Activations
from mlxquant.fit.cache import default_prefill_step
from mlxquant.fit.values import CONTEXT_TOKENS
from mlxquant.run import budget as budgets
from mlxquant.run.budget import Budget, Reckoned
from mlxquant.run.cache import CachePlan, plan_cache
from mlxquant.run.device import Device
from mlxquant.run.model import LoadedModel, load_model
from mlxquant.run.text import Text

MAX_CONTEXT_TOKENS = 2**24  # nothing is made for more, and the budget replays a run chunk by chunk


@dataclass(frozen=True)
class CacheOptions:
    """--max-kv-size, --kv-bits, --kv-group-size."""

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64


@dataclass(frozen=True)
class Ready:
    """notes: everything the user should be told, in order."""

    loaded: LoadedModel
    text: Text
    plan: CachePlan
    budget: Budget
    context_tokens: int
    prefill_step: int
    notes: tuple[str, ...]


def make_ready(path: Path, device: Device, text: Text, **options: Any) -> Ready:
    """`open_unread`, and the weights read."""
    ready = open_unread(path, device, text, **options)
    ready.loaded.materialize()
    return ready


def open_unread(
    path: Path,
    device: Device,
    text: Text,
    *,
    expand: str = "auto",
    context_tokens: int | None = None,
    options: CacheOptions | None = None,
    prefill_step: int | None = None,
    force: bool = False,
) -> Ready:
    """Opens `path`, whose tokenizer `text` is, for a context of so many tokens; no weight is read. Raises
    MemoryBudgetError.

    prefill_step None: 512 on a CPU, 2048 on a GPU.
    context_tokens None: 8192, or what the model was made for if that is less.
    """
    options = options or CacheOptions()
    step = prefill_step or default_prefill_step(device.kind)
    loaded = load_model(path, expand=expand, lazy=True, memory_bytes=device.machine.working_set_bytes)
    plan = _plan(loaded, options)
    asked = context_tokens or min(loaded.context_tokens or CONTEXT_TOKENS, CONTEXT_TOKENS)
    if asked > MAX_CONTEXT_TOKENS:
        raise UsageError(f"a context of {asked} tokens is beyond {MAX_CONTEXT_TOKENS}", hint="use a shorter one")
    made = Activations.of_config(loaded.config)

    def reckoned(tokens: int, chosen: CachePlan = plan) -> Budget:
        return budgets.reckon(loaded.weight_bytes, chosen, made, device.machine, device.kind, tokens, min(step, asked))

    budget = reckoned(asked)
    if not budget.fits:
        others: dict[str, Reckoned] = {}
        for bits in (8, 4) if not options.kv_bits and not options.max_kv_size else ():
            smaller = _plan(loaded, CacheOptions(kv_bits=bits))
            others[f"--kv-bits {bits}"] = partial(reckoned, chosen=smaller)
        budget = budgets.check(reckoned, asked, force=force, alternatives=others)
    notes = (*loaded.notes, *plan.notes, *_context_notes(loaded, asked))
    return Ready(loaded, text, plan, budget, asked, step, notes)


def _plan(loaded: LoadedModel, options: CacheOptions) -> CachePlan:
    return plan_cache(
        loaded.model,
        max_kv_size=options.max_kv_size,
        kv_bits=options.kv_bits,
        kv_group_size=options.kv_group_size,
    )


def _context_notes(loaded: LoadedModel, asked: int) -> list[str]:
    made_for = loaded.context_tokens
    if made_for and asked > made_for:
        return [f"the model was made for {made_for} tokens; beyond that its answers get worse"]
    return []
