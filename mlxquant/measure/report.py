"""What `eval` found, as plain values: everything that the table, the JSON, the card and the plot are drawn from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, clustered by window; None of one window, and where the figure is not finite."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Divergence:
    """Of a student from its teacher, over all scored positions.

    kl*: KL(teacher || student) of a position's next-token distribution over the whole vocabulary, nats.
    ppl_ratio: the student's perplexity by the teacher's. delta_p: the student's probability of the text's own next
    token less the teacher's, as a fraction. top1: share of positions where both have the same best token (the flip
    rate is the rest). top5: mean share of the teacher's five best tokens that are among the student's.
    """

    kl: Estimate
    kl_median: Estimate
    kl_p90: Estimate
    kl_p99: Estimate
    kl_p999: Estimate
    kl_max: float
    ppl_teacher: Estimate
    ppl_student: Estimate
    ppl_ratio: Estimate
    delta_p: Estimate
    delta_p_rms: Estimate
    top1: Estimate
    top5: Estimate
    windows: int
    positions: int


@dataclass(frozen=True)
class Worst:
    """One of the positions with the most divergence. `text` ends where the next token is asked for."""

    kl: float
    window: int
    position: int
    text: str
    next: str
    teacher_best: str
    student_best: str


@dataclass(frozen=True)
class Size:
    """nbytes: of all stored tensors. label: 'Q4_K_M', '4 bit affine, group size 64', 'BF16'."""

    nbytes: int
    parameters: int
    bpw: float
    label: str


@dataclass(frozen=True)
class Speed:
    """Of `mlxquant bench`: 512 prompt tokens, then 128 generated ones. peak_bytes: MLX's own peak."""

    prefill_tok_s: float
    decode_tok_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Model:
    """name: as short as tells it from the others of the report. sha256: of its files."""

    name: str
    size: Size
    sha256: str
    speed: Speed | None = None


@dataclass(frozen=True)
class Student:
    """behind: mean KL less that of the student before it in the report, paired by position; None for the first."""

    model: Model
    divergence: Divergence
    worst: tuple[Worst, ...] = ()
    behind: Estimate | None = None


@dataclass(frozen=True)
class Setting:
    """What the figures stand for. text: the corpus's label. available: windows that the text has. bos: the token each
    window begins with, None where the tokenizer adds none. floor: mean KL of the teacher from itself, its windows
    computed in another split, nats: differences below are this device's rounding. dtype: the teacher's activations'.
    """

    text: str
    text_sha256: str
    context: int
    stride: int
    windows: int
    available: int
    bos: int | None
    floor: float
    dtype: str
    device: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """students: best first. interrupted: Ctrl-C came before all windows were scored."""

    teacher: Model
    students: tuple[Student, ...]
    setting: Setting
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, nested as here; None for an infinite figure, which JSON cannot say."""
        return asdict(self, dict_factory=_finite)


def _finite(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in pairs}
