"""280 hostile GGUF files, made from a good one by seeded strokes at the places that matter: each is read right or
refused in one line, in bounded time and memory."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest

from tests import tiny
from tests.gguf_files import write_gguf

EACH = 30
NUMBERS = (0, 1, 2, 3, 7, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class Places:
    """Where in a good file each sort of field stands: {sort: [(offset, bytes)]}. A walk without any checks."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 24
        self.found: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self.found["count"] = [(8, 8), (16, 8)]
        n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
        self.keys: list[tuple[int, int]] = [self.key() for _ in range(n_keys)]
        for _ in range(n_tensors):
            self.tensor()

    def note(self, sort: str, size: int) -> int:
        self.found[sort].append((self.at, size))
        value = int.from_bytes(self.data[self.at : self.at + size], "little")
        self.at += size
        return value

    def string(self) -> None:
        length = self.note("length", 8)
        self.at += length

    def key(self) -> tuple[int, int]:
        start = self.at
        self.string()
        kind = self.note("type", 4)
        if kind == 9:
            self.found["array"].append((self.at, 12))
            kind, count = self.note("type", 4), self.note("count", 8)
            for _ in range(count):
                self.value(kind)
        else:
            self.value(kind)
        return start, self.at

    def value(self, kind: int) -> None:
        if kind == 8:
            self.string()
        else:
            self.found["value"].append((self.at, _SIZES[kind]))
            self.at += _SIZES[kind]

    def tensor(self) -> None:
        self.string()
        for _ in range(self.note("dimensions", 4)):
            self.note("shape", 8)
        self.note("type", 4)
        self.note("offset", 8)


def stroke(sort: str, data: bytes, places: Places, rng: random.Random) -> bytes:
    """One fault of the given sort."""
    mutant = bytearray(data)
    if sort == "truncation":
        return data[: rng.randrange(len(data))]
    if sort == "duplicate":
        start, stop = rng.choice(places.keys)
        mutant[start:start] = data[start:stop]
        mutant[16:24] = struct.pack("<Q", len(places.keys) + 1)
        return bytes(mutant)
    if sort == "nested":  # an array of arrays of arrays...
        at, _ = rng.choice(places.found["array"])
        mutant[at : at + 12] = struct.pack("<IQ", 9, rng.choice((1, 5, 2**20))) * rng.choice((1, 3, 1000))
        return bytes(mutant)
    at, size = rng.choice(places.found[sort])
    number = rng.choice((*NUMBERS, rng.getrandbits(64)))
    mutant[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(mutant)


SORTS = ("count", "length", "type", "shape", "offset", "value", "truncation", "duplicate", "nested", "dimensions")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], int]:
    tmp_path = tmp_path_factory.mktemp("hostile")
    good = write_gguf(tiny.make(tmp_path / "tiny", width=256), tmp_path / "good.gguf", "Q4_0").read_bytes()
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "good.gguf").write_bytes(good)
    places = Places(good)
    for sort in SORTS:
        for seed in range(EACH if sort != "dimensions" else 10):
            mutant = stroke(sort, good, places, random.Random(f"{sort} {seed}"))
            (tmp_path / "cases" / f"{sort}-{seed:02d}.gguf").write_bytes(mutant)
    command = [sys.executable, "-m", "tests.convert.hostile_worker", str(tmp_path / "cases")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["file"].removesuffix(".gguf"): line for line in lines}, len(good)


def test_every_mutant_is_read_or_refused_in_one_line(outcomes: tuple[dict[str, dict[str, Any]], int]) -> None:
    ended, _ = outcomes
    assert len(ended) > 240
    assert ended["good"]["ended"] == "read"
    assert [case for case in ended.values() if case["ended"] == "crashed"] == []
    assert [case for case in ended.values() if "\n" in case["said"] or len(case["said"]) > 600] == []


def test_mutants_are_hostile_indeed(outcomes: tuple[dict[str, dict[str, Any]], int]) -> None:
    """Of each sort most must be refused: were they read, the strokes would miss what they aim at."""
    ended, _ = outcomes
    for sort in ("count", "length", "type", "shape", "offset", "truncation", "duplicate", "nested"):
        refused = [case for name, case in ended.items() if name.startswith(sort) and case["ended"] == "refused"]
        assert len(refused) >= EACH // 2, sort


def test_no_mutant_takes_twice_the_files_memory(outcomes: tuple[dict[str, dict[str, Any]], int]) -> None:
    """Beside a constant for what Python itself takes: the file is a tiny one."""
    ended, size = outcomes
    greedy = {name: case["peak"] for name, case in ended.items() if case["peak"] > 2 * size + 3_000_000}
    assert greedy == {}
