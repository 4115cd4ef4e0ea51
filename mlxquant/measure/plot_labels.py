"""Where names go beside their marks so that nothing covers them. Plain geometry in points, y upwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import hypot

Spot = tuple[float, float]

# Right of the mark first, as text is read; then left, above, below, and the corners.
_DIRECTIONS = (
    *((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)),
    *((1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5)),
)
_DISTANCES = (6, 10, 16, 24, 34, 46, 60, 76, 94, 114, 136, 160)
_NEAR = 6  # from further away a line leads to the mark
_MARGIN = 1.5  # of air around a name
_SURE = 2  # so much nearer to its own mark than to another
_COVERED = 1e6  # a name that covers something is worse than any that is far away
_CROSSED = 8  # one across the front's line is as bad as so many points further away
_MISLEADING = 20  # and one that is nearer to another mark, too; it then has a line of its own


@dataclass(frozen=True)
class Box:
    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return wide * high if wide > 0 and high > 0 else 0.0

    def within(self, other: Box) -> bool:
        inside = other.left <= self.left and self.right <= other.right
        return inside and other.bottom <= self.bottom and self.top <= other.top

    def distance(self, spot: Spot) -> float:
        x, y = spot
        return hypot(max(self.left - x, 0, x - self.right), max(self.bottom - y, 0, y - self.top))

    def grown(self, by: float) -> Box:
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)


@dataclass(frozen=True)
class Corner:
    """Lower left of a name. led: a line has to lead to its mark."""

    x: float
    y: float
    led: bool


def place(
    anchors: Sequence[Spot], sizes: Sequence[Spot], taken: Sequence[Box], line: Sequence[Spot], bounds: Box
) -> list[Corner]:
    """One corner for each anchor, one name after the other, each at the cheapest of fixed places around its mark.

    taken: what no name may cover. line: what it should not cross. Where there is no free place, the one that covers
    least is taken.
    """
    covered = list(taken)
    corners = []
    for anchor, size in zip(anchors, sizes, strict=True):
        _, _, box, led = min(
            _priced(rank, box, distance, anchor, anchors, covered, line, bounds)
            for rank, (box, distance) in enumerate(_places(anchor, size))
        )
        covered.append(box)
        corners.append(Corner(box.left, box.bottom, led))
    return corners


def _places(anchor: Spot, size: Spot) -> list[tuple[Box, float]]:
    (x, y), (wide, high) = anchor, size
    found: list[tuple[Box, float]] = []
    for distance in _DISTANCES:
        for across, up in _DIRECTIONS:
            left = x + across * (distance + wide / 2) - wide / 2
            bottom = y + up * (distance + high / 2) - high / 2
            found.append((Box(left, bottom, left + wide, bottom + high), distance))
    return found


def _priced(
    rank: int,
    box: Box,
    distance: float,
    anchor: Spot,
    anchors: Sequence[Spot],
    covered: Sequence[Box],
    line: Sequence[Spot],
    bounds: Box,
) -> tuple[float, int, Box, bool]:
    """(cost in points, rank, box, led): ranks differ, so that boxes are never compared."""
    airy = box.grown(_MARGIN)
    area = sum(airy.overlap(other) for other in covered)
    misleading = any(box.distance(other) < box.distance(anchor) + _SURE for other in anchors if other != anchor)
    cost = distance + (_COVERED + area if area else 0.0) + (0.0 if box.within(bounds) else _COVERED)
    cost += _CROSSED * sum(_crosses(box, a, b) for a, b in pairwise(line)) + _MISLEADING * misleading
    return cost, rank, box, misleading or distance > _NEAR


def _crosses(box: Box, a: Spot, b: Spot) -> bool:
    """Whether the segment enters the box: clipped to it, something is left (Liang and Barsky)."""
    start, stop = 0.0, 1.0
    for at, to, low, high in ((a[0], b[0], box.left, box.right), (a[1], b[1], box.bottom, box.top)):
        step = to - at
        if step == 0:
            if not low <= at <= high:
                return False
            continue
        near, far = sorted(((low - at) / step, (high - at) / step))
        start, stop = max(start, near), min(stop, far)
    return start < stop
