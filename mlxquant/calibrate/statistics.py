"""What entered a linear layer, summed up: mean squares of its columns, Hessians, moments between two streams.

For an error dW of the weights, the layer's squared output error is sum over tokens of |dW x|^2 = tr(dW H dW^T) times
the tokens, H = mean of x x^T (Frantar et al. 2022, arXiv:2210.17323, section 3); H's diagonal is what llama.cpp calls
an importance matrix. A stack of experts has one of each for every expert, of the tokens that it was sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlxquant.calibrate.values import Inputs
from mlxquant.errors import SourceError

Array = np.ndarray[Any, Any]

# squares: (I,), mean of x^2        hessian: (I, I), mean of x x^T
# cross:   (I, I), mean of x y^T, y being what the same tokens are in another stream
Kind = Literal["squares", "hessian", "cross"]
_ROWS = 256


@dataclass
class _Sum:
    """matrix: float64 for squares, else float32. weight: of all its rows; tokens: how many they are."""

    matrix: Any
    weight: float = 0.0
    tokens: int = 0

    def mean(self, symmetric: bool) -> Array:
        mean: Array = np.array(self.matrix)
        mean /= max(self.weight, float(np.finfo(np.float32).tiny))
        if symmetric:  # a matrix product may add its two halves in another order
            _make_symmetric(mean)
        return mean


class Moments:
    """Sums over batches of one layer's Inputs.

    name: of the layer's weight, for errors. experts: how many, 0 for a dense layer. least_tokens: an expert that was
    sent fewer has the moments of all tokens of its layer instead.
    """

    def __init__(self, name: str, kind: Kind, *, experts: int = 0, least_tokens: int = 1) -> None:
        self.name, self.kind, self.experts, self._least = name, kind, experts, least_tokens
        self._sums: dict[int, _Sum] = {}
        self._all: Array | None = None

    def add(self, inputs: Inputs, weight_N: Any = None, other_NI: Any = None) -> None:
        """A batch. weight_N: float32 >= 0, how much each row counts; 1 by default. other_NI: for kind cross.

        Raises SourceError where activations are not finite.
        """
        import mlx.core as mx

        x_NI = mx.array(inputs.x_NI).astype(mx.float32)
        w_N = None if weight_N is None else mx.array(weight_N).astype(mx.float32)
        y_NI = x_NI if other_NI is None else mx.array(other_NI).astype(mx.float32)
        self._all = None
        for expert, rows in _rows(inputs.expert_N):
            chosen = (x_NI, y_NI, w_N) if rows is None else _taken((x_NI, y_NI, w_N), mx.array(rows))
            self._add(expert, *chosen)

    @property
    def tokens(self) -> int:
        """Rows that were added; of experts, every token counts for each that it was sent to."""
        return sum(part.tokens for part in self._sums.values())

    def tokens_of(self, expert: int) -> int:
        return self._sums[expert].tokens if expert in self._sums else 0

    def mean(self) -> Array:
        """Over all rows, whatever expert they were sent to: (I,) or (I, I). Of a dense layer's matrices the sum is let
        go then: nothing can be added any more.
        """
        if self._all is None:
            parts = list(self._sums.values())
            if not parts:
                raise SourceError(f"{self.name}: no calibration token reached this layer", hint="give more --samples")
            total = parts[0].matrix if len(parts) == 1 else sum(part.matrix for part in parts)
            self._all = self._mean(_Sum(total, sum(part.weight for part in parts)))
            if not self.experts and self.kind != "squares":
                parts[0].matrix = None
        return self._all

    def _mean(self, part: _Sum) -> Array:
        return part.mean(symmetric=self.kind == "hessian")

    def for_expert(self, expert: int) -> tuple[Array, bool]:
        """(its moments, False), or (those of all tokens, True) where it was sent too few."""
        if self.is_fallback(expert) or len(self._sums) == 1:
            return self.mean(), self.is_fallback(expert)
        return self._mean(self._sums[expert]), False

    def is_fallback(self, expert: int) -> bool:
        part = self._sums.get(expert)
        return part is None or part.tokens < self._least or part.weight <= 0

    @property
    def fallbacks(self) -> tuple[int, ...]:
        """Experts that were sent too few tokens."""
        return tuple(expert for expert in range(self.experts) if self.is_fallback(expert))

    def columns(self) -> Array:
        """How much each column matters, for kind squares: float32 (I,), or (experts, I) with fallbacks filled in."""
        if not self.experts:
            return self.mean().astype(np.float32)
        return np.stack([self.for_expert(expert)[0] for expert in range(self.experts)]).astype(np.float32)

    def sums(self, width: int) -> tuple[Array, Array]:
        """(sums of squares (matrices, width) float64, rows summed (matrices,) int64), for kind squares: zeros for an
        expert that was never asked."""
        total, counts = np.zeros((self.experts or 1, width)), np.zeros(self.experts or 1, np.int64)
        for expert, part in self._sums.items():
            total[expert], counts[expert] = part.matrix, part.tokens
        return total, counts

    def _add(self, expert: int, x_NI: Any, y_NI: Any, w_N: Any) -> None:
        import mlx.core as mx

        scaled = x_NI if w_N is None else x_NI * w_N[:, None]
        batch = (scaled * x_NI).sum(axis=0) if self.kind == "squares" else scaled.T @ y_NI
        finite = mx.isfinite(batch).all()
        mx.eval(batch, finite)
        if not finite.item():
            raise SourceError(
                f"{self.name}: what enters this layer is NaN or infinite for some calibration text",
                hint="`mlxquant verify` finds damaged weights; download the model again",
            )
        # float64 lies on no GPU: squares are summed in numpy, which for a vector costs nothing.
        added = np.array(batch).astype(np.float64) if self.kind == "squares" else batch
        part = self._sums.get(expert)
        if part is None:
            part = self._sums[expert] = _Sum(added)
        else:
            part.matrix = part.matrix + added
            if self.kind != "squares":
                mx.eval(part.matrix)
        part.weight += x_NI.shape[0] if w_N is None else float(w_N.sum().item())
        part.tokens += x_NI.shape[0]


def _rows(expert_N: Any) -> list[tuple[int, Array | None]]:
    """(expert, its rows) for each that has some; a dense layer is expert 0 with all."""
    if expert_N is None:
        return [(0, None)]
    experts = np.array(expert_N).astype(np.int64)
    order = np.argsort(experts, kind="stable")
    present, starts = np.unique(experts[order], return_index=True)
    return list(zip(present.tolist(), np.split(order, starts[1:]), strict=True)) if len(present) else []


def _make_symmetric(a_II: Array) -> None:
    """(A + A^T) / 2 in place, some rows at a time: a wide layer's Hessian is not copied."""
    for start in range(0, len(a_II), _ROWS):
        part = slice(start, start + _ROWS)
        mean = (a_II[part, start:] + a_II[start:, part].T) / 2
        a_II[part, start:], a_II[start:, part] = mean, mean.T


def _taken(arrays: tuple[Any, ...], rows: Any) -> tuple[Any, ...]:
    return tuple(None if array is None else array[rows] for array in arrays)
