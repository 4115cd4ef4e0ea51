"""Killed at random points and started again, a conversion ends in the same bytes as one that was left alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from tests.tiny import make

# A process that forks a converting child and kills it when the journal has a random number of lines, 20 times: forking
# spares 20 interpreter starts. It never imports mlx and converts nothing itself, so at each fork it has neither threads
# nor compiled kernels, of which macOS would not promise the child a copy.
DRIVER = """
import itertools, json, os, random, shutil, signal, sys, time
from pathlib import Path
from mlxquant.convert.sources import open_source
from mlxquant.convert.to_mlx import to_mlx
from mlxquant.plan.plan import make_plan
from mlxquant.plan.recipe import settings

source, scratch = Path(sys.argv[1]), Path(sys.argv[2])
rng = random.Random(20)

def convert(out):
    opened = open_source(source)
    to_mlx(opened, make_plan(opened.config, opened.specs, settings(bits=4)), out, shard_bytes=2_000_000)

def lines(out):
    try:
        return (out.parent / (out.name + ".partial") / "journal").read_bytes().count(b"\\n")
    except OSError:
        return 0

def begin(out):
    child = os.fork()
    if child == 0:
        convert(out)
        os._exit(0)
    return child

def finish(out):
    assert os.waitpid(begin(out), 0)[1] == 0, "the child failed: see above"

def killed(out, at_line, delay):
    child = begin(out)
    while lines(out) < at_line:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return not out.exists()

finish(scratch / "whole")
opened = open_source(source)
total = len(make_plan(opened.config, opened.specs, settings(bits=4)).tensors)
kills, out = 0, scratch / "killed"
points = itertools.cycle(sorted(rng.randrange(0, total) for _ in range(20)))
while kills < 20:
    kills += killed(out, next(points), rng.random() * 0.002)
    if out.exists():  # finished before it could be killed
        shutil.rmtree(out)
finish(out)
print(json.dumps({"kills": kills}))
"""


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def test_killed_at_20_random_points(tmp_path):
    source = make(tmp_path / "source", width=512, layers=6)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(source), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == 20
    whole = digests(tmp_path / "whole")
    assert len([n for n in whole if n.endswith(".safetensors")]) > 1
    assert digests(tmp_path / "killed") == whole
    assert not (tmp_path / "killed.partial").exists()
