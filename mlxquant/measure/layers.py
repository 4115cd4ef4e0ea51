"""Where a student's divergence comes from: the teacher with one of its weights replaced by the student's, for each.

A weight of layer n leaves what enters layer n as it is: that is kept, and the layers before n hand it out instead of
computing it, which saves half the time. No list says for which of mlx-lm's models this is right (in some a layer sees
more than the one before it leaves): at each layer the teacher itself is run so, and where its hidden states are not the
same to the bit, everything is computed from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxquant.errors import UnsupportedError
from mlxquant.families.layout import Target
from mlxquant.families.roles import Role, assign_roles
from mlxquant.families.shape import ModelShape
from mlxquant.measure.changes import changes, put, shapes
from mlxquant.measure.divergence import summarize
from mlxquant.measure.forward import Split, Tap, compare
from mlxquant.measure.report import Estimate
from mlxquant.measure.windows import Windows
from mlxquant.run.cache import plan_cache
from mlxquant.run.model import LoadedModel


@dataclass(frozen=True)
class Injected:
    """kl: mean KL(teacher || teacher with this one weight of the student), nats. name: without what models for images,
    too, have before it. layer: None outside the layers. kind: its role as families/roles.py has it.
    """

    name: str
    layer: int | None
    kind: str
    kl: Estimate


def inject(
    teacher: LoadedModel,
    student: LoadedModel,
    windows: Windows,
    *,
    step: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Injected]:
    """One for each weight that is not the same in both models, in the model's own order; those below the rounding of
    the machine as measured. A tied embedding is replaced in both of its places.

    What their sum is, set beside `whole`: KL of small errors is a quadratic form in the change of the logits, so where
    errors have nothing to do with one another their divergences add up to the student's. It is no bound: errors that
    grow on their way make the whole more than the sum, and what one weight has ruined another cannot ruin again. A
    student in another basis (scales folded into norms, as by AWQ; rotated weights) undoes in one weight what it did in
    the one before: its sum is far above the whole, and the single figures say nothing.

    step: at most so many tokens at once; windows that are longer are always computed from the first layer on.
    progress(done, total) after each weight.

    Raises PlanError when the models have not the same weights, UnsupportedError for a model that cannot be cut.
    """
    source = _Teacher(teacher, windows, step)
    found = list(changes(teacher, student, source.split.dtype))
    kinds = _kinds(teacher)
    for done, change in enumerate(found, 1):
        source.enter(change.path)
        kl = source.kl(source.split.of(change.of(source.split.whole)))
        if progress:
            progress(done, len(found))
        yield Injected(change.name, change.layer, kinds.get(change.name, Role.OTHER), kl)


def whole(teacher: LoadedModel, student: LoadedModel, windows: Windows, *, step: int | None = None) -> Estimate:
    """Mean KL(teacher || student) over the same windows, computed the same way."""
    return _Teacher(teacher, windows, step).kl(Split(student, plan_cache(student.model)))


class _Teacher:
    """Its hidden states of each window, and what enters the layer that was asked for last."""

    def __init__(self, loaded: LoadedModel, windows: Windows, step: int | None) -> None:
        self.split = Split(loaded, plan_cache(loaded.model))
        self._windows, self._step = windows, step
        self._hidden = [self.split.hidden(tokens_L, windows.first, step) for tokens_L in windows.tokens_WL]
        self._list = layers_of(self.split.trunk)
        self._skips = bool(self._list) and (step or windows.tokens_WL.shape[1]) >= windows.tokens_WL.shape[1] - 1
        self._at, self._entering = 0, list[Any]()

    def kl(self, other: Split) -> Estimate:
        """From the teacher to a model that is the same before the layer that was entered."""
        scores = []
        for i, (tokens_L, p_PH) in enumerate(zip(self._windows.tokens_WL, self._hidden, strict=True)):
            q_PH = other.of(self._from(other.whole, i)).hidden(tokens_L, self._windows.first, self._step)
            scores.append(compare(self.split, other, p_PH, q_PH, self._windows.next_P(i)))
        return summarize(np.stack(scores)).kl

    def enter(self, path: str) -> None:
        """From now on runs begin at the layer that `path` lies in: behind the last for what is behind the trunk."""
        if not self._skips:
            return
        layer = self._place(path)
        if layer < self._at:
            self._at, self._entering = 0, []
        if layer > self._at:
            self._entering = [self._leaving(i, layer - 1) for i in range(len(self._hidden))]
            self._at = layer
            if not self._same():
                self._skips, self._at, self._entering = False, 0, []

    def _place(self, path: str) -> int:
        trunk, layers, number, *_ = [*path.split("."), "", "", ""]
        if trunk != self.split.name:
            return len(self.split.trunk[self._list])
        return int(number) if layers == self._list and number.isdigit() else 0

    def _leaving(self, window: int, layer: int) -> Any:
        """What leaves a layer; nothing behind it is evaluated."""
        import mlx.core as mx

        tap = Tap(self.split.trunk[self._list][layer])
        model = put(self._from(self.split.whole, window), [self.split.name, self._list, str(layer)], tap)
        model(mx.array(self._windows.tokens_WL[window : window + 1, :-1]), cache=self.split.make_cache())
        mx.eval(tap.out)
        return tap.out

    def _from(self, model: Any, window: int) -> Any:
        """The model with Taps in place of the layers that were passed."""
        if not self._at:
            return model
        layers = list(model[self.split.name][self._list])
        layers[: self._at] = [Tap(layer, self._entering[window]) for layer in layers[: self._at]]
        return put(model, [self.split.name, self._list], layers)

    def _same(self) -> bool:
        """Whether the teacher itself, begun here, gives the same. Layers that leave more than one array never do."""
        import mlx.core as mx

        if not all(isinstance(out, mx.array) for out in self._entering):
            return False
        begun, windows = self.split.of(self._from(self.split.whole, 0)), self._windows
        return np.array_equal(begun.hidden(windows.tokens_WL[0], windows.first, self._step), self._hidden[0])


def layers_of(trunk: Any) -> str:
    """The name of the one list of modules in a trunk; '' where there is not one."""
    from mlx.nn import Module

    lists = [name for name, value in trunk.items() if isinstance(value, list)]
    lists = [name for name in lists if trunk[name] and all(isinstance(item, Module) for item in trunk[name])]
    return lists[0] if len(lists) == 1 else ""


def _kinds(teacher: LoadedModel) -> dict[str, Role]:
    """Roles by name; none for a family that mlxquant has no shape of."""
    try:
        dimensions = ModelShape.from_config(teacher.config)
    except UnsupportedError:
        return {}
    return assign_roles([Target(name, shape, "F32", ()) for name, shape in shapes(teacher).items()], dimensions)
