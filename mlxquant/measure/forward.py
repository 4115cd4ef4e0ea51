"""A model cut before its output head: the trunk gives hidden states, which are small; the head gives logits from them.

mlx-lm's models all say `head(self.trunk(tokens, cache))`, some with a factor, a soft cap or a mask behind it, and each
with arguments of its own. So neither half is called by us: the model is called as ever, with a tap in its trunk's
place. The tap runs the trunk and keeps what it gives, and logits that nobody evaluates cost nothing; or it hands out
what it was given, and the model computes whatever stands behind its trunk. Models are copied shallowly for that and
never changed.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np

from mlxquant.errors import UnsupportedError
from mlxquant.measure.score import score
from mlxquant.run.cache import CachePlan
from mlxquant.run.model import LoadedModel

Array = np.ndarray[Any, Any]

_TRUNKS = ("model", "backbone", "transformer")
# Weights of a half-precision head that are widened to float32 at a time: 128 MB.
_SLICE = 1 << 25
# Of the logits that are compared at a time there are three or four copies: 64 MB each.
LOGITS_BYTES = 1 << 26


class Split:
    """`hidden` and `logits` of one loaded model, whose weights may still be unread.

    whole: the model for text. name: its trunk's. width: columns of hidden states. vocabulary: columns of logits.
    dtype: what the trunk computes in, 'bfloat16'.
    Raises UnsupportedError when the model has no trunk that can be cut off.
    """

    def __init__(self, loaded: LoadedModel, plan: CachePlan) -> None:
        self.make_cache = plan.make
        self.whole = innermost(loaded.model)
        self.name = next((name for name in _TRUNKS if name in self.whole), "")
        traced = self.name and self._trace()
        if not traced:
            family = loaded.config.get("model_type")
            raise UnsupportedError(
                f"{loaded.path}: eval does not know where the output head of {family!r} begins",
                hint="please report the family at the project's issues",
            )
        self.width, self.vocabulary, self.dtype, self._behind = traced

    def _trace(self) -> tuple[int, int, str, set[str]] | None:
        """Width, vocabulary, dtype, and what the head asks of the trunk (a tied embedding); None where the trunk is not
        called, gives no states, or gives logits. Nothing is evaluated.
        """
        import mlx.core as mx

        tap = Tap(self.trunk)
        logits = self._with(tap)(mx.zeros((1, 1), dtype=mx.int32), cache=self.make_cache())
        if not isinstance(tap.out, mx.array) or tap.out.shape[:-1] != (1, 1) or tap.out is logits:
            return None
        return tap.out.shape[-1], logits.shape[-1], str(tap.out.dtype).rpartition(".")[2], tap.asked

    @property
    def trunk(self) -> Any:
        return self.whole[self.name]

    def of(self, whole: Any) -> Split:
        """The same cut of a model that is built alike."""
        other = copy(self)
        other.whole = whole
        return other

    def drop_trunk(self) -> None:
        """Lets go of all but the head: `logits` still works, `hidden` does not."""
        for name in self.trunk.keys() - self._behind:
            self.trunk.pop(name)

    def hidden(self, tokens_L: Array, first: int, step: int | None = None) -> Array:
        """Hidden states of positions first .. L-2, those whose next token the window has: (P, H), in the dtype they are
        computed in (float16 and bfloat16 as float32, which holds them exactly).

        step: at most so many tokens at once, the others before them in the cache.
        """
        import mlx.core as mx

        cache, parts = self.make_cache(), []
        ids = [int(token) for token in tokens_L[:-1]]
        step = step or len(ids)
        for start in range(0, len(ids), step):
            tap = Tap(self.trunk)
            self._with(tap)(mx.array([ids[start : start + step]]), cache=cache)
            mx.eval(tap.out, [entry.state for entry in cache])
            parts.append(np.array(tap.out[0, max(0, first - start) :].astype(mx.float32)))
        mx.clear_cache()
        return np.concatenate(parts)

    def logits(self, hidden_PH: Array) -> Array:
        """float32 (P, V). The head computes in float32, whatever it is stored in."""
        import mlx.core as mx

        tap = Tap(self.trunk, mx.array(hidden_PH)[None].astype(mx.float32))
        whole = self._with(tap)
        for name, child in self.whole.items():
            if name != self.name:
                whole[name] = _widened(child)
        logits_PV = np.array(whole(mx.zeros((1, len(hidden_PH)), dtype=mx.int32))[0].astype(mx.float32))
        mx.clear_cache()
        return logits_PV

    def _with(self, tap: Tap) -> Any:
        whole = copy(self.whole)
        whole[self.name] = tap
        return whole


class Tap:
    """In a module's place. Without `out` it runs the module and keeps what that gives; with it, it hands that out.

    asked: names of the module's parts that others reached for themselves.
    """

    def __init__(self, module: Any, out: Any = None) -> None:
        self._module, self._given, self.out = module, out is not None, out
        self.asked: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._given:
            self.out = self._module(*args, **kwargs)
        return self.out

    def __getattr__(self, name: str) -> Any:
        self.asked.add(name)
        part = getattr(self._module, name)
        return _widened(part) if self._given else part


def _widened(part: Any) -> Any:
    """A float16 or bfloat16 head as one that computes in float32; anything else as it is.

    Quantized ones need no such thing: given float32, MLX's kernels widen codes as they go.
    """
    import mlx.core as mx
    import mlx.nn as nn

    half = type(part) in (nn.Linear, nn.Embedding) and part["weight"].dtype in (mx.float16, mx.bfloat16)
    return _Widened(part) if half else part


class _Widened:
    """A head of which some rows are widened at a time: all at once would be twice its bytes more."""

    def __init__(self, head: Any) -> None:
        self._head = head

    def __call__(self, x: Any) -> Any:
        out = self.as_linear(x)
        return out + self._head["bias"] if "bias" in self._head else out

    def as_linear(self, x: Any) -> Any:
        import mlx.core as mx

        weight_VH = self._head["weight"]
        step, parts = max(1, _SLICE // weight_VH.shape[1]), []
        for start in range(0, weight_VH.shape[0], step):
            parts.append(x @ weight_VH[start : start + step].astype(mx.float32).T)
            mx.eval(parts[-1])
        return mx.concatenate(parts, axis=-1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)


def compare(p: Split, q: Split, p_PH: Array, q_PH: Array, next_P: Array) -> Array:
    """POSITION (P,) from the hidden states of teacher p and student q; some positions at a time, so that logits take a
    bounded room whatever the vocabulary. Where one has more rows, what both have counts (match.py says when that is).
    """
    parts, rows = [], max(16, LOGITS_BYTES // (4 * p.vocabulary))
    for some in (slice(at, at + rows) for at in range(0, len(next_P), rows)):
        p_PV, q_PV = p.logits(p_PH[some]), q.logits(q_PH[some])
        both = min(p_PV.shape[1], q_PV.shape[1])
        parts.append(score(p_PV[:, :both], q_PV[:, :both], next_P[some]))
    return np.concatenate(parts)


def innermost(model: Any) -> Any:
    """The model for text alone: those for text and images keep it a level deeper."""
    while "language_model" in model:
        model = model.language_model
    return model
