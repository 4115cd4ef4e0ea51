"""The closed forms of growth.py against mlx-lm's own caches, push by push, and against a replay where those are slow.

Shapes alone are asked for, so nothing is ever evaluated.
"""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from mlxquant.fit.growth import STEP, Growth, fed, full_lengths, rotating_lengths

SIZES = st.one_of(st.sampled_from([1, 2, 32, 64, 255, 256, 257, 512, 2048]), st.integers(1, 700))
FEEDS = st.lists(st.tuples(SIZES, st.integers(1, 40)), max_size=4)
WINDOWS = st.one_of(st.sampled_from([1, 2, 24, 128, 256, 512]), st.integers(1, 900))


def push(cache, size, width=1):
    """Positions that a real cache has allocated after one more push."""
    rows = mx.zeros((1, 1, size, width), dtype=mx.bfloat16)
    cache.update_and_fetch(rows, rows)
    keys = cache.keys[0] if isinstance(cache.keys, (tuple, list)) else cache.keys
    return keys.shape[2]


def lengths(cache, feed, width=1):
    """(after each entry, the most within each)."""
    within = [[push(cache, size, width) for _ in range(times)] for size, times in feed]
    return [moments[-1] for moments in within], [max(moments) for moments in within]


@settings(max_examples=60, deadline=None)
@given(FEEDS)
def test_full_caches_grow_as_mlx_lms_do(feed):
    assert full_lengths(feed) == lengths(KVCache(), feed)[0]


@settings(max_examples=60, deadline=None)
@given(FEEDS, WINDOWS, st.booleans())
@example([(1, 5), (10, 2), (1, 1)], 512, False)  # a second prompt: what is allocated and not used is cut
@example([(1, 30), (10, 2), (1, 300)], 24, True)
def test_rotating_caches_grow_as_mlx_lms_do(feed, window, keeps):
    keep = 4 if keeps and window >= 16 else 0
    after, most = lengths(RotatingKVCache(max_size=window, keep=keep), feed)
    assert rotating_lengths(feed, window) == after
    assert max(most, default=0) == max(after, default=0), "ends of entries are where a cache is largest"


@pytest.mark.parametrize("feed", [fed(700, 300, 512), fed(400, 5, 100), [(300, 1), (7, 3), (256, 2)]])
def test_quantized_caches_grow_as_full_ones_do(feed):
    assert full_lengths(feed) == lengths(QuantizedKVCache(group_size=32, bits=8), feed, width=32)[0]


def replayed(feed):
    """One push at a time, as KVCache.update_and_fetch is written."""
    capacity = offset = 0
    for size, times in feed:
        for _ in range(times):
            if offset + size > capacity:
                capacity = (capacity if offset % STEP == 0 else offset) + (STEP + size - 1) // STEP * STEP
            offset += size
        yield capacity


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(SIZES, st.integers(1, 4000)), min_size=1, max_size=3))
def test_long_contexts_are_reckoned_as_they_are_replayed(feed):
    assert full_lengths(feed) == list(replayed(feed))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 400), SIZES)
def test_a_run_is_fed_all_but_its_last_prompt_token_in_chunks(prompt, new, chunk):
    flat = [size for size, times in fed(prompt, new, chunk) for _ in range(times)]
    wanted, left = [], prompt - 1
    while left > 0:
        wanted.append(min(left, chunk))
        left -= chunk
    assert flat == wanted + [1] * new


def test_full_growth_by_hand():
    assert full_lengths([(100, 1), (1, 1), (200, 1)]) == [256, 256, 357]
    assert fed(10, 2, 4) == [(4, 2), (1, 1), (1, 2)]
    assert fed(1, 1, 4) == [(1, 1)]
    assert full_lengths(fed(1_000_001, 1, 2048)) == [488 * 2048, 488 * 2048 + 768, 488 * 2048 + 768]


def test_peak_of_a_window_is_the_chunk_that_joins_it():
    assert rotating_lengths([(100, 2), (1, 1)], 24) == [23 + 100, 24]
    assert rotating_lengths([(100, 1), (1, 2)], 24) == [100, 24]
    growth = Growth(10, window=24, array_bytes=5)
    assert growth.peak_bytes([(100, 1), (1, 1)]) == 1000
    assert growth.final_bytes([(100, 1), (1, 1)]) == 240
    assert growth.largest_bytes([(100, 1), (1, 1)]) == 500
    assert growth.read_bytes(10) == 100
    assert growth.read_bytes(1000) == 240


def test_a_run_of_nothing_takes_nothing():
    assert Growth(10).peak_bytes([]) == Growth(10).final_bytes([]) == Growth(10).largest_bytes([]) == 0
    assert Growth(fixed_bytes=7).final_bytes([]) == 0
    assert Growth(fixed_bytes=7, array_bytes=5).largest_bytes([(1, 1)]) == 5
