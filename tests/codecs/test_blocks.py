"""Sharing rows out over threads: everything once, the first refusal, and no thread left working for nothing."""

from __future__ import annotations

import threading

import pytest

from mlxquant.codecs import blocks

COUNT, TILE = (1 << 22) + 96, 1 << 10


@pytest.fixture(params=[1, 2, 5])
def threads(request, monkeypatch):
    monkeypatch.setattr(blocks, "cores", lambda: request.param)
    return request.param


def test_every_weight_once(threads):
    seen, lock = [], threading.Lock()

    def work(start, stop):
        with lock:
            seen.append((start, stop))
        return -1

    assert blocks.each_block(work, COUNT, TILE) == -1
    seen.sort()
    assert [start for start, _ in seen] == [0, *(stop for _, stop in seen[:-1])]
    assert seen[-1][1] == COUNT
    assert all(start % TILE == 0 for start, _ in seen)
    assert len(seen) >= threads


def test_the_lowest_refusal_is_the_answer(threads):
    bad = (COUNT - 1, 3_000_000, 2_000_001)

    def work(start, stop):
        return min((at for at in bad if start <= at < stop), default=-1)

    assert blocks.each_block(work, COUNT, TILE) == 2_000_001


def test_an_error_ends_the_work(threads):
    calls, lock = [], threading.Lock()

    def work(start, stop):
        with lock:
            calls.append(start)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blocks.each_block(work, COUNT, TILE)
    assert len(calls) <= threads


def test_nothing_to_do(threads):
    assert blocks.each_block(lambda start, stop: 0, 0) == -1
