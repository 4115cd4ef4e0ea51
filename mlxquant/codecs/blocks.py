"""From arrays of rows to what the kernels take: flat bits, dealt out to all cores in blocks of whole tiles.

Threads are Python's, over kernels that release the GIL. numba's own `parallel=True` would need a threading
layer, and the one it brings along on a Mac (workqueue) aborts the process when two Python threads enter it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mlxquant.codecs.floats import Array, cast, check
from mlxquant.codecs.kernels import KINDS, TILE

_BLOCK = 1 << 18  # weights below which another thread does not pay


def as_bits(raw: Array, code: str) -> tuple[Array, int]:
    """Raw rows -> their bits, flat, uint16 or uint32, copied only when they must be; and their kind."""
    check(raw, code)
    if code == "F64":
        raw, code = cast(raw, "F64", "F32"), "F32"
    return _flat(raw, np.uint32 if code == "F32" else np.uint16), KINDS[code]


def as_bytes(packed: Array) -> Array:
    """Packed codes -> flat bytes."""
    return _flat(packed, np.uint8)


def _flat(array: Array, unsigned: type[np.unsignedinteger[Any]]) -> Array:
    # numba compiles writable, read-only and unaligned arrays apart: let there be one sort only.
    flat = np.require(array, requirements=["C", "A"]).view(unsigned).reshape(-1)
    flat.flags.writeable = False
    return flat


def each_block(work: Callable[[int, int], int], count: int, tile: int = TILE) -> int:
    """work(start, stop) over `count` weights in blocks of whole tiles of `tile` weights, on all cores.

    work returns where it stopped, or -1 when it went through; the answer is the lowest of those, or -1.
    """
    threads = cores()
    # Four blocks a thread: the slow cores of an Apple chip then do not hold up the fast ones.
    block = max(_BLOCK, -(-count // (4 * threads)))
    block = -(-block // tile) * tile
    starts = range(0, count, block)
    if threads == 1 or len(starts) <= 1:
        return work(0, count) if count else -1
    left = iter(starts)

    def take() -> int:
        stops = [work(start, min(start + block, count)) for start in left]
        return min((stop for stop in stops if stop >= 0), default=count)

    # This thread works too: starting another takes as long as encoding 200,000 weights of a simple format.
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(take) for _ in range(threads - 1)]
        try:
            lowest = take()
        finally:  # where that was cut short, the others need not do what is left
            list(left)
    lowest = min([lowest, *(other.result() for other in others)])
    return lowest if lowest < count else -1


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
