"""The two sides of an eval at work: models opened before anything of them is read, and a teacher that runs once.

The teacher's final hidden states are kept in a file, a hundredth of its logits, so that each student after the first
needs its output head only.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxquant.fit.memory import limit_bytes
from mlxquant.measure.forward import LOGITS_BYTES, Split, compare
from mlxquant.measure.kept import Kept
from mlxquant.measure.match import Side
from mlxquant.measure.score import POSITION
from mlxquant.measure.windows import Windows
from mlxquant.run.device import Device
from mlxquant.run.ready import Ready, open_unread

Array = np.ndarray[Any, Any]


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


def step(watch: Watch) -> None:
    """One of the stage's units is done. Raises KeyboardInterrupt when it was stopped by then."""
    watch.advance(1)
    if watch.stopped():
        raise KeyboardInterrupt


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

    def __init__(self, side: Side, windows: Windows, how: How, folder: Path, identity: dict[str, Any]) -> None:
        self.windows, self.how, self.folder = windows, how, folder
        self.runner = Runner(side, windows, how)
        loaded = self.runner.ready.loaded
        self.header = identity | {"expanded": loaded.expanded}
        shape = (windows.next_P(0).size, self.runner.split.width)
        states, scores = np.dtype((np.float32, shape)), np.dtype((POSITION, shape[:1]))
        with ExitStack() as stack:  # a second file that is refused lets go of the first one's lock
            self._kept = stack.enter_context(Kept.open(folder / "teacher.states", self.header, states))
            self._floor = stack.enter_context(Kept.open(folder / "floor.scores", self.header, scores))
            self.close = stack.pop_all().close
        self._read = False

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
        """Of window i. Those before it are run too where they are not kept: a damaged file ends at the damage."""
        while len(self._kept) <= i:
            tokens_L = self.windows.tokens_WL[len(self._kept)]
            self._kept.append(self.runner.hidden(tokens_L, self.windows.first))
        if len(self._floor) == 0:
            self._floor.append(self._from_itself())
        return self._kept.read(i)

    def _from_itself(self) -> Array:
        """Scores of the first window against the same in other chunks: sums are then added in another order."""
        tokens_L, first = self.windows.tokens_WL[0], self.windows.first
        other = self.runner.hidden(tokens_L, first, max(1, first // 3))
        split = self.runner.split
        return compare(split, split, self._kept.read(0), other, self.windows.next_P(0))

    @property
    def floor(self) -> float:
        if len(self._floor) == 0:  # its file can be damaged beside scores that are whole
            self.read()
            self.hidden(0)
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
        self.hidden(0)  # and with it the floor, where only that was lost


def notes_on(runner: Runner) -> list[str]:
    """What to say of how a model is run; that it is expanded once, not with the bytes of each."""
    loaded = runner.ready.loaded
    notes = [note for note in runner.ready.notes if not note.startswith("weights expanded")]
    if loaded.expanded:
        notes.insert(0, "weights are expanded to float32 for the CPU, exactly")
    elif loaded.kind == "gguf" and loaded.quantization != "not quantized":
        notes.append(f"{loaded.path.name} runs as MLX arrays here; docs/gguf.md says what that adds to each type")
    return notes


def both_fit(teacher: Runner, student: Runner, how: How) -> bool:
    together = teacher.ready.budget.total_bytes + student.ready.budget.total_bytes + 4 * LOGITS_BYTES
    return together <= limit_bytes(how.device.machine)
