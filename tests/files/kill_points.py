"""Run by test_publish.py in its own process: a small conversion that dies by SIGKILL where it is told to.

    python kill_points.py FOLDER each|force|restart|chain [file|files]  ->  one JSON line

OUT is a folder, or one file, or several of which readers open the first.

The points are Python audit events (each open, mkdir, rename, remove, truncate, flock): the process kills
itself just before its n-th. Forked, so that hundreds of deaths take seconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlxquant.errors import TargetError
from mlxquant.files.place import FilesPlace, Place
from mlxquant.files.publish import Workspace
from mlxquant.files.shards import INDEX, assign, index_json
from mlxquant.tensors import TensorSpec

GROUPS = [[TensorSpec(f"{i}.weight", (40, 8), "U32"), TensorSpec(f"{i}.scales", (40, 2), "F16")] for i in range(4)]
OUTPUT = sys.argv[3] if len(sys.argv) > 3 else "folder"
LIMIT = 10**9 if OUTPUT == "file" else 3500
# As GGUF's: the first shard comes last. INDEX stands for a small file beside them.
NAMES = [*(() if OUTPUT == "file" else (INDEX,)), *reversed([shard.file for shard in assign(GROUPS, LIMIT)])]
EVENTS = ("open", "os.", "shutil.", "fcntl.", "tempfile.")


def convert(out: Path, how: str = "each") -> int:
    """The executor in small. Returns how many groups it took over."""
    shards = list(assign(GROUPS, LIMIT))
    if OUTPUT != "folder":
        shards[0] = replace(shards[0], seal=(9, 11))
    place: Place | Path = out if OUTPUT == "folder" else FilesPlace(out, NAMES)
    with Workspace.open(place, "digest", shards, force=how == "force", restart=how == "restart") as work:
        for group in GROUPS:
            name = group[0].name
            if work.done(name):
                continue
            for start in (0, 10, 20, 30):
                for spec in group:
                    rows = np.full((10, spec.width), start + int(name[0]), "<u4" if spec.dtype == "U32" else "<f2")
                    work.write(spec.name, rows)
            work.finish(name, [spec.name for spec in group])
        if OUTPUT != "file":
            work.write_file(INDEX, index_json(shards))
        if OUTPUT == "folder":
            work.write_file("config.json", b'{"made": "anew"}')
        work.seal(b"##")
        work.publish()
        return work.resumed


def die_at(point: int) -> None:
    seen = 0

    def hook(event: str, _: object) -> None:
        nonlocal seen
        if event.startswith(EVENTS):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(out: Path, how: str, point: int = 0) -> str:
    """Converts in a child: 'killed', 'refused' (TargetError), or the number of groups it took over."""
    child = os.fork()
    if not child:
        if point:
            die_at(point)
        try:
            os._exit(convert(out, how))
        except TargetError:
            os._exit(100)
        except BaseException as exc:
            sys.excepthook(type(exc), exc, exc.__traceback__)
            os._exit(101)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 101:
        raise SystemExit("the child raised something else")
    return {-signal.SIGKILL: "killed", 100: "refused"}.get(status, str(status))


def folder(path: Path) -> dict[str, str]:
    return {p.name: p.read_bytes().hex() for p in sorted(path.iterdir())} if path.exists() else {}


def found_at(out: Path) -> dict[str, str]:
    """What a reader finds: without the file that it opens first, nothing."""
    if OUTPUT == "folder":
        return folder(out)
    there = {name: (out.parent / name).read_bytes().hex() for name in NAMES if (out.parent / name).exists()}
    return there if NAMES[-1] in there else {}


def remove(out: Path) -> None:
    for name in NAMES if OUTPUT != "folder" else ():
        (out.parent / name).unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)


def old(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text('{"made": "before"}')


def old_output(out: Path) -> None:
    if OUTPUT == "folder":
        old(out)
    for name in NAMES if OUTPUT != "folder" else ():
        (out.parent / name).write_text("before")


def each(place: Path, how: str) -> dict[str, object]:
    """Killed once, at every point in turn; then run again. "force": over an old OUT; "restart": over an old partial."""
    expected, before = reference(place), {}
    outcomes: dict[str, int] = {}
    out, partial = place / "out", place / "out.partial"
    for point in range(1, 1000):
        remove(out)
        if how == "force":
            old_output(out)
            before = found_at(out)
        if how == "restart" and run(out, "each", 30) != "killed":
            raise SystemExit("there is nothing to begin anew")
        if run(out, how, point) != "killed":
            return {"points": point - 1, "outcomes": outcomes}
        found = found_at(out)
        if found not in (before, expected, {}):
            raise SystemExit(f"point {point}: OUT is neither old nor new nor absent")
        if how == "force" and not found and not (partial / "replaced").exists():
            raise SystemExit(f"point {point}: the old OUT is lost")
        again = run(out, "each" if how == "restart" else how)
        outcomes[again] = outcomes.get(again, 0) + 1
        if found_at(out) != expected or partial.exists() or (again == "refused" and found != expected):
            raise SystemExit(f"point {point}: run again: {again}, partial {partial.exists()}")
    raise SystemExit("more points than expected")


def reference(place: Path) -> dict[str, str]:
    (place / "reference").mkdir()
    convert(place / "reference/out")
    return found_at(place / "reference/out")


def chain(place: Path) -> dict[str, object]:
    """Killed again and again at random points of one conversion, until it comes through."""
    expected = reference(place)
    rng, kills = random.Random(7), 0
    for attempt in range(8):
        out = place / f"{attempt}/out"
        while run(out, "each", rng.randrange(5, 45)) == "killed":
            kills += 1
        if run(out, "each") != "refused" or found_at(out) != expected:
            raise SystemExit(f"attempt {attempt}: OUT differs")
    return {"kills": kills}


if __name__ == "__main__":
    where, how = Path(sys.argv[1]), sys.argv[2]
    print(json.dumps(chain(where) if how == "chain" else each(where, how)))
