"""An mlx-lm model of which one layer's weights are in memory at a time.

The model is built from its config, its weights never evaluated. To run layer i, the trunk is called as ever, with taps
in the other layers' places: so masks and positions are mlx-lm's own, in whatever family. The layer is given what
entered it, and once it has answered the trunk is left.

Everything is float32: codes are chosen by differences that bfloat16 would drown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlxquant.calibrate.rotate import Rotation
from mlxquant.calibrate.stand_ins import Ear, Reached, Stop
from mlxquant.calibrate.values import Inputs
from mlxquant.codecs.floats import cast, widen
from mlxquant.convert.gather import chunks, rows
from mlxquant.convert.sources import OpenSource
from mlxquant.convert.to_mlx import check_finite, named
from mlxquant.errors import UnsupportedError
from mlxquant.families.mlx_config import mlx_config
from mlxquant.families.roles import Role
from mlxquant.measure.changes import at, put
from mlxquant.measure.forward import Split, Tap
from mlxquant.measure.layers import layers_of
from mlxquant.plan.plan import Plan, PlannedTensor
from mlxquant.plan.untied import untied_config
from mlxquant.run.cache import plan_cache
from mlxquant.run.model import LoadedModel, refuse
from mlxquant.tensors import DTYPES

Array = np.ndarray[Any, Any]

# Families whose layers hand one another more than one hidden state, so that none can be run alone.
NOT_LAYERED = frozenset({"gemma3n", "gemma3n_text", "gemma4", "gemma4_text"})


class Layered:
    """source: where rows come from. plan: says what they become. rotation: what they are given to first; the plan is
    then the rotated model's.

    count: layers. width: of the hidden states. tensors: the plan's, by name.
    Raises UnsupportedError for a family whose layers cannot be run one by one.
    """

    def __init__(self, source: OpenSource, plan: Plan, rotation: Rotation | None = None) -> None:
        self.config = dict(untied_config(source.config) if rotation else source.config)
        self.source, self.plan, self._rotation = source, plan, rotation
        self.tensors = {t.name: t for t in plan.tensors}
        refuse(self.config, source.path)
        if plan.model_type in NOT_LAYERED:
            raise _not_layered(plan.model_type)
        model = _skeleton(self.config, plan)
        split = Split(LoadedModel(model, self.config, source.path, "hf", "", 0), plan_cache(model))
        self._list = layers_of(split.trunk)
        if not self._list:
            raise _not_layered(plan.model_type)
        self._outer = _outer(model, split.whole)
        self._trunk, self.width = split.name, split.width
        self._whole = self._with_vectors(split.whole)

    @property
    def count(self) -> int:
        return len(self._whole[self._trunk][self._list])

    def prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return f"{self._outer}{self._trunk}.{self._list}.{layer}."

    def of_layer(self, layer: int) -> list[PlannedTensor]:
        return [t for t in self.plan.tensors if t.name.startswith(self.prefix(layer))]

    def outside(self) -> list[PlannedTensor]:
        """Tensors of no layer: embeddings, last norm, head."""
        inside = f"{self._outer}{self._trunk}.{self._list}."
        return [t for t in self.plan.tensors if not t.name.startswith(inside)]

    def weights(self, layer: int) -> dict[str, Array]:
        """Float32, as the plan's dtype rounds them. Raises SourceError when a file is short."""
        made = {t.name: whole(self.source, t) for t in self.of_layer(layer)}
        return self._rotation.layer(layer, made) if self._rotation else made

    def rows(self, tensor: PlannedTensor, start: int, stop: int) -> Array:
        """Of a tensor outside the layers: float32 (stop - start, width). Raises SourceError when a file is short."""
        values, rotation = some_rows(self.source, tensor, start, stop), self._rotation
        if rotation is None or not DTYPES[tensor.target.dtype].floating:
            return values
        if tensor.name == rotation.embedding_name:
            return rotation.embedding(values)
        if tensor.name == rotation.head_name:
            return rotation.head(values, whole(self.source, self.tensors[rotation.norm_name]))
        return rotation.final_norm[None] if tensor.name == rotation.norm_name else values

    def open(self, layer: int, weights: Mapping[str, Array]) -> Layer:
        """The layer with these weights, which nothing else holds."""
        return Layer(self, layer, weights)

    def table(self, ids_U: Array, change: Callable[[Array], Array] | None = None) -> Array:
        """Rows of the embedding, float32 (U, H), read some at a time: none else is ever in memory. ids_U: sorted.
        change: of some whole rows, float32.
        """
        tensor = self.embedding()
        parts = []
        for start, stop in chunks(tensor.target):
            wanted = ids_U[(ids_U >= start) & (ids_U < stop)]
            if len(wanted):
                values = self.rows(tensor, start, stop)[wanted - start]
                parts.append(change(values) if change else values)
        return np.concatenate(parts)

    def embedding(self) -> PlannedTensor:
        found = [t for t in self.outside() if t.role == Role.EMBEDDING]
        if len(found) != 1:
            raise _not_layered(self.plan.model_type)
        return found[0]

    def embed(self, tokens_BL: Array, change: Callable[[Array], Array] | None = None) -> Array:
        """What enters the first layer: float32 (B, L, H). change: as of `table`."""
        return np.concatenate(list(self.embedded(tokens_BL, change)))

    def embedded(self, tokens_BL: Array, change: Callable[[Array], Array] | None = None) -> Iterator[Array]:
        """The same sample by sample, (1, L, H)."""
        ids_U, places = np.unique(tokens_BL, return_inverse=True)
        return self.embed_rows(places.reshape(tokens_BL.shape), self.table(ids_U, change))

    def embed_rows(self, places_BL: Array, table_UH: Array) -> Iterator[Array]:
        """The same of rows that are at hand already; places_BL: the row of each token."""
        import mlx.core as mx

        rows_UH = mx.array(table_UH)
        for places_L in places_BL:
            yield np.array(self.entering(places_L[None], rows_UH).astype(mx.float32))

    def entering(self, places_BL: Array, table_UH: Any) -> Any:
        """The same at once, as an mlx array that is not evaluated: what gradients are taken of."""
        import mlx.core as mx

        model = put(self._whole, self._inner(self.embedding().name), table_UH)
        entry = Stop(model[self._trunk][self._list][0])
        _reach(put(model, [self._trunk, self._list, "0"], entry), mx.array(places_BL.astype(np.int32)))
        return entry.seen

    def head(self) -> PlannedTensor:
        """What makes logits; where it is tied, the embedding."""
        return next((t for t in self.outside() if t.role == Role.HEAD), None) or self.embedding()

    def logits(self, hidden_BLH: Any, wrap: Callable[[Any], Any]) -> Any:
        """An mlx array that is not evaluated, given what left the last layer. wrap(module) stands for the head."""
        path = self._inner(self.head().name)[:-1]
        model = self._passing(self.count, hidden_BLH)
        return put(model, path, wrap(at(model, path)))(_no_tokens(hidden_BLH))

    def finish(self, hidden_BLH: Any) -> Any:
        """What leaves the trunk, behind its last norm, given what left the last layer: an mlx array."""
        import mlx.core as mx

        model = self._passing(self.count, mx.array(hidden_BLH))
        tap = Tap(model[self._trunk])
        put(model, [self._trunk], tap)(_no_tokens(hidden_BLH))
        mx.eval(tap.out)
        return tap.out

    def entering_head(self, hidden_BLH: Any) -> Inputs:
        """What leaves the trunk, as any linear layer's inputs: a row a token."""
        return Inputs(self.finish(hidden_BLH).reshape(-1, self.width))

    def _inner(self, name: str) -> list[str]:
        return name.removeprefix(self._outer).split(".")

    def _passing(self, layer: int, hidden_BLH: Any) -> Any:
        """The model with taps for all layers before one."""
        layers = list(self._whole[self._trunk][self._list])
        layers[:layer] = [Tap(module, hidden_BLH) for module in layers[:layer]]
        return put(self._whole, [self._trunk, self._list], layers)

    def _with_vectors(self, model: Any) -> Any:
        """Norms and the like outside the layers, which are small."""
        import mlx.core as mx

        for tensor in self.outside():
            if len(tensor.target.shape) < 2:
                values = self.rows(tensor, 0, 1).reshape(tensor.target.shape)
                model = put(model, self._inner(tensor.name), mx.array(values))
        return model


class Layer:
    """One layer with its weights. stages: names of the weights that share an input, in the order they are used."""

    def __init__(self, model: Layered, number: int, weights: Mapping[str, Array]) -> None:
        self._model, self.number = model, number
        self._module = model._whole[model._trunk][model._list][number]
        for name, values in weights.items():
            self.put(name, values)
        self.stages = self._stages()

    def put(self, name: str, values_OI: Array) -> None:
        """Gives a weight other values."""
        import mlx.core as mx

        self._module = put(self._module, self.path(name), mx.array(values_OI))

    def get(self, name: str) -> Any:
        """A weight's values: an mlx array in its own shape."""
        return at(self._module, self.path(name))

    def path(self, name: str) -> list[str]:
        """Where a weight stands in the layer."""
        return name.removeprefix(self._model.prefix(self.number)).split(".")

    def run(self, hidden_BLH: Any) -> Array:
        """What leaves the layer, float32."""
        return np.array(self.call(self._module, hidden_BLH))

    def inputs(self, stage: Sequence[str], hidden_BLH: Any) -> Inputs:
        """What enters the linear layers of a stage, given what enters the layer: mlx arrays, evaluated."""
        import mlx.core as mx

        ears, module = self._ears([stage[0]])
        self.graph(module, hidden_BLH)
        heard = ears[stage[0]].heard
        mx.eval(heard.x_NI)
        return heard

    def inputs_and_out(self, stage: Sequence[str], hidden_BLH: Any) -> tuple[Inputs, Array]:
        """The same, and what leaves the layer, of one run."""
        ears, module = self._ears([stage[0]])
        out = self.call(module, hidden_BLH)
        return ears[stage[0]].heard, np.array(out)

    def heard(self, hidden_BLH: Any) -> tuple[dict[str, Inputs], Array]:
        """What enters every stage, by the stage's first name, and what leaves the layer: all of one run."""
        ears, module = self._ears([stage[0] for stage in self.stages])
        out = self.call(module, hidden_BLH)
        return {name: ear.heard for name, ear in ears.items()}, np.array(out)

    def module(self, wrap: Callable[[str, Any], Any]) -> Any:
        """A copy in which wrap(weight's name, linear layer) stands for each linear layer."""
        made = self._module
        for name, path in self._linears():
            made = put(made, path, wrap(name, at(made, path)))
        return made

    def call(self, module: Any, hidden_BLH: Any) -> Any:
        """What leaves a module that stands in this layer's place: an mlx array, evaluated."""
        import mlx.core as mx

        out = self.graph(module, hidden_BLH)
        mx.eval(out)
        return out

    def graph(self, module: Any, hidden_BLH: Any) -> Any:
        """As `call`, not evaluated: what gradients are taken of."""
        import mlx.core as mx

        hidden_BLH = mx.array(hidden_BLH) if isinstance(hidden_BLH, np.ndarray) else hidden_BLH
        stop = Stop(module, hidden_BLH)
        owner = self._model
        model = put(owner._passing(self.number, hidden_BLH), [owner._trunk, owner._list, str(self.number)], stop)
        _reach(model, _no_tokens(hidden_BLH))
        if not isinstance(stop.seen, mx.array) or stop.seen.shape != hidden_BLH.shape:
            raise _not_layered(owner.plan.model_type)
        return stop.seen

    def _linears(self) -> Iterator[tuple[str, list[str]]]:
        """(weight's name, path of its module) of each layer that takes rows of inputs."""
        import mlx.nn as nn
        from mlx_lm.models.switch_layers import SwitchLinear

        prefix = self._model.prefix(self.number)
        for path, module in self._module.named_modules():
            name = f"{prefix}{path}.weight"
            if type(module) in (nn.Linear, SwitchLinear) and name in self._model.tensors:
                yield name, path.split(".")

    def _ears(self, names: Iterable[str]) -> tuple[dict[str, Ear], Any]:
        ears: dict[str, Ear] = {}
        wanted = set(names)

        def wrap(name: str, module: Any) -> Any:
            if name not in wanted:
                return module
            ears[name] = Ear(module)
            return ears[name]

        return ears, self.module(wrap)

    def _stages(self) -> tuple[tuple[str, ...], ...]:
        """Found by running a few tokens: linear layers that are handed one and the same array share it."""
        import mlx.core as mx

        order: list[tuple[str, Any]] = []
        names = [name for name, _ in self._linears()]
        ears, module = self._ears(names)
        for name, ear in ears.items():
            ear.order = lambda given, name=name: order.append((name, given))
        self.graph(module, mx.zeros((1, 2, self._model.width)))
        stages: list[tuple[Any, list[str]]] = []
        for name, given in order:
            same = [names for seen, names in stages if seen is given]
            if same and name not in same[0]:
                same[0].append(name)
            elif not any(name in names for _, names in stages):
                stages.append((given, [name]))
        return tuple(tuple(names) for _, names in stages)


def whole(source: OpenSource, tensor: PlannedTensor) -> Array:
    """A tensor's float32 values in its own shape, as the plan's dtype rounds them."""
    parts = [some_rows(source, tensor, start, stop) for start, stop in chunks(tensor.target)]
    return np.concatenate(parts).reshape(tensor.target.shape)


def some_rows(source: OpenSource, tensor: PlannedTensor, start: int, stop: int) -> Array:
    """The same of some rows: (stop - start, width). Raises SourceError where they are not finite."""
    raw = rows(source, tensor.target, start, stop)
    if not DTYPES[tensor.target.dtype].floating:
        return raw
    values = cast(raw, tensor.target.dtype, tensor.dtype)
    with named(tensor, start):
        check_finite(values, tensor.dtype)
    return widen(values, tensor.dtype)


def _skeleton(config: dict[str, Any], plan: Plan) -> Any:
    """The model's modules; their arrays are zeros that nobody evaluates."""
    import mlx.core as mx
    from mlx_lm.utils import _get_classes

    config = mlx_config(config)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    zeros = {t.name: mx.zeros(t.target.shape, dtype=mx.float32) for t in plan.tensors}
    if hasattr(model, "sanitize") and not any("lm_head" in name for name in zeros):
        zeros = dict(model.sanitize(zeros))  # a model may learn there that its head is tied (gemma3)
    model.load_weights(list(zeros.items()), strict=True)
    model.eval()
    return model


def _outer(model: Any, inner: Any) -> str:
    """What stands before the names of a text model that lies within another."""
    prefix = ""
    while model is not inner:
        prefix, model = prefix + "language_model.", model.language_model
    return prefix


def _reach(model: Any, tokens: Any) -> None:
    try:
        model(tokens)
    except Reached:
        return
    raise RuntimeError("the trunk did not call its layer")


def _no_tokens(hidden_BLH: Any) -> Any:
    """Of the right shape; what is embedded for them is never evaluated."""
    import mlx.core as mx

    return mx.zeros(hidden_BLH.shape[:2], dtype=mx.int32)


def _not_layered(family: str) -> UnsupportedError:
    return UnsupportedError(
        f"{family}: its layers cannot be run one by one, which calibration does",
        hint="use --method search, which needs no data",
    )
