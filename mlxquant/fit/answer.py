"""The whole answer: every level of one model on one machine, and the grid of one model over machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlxquant.families.shape import ModelShape
from mlxquant.fit.cache import Cache, default_prefill_step
from mlxquant.fit.calibration import Own
from mlxquant.fit.levels import left_out, levels, survey
from mlxquant.fit.memory import advice, cache_on, limit_bytes, longest_context, need, verdict
from mlxquant.fit.speed import speed
from mlxquant.fit.subject import Subject
from mlxquant.fit.values import CONTEXT_TOKENS, Asked, Level, Row
from mlxquant.fit.work import work
from mlxquant.machine import Machine

PROMPT_TOKENS = 2048
DEPTHS_TOKENS = (0, 4096, 16384)
CEILING_TOKENS = 2**20  # where a config does not say what context the model was made for
RAM_GIB = (8, 16, 24, 32, 48, 64, 128)


def asked_of(
    subject: Subject,
    machine: Machine,
    context_tokens: int | None = None,
    *,
    kv_bits: int | None = None,
    chunk_tokens: int | None = None,
) -> Asked:
    """A context that was not asked for is 8k, or what the model was made for if that is less; chunks are those that
    `generate` and `chat` would take there."""
    return asked_of_shape(subject.shape, machine, context_tokens, kv_bits=kv_bits, chunk_tokens=chunk_tokens)


def asked_of_shape(
    shape: ModelShape,
    machine: Machine,
    context_tokens: int | None = None,
    *,
    kv_bits: int | None = None,
    chunk_tokens: int | None = None,
) -> Asked:
    """The same of a shape alone."""
    context = context_tokens or min(CONTEXT_TOKENS, shape.context_length or CONTEXT_TOKENS)
    return Asked(context, kv_bits, chunk_tokens or default_prefill_step(machine.device))


@dataclass(frozen=True)
class Answer:
    """`rows`: one for each level. `refused`: levels that cannot be written -> why. `left_out`: (reason, tensors, bytes)
    of what the source holds beside the model."""

    subject: Subject
    machine: Machine
    asked: Asked
    cache: Cache
    rows: tuple[Row, ...]
    refused: Mapping[str, str]
    left_out: tuple[tuple[str, int, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values. Bytes, tokens, tokens a second and seconds."""
        return {
            "model": self.subject.name,
            "model_type": self.subject.shape.model_type,
            "layers": self.subject.shape.layers,
            "made_for_tokens": self.subject.shape.context_length,
            "machine": asdict(self.machine) | {"limit_bytes": limit_bytes(self.machine)},
            **asdict(self.asked),
            "cache": {
                "bytes_per_token": self.cache.bytes_per_token,
                "layers": [{"kind": kind, "layers": count} for kind, count, *_ in self.cache.layers],
                "notes": list(self.cache.notes),
            },
            "levels": [_row_json(row) for row in self.rows],
            "refused": dict(self.refused),
            "left_out": [{"reason": why, "tensors": count, "bytes": size} for why, count, size in self.left_out],
            "remarks": list(self.subject.remarks),
        }


def answer(subject: Subject, machine: Machine, asked: Asked, *, every: bool = False, own: Own | None = None) -> Answer:
    """What each level of `subject` takes on `machine`, and how fast it is. `every`: all levels, not only the usual.

    Raises SourceError and UnsupportedError for a model that cannot be reckoned with, naming what it is.
    """
    shape, cost = subject.shape, work(subject)
    plain, small = cache_on(machine, shape), cache_on(machine, shape, 8)
    cache = cache_on(machine, shape, asked.kv_bits)
    depths = tuple(sorted({*DEPTHS_TOKENS, asked.context_tokens}))
    ceiling, chunk = shape.context_length or CEILING_TOKENS, asked.chunk_tokens

    def row(level: Level) -> Row:
        needed = need(level, cache, shape, machine, asked.context_tokens, chunk)
        return Row(
            level,
            needed,
            verdict(needed, machine),
            longest_context(level, plain, shape, machine, chunk, ceiling),
            longest_context(level, small, shape, machine, chunk, ceiling) if small.quantizable else None,
            speed(level, cost, cache, machine, depths, PROMPT_TOKENS, own),
            tuple(advice(level, needed, cache, shape, machine, asked)),
        )

    found = survey(subject, every)
    rows = tuple(map(row, found.levels))
    return Answer(subject, machine, asked, cache, rows, found.refused, left_out(subject))


@dataclass(frozen=True)
class Grid:
    """The longest context of each level (tokens; 0: not even one) on machines of each RAM, new macOS and old."""

    subject: Subject
    asked: Asked
    machines: tuple[Machine, ...]
    levels: tuple[Level, ...]
    longest: tuple[tuple[int, ...], ...]
    older: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values: a list of levels, each with its longest context in tokens on each machine."""
        return {
            "model": self.subject.name,
            "kv_bits": self.asked.kv_bits,
            "chunk_tokens": self.asked.chunk_tokens,
            "made_for_tokens": self.subject.shape.context_length,
            "memory_bytes": [machine.memory_bytes for machine in self.machines],
            "levels": [
                {
                    "level": level.key,
                    "bytes": level.nbytes,
                    "longest_tokens": list(new),
                    "older_macos_longest_tokens": list(old),
                }
                for level, new, old in zip(self.levels, self.longest, self.older, strict=True)
            ],
        }


def grid(subject: Subject, machines: Iterable[Machine], asked: Asked, *, every: bool = False) -> Grid:
    """The longest context that fits, for every level on every machine. Raises as `answer`."""
    shape, machines = subject.shape, tuple(machines)
    ceiling, shown = shape.context_length or CEILING_TOKENS, levels(subject, every)
    pairs = [(machine, cache_on(machine, shape, asked.kv_bits)) for machine in machines]
    older = [(machine.with_older_macos(), cache) for machine, cache in pairs]

    def longest(level: Level, machine: Machine, cache: Cache) -> int:
        return longest_context(level, cache, shape, machine, asked.chunk_tokens, ceiling)

    new = tuple(tuple(longest(level, *pair) for pair in pairs) for level in shown)
    old = tuple(tuple(longest(level, *pair) for pair in older) for level in shown)
    return Grid(subject, asked, machines, shown, new, old)


def _row_json(row: Row) -> dict[str, Any]:
    level = row.level
    return {
        "level": level.key,
        "format": level.format,
        "name": level.name,
        "options": list(level.options),
        "bytes": level.nbytes,
        "bpw": level.bpw,
        "loaded_bytes": level.loaded_bytes,
        "token_bytes": level.token_bytes,
        "header_bytes": level.header_bytes,
        "need": asdict(row.need) | {"total_bytes": row.need.total_bytes},
        "verdict": row.verdict,
        "longest_tokens": row.longest_float,
        "longest_tokens_8bit": row.longest_8bit,
        "speed": _speed_json(row),
        "remarks": list(level.remarks),
        "advice": list(row.advice),
    }


def _speed_json(row: Row) -> dict[str, Any] | None:
    if row.speed is None:
        return None
    return {
        "decode_tok_s": [{"depth_tokens": depth} | asdict(found) for depth, found in row.speed.decode],
        "prompt_tokens": row.speed.prompt_tokens,
        "prefill_tok_s": asdict(row.speed.prefill),
        "ttft_s": asdict(row.speed.ttft_s),
        "engine": row.speed.engine,
    }
