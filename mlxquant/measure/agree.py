"""Do two models say the same on a short prompt? The check that no list of checks replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.codecs.spec import Codec
from mlxquant.convert.weight_checks import Promise
from mlxquant.plan.recipe import SEARCH
from mlxquant.run.device import Device
from mlxquant.run.expand import expand_weights
from mlxquant.run.model import LoadedModel, evaluate
from mlxquant.run.ready import make_ready
from mlxquant.run.text import Text
from mlxquant.tensors import FLOAT_CODES

Array = np.ndarray[Any, Any]

# Prose, code, numbers and a question: enough for a broken layout to show, short enough for a CPU.
PROMPT = (
    "The capital of France is Paris, and the capital of Japan is Tokyo.\n"
    "def mean(values):\n    return sum(values) / len(values)\n"
    "Q: What is 17 + 25?\nA:"
)
# Nats that the output may be away from the source *rounded the same way*. What rounding costs differs from model to
# model more than most faults do: 4 bits cost SmolLM2-135M 0.72 nats and a wrong rope_theta 0.15 more, honest 2 bits
# cost 10. With the rounding on both sides an honest output is at 0 at any width, and the smallest fault tried (gate
# and up swapped in one of 30 layers) at 0.13.
LIMIT_NATS = 0.005
# Codes that were chosen by calibration text cannot be chosen anew here. They may be at most so many times as far from
# the source as plain rounding to the same formats, on a prompt that they were not chosen for.
LIMIT_TIMES = 1.5

# name of a weight -> (dtype of what stays float, codec)
Stored = Mapping[str, tuple[str, Codec]]


@dataclass(frozen=True)
class Agreement:
    """kl_nats: mean KL(source || output) over the prompt's positions. top1: share of them with the same best token.

    drift_nats: mean KL(rounded source || output), where the source's weights are rounded as the output's were: 0 but
    for the order of additions, unless layout, config or weights are wrong, or text chose the output's codes.
    rounding_nats: mean KL(source || rounded source).
    """

    kl_nats: float
    drift_nats: float
    rounding_nats: float
    top1: float
    tokens: int
    finite: bool
    calibrated: bool = False

    @property
    def ok(self) -> bool:
        limit = LIMIT_TIMES * self.rounding_nats + LIMIT_NATS
        return self.finite and (self.kl_nats <= limit if self.calibrated else self.drift_nats <= LIMIT_NATS)


def agreement(
    source: Path, output: Path, device: Device, stored: Stored, promise: Promise | None = None, prompt: str = PROMPT
) -> Agreement:
    """Runs the prompt through both models, one after the other so that only one is in memory.

    `stored`: how the output holds each weight; `promise`: how its codes were chosen, rtn unless said. Raises
    MemoryBudgetError, before any weight is read, when one of them does not fit the machine.
    """
    promise = promise or Promise()
    tokens = Text.load(output).encode(prompt)
    p_LV, rounded_LV = both(source, tokens, device, stored, promise)
    q_LV = log_probabilities(load(output, tokens, device).model, tokens)
    same = p_LV.argmax(-1) == q_LV.argmax(-1)
    return Agreement(
        kl(p_LV, q_LV),
        kl(rounded_LV, q_LV),
        kl(p_LV, rounded_LV),
        float(same.mean()),
        len(tokens),
        bool(np.isfinite(q_LV).all()),
        promise.calibrated,
    )


def both(source: Path, tokens: list[int], device: Device, stored: Stored, promise: Promise) -> tuple[Array, Array]:
    """The source's log-probabilities as it is, and with its weights rounded."""
    loaded = load(source, tokens, device)
    p_LV = log_probabilities(loaded.model, tokens)
    round_weights(loaded, stored, searched=promise.method == SEARCH and not promise.calibrated)
    return p_LV, log_probabilities(loaded.model, tokens)


def load(path: Path, tokens: list[int], device: Device) -> LoadedModel:
    import mlx.core as mx

    mx.clear_cache()
    return make_ready(path, device, Text.load(path), context_tokens=len(tokens)).loaded


def round_weights(loaded: LoadedModel, stored: Stored, *, searched: bool) -> None:
    """Stock MLX's own rounding, so that ours is not its own judge; on the CPU, where the two are bit-identical. MLX has
    none for what was searched, so that is searched anew.

    One weight at a time, and codes before they are expanded, so that it takes no more memory than loading the output.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    model = loaded.model
    arrays = dict(tree_flatten(model.parameters()))
    for name in arrays.keys() & stored.keys():
        array = arrays.pop(name).astype(getattr(mx, stored[name][0]))
        mx.eval(array)
        model.load_weights([(name, array)], strict=False)
    arrays.clear()
    mx.clear_cache()
    codecs = {name.removesuffix(".weight"): codec for name, (_, codec) in stored.items() if codec.quantized}
    found = search_weights(dict(tree_flatten(model.parameters())), stored) if searched else []
    with mx.stream(mx.cpu):
        nn.quantize(model, class_predicate=lambda path, _: codecs[path].mlx_config() if path in codecs else False)
    model.load_weights(found, strict=False)
    evaluate(model)
    if loaded.expanded:
        expand_weights(model)
        evaluate(model)


def search_weights(arrays: Mapping[str, Any], stored: Stored) -> list[tuple[str, Any]]:
    """Stored tensors by name, of the weights that have codes."""
    import mlx.core as mx

    from mlxquant.codecs.search import search

    found: list[tuple[str, Any]] = []
    for name in sorted(arrays.keys() & stored.keys()):
        label, codec = stored[name]
        if codec.quantized:
            array, dtype = arrays[name], FLOAT_CODES[label]
            raw = np.array(array.view(mx.uint16) if dtype == "BF16" else array)
            parts = search(raw.reshape(-1, raw.shape[-1]), dtype, dtype, codec)
            for spec, part in zip(codec.parts(name, raw.shape, dtype), parts, strict=True):
                made = mx.array(part.reshape(spec.shape))
                found.append((spec.name, made.view(mx.bfloat16) if spec.dtype == "BF16" else made))
    return found


def log_probabilities(model: Any, tokens: list[int]) -> Array:
    """log softmax of the logits, float64 (L, vocabulary)."""
    import mlx.core as mx

    logits_LV = np.array(model(mx.array([tokens]))[0].astype(mx.float32)).astype(np.float64)
    logits_LV -= logits_LV.max(-1, keepdims=True)
    return np.asarray(logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True)))


def kl(p_LV: Array, q_LV: Array) -> float:
    """Mean over positions of KL(p || q), in nats."""
    return float((np.exp(p_LV) * (p_LV - q_LV)).sum(-1).mean())
