"""How a report's figures are written: the same columns, digits and sentences in table, card and page.

Divergence is written in milli-nats, plain decimals: what quantizing costs lies between 0.0001 and 10,000 of them. A
figure has as many digits as two digits of its standard error allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from mlxquant.measure.report import Estimate, Report, Speed, Student
from mlxquant.units import format_bytes, format_number

MILLI = 1000.0
_FINEST = 6  # decimals at most: of milli-nats 1e-9 nats, and below that a divergence is the rounding of float64
_FULL_BPW = 15.5  # below is a quantized model, or a student that was named first by mistake
_FEW_WINDOWS = 10  # with these two standard errors are 92 % (Student's t), with two windows 70 %
_LARGEST = 1e7  # from here on with an exponent: 1.2e+09 is what a broken model shows

Form = Callable[[float], str]


def significant(value: float) -> str:
    """Three significant digits: 0.000521, 12.3, 1,234, 0, inf."""
    return _number(value, decimals_of(value))


def decimals_of(value: float) -> int:
    """Decimals that `significant` writes it with."""
    return max(0, _decimals(value, 3))


def fixed(value: float, decimals: int) -> str:
    """So many decimals; what would look like 0 and is not: <0.001."""
    if 0 < value < 0.5 * 10**-decimals:
        return f"<{10**-decimals:.{decimals}f}"
    return _number(value, decimals)


def estimate(found: Estimate, scale: float = 1.0, plain: Form = significant) -> str:
    """'12.31 ± 0.42'; without an error as `plain` writes it."""
    decimals = _error_decimals(found, scale)
    if decimals is None:
        return plain(found.value * scale)
    return f"{_number(found.value * scale, decimals)} ± {_number((found.error or 0) * scale, decimals)}"


def rounded(found: Estimate, scale: float = 1.0, plain: Form = significant) -> str:
    """The value alone, up to the digit where its error begins."""
    decimals = _error_decimals(found, scale)
    if decimals is None:
        return plain(found.value * scale)
    return _number(found.value * scale, decimals - 1)


def _error_decimals(found: Estimate, scale: float) -> int | None:
    """Decimals that two digits of the error need, below 0 for tens; None where there is no error to go by."""
    if found.error is None or not math.isfinite(found.error) or found.error * scale < 0.5 * 10**-_FINEST:
        return None
    return _decimals(found.error * scale, 2)


def _decimals(value: float, digits: int) -> int:
    if value == 0 or not math.isfinite(value):
        return 0
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the value as it is rounded: 0.0996 is 1.0e-01
    return min(digits - 1 - exponent, _FINEST)


def _number(value: float, decimals: int) -> str:
    if not math.isfinite(value) or abs(value) >= _LARGEST:
        return f"{value:.2g}"
    if 0 < abs(value) < 0.5 * 10**-_FINEST:
        return f"<{10**-_FINEST:.{_FINEST}f}"
    return f"{round(value, decimals) + 0.0:,.{max(0, decimals)}f}"  # + 0.0: no "-0.0"


def _four(value: float) -> str:
    return _number(value, 4)


def _one(value: float) -> str:
    return _number(value, 1)


@dataclass(frozen=True)
class Column:
    """cell: with its error, where it has one. brief: as short as it can be without saying less than is known."""

    head: str
    unit: str
    note: str
    cell: Callable[[Student], str]
    brief: Callable[[Student], str]

    @property
    def title(self) -> str:
        return f"{self.head} ({self.unit})" if self.unit else self.head


def _plain(head: str, unit: str, note: str, cell: Callable[[Student], str]) -> Column:
    return Column(head, unit, note, cell, cell)


def _estimated(
    head: str, unit: str, note: str, of: Callable[[Student], Estimate], scale: float = 1.0, plain: Form = significant
) -> Column:
    return Column(head, unit, note, lambda s: estimate(of(s), scale, plain), lambda s: rounded(of(s), scale, plain))


SIZE = _plain("size", "", "of all stored tensors.", lambda s: format_bytes(s.model.size.nbytes))
BPW = _plain("bpw", "", "bits per weight, everything stored counted.", lambda s: f"{s.model.size.bpw:.2f}")
KLD = _estimated(
    "KLD",
    "mnat",
    "how far next-token probabilities are from the teacher's: KL divergence over the whole vocabulary, mean of all "
    "positions. 0 is the same model; 1 mnat (milli-nat) = 0.001 nats.",
    lambda s: s.divergence.kl,
    MILLI,
)
P99 = _estimated("p99", "mnat", "KL divergence that 1 % of positions exceed.", lambda s: s.divergence.kl_p99, MILLI)
MAX = _plain("max", "mnat", "KL divergence at the worst position.", lambda s: significant(s.divergence.kl_max * MILLI))
RATIO = _estimated(
    "PPL ratio",
    "",
    "perplexity of the text, divided by the teacher's: 1 is no change.",
    lambda s: s.divergence.ppl_ratio,
    plain=_four,
)
DELTA = _estimated(
    "RMS Δp",
    "%",
    "how much the probability of the text's own next token changes, root mean square.",
    lambda s: s.divergence.delta_p_rms,
    100,
)
TOP = _estimated(
    "same top",
    "%",
    "positions where both have the same most probable token; the rest are flips.",
    lambda s: s.divergence.top1,
    100,
    _one,
)
QUALITY = (SIZE, BPW, KLD, P99, MAX, RATIO, DELTA, TOP)


def _speed(head: str, unit: str, note: str, of: Callable[[Speed], str]) -> Column:
    return _plain(head, unit, note, lambda s: of(s.model.speed) if s.model.speed else "")


SPEED = (
    _speed("prefill", "tok/s", "512 prompt tokens.", lambda v: format_number(v.prefill_tok_s)),
    _speed("decode", "tok/s", "128 generated tokens after them.", lambda v: format_number(v.decode_tok_s)),
    _speed("peak", "", "peak memory of MLX at that.", lambda v: format_bytes(v.peak_bytes)),
)


def columns(report: Report) -> tuple[Column, ...]:
    """Those that were measured."""
    return QUALITY + (SPEED if any(s.model.speed for s in report.students) else ())


def protocol(report: Report) -> str:
    """What the figures stand for, without text and teacher: windows, positions, BOS, device."""
    s = report.setting
    windows = f"{s.windows:,} of {s.available:,} windows" if s.windows < s.available else f"{s.windows:,} windows"
    stride = "" if s.stride == s.context else f", one every {s.stride:,}"
    bos = "no BOS" if s.bos is None else f"each begins with BOS (token {s.bos})"
    positions = max((student.divergence.positions for student in report.students), default=0)
    return (
        f"{windows} of {s.context:,} tokens{stride}, the second half of each scored ({positions:,} positions), {bos}; "
        f"computed on {s.device}, activations in {s.dtype}"
    )


def floor(report: Report) -> str:
    """From where on differences mean nothing on this device."""
    found = significant(report.setting.floor * MILLI).lstrip("<")
    return f"Differences below {found} mnat are rounding noise of this device." if report.setting.floor > 0 else ""


def caveats(report: Report) -> list[str]:
    """What a reader has to know before believing the figures."""
    lines = [
        f"Stopped early: {s.model.name} was scored on {s.divergence.windows:,} of {report.setting.windows:,} windows."
        for s in report.students
        if s.divergence.windows < report.setting.windows
    ]
    if report.interrupted and not lines:
        lines.append("Stopped early: not every student was scored.")
    if (bpw := report.teacher.size.bpw) < _FULL_BPW:
        lines.append(f"The teacher is quantized itself ({bpw:.2f} bits per weight): distances are from it.")
    fewest = min((s.divergence.windows for s in report.students), default=0)
    if fewest == 1:
        lines.append("Where there is one window there are no standard errors: two windows or more tell them.")
    elif 1 < fewest < _FEW_WINDOWS:
        lines.append(f"Standard errors from {fewest} windows are rough: take {_FEW_WINDOWS} or more to rank models.")
    alike = "; ".join(", ".join(group) for group in indistinguishable(report))
    if alike:
        lines.append(f"Cannot be told apart (neighbours less than two standard errors apart): {alike}.")
    return lines


def indistinguishable(report: Report) -> list[list[str]]:
    """Names of students, best first, in groups of neighbours that two standard errors or the floor do not part."""
    groups = [[s.model.name for s in report.students[:1]]]
    for _, student in pairwise(report.students):
        if _apart(student, report.setting.floor):
            groups.append([])
        groups[-1].append(student.model.name)
    return [group for group in groups if len(group) > 1]


def _apart(student: Student, floor_nats: float) -> bool:
    """Where nothing is known of the difference nothing is said of it, but for the floor."""
    behind = student.behind
    if behind is None:
        return True
    return abs(behind.value) > max(floor_nats, 2 * (behind.error or 0)) or math.isnan(behind.value)
