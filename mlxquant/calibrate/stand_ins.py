"""What stands in the places of a model's modules while it is looked at. Models are copied for that, never changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlxquant.calibrate.values import Inputs


class StandIn:
    """In a module's place: whatever else is asked of it, the module answers."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._module, name)


class Stop(StandIn):
    """In a layer's place: runs it on `given` and leaves the trunk. With nothing given, what entered is seen."""

    def __init__(self, module: Any, given: Any = None) -> None:
        super().__init__(module)
        self._given = given
        self.seen: Any = None

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen = x if self._given is None else self._module(self._given, *args, **kwargs)
        raise Reached


class Reached(Exception):
    """The layer that was wanted has run."""


class Ear(StandIn):
    """In a linear layer's place: runs it, and keeps what it was given."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.order: Callable[[Any], None] | None = None
        self.heard = Inputs(None)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        import mlx.core as mx

        if self.order:
            self.order(x)
        if args:  # a stack of experts: which of them each row goes to
            chosen = args[0]
            spread = mx.broadcast_to(x, (*chosen.shape, *x.shape[-2:]))
            self.heard = Inputs(spread.reshape(-1, x.shape[-1]), chosen.reshape(-1))
        else:
            self.heard = Inputs(x.reshape(-1, x.shape[-1]))
        return self._module(x, *args, **kwargs)


class Probed(StandIn):
    """In the head's place: x values^T, to which x probe^T is added in some columns, so that the slope by these rows is
    found without that by all. Asked for tokens it is an embedding, which nobody evaluates.
    """

    def __init__(self, module: Any, values_VH: Any, index_R: Any, probe_RH: Any) -> None:
        super().__init__(module)
        self._values, self._index, self._probe = values_VH, index_R, probe_RH

    def __call__(self, x: Any) -> Any:
        import mlx.core as mx

        if not mx.issubdtype(x.dtype, mx.floating):
            return self._values[x]
        out = self.as_linear(x)
        return out + self._module["bias"] if "bias" in self._module else out

    def as_linear(self, x: Any) -> Any:
        return (x @ self._values.T).at[..., self._index].add(x @ self._probe.T)


class Seen(StandIn):
    """In a linear layer's place: notes the shape of what it gives."""

    def __init__(self, module: Any, name: str, found: dict[str, tuple[int, ...]]) -> None:
        super().__init__(module)
        self._name, self._found = name, found

    def __call__(self, x: Any) -> Any:
        out = self._module(x)
        self._found[self._name] = out.shape
        return out


class Added(StandIn):
    """In a linear layer's place: what it gives and a probe, by which a slope is taken."""

    def __init__(self, module: Any, probe: Any) -> None:
        super().__init__(module)
        self._probe = probe

    def __call__(self, x: Any) -> Any:
        return self._module(x) + self._probe
