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
    """The weight `own` of `module`, the student's at `path`, for the teacher's. dtype: what the teacher computes in."""

    path: str
    own: str
    module: Any
    dtype: str

    def of(self, model: Any) -> Any:
        """The innermost model with this weight; the one given stays as it is."""
        words = self.path.split(".") if self.path else []
        made = _mixed(_bare(at(model, words)), self.module, self.own)
        return put(model, words, _in_dtype(made, self.dtype))

    @property
    def name(self) -> str:
        return _name(self.path, self.own)

    @property
    def layer(self) -> int | None:
        return next((int(word) for word in self.path.split(".") if word.isdigit()), None)


def changes(teacher: LoadedModel, student: LoadedModel, dtype: str) -> Iterator[Change]:
    """What of the student is not the same in the teacher, in the teacher's order. dtype: what the teacher computes in.

    Of a vocabulary's matrices the rows that both have count. Raises PlanError when one has a weight that the other
    lacks, or has it in another shape.
    """
    (our_modules, ours), (their_modules, theirs) = (_weights(innermost(m.model)) for m in (teacher, student))
    _untie(our_modules, their_modules, theirs)
    for path, own in [*(ours.keys() - theirs.keys()), *(theirs.keys() - ours.keys())]:
        has, lacks = (teacher, student) if (path, own) in ours else (student, teacher)
        raise PlanError(
            f"{has.path}: has {_name(path, own)}, {lacks.path} has not: one cannot stand in the other",
            hint="where it is the output head: give a teacher whose head is not tied to its embedding, either",
        )
    for (path, own), arrays in ours.items():
        change = Change(path, own, their_modules[path], dtype)
        have, want = _shape(change.module, theirs[path, own]), _shape(our_modules[path], arrays)
        if have != want and not (change.layer is None and len(have) == 2 and have[1:] == want[1:]):
            raise PlanError(f"{student.path}: {change.name} is {have}, in its teacher {want}")
        if not _equal(arrays, theirs[path, own]):
            yield change


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
    if "scales" not in arrays:
        return tuple(next(iter(arrays.values())).shape)
    *rows, packed = arrays["weight"].shape
    return (*rows, packed * 32 // module.bits)


def _equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """By value, in the wider dtype; what both have rows of."""
    import mlx.core as mx

    def same(a: Any, b: Any) -> bool:
        rows = slice(min(a.shape[0], b.shape[0])) if a.ndim and a.shape != b.shape else ...
        return bool(mx.array_equal(a[rows], b[rows]).item())

    return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)


def _mixed(module: Any, other: Any, own: str) -> Any:
    """`module` with one weight of `other`. A quantized weight is known to its own kind of module alone."""
    words = own.split(".")
    if own != "weight" or not ("scales" in module or "scales" in other):
        return put(module, words, at(other, words))
    made = copy(other)
    dict.update(made, {name: array for name, array in module.items() if name not in _PACKED})
    return made


def at(module: Any, words: Sequence[str]) -> Any:
    """What stands at a path in a tree of modules, lists and dicts."""
    for word in words:
        module = module[int(word)] if isinstance(module, (list, tuple)) else module[word]
    return module


def _in_dtype(module: Any, dtype: str) -> Any:
    """Float16 scales in a bfloat16 model would make everything behind them float32, which is another model."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    wanted = getattr(mx, dtype)
    arrays = [array for _, array in tree_flatten(module.parameters())]
    same = {array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating)} == {wanted}
    return module if same else _InDtype(module, wanted)


def _bare(module: Any) -> Any:
    return module.inner if isinstance(module, _InDtype) else module


class _InDtype:
    """A module whose results have the dtype of what it is given; from token ids, that of the model."""

    def __init__(self, module: Any, dtype: Any) -> None:
        self.inner, self._dtype = module, dtype

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self._cast(x, self.inner(x, *args, **kwargs))

    def as_linear(self, x: Any) -> Any:
        return self._cast(x, self.inner.as_linear(x))

    def _cast(self, x: Any, out: Any) -> Any:
        import mlx.core as mx

        wanted = x.dtype if mx.issubdtype(x.dtype, mx.floating) else self._dtype
        return out.astype(wanted) if isinstance(out, mx.array) else out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
