"""How far each student drifted from its teacher: both run over the same windows, and their logits are compared.

The first student runs beside the teacher where both fit into memory, window by window; otherwise the teacher goes
first, alone. Its final hidden states are kept either way, a hundredth of its logits, so that further students need its
output head only. What is kept and what is scored stands in files: stopped at any place, the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.errors import SourceError, UsageError
from mlxquant.measure.divergence import difference, summarize, worst
from mlxquant.measure.forward import compare
from mlxquant.measure.kept import Kept
from mlxquant.measure.match import Side, check_student
from mlxquant.measure.report import Model, Report, Setting, Student, Worst
from mlxquant.measure.runner import How, Runner, Teacher, Watch, both_fit, notes_on
from mlxquant.measure.score import POSITION
from mlxquant.measure.size import sha256_of, size_of, tokenizer_sha256
from mlxquant.measure.windows import Windows

Array = np.ndarray[Any, Any]

_TEXT_TOKENS = 16  # of text before one of the worst positions


def evaluate(teacher: Side, students: Sequence[Side], windows: Windows, how: How, folder: Path, watch: Watch) -> Report:
    """The report, best student first.

    folder: where states and scores are kept, and found again. Raises PlanError for a student that is none of this
    teacher, MemoryBudgetError, SourceError for damaged weights or a kept file of something else, TargetError when
    nothing can be kept, and KeyboardInterrupt when it was stopped before anything was scored.
    """
    for student in students:
        check_student(teacher, student, windows)
    hashes = _hashes([teacher, *students], watch)
    identity = _identity(hashes[0], teacher, windows, how)
    with closing(Teacher(teacher, windows, how, folder, identity)) as source:
        notes: dict[str, None] = dict.fromkeys(notes_on(source.runner))
        tables: list[tuple[Side, str, Array]] = []
        for place, (student, sha) in enumerate(zip(students, hashes[1:], strict=True), 1):
            label = f"{place} of {len(students)}: {student.name}" if len(students) > 1 else student.name
            scores = _score_student(source, student, sha, label, watch, notes)
            if len(scores):
                tables.append((student, sha, scores))
            if watch.stopped():
                break
        complete = len(tables) == len(students) and all(len(t[2]) == len(windows.tokens_WL) for t in tables)
        if not tables:
            raise KeyboardInterrupt
        setting = _setting(source, windows, how)
        found = _ranked(tables, windows, teacher, how.worst)
        model = Model(teacher.name, size_of(teacher.path), hashes[0])
        return Report(model, found, setting, not complete, tuple(notes))


def _score_student(teacher: Teacher, side: Side, sha: str, label: str, watch: Watch, notes: dict[str, None]) -> Array:
    """POSITION (windows scored, positions); fewer windows when it was stopped. Weights are read only where needed."""
    windows, runner = teacher.windows, Runner(side, teacher.windows, teacher.how)
    notes.update(dict.fromkeys(notes_on(runner)))
    header = teacher.header | {"student": sha, "student expanded": runner.ready.loaded.expanded}
    record = np.dtype((POSITION, windows.next_P(0).shape))
    with Kept.open(teacher.folder / f"{sha[:16]}.scores", header, record) as kept:
        total = len(windows.tokens_WL)
        if len(kept) < total:
            if not teacher.complete and not both_fit(teacher.runner, runner, teacher.how):
                teacher.run_all(watch, "teacher, alone first")
                if not teacher.complete:
                    return kept.all()
            teacher.read()
            runner.read()
            watch.stage(label, total, "windows")
            watch.advance(len(kept))
            for i in range(len(kept), total):
                scores = _score_window(teacher, runner, side, i)
                kept.append(scores)
                watch.advance(1, f"KLD {scores['kl'].mean():.2g}")
                if watch.stopped():
                    break
        return kept.all()


def _score_window(teacher: Teacher, runner: Runner, side: Side, i: int) -> Array:
    windows, p_PH = teacher.windows, teacher.hidden(i)
    q_PH = runner.hidden(windows.tokens_WL[i], windows.first)
    scores = compare(teacher.runner.split, runner.split, p_PH, q_PH, windows.next_P(i))
    if np.isnan(scores["kl"]).any():
        path = teacher.runner.ready.loaded.path if np.isnan(scores["nll_p"]).any() else side.path
        raise SourceError(
            f"{path}: window {i + 1} gives logits that are no numbers",
            hint="see `mlxquant verify` for damaged weights; float16 may also overflow: use bfloat16 or --expand on",
        )
    return scores


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
        "text or windows": windows.digest,
        "device": how.device.kind,
        "mlx": version("mlx"),
    }


def own_folder(teacher: Side, windows: Windows, how: How) -> Path:
    """Where a run without a folder of the user's is kept until it has been shown: the same for the same command.

    A teacher is told by names, sizes and times of its files: the hashes in what is kept are the proof.
    """
    files = teacher.path.iterdir() if teacher.path.is_dir() else [teacher.path]
    known = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files) if file.is_file()]
    key = json.dumps([str(teacher.path.resolve()), known, windows.digest, how.device.kind, how.expand, version("mlx")])
    return Path.home() / ".cache" / "mlxquant" / "eval" / hashlib.sha256(key.encode()).hexdigest()[:16]


def _setting(teacher: Teacher, windows: Windows, how: How) -> Setting:
    protocol = windows.protocol
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
        versions={name: version(name) for name in ("mlxquant", "mlx", "mlx-lm")},
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


def named(paths: Sequence[Path]) -> list[str]:
    """As short names as tell the paths from one another. Raises UsageError for a path that stands there twice."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("a model is named twice", hint="give each teacher and student once")
    parts = [path.resolve().parts for path in paths]
    length = next((n for n in range(1, 99) if len({p[-n:] for p in parts}) == len(paths)), 99)
    return ["/".join(p[-length:]) for p in parts]
