"""`eval --layers`: a student taken apart, tensor by tensor."""

from __future__ import annotations

from mlxquant.errors import MemoryBudgetError
from mlxquant.measure.layers import Injected, inject, whole
from mlxquant.measure.match import Side, check_student
from mlxquant.measure.report import Estimate
from mlxquant.measure.runner import How, Runner, Watch, both_fit
from mlxquant.measure.windows import Windows
from mlxquant.units import format_bytes


def by_tensor(
    teacher: Side, student: Side, windows: Windows, how: How, *, watch: Watch
) -> tuple[Estimate, list[Injected], int]:
    """(mean KL of the whole student, one row for each weight that differs, how many differ). Ends early, with fewer
    rows, where `watch` says so.

    Raises MemoryBudgetError where the two do not fit together, and what `evaluate` raises.
    """
    check_student(teacher, student, windows)
    ours, theirs = Runner(teacher, windows, how), Runner(student, windows, how)
    if not how.force and not both_fit(ours, theirs, how):
        needed = format_bytes(ours.ready.budget.total_bytes + theirs.ready.budget.total_bytes)
        raise MemoryBudgetError(
            f"--layers holds both models, {needed} together, of {format_bytes(how.device.machine.working_set_bytes)}",
            hint="leave --layers out, or add --force to try all the same",
        )
    watch.stage("Reading both models", 1, "pair")
    ours.read()
    theirs.read()
    models, step = (ours.ready.loaded, theirs.ready.loaded), ours.ready.prefill_step
    whole_kl, rows, differing = whole(*models, windows, step=step), list[Injected](), 0

    def progress(done: int, total: int) -> None:
        nonlocal differing
        if not differing:
            watch.stage(student.name, total, "tensors")
        differing = total
        watch.advance(1)

    for row in inject(*models, windows, step=step, progress=progress):
        rows.append(row)
        if watch.stopped():
            break
    return whole_kl, rows, differing
