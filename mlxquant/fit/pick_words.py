"""What is said of a pick: what fits, what it costs, what its neighbours would change; or why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import floor, log10

from mlxquant.fit.decision import Choice, Room, Use, fast_enough, keeps_codes, rate_at, tok_s
from mlxquant.fit.divergence import Divergence, divergence
from mlxquant.fit.memory import limit_bytes
from mlxquant.fit.values import Level, Row
from mlxquant.machine import Machine
from mlxquant.macs import chips
from mlxquant.units import format_bytes, format_count, format_number

USEFUL_TOKENS = 1024  # less is no conversation, and not worth naming
WOULD_FIT = "What would fit: "
_MILLI = 1000
_ROOM = {
    "plenty": "what this use wants fits",
    "comfortable": "it fits at ease",
    "tight": "memory is tight",
}


def fits(row: Row, room: Room, machine: Machine, context_tokens: int) -> str:
    need = row.need
    return (
        f"{row.level.key} takes {format_bytes(need.total_bytes)} of the {format_bytes(limit_bytes(machine))} that "
        f"{machine.title} has for it (weights {format_bytes(need.weight_bytes)}, cache "
        f"{format_bytes(need.cache_bytes)} at {context_tokens:,} tokens, scratch {format_bytes(need.scratch_bytes)}): "
        f"{_ROOM[room]}."
    )


def costs(choice: Choice, context_tokens: int) -> str:
    rate = _rate(choice.row, context_tokens)
    if choice.cost is None:
        return f"It is taken as it is stored{f'; it writes {rate}' if rate else ''}."
    if choice.cost.how == "exact":
        return f"Nothing is rounded{f'; it writes {rate}' if rate else ''}."
    cost = choice.cost
    return (
        f"Its divergence from the full-precision model is {milli_nats(cost)}, with the same best token at "
        f"{100 * cost.top1:.0f} % of positions, on {cost.model}: larger models lose less, smaller ones more"
        f"{f'; it writes {rate}' if rate else ''}."
    )


def _rate(row: Row, context_tokens: int) -> str:
    found = rate_at(row, context_tokens)
    if found is None:
        return ""
    low, likely, high = (format_number(v) for v in (found.low, found.likely, found.high))
    return f"about {likely} tok/s ({low} to {high}) at the context's end"


def neighbours(chain: Sequence[Choice], at: int, use: Use, context_tokens: int) -> str:
    """What the next larger and the next smaller level would change."""
    parts = []
    chosen = chain[at].row
    if at + 1 < len(chain):
        parts.append(f"the next larger, {chain[at + 1].row.level.key}, {_larger(chain, at + 1, use, context_tokens)}")
    if at:
        smaller = chain[at - 1]
        saved = format_bytes(chosen.need.total_bytes - smaller.row.need.total_bytes)
        parts.append(
            f"the next smaller, {smaller.row.level.key}, saves {saved} and diverges by {milli_nats(smaller.cost)}"
        )
    elif not keeps_codes(chosen.level):
        parts.append(
            f"what is smaller diverges by more than {use.worst * _MILLI:.0f} milli-nats, too much for {use.name}"
        )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _larger(chain: Sequence[Choice], at: int, use: Use, context_tokens: int) -> str:
    row, rate = chain[at].row, tok_s(chain[at].row, context_tokens)
    if row.verdict == "no":
        return f"takes {format_bytes(row.need.total_bytes)} and does not fit"
    if row.verdict == "tight":
        return f"takes {format_bytes(row.need.total_bytes)}, with next to nothing left"
    if rate is not None and not fast_enough(row, use.tok_s, context_tokens):
        slow = not fast_enough(chain[at - 1].row, use.tok_s, context_tokens)
        short = "even further from the" if slow else "less than the"
        return f"writes {format_number(rate)} tok/s, {short} {format_number(use.tok_s)} that {use.name} wants"
    more = format_bytes(row.need.total_bytes - chain[at - 1].row.need.total_bytes)
    return f"takes {more} more for {milli_nats(chain[at].cost)}, closer than {use.name} needs"


def nothing(
    offered: Sequence[Row],
    chain: Sequence[Choice],
    instead: Level | None,
    use: Use,
    machine: Machine,
    context_tokens: int,
    kv_bits: int | None,
) -> Iterator[str]:
    """Why no level is named, and what would fit. `instead`: a level of the other format."""
    worse = [row for row in offered if row.verdict != "no" and divergence(row.level) and row not in _rows(chain)]
    if not chain:
        yield f"No level of this model is known to be good enough for {use.name}."
    else:
        row = chain[0].row
        total, limit = row.need.total_bytes, limit_bytes(machine)
        yield (
            f"Nothing good enough for {use.name} fits: {row.level.key}, the smallest, takes {format_bytes(total)} at "
            f"{context_tokens:,} tokens, and {machine.title} has {format_bytes(limit)} for it."
        )
        found = [f"{instead.key}, with --format {instead.format}"] if instead else []
        yield f"{WOULD_FIT}{'; '.join([*found, *offers(row, limit, context_tokens, kv_bits)])}."
    if worse:
        best = min(worse, key=lambda found: _known(found).kl)
        yield (
            f"{best.level.key} fits, but diverges by {milli_nats(_known(best))} (on {_known(best).model}): a smaller "
            "model at 4 bits is the better use of this memory."
        )


def offers(row: Row, limit: int, context_tokens: int, kv_bits: int | None) -> Iterator[str]:
    """What would make `row` fit into `limit` bytes: context, cache, memory, another model."""
    need, small = row.need, row.longest_8bit or 0
    if kv_bits is None and small >= context_tokens:
        yield "this context with --kv-bits 8"
    elif (longest := max(row.longest_float, small)) >= USEFUL_TOKENS:
        yield f"--context {longest}" + (" --kv-bits 8" if small > row.longest_float else "")
    if ram := _ram_for(need.total_bytes):
        yield f"a Mac with {ram} GB of memory"
    left = limit - need.cache_bytes - need.scratch_bytes
    if left > 0 and not keeps_codes(row.level):
        yield f"a model of at most {format_count(8 * left / row.level.bpw)} weights at {row.level.name}"


def _ram_for(total_bytes: int) -> int | None:
    """GB, as Apple prints it, of the smallest Mac that has room for so much."""
    from mlxquant.machine import described

    sold = sorted({gib for chip in chips() for gib in chip.ram_gib})
    return next((gib for gib in sold if limit_bytes(described(ram=f"{gib}GB")) >= total_bytes), None)


def milli_nats(cost: Divergence | None) -> str:
    """'95 ± 11 milli-nats', 'at most 6.5 ± 1.1', 'some 18': the error with two digits, the figure with as many."""
    if cost is None:
        return "an unknown amount"
    how = {"at most": "at most ", "interpolated": "some "}.get(cost.how, "")
    kl, error = cost.kl * _MILLI, (cost.error or 0) * _MILLI
    if not error:
        return f"{how}{format_number(kl)} milli-nats"
    digits = max(0, 1 - floor(log10(error)))
    return f"{how}{kl:,.{digits}f} ± {error:,.{digits}f} milli-nats"


def _known(row: Row) -> Divergence:
    found = divergence(row.level)
    assert found is not None  # the caller has asked
    return found


def _rows(chain: Sequence[Choice]) -> list[Row]:
    return [choice.row for choice in chain]
