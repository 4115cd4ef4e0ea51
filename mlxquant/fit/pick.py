"""The level to take: which, why, and the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from mlxquant.errors import UsageError
from mlxquant.fit.decision import USES, Choice, Room, chain_of, decide, keeps_codes, room_of
from mlxquant.fit.divergence import Divergence
from mlxquant.fit.memory import limit_bytes
from mlxquant.fit.pick_words import costs, fits, neighbours, nothing
from mlxquant.fit.values import Level, Row
from mlxquant.machine import Machine

Form = Literal["mlx", "gguf", "either"]


@dataclass(frozen=True)
class Pick:
    """row: None where nothing fits that could be recommended. why: at most three sentences. runner_up: what to take if
    memory is shorter than reckoned, else the next larger. command: to be pasted into a shell, '' without a row.
    """

    use: str
    row: Row | None
    cost: Divergence | None
    room: Room
    why: tuple[str, ...]
    runner_up: Row | None
    command: str

    def lines(self) -> tuple[str, ...]:
        """For people: the level, why, and the command."""
        if self.row is None:
            return self.why
        return (f"For {self.use}: {self.row.level.key}", *self.why, f"Next: {self.command}")

    def to_json(self) -> dict[str, Any]:
        return {
            "use": self.use,
            "level": self.row.level.key if self.row else None,
            "room": self.room,
            "divergence": _cost_json(self.cost),
            "why": list(self.why),
            "runner_up": self.runner_up.level.key if self.runner_up else None,
            "command": self.command,
        }


def pick(
    rows: Sequence[Row],
    use: str,
    machine: Machine,
    context_tokens: int,
    *,
    name: str = "MODEL",
    form: Form = "mlx",
    kv_bits: int | None = None,
) -> Pick:
    """One of `rows`, which are of one model on `machine` at a prompt of `context_tokens`. `name`: what `mlxquant
    convert` is given for the model. `form` leaves levels out; a model as it is stored stays where `form` has nothing
    to offer.

    More memory never picks a level with more divergence, nor a longer context a larger one. Raises UsageError for an
    unknown use.
    """
    if use not in USES:
        raise UsageError(f"--for {use!r} is unknown", hint=f"one of {', '.join(USES)}")
    wanted = USES[use]
    of_form = [row for row in rows if form in ("either", row.level.format)]
    offered = of_form or [row for row in rows if keeps_codes(row.level)]
    chain, limit = chain_of(offered, wanted), limit_bytes(machine)
    at = decide(chain, wanted, context_tokens, limit)
    if at is None:
        others = chain_of([row for row in rows if row not in offered], wanted)
        other = decide(others, wanted, context_tokens, limit)
        instead = None if other is None else others[other].row.level
        why = tuple(nothing(offered, chain, instead, wanted, machine, context_tokens, kv_bits))
        return Pick(use, None, None, "none", why, None, "")
    chosen, room = chain[at], room_of(chain, at, wanted)
    why = (
        fits(chosen.row, room, machine, context_tokens),
        costs(chosen, context_tokens),
        neighbours(chain, at, wanted, context_tokens),
    )
    line = command(name, chosen.row.level, kv_bits)
    return Pick(use, chosen.row, chosen.cost, room, tuple(filter(None, why)), _runner_up(chain, at), line)


def command(name: str, level: Level, kv_bits: int | None = None) -> str:
    """What makes `level` of the model `name`, or runs it where there is nothing to be made."""
    if not level.options:
        return shlex.join(["mlxquant", "chat", name, *(["--kv-bits", str(kv_bits)] if kv_bits else [])])
    return shlex.join(["mlxquant", "convert", name, "-o", output_name(name, level), *level.options])


def output_name(name: str, level: Level) -> str:
    """In the folder one stands in: 'org/Qwen3-8B' at '4-bit' -> 'Qwen3-8B-4bit', at 'Q4_K_M' -> '...-Q4_K_M.gguf'."""
    stem = PurePath(name).name.removesuffix(".gguf") or "model"
    label = level.name.replace("-bit", "bit").replace(" ", "-")
    return f"{stem}-{label}" + (".gguf" if level.format == "gguf" else "")


def _runner_up(chain: Sequence[Choice], at: int) -> Row | None:
    if at:
        return chain[at - 1].row
    return next((choice.row for choice in chain[at + 1 :] if choice.row.verdict != "no"), None)


def _cost_json(cost: Divergence | None) -> dict[str, Any] | None:
    if cost is None:
        return None
    return {
        "kl_nats": cost.kl,
        "kl_error_nats": cost.error,
        "same_top_token": cost.top1,
        "ppl_ratio": cost.ppl_ratio,
        "how": cost.how,
        "measured_on": cost.model,
    }
