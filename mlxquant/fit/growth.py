"""How many positions a cache holds, from how it is fed alone: the growth rules of mlx-lm's caches in closed form.

`mlx_lm/models/cache.py`, 0.32: buffers grow in steps of 256 positions, and not always to a multiple of it. A run is
fed a few sizes over and over, so a million tokens cost no more to reckon than a thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STEP = 256

# What a cache is fed, in order: (tokens at a time, how often). Every run of mlxquant and mlx-lm is three of these.
Feed = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Growth:
    """One array pair of a cache. `position_bytes`: keys and values of one position; `fixed_bytes`: whatever
    the length.

    window None grows with the context; otherwise only the last `window` positions are kept (the first `keep`
    of all). `array_bytes`: the larger of the two arrays, of one position, or in all where it does not grow.
    """

    position_bytes: int = 0
    fixed_bytes: int = 0
    window: int | None = None
    keep: int = 0
    array_bytes: int = 0

    def bytes_after(self, feed: Feed) -> list[int]:
        """Bytes allocated after each entry of `feed`. Between two of them it is never more than at both ends."""
        return [self.fixed_bytes + self.position_bytes * length for length in self._lengths(feed)]

    def peak_bytes(self, feed: Feed) -> int:
        """Bytes at the largest moment of the run."""
        return max(self.bytes_after(feed), default=0)

    def final_bytes(self, feed: Feed) -> int:
        """Bytes allocated after the run."""
        return [0, *self.bytes_after(feed)][-1]

    def largest_bytes(self, feed: Feed) -> int:
        """Bytes of the larger array alone, at its largest."""
        return self.array_bytes * (max(self._lengths(feed), default=0) if self.position_bytes else 1)

    def read_bytes(self, depth_tokens: int) -> int:
        """What attention reads for one token at such a depth: used positions, not allocated ones."""
        depth = depth_tokens if self.window is None else min(depth_tokens, self.window)
        return self.fixed_bytes + self.position_bytes * depth

    def _lengths(self, feed: Feed) -> list[int]:
        return full_lengths(feed) if self.window is None else rotating_lengths(feed, self.window)


def fed(prompt_tokens: int, new_tokens: int, prefill_step: int) -> Feed:
    """What run/generate.py feeds: all but the last prompt token in chunks, then one by one.

    The last generated token is not fed; mlx_lm.generate, a step ahead, feeds it.
    """
    chunks, rest = divmod(max(prompt_tokens - 1, 0), prefill_step)
    return [(size, times) for size, times in ((prefill_step, chunks), (rest, 1), (1, new_tokens)) if size and times]


def full_lengths(feed: Feed) -> list[int]:
    """Positions allocated by KVCache and QuantizedKVCache after each entry of `feed`."""
    capacity = offset = 0
    lengths = []
    for size, times in feed:
        capacity = _grown(capacity, offset, size, times)
        offset += size * times
        lengths.append(capacity)
    return lengths


def _grown(capacity: int, offset: int, size: int, times: int) -> int:
    """A buffer of `capacity` positions, `offset` of them used, after so many pushes of `size`."""
    end = offset + size * times
    if (size % STEP == 0 or STEP % size == 0) and (capacity - offset) % size == 0:
        # Pushes fill the buffer to the brim, so it is never cut, and each full one gains the same.
        gain = max(size, STEP)
        return capacity + gain * -(-max(end - capacity, 0) // gain)
    while offset < end:
        if offset + size > capacity:
            # A buffer that is not full of whole steps is first cut to what is used.
            capacity = (capacity if offset % STEP == 0 else offset) + -(-size // STEP) * STEP
        offset += min((capacity - offset) // size * size, end - offset)
    return capacity


def rotating_lengths(feed: Feed, window: int) -> list[int]:
    """Positions allocated by RotatingKVCache after each entry of `feed`: a chunk of L holds up to window - 1 + L."""
    length = offset = 0
    lengths = []
    for size, times in feed:
        if size > 1:
            # Before each chunk is joined on, the unused end is cut, then all but the last window - 1 positions.
            length = min(min(length, offset) + size * times, window - 1 + size)
        else:
            length = min(length + STEP * -(-max(offset + times - length, 0) // STEP), window)
        offset += size * times
        lengths.append(length)
    return lengths
