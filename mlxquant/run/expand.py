"""Quantized layers into float32 ones, lazily: nothing is computed until the new weights are evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def expanded_bytes(model: Any) -> int:
    """Bytes of all parameters with codes decoded and every float in float32."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    total = 0
    for module in _leaves(model):
        own = dict(tree_flatten(module.parameters()))
        if _is_quantized(module):
            total += 4 * (own["weight"].size * 32 // module.bits)
            own = {name: own[name] for name in own if name == "bias"}
        for array in own.values():
            total += array.size * (4 if mx.issubdtype(array.dtype, mx.floating) else array.dtype.size)
    return total


def expand_weights(model: Any) -> list[str]:
    """Swaps every quantized layer for its float32 twin and casts all other floats; returns the layers it does
    not know.
    """
    import mlx.core as mx
    from mlx.nn import Module
    from mlx.utils import tree_map_with_path

    twins = _twins()
    left: list[str] = []
    done: dict[int, Any] = {}  # a layer that stands in two places (a tied head) stays one layer

    def swap(path: str, module: Any) -> Any:
        if type(module) in twins:
            return done.setdefault(id(module), _filled(twins[type(module)](), module))
        if _is_quantized(module):
            left.append(path)
        return module

    model.update_modules(tree_map_with_path(swap, model.leaf_modules(), is_leaf=Module.is_module))
    if not left:
        model.set_dtype(mx.float32)
    model.eval()
    return left


def _twins() -> dict[type, Callable[[], Any]]:
    """Quantized layer -> an empty float one, whose weight is put in afterwards."""
    import mlx.nn as nn
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return {
        nn.QuantizedLinear: lambda: nn.Linear(1, 1, bias=False),
        nn.QuantizedEmbedding: lambda: nn.Embedding(1, 1),
        QuantizedSwitchLinear: lambda: SwitchLinear(1, 1, 1, bias=False),
        QuantizedMultiLinear: lambda: MultiLinear(1, 1, 1),
    }


def _filled(twin: Any, quantized: Any) -> Any:
    import mlx.core as mx

    twin.weight = decoded(quantized)
    if "bias" in quantized:
        twin.bias = quantized.bias.astype(mx.float32)
    return twin


def decoded(layer: Any) -> Any:
    """float32 weight of a quantized layer. Affine scales are widened first, so that only float32 rounding is
    left.
    """
    import mlx.core as mx

    scales, biases = layer["scales"], layer.get("biases")
    if layer.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    global_scale = layer.get("global_scale")

    def decode(w: Any, s: Any, b: Any, g: Any) -> Any:
        return mx.dequantize(
            w,
            s,
            b,
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
            global_scale=g,
            dtype=mx.float32,
        )

    if global_scale is not None and global_scale.ndim:  # one for each expert
        experts = range(layer["weight"].shape[0])
        return mx.stack([decode(layer["weight"][e], scales[e], None, global_scale[e]) for e in experts])
    return decode(layer["weight"], scales, biases, global_scale)


def _is_quantized(module: Any) -> bool:
    return hasattr(module, "bits") and "scales" in module


def _leaves(model: Any) -> list[Any]:
    from mlx.nn import Module
    from mlx.utils import tree_flatten

    found = {id(module): module for _, module in tree_flatten(model.leaf_modules(), is_leaf=Module.is_module)}
    return list(found.values())
