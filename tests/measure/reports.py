"""Reports made by hand: figures like those of a 135M model."""

from __future__ import annotations

from mlxquant.measure.report import Divergence, Estimate, Model, Report, Setting, Size, Speed, Student, Worst

PARAMETERS = 134_515_008
# name, label, bpw, mean KL in nats and its error, as of a ladder of quants
LADDER = (
    ("smol-Q8_0.gguf", "Q8_0", 8.51, 0.000612, 0.000021),
    ("smol-mlx-8bit", "8 bit affine, group size 64", 8.50, 0.000634, 0.000022),
    ("smol-mlx-6bit", "6 bit affine, group size 64", 6.50, 0.00911, 0.00024),
    ("smol-Q6_K.gguf", "Q6_K", 6.57, 0.0093, 0.00026),
    ("smol-mlx-5bit", "5 bit affine, group size 64", 5.50, 0.0367, 0.0008),
    ("smol-Q4_K_M.gguf", "Q4_K_M", 5.26, 0.0521, 0.0011),
    ("smol-mlx-4bit", "4 bit affine, group size 64", 4.50, 0.158, 0.0032),
    ("smol-Q2_K.gguf", "Q2_K", 3.61, 0.944, 0.014),
    ("smol-mlx-2bit", "2 bit affine, group size 64", 2.50, 5.87, 0.041),
)
WORST = (
    Worst(7.25, 3, 301, "The capital of France is", " Paris", " Paris", " the"),
    Worst(6.5, 11, 499, "def mean(values):\n    return", " sum", " sum", "\n"),
)


def size(bpw: float, label: str = "Q4_K_M") -> Size:
    return Size(round(bpw * PARAMETERS / 8), PARAMETERS, bpw, label)


def divergence(kl: float, error: float | None, windows: int = 64) -> Divergence:
    """The rest follows roughly, as it does in life."""

    def of(value: float, relative: float = 0.03) -> Estimate:
        return Estimate(value, None if error is None else abs(value) * relative)

    flips = min(0.9, 0.28 * kl**0.5)
    return Divergence(
        kl=Estimate(kl, error),
        kl_median=of(kl * 0.4),
        kl_p90=of(kl * 2.4),
        kl_p99=of(kl * 8.5, 0.06),
        kl_p999=of(kl * 21),
        kl_max=kl * 63.7,
        ppl_teacher=of(18.31, 0.02),
        ppl_student=of(18.31 * (1 + 0.9 * kl), 0.02),
        ppl_ratio=Estimate(1 + 0.9 * kl, None if error is None else 0.02 * kl),
        delta_p=of(-0.02 * kl),
        delta_p_rms=of(0.1 * kl**0.5),
        top1=Estimate(1 - flips, None if error is None else 0.01 * flips),
        top5=Estimate(1 - flips / 2, None if error is None else 0.01 * flips),
        windows=windows,
        positions=windows * 255,
    )


def student(
    name: str,
    label: str,
    bpw: float,
    kl: float,
    error: float | None,
    *,
    behind: Estimate | None = None,
    worst: tuple[Worst, ...] = WORST,
    speed: Speed | None = None,
) -> Student:
    sha256 = name.encode().hex().ljust(64, "0")[:64]
    return Student(Model(name, size(bpw, label), sha256, speed), divergence(kl, error), worst, behind)


def setting(text: str = "wiki.txt", **changes: object) -> Setting:
    given: dict[str, object] = {
        "text": text,
        "text_sha256": "ab" * 32,
        "context": 512,
        "stride": 512,
        "windows": 64,
        "available": 561,
        "bos": 1,
        "floor": 3.1e-9,
        "dtype": "float32",
        "device": "cpu (AMD EPYC)",
        "versions": {"mlxquant": "0.1.0", "mlx": "0.32.4"},
    }
    return Setting(**{**given, **changes})  # type: ignore[arg-type]


def report(students: tuple[Student, ...] | None = None, **changes: object) -> Report:
    if students is None:
        before = [None, *LADDER[:-1]]
        students = tuple(
            student(*row, behind=None if b is None else Estimate(row[3] - b[3], 0.7 * row[4]))
            for row, b in zip(LADDER, before, strict=True)
        )
    teacher = Model("smol", size(16.0, "BF16"), "cd" * 32)
    given: dict[str, object] = {"teacher": teacher, "students": students, "setting": setting()}
    return Report(**{**given, **changes})  # type: ignore[arg-type]


def timed() -> Report:
    """With --speed."""
    found = tuple(
        student(*row, speed=Speed(1234.5 - 40 * i, 98.7 + 9 * i, 350_000_000 - 20_000_000 * i))
        for i, row in enumerate(LADDER)
    )
    return report(found)
