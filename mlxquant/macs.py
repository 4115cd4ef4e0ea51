"""`macs.toml` as values: chips, their bandwidths, the RAM they were sold with, and how much Metal gives to one process.

And the words in which people name a Mac. The file is read when first asked for, as every command imports this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from mlxquant.errors import UsageError
from mlxquant.units import GIB, parse_ram

# From this macOS on Metal gives more of the RAM to one process.
NEW_MACOS = 26
_PAGE_BYTES = 16384


@dataclass(frozen=True)
class Chip:
    """One row of macs.toml. second_hand: `gpu_cores` is then the most there are, `ram_gib` the ends of a range."""

    name: str
    gpu_cores: tuple[int, ...]
    bandwidth_bytes_per_s: float
    ram_gib: tuple[int, ...]
    second_hand: bool

    def sold_with(self, memory_bytes: int) -> bool:
        if self.second_hand:
            return min(self.ram_gib) * GIB <= memory_bytes <= max(self.ram_gib) * GIB
        return memory_bytes in {gib * GIB for gib in self.ram_gib}

    def has_cores(self, gpu_cores: int) -> bool:
        return gpu_cores in self.gpu_cores or (self.second_hand and 0 < gpu_cores <= max(self.gpu_cores))


@dataclass(frozen=True)
class Share:
    """What part of `ram_gib` Metal gives to one process. observed: somebody's Mac printed that very value."""

    ram_gib: int
    share: float
    observed: bool


@cache
def _table() -> dict[str, Any]:
    import tomllib

    with Path(__file__).with_name("macs.toml").open("rb") as file:
        return tomllib.load(file)


@cache
def chips() -> tuple[Chip, ...]:
    """All rows of macs.toml, in its order: a chip with two bandwidths has two."""
    return tuple(
        Chip(
            row["name"],
            tuple(row["gpu_cores"]),
            row["bandwidth_bytes_per_s"],
            tuple(row["ram_gib"]),
            row.get("second_hand", False),
        )
        for row in _table()["chip"]
    )


def rows_of(name: str) -> tuple[Chip, ...]:
    return tuple(row for row in chips() if row.name == name)


def bandwidth(chip: str, gpu_cores: int | None, memory_bytes: int | None = None) -> float | None:
    """Bytes per second for 'Apple M3 Max' or 'M3 Max'; None when unknown.

    The same name can have two bandwidths: then the GPU's cores tell, or else the RAM.
    """
    rows = rows_of(chip.removeprefix("Apple ").strip())
    if len(rows) > 1 and gpu_cores is not None:
        rows = tuple(row for row in rows if row.has_cores(gpu_cores))
    if len(rows) > 1 and memory_bytes is not None:
        rows = tuple(row for row in rows if row.sold_with(memory_bytes))
    return rows[0].bandwidth_bytes_per_s if len(rows) == 1 else None


@cache
def _shares(new: bool) -> tuple[Share, ...]:
    """By RAM, smallest first."""
    rows = [row for row in _table()["working_set"] if row["macos"] == ("26" if new else "15")]
    found = (Share(row["ram_gib"], row["share"], not row.get("derived", False)) for row in rows)
    return tuple(sorted(found, key=lambda row: row.ram_gib))


def usual_working_set(memory_bytes: int, macos: int = NEW_MACOS) -> tuple[int, bool]:
    """(bytes that Metal gives one process by default, whether a Mac with that RAM was seen to print them).

    RAM that is not in macs.toml has the share of the next smaller one that is: shares grow with RAM, so that is the
    careful guess. Metal's values are whole pages.
    """
    rows = _shares(macos >= NEW_MACOS)
    row = next((row for row in reversed(rows) if row.ram_gib * GIB <= memory_bytes), rows[0])
    pages = ceil(row.share * memory_bytes / _PAGE_BYTES)
    return pages * _PAGE_BYTES, row.observed and row.ram_gib * GIB == memory_bytes


def largest_buffer(working_set_bytes: int) -> int:
    """Metal's maxBufferLength: 3/4 of the default working set, in pages, wherever macs.toml has both."""
    return working_set_bytes * 3 // 4 // _PAGE_BYTES * _PAGE_BYTES


# What may stand in a Mac's name beside what counts. 'MacBook Pro' first, as Pro is a chip's word, too.
_PRODUCT = re.compile(r"\b(?:macbook(?: (?:air|pro|neo))?|mac (?:mini|studio|pro)|imac|mac|apple)\b")
_NUMBER = r"(?<![\w.])([0-9]{1,6}(?:\.[0-9]{1,3})?)"
_CPU_CORES = re.compile(_NUMBER + r" ?cores? cpu\b")
_GPU_CORES = re.compile(_NUMBER + r" ?(?:gpu )?(?:cores?|c)(?: gpu)?\b")
_RAM = re.compile(_NUMBER + r" ?(?:[gt]i?b|g|mi?b)\b(?: (?:ram|memory))?")


@dataclass(frozen=True)
class Words:
    """What a Mac's name says. None: nothing."""

    chip: str | None = None
    memory_bytes: int | None = None
    gpu_cores: int | None = None


def read_words(text: str) -> Words:
    """'m3 max 40-core 64gb', 'MacBook Pro M3-Max, 40-core GPU, 64 GB', 'M3-Pro', '16GB'. Raises UsageError."""
    rest = " ".join(re.sub(r"[-_,;/()]", " ", text.lower()).split())
    rest, _ = _taken(_CPU_CORES, _PRODUCT.sub(" ", rest))
    rest, cores = _taken(_GPU_CORES, rest)
    rest, ram = _taken(_RAM, rest)
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    if stray := re.search(r"(?<![\w.])[0-9][0-9.]* ?([a-z]*)", rest):
        unit = f"has the unknown unit {stray[1][:20]!r}" if stray[1] else "has no unit"
        raise UsageError(
            f"{stray[0][:20].strip()!r} in {shown!r} {unit}", hint="write RAM like 64GB and GPU cores like 40-core"
        )
    core_counts = [int(found[1]) for found in cores if found[1].isdecimal()]
    if len(core_counts) < len(cores):
        raise UsageError(f"{cores[0][0].strip()!r} in {shown!r} is no number of cores", hint="write it like 40-core")
    memory = [parse_ram(re.sub(r" (?:ram|memory)$", "", found[0])) for found in ram]
    chip = chip_name(rest) if rest.strip() else None
    return Words(chip, agreed("amount of RAM", memory, shown), agreed("number of GPU cores", core_counts, shown))


def _taken(pattern: re.Pattern[str], text: str) -> tuple[str, list[re.Match[str]]]:
    """(the text without what the pattern matches, its matches)."""
    return pattern.sub(" ", text), list(pattern.finditer(text))


def agreed(what: str, values: Iterable[int | str | None], where: str = "") -> Any:
    """The one value that is given, however often; None when none is. Raises UsageError when they differ."""
    given = sorted({value for value in values if value is not None}, key=str)
    if len(given) > 1:
        raise UsageError(
            f"more than one {what} is given{f' in {where!r}' if where else ''}", hint="leave all but one out"
        )
    return given[0] if given else None


def chip_name(text: str) -> str:
    """'M3 Max' of 'm3-max', 'Apple M3 Max' or 'M3Max'. Raises UsageError that lists the nearest first."""
    wanted = re.sub(r"[^a-z0-9]", "", text.lower()).removeprefix("apple")
    names = {name.replace(" ", "").lower(): name for name in dict.fromkeys(row.name for row in chips())}
    if wanted in names:
        return names[wanted]
    import difflib

    same_generation = [key for key in names if wanted.startswith(re.split(r"pro|max|ultra", key)[0])]
    near = [*same_generation, *difflib.get_close_matches(wanted[:40], names, 3)]
    known = [names[key] for key in dict.fromkeys([*near, *names])]
    raise UsageError(f"no Mac has a chip {text.strip()[:80]!r}", hint=f"known are {', '.join(known)}")
