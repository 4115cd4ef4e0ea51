"""A report's models timed, each alone: what `eval --speed` adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlxquant.errors import MemoryBudgetError
from mlxquant.measure.forward import Split
from mlxquant.measure.match import Side
from mlxquant.measure.report import Model, Report, Speed
from mlxquant.measure.runner import How
from mlxquant.measure.speed import Case, bench
from mlxquant.run.ready import make_ready

SPEED = Case(512, 128, 0)


def with_speed(report: Report, sides: Sequence[Side], how: How) -> Report:
    """The report with each model timed alone; with a note instead where one does not fit with the longer context, as
    what was scored still holds. sides: teacher and students, as `evaluate` had them.
    """
    try:
        found = {side.name: _speed(side, how) for side in sides}
    except MemoryBudgetError as error:
        return replace(report, notes=(*report.notes, f"not timed: {error.message}"))

    def timed(model: Model) -> Model:
        return replace(model, speed=found[model.name])

    students = tuple(replace(student, model=timed(student.model)) for student in report.students)
    return replace(report, teacher=timed(report.teacher), students=students)


def _speed(side: Side, how: How) -> Speed:
    import mlx.core as mx

    tokens = SPEED.prompt_tokens + SPEED.generated_tokens
    ready = make_ready(side.path, how.device, side.text, expand=how.expand, context_tokens=tokens, force=how.force)
    vocabulary = Split(ready.loaded, ready.plan).vocabulary
    (row,) = bench(ready.loaded.model, ready.plan.make, vocabulary, [SPEED], 2, ready.prefill_step)
    del ready
    mx.clear_cache()
    return Speed(row.mean("prefill_tok_s"), row.mean("decode_tok_s"), row.peak_bytes)
