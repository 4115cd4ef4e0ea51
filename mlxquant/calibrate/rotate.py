"""The residual stream and the value heads in another basis: the same function, with outliers spread over all columns.

RMSNorm without its weight commutes with every orthogonal Q: rms(x Q) = rms(x) Q. So with the norms' weights multiplied
into what reads them, rows of the embedding may become e Q, readers W diag(g) Q, writers Q^T W, and no logit changes
(SliceGPT, arXiv 2401.15024, section 3; QuaRot, arXiv 2404.00456, section 4). Values pass attention as they are mixed,
head by head: each head's may be rotated too, and back in what reads them. All of it is in the weights: stock runtimes
run it. What a family does otherwise is told by wiring.py; Rotation.check runs both models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxquant.calibrate.orthogonal import spreading, times
from mlxquant.calibrate.wiring import Values, Wiring, wiring
from mlxquant.errors import UnsupportedError
from mlxquant.families.known import FACTS
from mlxquant.families.mlx_modules import FAMILIES
from mlxquant.families.roles import Role
from mlxquant.families.shape import ModelShape
from mlxquant.plan.plan import Plan
from mlxquant.plan.untied import head_name

if TYPE_CHECKING:
    from mlxquant.calibrate.layered import Layered

Array = np.ndarray[Any, Any]

# They subtract the mean, which no rotation leaves alone (mlx_lm/models/<module>.py, nn.LayerNorm).
_LAYER_NORM = ("phi", "starcoder2", "stablelm", "cohere", "cohere2")
# Of a token's hidden state, or logits: what float32 may change over all layers.
TOLERANCE = 1e-3
# `check` lets a tenth of the tokens differ: rounding may send one to another expert.
_TOKENS = 0.9
_VOCABULARY = 512  # rows of the head that `check` looks at


@dataclass(frozen=True)
class Rotation:
    """factors: of Q = signs * (their Kronecker product); heads: of one value head. head: name of the output head's
    weight, which a model with tied embeddings gets by this. norm: name of the last norm's, all ones afterwards.
    """

    family: str
    embedding_name: str
    norm_name: str
    head_name: str
    factors: tuple[Array, ...]
    signs: Array
    heads: tuple[Array, ...]
    layers: tuple[Wiring, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], plan: Plan, seed: int = 0) -> Rotation:
        """From config.json and the tensors of a plan for it. Raises UnsupportedError, naming the family and what in it
        a rotation would change, where it does not hold.
        """
        model = ModelShape.from_config(config)
        shapes = {t.name: t.target.shape for t in plan.tensors}
        at = FAMILIES[model.module].prefix
        by_layer: list[dict[str, tuple[int, ...]]] = [{} for _ in range(model.layers)]
        outside = dict(shapes)
        for name in shapes:
            if name.startswith(f"{at}."):
                by_layer[int(name.removeprefix(f"{at}.").partition(".")[0])][name] = outside.pop(name)
        wired = tuple(wiring(own, f"{at}.{i}.", model) for i, own in enumerate(by_layer))
        _refuse(model, wired, by_layer)
        embedding = next(t.name for t in plan.tensors if t.role == Role.EMBEDDING)
        head, norm = head_name(model), next((n for n, shape in outside.items() if shape == (model.hidden_size,)), "")
        if other := outside.keys() - {embedding, head, norm}:
            raise _refusal(model.model_type, f"{min(other)} is not known to commute with a rotation")
        rng = np.random.default_rng(seed)
        signs = rng.choice((-1.0, 1.0), model.hidden_size)
        heads = next((spreading(w.values.head_dim, seed) for w in wired if w.values), ())
        factors = spreading(model.hidden_size, seed)
        return cls(model.model_type, embedding, norm, head, factors, signs, heads, wired)

    def layer(self, index: int, weights: Mapping[str, Array]) -> dict[str, Array]:
        """One layer's weights, float32, all of them given. Computed in float64 and rounded once, matrix by matrix."""
        wired = self.layers[index]
        norms = {reader: norm for norm, readers in wired.reads.items() for reader in readers}
        made = {}
        for name, value in weights.items():
            norm = weights[norms[name]] if name in norms else None
            made[name] = np.ones_like(value) if name in wired.reads else np.empty_like(value)
            stack = value.ndim == 3 and (name in norms or name in wired.writes)
            if name not in wired.reads:
                for i in range(len(value)) if stack else (...,):
                    made[name][i] = self._rotated(wired, name, value[i], norm)
        return made

    def _rotated(self, wired: Wiring, name: str, value: Array, norm: Array | None) -> Array:
        """One matrix or vector, of an expert where there are some. norm: the weight of what it reads."""
        made = value.astype(np.float64)
        if norm is not None:
            made = self._columns(made * norm)
        if name in wired.writes:
            made = np.ascontiguousarray(self._columns(made.T).T)  # Q^T w
        if name.endswith("bias") and name.removesuffix("bias") + "weight" in wired.writes:
            made = self._columns(made)
        if wired.values and not wired.values.gated:
            made = self._with_values(wired.values, name, made)
        return made

    def embedding(self, rows_VH: Array) -> Array:
        """Rows of the embedding, float32. Any number of them."""
        return self._columns(rows_VH).astype(np.float32)

    def head(self, rows_VH: Array, final_norm_H: Array) -> Array:
        """Rows of the output head (of a tied model: of the embedding, as they were), float32; final_norm_H: the last
        norm's weight, which becomes `final_norm`.
        """
        return self._columns(rows_VH.astype(np.float64) * final_norm_H).astype(np.float32)

    @property
    def final_norm(self) -> Array:
        return np.ones(len(self.signs), np.float32)

    def check(self, layered: Layered, tokens_BL: Array) -> float:
        """Runs a few tokens through the model as it is and rotated, a layer at a time, and returns by how much logits
        differ, of their norm. Reads every layer once. Raises UnsupportedError where it is more than TOLERANCE.
        """
        plain, rotated = layered.embed(tokens_BL), layered.embed(tokens_BL, self.embedding)
        for i in range(layered.count):
            weights = layered.weights(i)
            plain = layered.open(i, weights).run(plain)
            rotated = layered.open(i, self.layer(i, weights)).run(rotated)
            self._compare(rotated, self._columns(plain), f"behind layer {i} hidden states")
        return self._compare(*self._logits(layered, plain, rotated), "logits")

    def _logits(self, layered: Layered, plain: Array, rotated: Array) -> tuple[Array, Array]:
        """Of the rotated model, and as they are; for the first tokens of the vocabulary. The rotated model's own last
        norm has no weight: it scales each token as much as the other's does.
        """
        from mlxquant.calibrate.layered import some_rows, whole

        normed, norm = np.array(layered.finish(plain)), whole(layered.source, layered.tensors[self.norm_name])
        tensor = layered.tensors.get(self.head_name) or layered.tensors[self.embedding_name]
        rows = some_rows(layered.source, tensor, 0, min(_VOCABULARY, tensor.target.shape[0]))
        scale = np.linalg.norm(normed, axis=-1) / np.linalg.norm(plain * norm, axis=-1)
        return (rotated * scale[..., None]) @ self.head(rows, norm).T, normed @ rows.T

    def _compare(self, found: Array, expected: Array, what: str) -> float:
        change = np.linalg.norm(found - expected, axis=-1) / np.maximum(np.linalg.norm(expected, axis=-1), 1e-30)
        most = float(np.quantile(change, _TOKENS))
        if not most <= TOLERANCE:
            raise _refusal(self.family, f"{what} differ by {most:.1e} of their norm, expected at most {TOLERANCE:.0e}")
        return most

    def _columns(self, w: Array) -> Array:
        """w Q, over the last axis."""
        return times(w * self.signs, self.factors)

    def _with_values(self, values: Values, name: str, made: Array) -> Array:
        """Each value head's rows, or elements of its bias, and the columns that read them."""
        rows, heads = slice(values.start, values.stop), (-1, values.head_dim)
        if name in (values.name, values.name.removesuffix("weight") + "bias"):
            own = made[rows].T
            made[rows] = times(own.reshape(heads), self.heads).reshape(own.shape).T
        if name == values.output:
            made = times(made.reshape(heads), self.heads).reshape(made.shape)
        return made


def _refuse(model: ModelShape, wired: tuple[Wiring, ...], by_layer: list[dict[str, tuple[int, ...]]]) -> None:
    if model.module in _LAYER_NORM:
        raise _refusal(model.model_type, "its norms subtract the mean")
    if FACTS[model.module].tie == "always":
        raise _refusal(model.model_type, "stock mlx-lm gives it no output head of its own, apart from the embedding")
    for layer, own in zip(wired, by_layer, strict=True):
        biased = [norm for norm in layer.reads if norm.removesuffix("weight") + "bias" in own]
        if layer.written_norms or biased:
            raise _refusal(
                model.model_type, f"{(*layer.written_norms, *biased)[0]} norms what no rotation commutes with"
            )
        if layer.unknown:
            raise _refusal(model.model_type, f"{layer.unknown[0]} is not known to commute with a rotation")


def _refusal(family: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"{family} cannot be rotated: {why}", hint="leave out --rotate")
