"""What of two models is not the same, and one with a weight of the other in it.

Weights are taken as mlx-lm's modules hold them: codes, scales and biases are one weight, and so is a float array. A
model is never changed: what lies between its root and the weight is copied shallowly, the rest is shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from mlxquant.errors import PlanError
from mlxquant.measure.forward import innermost
from mlxquant.run.model import LoadedModel

# The arrays of one quantized weight.
_PACKED = frozenset({"weight", "scales", "biases", "global_scale"})

# Modules by path; and the arrays that make a weight, by its module's path and its own name there.
Modules = dict[str, Any]
Weights = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """`module`, with the student's weight in it, is to stand at `path` of the innermost teacher."""

    name: str
    path: str
    module: Any

    def of(self, model: Any) -> Any:
        """The model so changed; the one given stays as it is."""
        return put(model, self.path.split("."), self.module) if self.path else self.module

    @property
    def layer(self) -> int | None:
        return next((int(word) for word in self.path.split(".") if word.isdigit()), None)


def changes(teacher: LoadedModel, student: LoadedModel, dtype: str) -> Iterator[Change]:
    """What of the student is not the same in the teacher, in the teacher's order. dtype: what the teacher computes in.

    Raises PlanError when one has a weight that the other lacks, or has it in another shape.
    """
    (our_modules, ours), (their_modules, theirs) = (_weights(innermost(m.model)) for m in (teacher, student))
    _untie(our_modules, their_modules, theirs)
    for path, own in [*(ours.keys() - theirs.keys()), *(theirs.keys() - ours.keys())]:
        has, lacks = (teacher, student) if (path, own) in ours else (student, teacher)
        raise PlanError(
            f"{has.path}: has {_name(path, own)}, {lacks.path} has not: one cannot stand in the other",
            hint="give a teacher whose output head is not tied to its embedding, either" if lacks is teacher else None,
        )
    for (path, own), arrays in ours.items():
        module, other = our_modules[path], their_modules[path]
        if _shape(module, arrays) != _shape(other, theirs[path, own]):
            raise PlanError(f"{student.path}: {_name(path, own)} has not the teacher's shape")
        if not _equal(arrays, theirs[path, own]):
            rest = [name for at, name in ours if at == path and name != own]
            yield Change(_name(path, own), path, _in_dtype(_mixed(module, other, own, rest), dtype))


def shapes(loaded: LoadedModel) -> dict[str, tuple[int, ...]]:
    """Of every weight of the innermost model, by name, in its order; as it is before it is packed."""
    modules, weights = _weights(innermost(loaded.model))
    return {_name(path, own): _shape(modules[path], arrays) for (path, own), arrays in weights.items()}


def put(module: Any, path: Sequence[str], new: Any) -> Any:
    """A copy of a tree of modules, lists and dicts with `new` at `path`; what does not lie on the way is shared."""
    if not path:
        return new
    key = int(path[0]) if isinstance(module, (list, tuple)) else path[0]
    changed: Any = list(module) if isinstance(module, tuple) else copy(module)
    changed[key] = put(module[key], path[1:], new)
    return changed


def _weights(model: Any) -> tuple[Modules, Weights]:
    from mlx.utils import tree_flatten

    modules, found = dict(model.named_modules()), Weights()
    for name, array in tree_flatten(model.parameters()):
        path = name
        while path not in modules:
            path = path.rpartition(".")[0]
        own = name.removeprefix(f"{path}.")
        packed = "scales" in modules[path] and own in _PACKED
        found.setdefault((path, "weight" if packed else own), {})[own] = array
    return modules, found


def _untie(ours: Modules, theirs: Modules, weights: Weights) -> None:
    """Gives a student with a tied head the head that its teacher has apart: its embedding, as a linear layer."""
    import mlx.nn as nn

    linear = {nn.Embedding: nn.Linear, nn.QuantizedEmbedding: nn.QuantizedLinear}
    tables = [path for path, module in theirs.items() if type(module) in linear]
    heads = [path for path, module in ours.items() if path not in theirs and type(module) in linear.values()]
    if len(tables) != 1 or len(heads) != 1 or "." in heads[0]:
        return
    table, kind = theirs[tables[0]], linear[type(theirs[tables[0]])]
    head = kind.__new__(kind)
    head.__dict__.update(table.__dict__)
    dict.update(head, table)
    theirs[heads[0]], weights[heads[0], "weight"] = head, weights[tables[0], "weight"]


def _name(path: str, own: str) -> str:
    return f"{path}.{own}" if path else own


def _shape(module: Any, arrays: Mapping[str, Any]) -> tuple[int, ...]:
    """As it is before it is packed."""
    *rows, width = next(iter(arrays.values())).shape or (1,)
    return (*rows, width * 32 // module.bits) if "scales" in arrays else (*rows, width)


def _equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """By value, in the wider dtype."""
    import mlx.core as mx

    return ours.keys() == theirs.keys() and all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)


def _mixed(module: Any, other: Any, own: str, rest: Sequence[str]) -> Any:
    """`module` with one weight of `other`. A quantized weight is known to its own kind of module alone."""
    if own != "weight" or not ("scales" in module or "scales" in other):
        return put(module, own.split("."), _at(other, own))
    made = other
    for name in rest:
        made = put(made, name.split("."), _at(module, name))
    return made


def _at(module: Any, name: str) -> Any:
    for key in name.split("."):
        module = module[int(key)] if isinstance(module, (list, tuple)) else module[key]
    return module


def _in_dtype(module: Any, dtype: str) -> Any:
    """Float16 scales in a bfloat16 model would make everything behind them float32, which is another model."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    wanted = getattr(mx, dtype)
    arrays = [array for _, array in tree_flatten(module.parameters())]
    same = {array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating)} == {wanted}
    return module if same else _InDtype(module, wanted)


class _InDtype:
    """A module whose results have the dtype of what it is given; from token ids, that of the model."""

    def __init__(self, module: Any, dtype: Any) -> None:
        self._module, self._dtype = module, dtype

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self._cast(x, self._module(x, *args, **kwargs))

    def as_linear(self, x: Any) -> Any:
        return self._cast(x, self._module.as_linear(x))

    def _cast(self, x: Any, out: Any) -> Any:
        import mlx.core as mx

        wanted = x.dtype if mx.issubdtype(x.dtype, mx.floating) else self._dtype
        return out.astype(wanted) if isinstance(out, mx.array) else out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
