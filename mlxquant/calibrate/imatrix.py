"""How much each column of each weight matters: the mean square of what enters it, over calibration text.

What llama-imatrix collects (llama.cpp, tools/imatrix/imatrix.cpp, IMatrixCollector::collect_imatrix), of the same
weights: all matrices of the layers that take rows of activations, routers included, and the output head only where it
is asked for. GGUF's q and k have their rows in another order than MLX's, but their columns, which is what importance is
of, in the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.calibrate.layered import Layer, Layered
from mlxquant.calibrate.statistics import Moments
from mlxquant.calibrate.streams import Stream
from mlxquant.calibrate.values import Samples
from mlxquant.families.gguf_table import ARCHS, gguf_name, module_of_config
from mlxquant.families.gguf_tensors import gguf_layout
from mlxquant.files.imatrix import Sums
from mlxquant.measure.runner import Silent, Watch
from mlxquant.plan.plan import Plan, make_plan
from mlxquant.plan.recipe import settings
from mlxquant.tensors import TensorSpec

Array = np.ndarray[Any, Any]

# At once: a mixture of experts keeps eight copies of what enters it, float32.
_BATCH_TOKENS = 2048
_QKVZ = ".linear_attn.in_proj_qkvz.weight"


class Stopped(KeyboardInterrupt):
    """By the user, between two batches."""


def float_plan(config: dict[str, Any], specs: Mapping[str, TensorSpec]) -> Plan:
    """The model as it is, no weight rounded: what Layered runs to look at it. Raises as `make_plan`."""
    return make_plan(config, specs, settings(sets=(".*=keep",)))


def importance(
    model: Layered, samples: Samples, watch: Watch | None = None, *, head: bool = False, least_tokens: int = 1
) -> dict[str, Moments]:
    """Mean squares of what enters each linear layer, by the MLX name of its weight; weights that share an input share
    one. head: also of the output head, under the embedding's name where the two are tied. least_tokens: experts that
    were sent fewer take those of the whole layer (Moments.columns).

    One layer is in memory at a time; hidden states lie in temporary files. Raises SourceError naming the layer where
    activations are not finite, UnsupportedError for a family that cannot be run layer by layer, and KeyboardInterrupt
    when the watch says so.
    """
    watch = watch or Silent()
    watch.stage("Reading activations", model.count + 1, "layers")
    found: dict[str, Moments] = {}
    shape = (*samples.tokens_BL.shape, model.width)
    with tempfile.TemporaryDirectory(prefix="mlxquant-") as folder:
        here, there = (Stream(Path(folder) / name, shape) for name in ("here.f32", "there.f32"))
        here.write(model.embedded(samples.tokens_BL))
        for number in range(model.count):
            layer = model.open(number, model.weights(number))
            sums = {stage[0]: _moments(model, stage[0], least_tokens) for stage in layer.stages}
            there.write(_through(layer, states, sums, watch) for _, states in here.batches(_BATCH_TOKENS))
            found |= {name: sums[stage[0]] for stage in layer.stages for name in stage}
            here, there = there, here
            watch.advance(1)
        if head:
            found |= _of_head(model, here)
        watch.advance(1)
    return found


def _moments(model: Layered, name: str, least_tokens: int) -> Moments:
    shape = model.tensors[name].target.shape
    return Moments(name, "squares", experts=shape[0] if len(shape) == 3 else 0, least_tokens=least_tokens)


def _through(layer: Layer, states_BLH: Array, sums: Mapping[str, Moments], watch: Watch) -> Array:
    """What leaves the layer; what enters its linear layers is summed up on the way."""
    if watch.stopped():
        raise Stopped
    heard, out = layer.heard(states_BLH)
    for name, inputs in heard.items():
        sums[name].add(inputs)
    return out


def _of_head(model: Layered, states: Stream) -> dict[str, Moments]:
    name = model.head().name
    moments = Moments(name, "squares")
    for _, states_BLH in states.batches(_BATCH_TOKENS):
        moments.add(model.entering_head(states_BLH))
    return {name: moments}


def column_weights(found: Mapping[str, Moments]) -> dict[str, Array]:
    """{MLX name: how much each column matters}, float32 (I,), or (experts, I) of a stack: what `search` weighs by."""
    return {name: moments.columns() for name, moments in found.items()}


def gguf_sums(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec], found: Mapping[str, Moments]
) -> dict[str, Sums]:
    """The same under GGUF's names, as an importance matrix has them. specs: of the source.

    Raises UnsupportedError for a family without a place in GGUF.
    """
    module = module_of_config(config)
    widths = {target.name: target.shape[-1] for target in gguf_layout(config, specs).targets}
    sums = {}
    for name, moments in found.items():
        for other in _gguf_names(module, name):
            if other in widths and other != "token_embd.weight":  # nor has llama-imatrix a head that is tied
                sums[other] = Sums(*moments.sums(widths[other]))
    return sums


def _gguf_names(module: str, name: str) -> Iterable[str]:
    """GGUF has in_proj_qkvz in two parts (families/gguf_tensors.py), which read the same columns."""
    if not name.endswith(_QKVZ):
        return (gguf_name(ARCHS[module], name),)
    block = f"blk.{name.split('.')[2]}"
    return f"{block}.attn_qkv.weight", f"{block}.attn_gate.weight"
