"""Which level is good enough, small enough and fast enough: the decision that people are taught, on our own figures.

Guides agree on the frame: take the largest level that fits with room to spare; 4 bits is the usual place, code and
anything a program reads wants 5 or 6, Q3 is the last resort, a smaller model is better than Q2; from some 10 tokens a
second on a reader is not kept waiting (spanvero.com/learn/which-quantization-should-i-use and
/learn/usable-tokens-per-second, solar.codes/blog/choosing-quantized-models, craftrigs.pages.dev "GGUF quant by use
case", mylocalai.org/blog/tokens-per-second-usable). The names of levels mean different things in different formats,
so that here bounds are set on what was measured (fit/divergence.py) and not on names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mlxquant.fit.divergence import FLOATS, Divergence, divergence
from mlxquant.fit.values import Level, Range, Row

Room = Literal["tight", "comfortable", "plenty", "none"]
PAINFUL_TOK_S, READING_TOK_S = 5.0, 10.0
# Where memory is plenty guides go up to 8 bits: as long as half of it stays free, for twice the context or another
# program, and decoding stays twice as fast as it has to be. 8 bits are below this on both models that were measured.
SPARE, NEXT_TO_NOTHING = 0.5, 0.003


@dataclass(frozen=True)
class Use:
    """Bounds in nats of mean KL divergence. enough: below this more bits are taken only where they cost nothing. good:
    speed is not bought with more than this. worst: only where nothing better fits; what is beyond is never named.
    tok_s: how fast decoding has to be.
    """

    name: str
    enough: float
    good: float
    worst: float
    tok_s: float


# The bounds lie in gaps between levels that were measured on the 1.5B model (milli-nats): 8 bits 0.3 and 0.7; 6 bits
# 3.8 and 6.5; 5 bits 13 to 24; GGUF's 4 bits 42 to 80, MLX's 95 to 134; Q3_K_M 152; MLX 3 bits 487, Q2_K 793.
USES = {
    use.name: use
    for use in (
        # Someone reads along: reading speed is wanted, 5 bits are enough, Q3_K_M is the last resort.
        Use("chat", 0.025, 0.12, 0.2, READING_TOK_S),
        # Read along, too, but long: what a wrong word begins goes on for pages, so 6 bits where they fit.
        Use("writing", 0.007, 0.12, 0.2, READING_TOK_S),
        # A wrong token breaks the program: 6 bits preferred, 5 the least by choice, never below 4. Waiting costs less.
        Use("code", 0.007, 0.025, 0.12, PAINFUL_TOK_S),
        # Read by a program, so that every digit counts: 8 bits preferred, 6 the least by choice, never below 4.
        Use("extraction", 0.003, 0.007, 0.12, PAINFUL_TOK_S),
    )
}
DEFAULT_USE = "chat"


@dataclass(frozen=True)
class Choice:
    """A level with what it costs. cost: None for a model that is stored so already and was not measured."""

    row: Row
    cost: Divergence | None


def keeps_codes(level: Level) -> bool:
    """A quantized model as it is, or taken over code by code: any other level of it is a second loss."""
    return "repack" in level.options or (not level.options and level.name.upper() not in FLOATS)


def chain_of(rows: Sequence[Row], use: Use) -> list[Choice]:
    """Levels good enough for `use`, from small to large, each with less divergence than the one before: one that takes
    no less memory than another and is no closer to the model has nothing to say for it.
    """
    kept = [row for row in rows if keeps_codes(row.level)]
    # As it is, unless that does not fit and others can be made: gpt-oss with MXFP4 experts and the rest rounded.
    if kept and (kept[0].verdict != "no" or len(kept) == len(rows)):
        return [Choice(kept[0], divergence(kept[0].level))]
    found: list[Choice] = []
    priced = [(row, cost) for row in rows if (cost := divergence(row.level)) and cost.kl <= use.worst]
    for row, cost in sorted(priced, key=lambda p: (p[0].need.total_bytes, p[1].kl)):
        if not found or cost.kl < kl_of(found[-1]):
            found.append(Choice(row, cost))
    return found


def decide(chain: Sequence[Choice], use: Use, context_tokens: int, limit_bytes: int) -> int | None:
    """The place in the chain of the level to take, where a model may take `limit_bytes`; None where none fits."""
    if not chain:
        return None
    cap, floor = first_within(chain, use.enough), first_within(chain, use.good)
    easy = [i for i in range(floor, cap + 1) if chain[i].row.verdict == "fits"]
    fast = [i for i in easy if fast_enough(chain[i].row, use.tok_s, context_tokens)]
    if easy:
        return max([*fast, *_beyond(chain, cap, use, context_tokens, limit_bytes)], default=easy[0])
    # Nothing that is good fits at ease: the smallest good one if it fits at all, else the best below it.
    close = [i for i in range(cap + 1) if chain[i].row.verdict != "no"]
    below = [i for i in close if i <= floor]
    return max(below) if below else min(close, default=None)


def _beyond(chain: Sequence[Choice], cap: int, use: Use, context_tokens: int, limit_bytes: int) -> Iterator[int]:
    """Levels better than is enough that neither memory nor speed would miss."""
    for i in range(cap + 1, first_within(chain, NEXT_TO_NOTHING) + 1):
        row = chain[i].row
        spare = row.verdict == "fits" and row.need.total_bytes <= (1 - SPARE) * limit_bytes
        if spare and row.speed and fast_enough(row, 2 * use.tok_s, context_tokens):
            yield i


def first_within(chain: Sequence[Choice], kl: float) -> int:
    """The smallest level of at most this divergence, else the best there is."""
    return next((i for i, choice in enumerate(chain) if kl_of(choice) <= kl), len(chain) - 1)


def room_of(chain: Sequence[Choice], at: int, use: Use) -> Room:
    """What memory is for this model: plenty where the level that is enough fits, even if a faster one is taken."""
    cap = chain[first_within(chain, use.enough)]
    if cap.cost and cap.row.verdict == "fits" and kl_of(cap) <= use.enough:
        return "plenty"
    chosen = chain[at]
    return "comfortable" if chosen.row.verdict == "fits" and kl_of(chosen) <= use.good else "tight"


def fast_enough(row: Row, wanted_tok_s: float, context_tokens: int) -> bool:
    """Also where no speed is known: then memory alone decides."""
    rate = tok_s(row, context_tokens)
    return rate is None or rate >= wanted_tok_s


def tok_s(row: Row, context_tokens: int) -> float | None:
    """The likely speed of decoding at the end of the context, where it is lowest."""
    found = rate_at(row, context_tokens)
    return found.likely if found else None


def rate_at(row: Row, context_tokens: int) -> Range | None:
    """Of decoding at the deepest that was reckoned within the context."""
    if row.speed is None:
        return None
    return ([found for depth, found in row.speed.decode if depth <= context_tokens] or [row.speed.decode[0][1]])[-1]


def kl_of(choice: Choice) -> float:
    return choice.cost.kl if choice.cost else 0.0
