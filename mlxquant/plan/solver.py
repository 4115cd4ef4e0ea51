"""One option for each unit so that their costs add up to little and their bytes stay within a limit.

The multiple-choice knapsack problem. The steps along each unit's lower convex hull, taken by gain per byte, give the
least cost of every limit at which such a step ends (Sinha and Zoltners, The multiple-choice knapsack problem, 1979);
what is left between two steps is filled with what fits, and improved by exchanging two units' options.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mlxquant.codecs.spec import Codec
from mlxquant.errors import PlanError

_EXCHANGES = 50  # of what is left there is ever less to gain: some thousandths of the whole at the first


@dataclass(frozen=True)
class Option:
    """A format of one unit: its bytes, and the divergence that is expected of it, in nats."""

    codec: Codec
    nbytes: int
    nats: float


@dataclass(frozen=True)
class Unit:
    """What has one format: a tensor, which may stand in two places (a tied embedding). One option: none to choose."""

    name: str
    options: tuple[Option, ...]


def solve(units: Sequence[Unit], limit_bytes: int) -> dict[str, Option]:
    """An option for each unit. Never more than limit_bytes, and so near to it that no single unit has a better option
    that would still fit.

    Raises PlanError when the smallest options are more than limit_bytes.
    """
    state = _State([_worthwhile(unit.options) for unit in units], limit_bytes)
    if state.left < 0:
        raise PlanError(f"{limit_bytes} bytes are asked for, and the smallest is {limit_bytes - state.left}")
    state.climb()
    state.fill()
    for _ in range(_EXCHANGES):
        if not state.exchange():
            break
        state.fill()
    return {unit.name: ladder[at] for unit, ladder, at in zip(units, state.ladders, state.at, strict=True)}


def least_nats(units: Sequence[Unit], limit_bytes: int) -> float:
    """What no choice within limit_bytes can be below: the same with fractions of a step (the linear relaxation)."""
    ladders = [_worthwhile(unit.options) for unit in units]
    left, nats = float(limit_bytes - sum(ladder[0].nbytes for ladder in ladders)), sum(x[0].nats for x in ladders)
    for step in _hull_steps(ladders):
        nats -= step.gain * min(1.0, left / step.nbytes)
        left -= step.nbytes
        if left <= 0:
            break
    return nats


@dataclass(frozen=True)
class _Step:
    """A unit's change to option `to`: bytes more and nats less (both below 0 for a step down)."""

    unit: int
    to: int
    nbytes: int
    gain: float

    @property
    def rate(self) -> float:
        return self.gain / self.nbytes


class _State:
    """Which rung of its ladder each unit stands on, and how many bytes are left."""

    def __init__(self, ladders: list[list[Option]], limit_bytes: int) -> None:
        self.ladders = ladders
        self.at = [0] * len(ladders)
        self.left = limit_bytes - sum(ladder[0].nbytes for ladder in ladders)

    def take(self, step: _Step) -> None:
        self.at[step.unit] = step.to
        self.left -= step.nbytes

    def climb(self) -> None:
        """The hulls' steps by gain per byte. A unit whose step does not fit takes none of its later ones."""
        stopped = set()
        for step in _hull_steps(self.ladders):
            if step.unit not in stopped and step.nbytes <= self.left:
                self.take(step)
            else:
                stopped.add(step.unit)

    def fill(self) -> None:
        """Steps up, hull or not, while one fits."""
        while fitting := [step for step in self.ups() if step.nbytes <= self.left]:
            self.take(max(fitting, key=lambda step: step.rate))

    def exchange(self) -> bool:
        """The best pair of a step down and another unit's step up; False where none gains anything."""
        ups = sorted(self.ups(), key=lambda step: step.nbytes)
        sizes, best = [step.nbytes for step in ups], _best_two(ups)
        pairs = []
        for down in self.downs():
            count = bisect_right(sizes, self.left - down.nbytes)
            up = next((step for step in best[count] if step.unit != down.unit), None)
            if up and up.gain + down.gain > 0:
                pairs.append((up.gain + down.gain, down, up))
        if not pairs:
            return False
        _, down, up = max(pairs, key=lambda pair: pair[0])
        self.take(down)
        self.take(up)
        return True

    def ups(self) -> Iterator[_Step]:
        for unit, (ladder, at) in enumerate(zip(self.ladders, self.at, strict=True)):
            for to in range(at + 1, len(ladder)):
                yield _step(unit, ladder, at, to)

    def downs(self) -> Iterator[_Step]:
        for unit, (ladder, at) in enumerate(zip(self.ladders, self.at, strict=True)):
            for to in range(at):
                yield _step(unit, ladder, at, to)


def _step(unit: int, ladder: list[Option], at: int, to: int) -> _Step:
    return _Step(unit, to, ladder[to].nbytes - ladder[at].nbytes, ladder[at].nats - ladder[to].nats)


def _worthwhile(options: Sequence[Option]) -> list[Option]:
    """From the smallest on, each with more bytes and less nats than the one before."""
    ladder: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.nats)):
        if not ladder or option.nats < ladder[-1].nats:
            ladder.append(option)
    return ladder


def _hull_steps(ladders: list[list[Option]]) -> list[_Step]:
    """The steps between corners of each ladder's lower convex hull, the best gain per byte first."""
    steps = []
    for unit, ladder in enumerate(ladders):
        steps += [_step(unit, ladder, a, b) for a, b in pairwise(_corners(ladder))]
    return sorted(steps, key=lambda step: -step.rate)


def _corners(ladder: list[Option]) -> list[int]:
    corners: list[int] = []
    for at in range(len(ladder)):
        while len(corners) > 1 and _rate(ladder, corners[-1], at) >= _rate(ladder, corners[-2], corners[-1]):
            corners.pop()
        corners.append(at)
    return corners


def _rate(ladder: list[Option], a: int, b: int) -> float:
    return (ladder[a].nats - ladder[b].nats) / (ladder[b].nbytes - ladder[a].nbytes)


def _best_two(steps: list[_Step]) -> list[list[_Step]]:
    """For each number of steps from the first on, the two of different units that gain most."""
    best: list[list[_Step]] = [[]]
    for step in steps:
        ranked = sorted([*best[-1], step], key=lambda step: -step.gain)
        best.append([ranked[0], *[other for other in ranked[1:] if other.unit != ranked[0].unit][:1]])
    return best
