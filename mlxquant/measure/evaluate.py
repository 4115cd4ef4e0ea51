"""How far each student drifted from its teacher: both run over the same windows, and their logits are compared.

The first student runs beside the teacher where both fit into memory, window by window; otherwise the teacher goes
first, alone. Its final hidden states are kept either way, a hundredth of its logits, so that further students need its
output head only. What is kept and what is scored stands in files: stopped at any place, the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxquant.errors import SourceError, UsageError
from mlxquant.measure.divergence import difference, summarize, worst
from mlxquant.measure.forward import Split
from mlxquant.measure.kept import Kept
from mlxquant.measure.match import Side, check_student
from mlxquant.measure.report import Model, Report, Setting, Speed, Student, Worst
from mlxquant.measure.score import POSITION, score
from mlxquant.measure.size import sha256_of, size_of, tokenizer_sha256
from mlxquant.measure.speed import Case, bench
from mlxquant.measure.windows import Windows
from mlxquant.run.budget import FILL
from mlxquant.run.device import Device
from mlxquant.run.ready import Ready, make_ready, open_unread

Array = np.ndarray[Any, Any]

# Of the logits that are alive at a time there are three or four copies: 64 MB each.
_LOGITS_BYTES = 1 << 26
SPEED = Case(512, 128, 0)  # what --speed times
_TEXT_TOKENS = 16  # of text before one of the worst positions


class Watch(Protocol):
    """Who is told how far things are. `stopped` is asked after each window."""

    def stage(self, label: str, total: int, unit: str) -> None: ...

    def advance(self, count: int, note: str = "") -> None: ...

    def stopped(self) -> bool: ...


class Silent:
    """Nobody watches."""

    def stage(self, label: str, total: int, unit: str) -> None:
        pass

    def advance(self, count: int, note: str = "") -> None:
        pass

    def stopped(self) -> bool:
        return False


@dataclass(frozen=True)
class How:
    """How models are run. worst: positions shown of each student."""

    device: Device
    expand: str = "auto"
    force: bool = False
    worst: int = 5


class Runner:
    """One model, opened without its weights being read. Raises MemoryBudgetError when it would not fit alone."""

    def __init__(self, side: Side, windows: Windows, how: How) -> None:
        self.ready: Ready = open_unread(
            side.path,
            how.device,
            side.text,
            expand=how.expand,
            context_tokens=windows.tokens_WL.shape[1],
            force=how.force,
        )
        self.split = Split(self.ready.loaded, self.ready.plan)

    def read(self) -> None:
        self.ready.loaded.materialize()

    def hidden(self, tokens_L: Array, first: int, step: int | None = None) -> Array:
        return self.split.hidden(tokens_L, first, step or self.ready.prefill_step)


class Teacher:
    """Final hidden states of each window, from the kept file or, where that ends, by running."""

    def __init__(self, side: Side, windows: Windows, how: How, work: Path, identity: dict[str, Any]) -> None:
        self.windows, self.runner = windows, Runner(side, windows, how)
        loaded = self.runner.ready.loaded
        self.header = identity | {"expanded": loaded.expanded}
        shape = (windows.next_P(0).size, self.runner.split.width)
        self._kept = Kept.open(work / "teacher.states", self.header, np.dtype((np.float32, shape)))
        self._floor = Kept.open(work / "floor.scores", self.header, np.dtype((POSITION, shape[:1])))
        self._read = False

    def close(self) -> None:
        self._kept.close()
        self._floor.close()

    @property
    def complete(self) -> bool:
        return len(self._kept) == len(self.windows.tokens_WL) and len(self._floor) == 1

    def read(self) -> None:
        """What is still needed of it: all, or the head alone."""
        if self.complete:
            self.runner.split.drop_trunk()
        if not self._read:
            self.runner.read()
            self._read = True

    def hidden(self, i: int) -> Array:
        """Of window i; all before it are kept already."""
        if len(self._floor) == 0:
            self._floor.append(self._from_itself())
        if i < len(self._kept):
            return self._kept.read(i)
        hidden_PH = self.runner.hidden(self.windows.tokens_WL[i], self.windows.first)
        self._kept.append(hidden_PH)
        return hidden_PH

    def _from_itself(self) -> Array:
        """Scores of the first window against the same in other chunks: sums are then added in another order."""
        tokens_L, first = self.windows.tokens_WL[0], self.windows.first
        other = self.runner.hidden(tokens_L, first, max(1, first // 3))
        same = self.runner.hidden(tokens_L, first)
        return scored(self, self.runner.split, same, other, self.windows.next_P(0))

    @property
    def floor(self) -> float:
        return float(self._floor.read(0)["kl"].mean())

    def run_all(self, watch: Watch, label: str) -> None:
        self.read()
        watch.stage(label, len(self.windows.tokens_WL), "windows")
        watch.advance(len(self._kept))
        for i in range(len(self._kept), len(self.windows.tokens_WL)):
            self.hidden(i)
            watch.advance(1)
            if watch.stopped():
                return


def evaluate(
    teacher: Side, students: Sequence[Side], windows: Windows, how: How, *, work: Path | None = None, watch: Watch
) -> Report:
    """The report, best student first.

    work: a folder for what is kept, which stays; None: one of ours, gone when everything is scored. Raises PlanError
    for a student that is none of this teacher, MemoryBudgetError, SourceError for damaged weights or a kept file of
    something else, and TargetError when nothing can be kept.
    """
    for student in students:
        check_student(teacher, student, windows)
    hashes = _hashes([teacher, *students], watch)
    identity = _identity(hashes[0], teacher, windows, how)
    with _working(work, identity) as (folder, finished), ExitStack() as stack:
        source = Teacher(teacher, windows, how, folder, identity)
        stack.callback(source.close)
        notes: dict[str, None] = dict.fromkeys(source.runner.ready.notes)
        tables: list[tuple[Side, str, Array]] = []
        for place, (student, sha) in enumerate(zip(students, hashes[1:], strict=True), 1):
            label = f"{student.name} ({place} of {len(students)})" if len(students) > 1 else student.name
            scores = _score_student(source, student, sha, windows, how, folder, watch, label, notes)
            if len(scores):
                tables.append((student, sha, scores))
            if watch.stopped():
                break
        complete = len(tables) == len(students) and all(len(t[2]) == len(windows.tokens_WL) for t in tables)
        if complete:
            finished()
        if not tables:
            raise KeyboardInterrupt
        setting = _setting(source, windows, how)
        found = _ranked(tables, windows, teacher, how.worst)
        model = Model(teacher.name, size_of(teacher.path), hashes[0])
        return Report(model, found, setting, not complete, tuple(notes))


def _score_student(
    teacher: Teacher,
    side: Side,
    sha: str,
    windows: Windows,
    how: How,
    folder: Path,
    watch: Watch,
    label: str,
    notes: dict[str, None],
) -> Array:
    """POSITION (windows scored, positions); fewer windows when it was stopped. Weights are read only where needed."""
    runner = Runner(side, windows, how)
    notes.update(dict.fromkeys(runner.ready.notes))
    header = teacher.header | {"student": sha, "student expanded": runner.ready.loaded.expanded}
    positions = windows.next_P(0).size
    with Kept.open(folder / f"{sha[:16]}.scores", header, np.dtype((POSITION, (positions,)))) as kept:
        total = len(windows.tokens_WL)
        if len(kept) < total:
            if not teacher.complete and not _both_fit(teacher.runner, runner, how):
                teacher.run_all(watch, f"teacher, alone: with {side.name} it would not fit")
                if not teacher.complete:
                    return kept.all()
            teacher.read()
            runner.read()
            watch.stage(label, total, "windows")
            watch.advance(len(kept))
            for i in range(len(kept), total):
                scores = _score_window(teacher, runner, side, windows, i)
                kept.append(scores)
                watch.advance(1, f"KLD {scores['kl'].mean():.2g}")
                if watch.stopped():
                    break
        return kept.all()


def _score_window(teacher: Teacher, runner: Runner, side: Side, windows: Windows, i: int) -> Array:
    p_PH = teacher.hidden(i)
    q_PH = runner.hidden(windows.tokens_WL[i], windows.first)
    scores = scored(teacher, runner.split, p_PH, q_PH, windows.next_P(i))
    if np.isnan(scores["kl"]).any():
        raise SourceError(
            f"{side.path}: window {i + 1} gives logits that are no numbers, from this model or from its teacher",
            hint="see `mlxquant verify` for damaged weights; float16 may also overflow: use bfloat16 or --expand on",
        )
    return scores


def scored(teacher: Teacher, student: Split, p_PH: Array, q_PH: Array, next_P: Array) -> Array:
    """Some positions at a time, so that logits take a bounded room whatever the vocabulary."""
    head = teacher.runner.split
    rows = max(16, _LOGITS_BYTES // (4 * head.vocabulary))
    spans = [slice(at, at + rows) for at in range(0, len(next_P), rows)]
    return np.concatenate([score(head.logits(p_PH[s]), student.logits(q_PH[s]), next_P[s]) for s in spans])


def _both_fit(teacher: Runner, student: Runner, how: How) -> bool:
    together = teacher.ready.budget.total_bytes + student.ready.budget.total_bytes + 4 * _LOGITS_BYTES
    return together <= FILL * how.device.machine.working_set_bytes


def _hashes(sides: Sequence[Side], watch: Watch) -> list[str]:
    found = []
    for side in sides:
        done = 0

        def progress(now: int, total: int, name: str = side.name) -> None:
            nonlocal done
            if not done:
                watch.stage(f"Hashing {name}", total, "bytes")
            watch.advance(now - done)
            done = now

        found.append(sha256_of(side.path, progress))
    return found


def _identity(sha: str, teacher: Side, windows: Windows, how: How) -> dict[str, Any]:
    """What kept files belong to; another of these makes other numbers."""
    return {
        "teacher": sha,
        "tokenizer": tokenizer_sha256(teacher.text),
        "text": windows.digest,
        "device": how.device.kind,
        "mlx": version("mlx"),
    }


@contextmanager
def _working(work: Path | None, identity: dict[str, Any]) -> Iterator[tuple[Path, Callable[[], None]]]:
    """(folder, what to call when everything is scored). A folder of the user's own stays."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = work or Path.home() / ".cache" / "mlxquant" / "eval" / key
    done = False

    def finished() -> None:
        nonlocal done
        done = True

    try:
        yield folder, finished
    finally:
        if done and not work:
            shutil.rmtree(folder, ignore_errors=True)


def _setting(teacher: Teacher, windows: Windows, how: How) -> Setting:
    loaded, protocol = teacher.runner.ready.loaded, windows.protocol
    return Setting(
        text=windows.corpus.label,
        text_sha256=windows.corpus.sha256,
        context=protocol.context,
        stride=protocol.stride or protocol.context,
        windows=len(windows.tokens_WL),
        available=windows.available,
        bos=windows.bos,
        floor=teacher.floor,
        dtype=teacher.runner.split.dtype,
        device=f"{how.device.kind} ({how.device.machine.chip})",
        versions={name: version(name) for name in ("mlxquant", "mlx", "mlx-lm")}
        | {"quantization": loaded.quantization},
    )


def _ranked(
    tables: Sequence[tuple[Side, str, Array]], windows: Windows, teacher: Side, count: int
) -> tuple[Student, ...]:
    """Best first, each with how far it is behind the one before it."""
    ordered = sorted(tables, key=lambda table: (float(table[2]["kl"].mean()), table[0].name))
    found: list[Student] = []
    for place, (side, sha, scores_WP) in enumerate(ordered):
        model = Model(side.name, size_of(side.path), sha)
        places = worst(scores_WP, count)
        shown = tuple(_worst(scores_WP, at, windows, teacher) for at in places)
        student = Student(model, summarize(scores_WP), shown)
        if place:
            before = ordered[place - 1][2]
            both = min(len(before), len(scores_WP))
            student = replace(student, behind=difference(scores_WP[:both], before[:both]))
        found.append(student)
    return tuple(found)


def _worst(scores_WP: Array, at: tuple[int, int], windows: Windows, teacher: Side) -> Worst:
    window, place = at
    position = windows.first + place
    tokens, row = windows.tokens_WL[window], scores_WP[window, place]

    def decode(*ids: int) -> str:
        return teacher.text.decode(ids)

    before = tokens[max(0, position + 1 - _TEXT_TOKENS) : position + 1].tolist()
    return Worst(
        float(row["kl"]),
        window,
        position,
        decode(*before),
        decode(int(tokens[position + 1])),
        decode(int(row["best_p"])),
        decode(int(row["best_q"])),
    )


def with_speed(report: Report, sides: Sequence[Side], how: How) -> Report:
    """The report with each model timed alone. sides: teacher and students, as `evaluate` had them."""
    found = {side.name: _speed(side, how) for side in sides}

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


def named(paths: Sequence[Path]) -> list[str]:
    """As short names as tell the paths from one another. Raises UsageError for a path that stands there twice."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("a model is named twice", hint="give each teacher and student once")
    parts = [path.resolve().parts for path in paths]
    length = next((n for n in range(1, 99) if len({p[-n:] for p in parts}) == len(paths)), 99)
    return ["/".join(p[-length:]) for p in parts]
