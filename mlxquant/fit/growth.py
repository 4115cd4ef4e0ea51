"""How many bytes a cache takes, from shapes alone: the growth rules of mlx-lm's caches, replayed.

`mlx_lm.models.cache`, 0.32: buffers grow in steps of 256 positions, and not always to a multiple of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

STEP = 256


@dataclass(frozen=True)
class Growth:
    """One array pair of a cache. `position_bytes`: keys and values of one position; `fixed_bytes`: whatever
    the length.

    window None grows with the context; otherwise only the last `window` positions are kept (the first `keep`
    of all).
    """

    position_bytes: int = 0
    fixed_bytes: int = 0
    window: int | None = None
    keep: int = 0

    def peak_bytes(self, pushes: Iterable[int]) -> int:
        """Bytes at the largest moment of a run that feeds so many tokens at a time."""
        return self.fixed_bytes + self.position_bytes * max(self._lengths(pushes), default=0)

    def final_bytes(self, pushes: Iterable[int]) -> int:
        """Bytes allocated after the run."""
        return self.fixed_bytes + self.position_bytes * ([0, *self._lengths(pushes)][-1])

    def _lengths(self, pushes: Iterable[int]) -> Iterator[int]:
        return full_lengths(pushes) if self.window is None else rotating_lengths(pushes, self.window)


def pushes(prompt_tokens: int, new_tokens: int, prefill_step: int) -> Iterator[int]:
    """What run/generate.py feeds: all but the last prompt token in chunks, then one by one.

    The last generated token is not fed.
    """
    left = prompt_tokens - 1
    while left > 0:
        yield min(left, prefill_step)
        left -= prefill_step
    for _ in range(new_tokens):
        yield 1


def full_lengths(pushes: Iterable[int]) -> Iterator[int]:
    """Positions allocated by KVCache and QuantizedKVCache after each push."""
    capacity = offset = 0
    for count in pushes:
        if offset + count > capacity:
            # A buffer that is not full of whole steps is first cut to what is used.
            capacity = (capacity if offset % STEP == 0 else offset) + -(-count // STEP) * STEP
        offset += count
        yield capacity


def rotating_lengths(pushes: Iterable[int], window: int) -> Iterator[int]:
    """Positions allocated by RotatingKVCache after each push: a chunk of L holds up to window - 1 + L."""
    length = offset = index = 0
    for count in pushes:
        if count > 1:
            if index != length and index >= offset:
                length = index
            length = length - max(length - window + 1, 0) + count if length else count
            index = length
        else:
            if length == 0 or (offset >= length and length < window):
                length, index = length + min(STEP, window - offset), offset
            if length > window:
                length = index = window
            index = (0 if index == window else index) + 1
        offset += count
        yield length
