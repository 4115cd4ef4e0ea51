"""A model cut before its output head: the trunk gives hidden states, which are small; the head gives logits from them.

mlx-lm's models all say `head(self.model(tokens, cache))`, some with a factor or a soft cap behind it. The trunk is
called as it is; for the head the model is called with a trunk that hands out what it is given, so that whatever stands
behind the head is computed by the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mlxquant.errors import UnsupportedError
from mlxquant.run.cache import CachePlan
from mlxquant.run.model import LoadedModel

Array = np.ndarray[Any, Any]

_TRUNKS = ("model", "backbone", "transformer")
_HEADS = ("lm_head", "embed_tokens", "embeddings", "word_embeddings", "wte")
_SLICED = ("Linear", "Embedding")  # those that are stored in half precision; quantized ones are widened as they go
# Weights of a head that are widened to float32 at a time: 128 MB.
_SLICE = 1 << 25


class Split:
    """`hidden` and `logits` of one loaded model.

    Raises UnsupportedError when the model has no trunk that can be cut off.
    """

    def __init__(self, loaded: LoadedModel, plan: CachePlan) -> None:
        self._make_cache = plan.make
        self._whole = _innermost(loaded.model)
        self._name = next((name for name in _TRUNKS if name in self._whole), "")
        self._head = self._name and next((h for h in _HEADS if h in self._whole or h in self.trunk), "")
        if not self._head:
            family = loaded.config.get("model_type")
            raise UnsupportedError(f"{loaded.path}: eval does not know where the output head of {family!r} begins")
        self.width, self.vocabulary, self.dtype = self._trace()

    def _trace(self) -> tuple[int, int, str]:
        """Columns of hidden states, of logits, and the dtype of activations; nothing is evaluated."""
        import mlx.core as mx

        token = mx.zeros((1, 1), dtype=mx.int32)
        out, logits = self.trunk(token, cache=self._make_cache()), self._whole(token, cache=self._make_cache())
        return out.shape[-1], logits.shape[-1], str(out.dtype).rpartition(".")[2]

    @property
    def trunk(self) -> Any:
        return getattr(self._whole, self._name)

    def drop_trunk(self) -> None:
        """Lets go of all but the head: `logits` still works, `hidden` does not."""
        for name in list(self.trunk):
            if name != self._head:
                self.trunk.pop(name)

    def hidden(self, tokens_L: Array, first: int, step: int | None = None) -> Array:
        """Hidden states of positions first .. L-2, those whose next token the window has: (P, H), in the dtype they are
        computed in (bfloat16 as float32, which holds it exactly).

        Tokens before `first` go into the cache beforehand. step: at most so many tokens at once.
        """
        import mlx.core as mx

        cache, parts = self._make_cache(), []
        ids = [int(token) for token in tokens_L[:-1]]
        for start, stop in _chunks(len(ids), first, step):
            out_1LH = self.trunk(mx.array([ids[start:stop]]), cache=cache)
            mx.eval(out_1LH, [entry.state for entry in cache])
            if start >= first:
                parts.append(np.array(_exact(out_1LH[0])))
        mx.clear_cache()
        return np.concatenate(parts)

    def logits(self, hidden_PH: Array) -> Array:
        """float32 (P, V). The head computes in float32, whatever it is stored in, a slice of the vocabulary at a time
        where it has to be widened for that.
        """
        import mlx.core as mx

        given = _Given(self.trunk, mx.array(hidden_PH)[None].astype(mx.float32))
        tokens = mx.zeros((1, len(hidden_PH)), dtype=mx.int32)
        parts = []
        for head in self._slices():
            given.put(self._head, head)
            with _swapped(self._whole, self._name, given), _swapped(self._whole, self._own_head, head):
                parts.append(np.array(self._whole(tokens)[0].astype(mx.float32)))
        mx.clear_cache()
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    @property
    def _own_head(self) -> str:
        return self._head if self._head in self._whole else ""

    def _slices(self) -> Iterator[Any]:
        """The head, as whole as float32 copies of it may be."""
        import mlx.core as mx

        head = getattr(self._whole if self._own_head else self.trunk, self._head)
        rows, width = head["weight"].shape[0], head["weight"].size // head["weight"].shape[0]
        if type(head).__name__ not in _SLICED or head["weight"].dtype in (mx.float32, mx.uint32):
            yield head
            return
        step = max(1, _SLICE // width)
        for start in range(0, rows, step):
            yield _rows(head, start, start + step)


class _Given:
    """In the trunk's place: what it is given, and else the trunk itself."""

    def __init__(self, trunk: Any, out: Any) -> None:
        self._trunk, self._out = trunk, out

    def put(self, name: str, head: Any) -> None:
        setattr(self, name, head)

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self._out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)


@contextmanager
def _swapped(module: Any, name: str, other: Any) -> Iterator[None]:
    if not name:
        yield
        return
    before = getattr(module, name)
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, before)


def _rows(head: Any, start: int, stop: int) -> Any:
    """A layer with some of another's rows; nothing is copied until it computes."""
    part = type(head).__new__(type(head))  # type: ignore[call-overload]
    part.__dict__.update(head.__dict__)
    dict.update(part, {name: array[start:stop] for name, array in head.items()})
    return part


def _innermost(model: Any) -> Any:
    """Models for text and images keep the one for text a level deeper."""
    while "language_model" in model:
        model = model.language_model
    return model


def _chunks(count: int, first: int, step: int | None) -> Iterator[tuple[int, int]]:
    for low, high in ((0, first), (first, count)):
        for start in range(low, high, step or count):
            yield start, min(start + (step or count), high)


def _exact(out: Any) -> Any:
    import mlx.core as mx

    return out.astype(mx.float32)
