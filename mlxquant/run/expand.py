"""Quantized layers into float32 ones, for the CPU, whose quantized matmul is scalar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlxquant.codecs.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, MX_MODES, Codec, affine

KNOWN = frozenset(
    [affine(bits, group_size) for bits in AFFINE_BITS for group_size in AFFINE_GROUP_SIZES]
    + [Codec(mode, bits, group_size) for mode, (group_size, bits) in MX_MODES.items()]
)


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
    """Swaps every quantized layer for its float32 twin and casts all other floats; returns the layers it does not
    know. The codes are decoded before this returns.
    """
    left, fill = swap_layers(model)
    fill()
    return left


def swap_layers(model: Any) -> tuple[list[str], Callable[[], None]]:
    """(layers it does not know, what decodes the codes). Until that is called the twins hold zeros that nobody
    evaluates, so that a lazy model stays unread.
    """
    import mlx.core as mx
    from mlx.nn import Module
    from mlx.utils import tree_map_with_path

    twins = _twins()
    left: list[str] = []
    pairs: dict[int, tuple[Any, Any]] = {}  # a layer that stands in two places (a tied head) stays one layer

    def swap(path: str, module: Any) -> Any:
        if type(module) in twins:
            twin, _ = pairs.setdefault(id(module), (_empty(twins[type(module)](), module), module))
            return twin
        if _is_quantized(module):
            left.append(path)
        return module

    model.update_modules(tree_map_with_path(swap, model.leaf_modules(), is_leaf=Module.is_module))
    if not left:
        model.set_dtype(mx.float32)
    model.eval()
    return left, lambda: _fill(pairs)


def _fill(pairs: dict[int, tuple[Any, Any]]) -> None:
    """One layer at a time, its codes let go before the next is read."""
    while pairs:
        twin, quantized = pairs.pop(next(iter(pairs)))
        twin.weight = decoded(quantized)


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


def _empty(twin: Any, quantized: Any) -> Any:
    import mlx.core as mx

    twin.weight = mx.zeros(_shape(quantized), dtype=mx.float32)
    if "bias" in quantized:
        twin.bias = quantized.bias.astype(mx.float32)
    return twin


def _shape(layer: Any) -> tuple[int, ...]:
    packed = layer["weight"].shape
    return (*packed[:-1], packed[-1] * 32 // layer.bits)


def decoded(layer: Any) -> Any:
    """float32 weight of a quantized layer, evaluated: what its codes, scales and biases stand for, exactly.

    By our own kernels, where they know the format: bit for bit mx.dequantize in float32, but MLX's on the CPU is 10 to
    40 times slower and takes seven times its result in memory for 6-bit codes.
    """
    import mlx.core as mx

    from mlxquant.codecs.encode import decode

    codec = Codec(layer.mode, layer.bits, layer.group_size)
    if layer.get("global_scale") is not None or codec not in KNOWN:
        weight = _decoded_by_mlx(layer)
        mx.eval(weight)
        return weight
    parts = [_rows(layer[name]) for name in ("weight", "scales", "biases") if layer.get(name) is not None]
    return mx.array(decode(tuple(parts), _code(layer["scales"]), codec).reshape(_shape(layer)))


def _rows(array: Any) -> Any:
    """A packed part as the codecs take it: numpy rows, bfloat16 as its bits."""
    import mlx.core as mx
    import numpy as np

    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).reshape(-1, array.shape[-1])


def _code(scales: Any) -> str:
    import mlx.core as mx

    return {mx.bfloat16: "BF16", mx.float16: "F16"}.get(scales.dtype, "F32")


def _decoded_by_mlx(layer: Any) -> Any:
    """The formats of stock mlx-lm that are not among our codecs. Affine scales are widened first, so that only float32
    rounding is left.
    """
    import mlx.core as mx

    scales, biases = layer["scales"], layer.get("biases")
    if layer.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    global_scale = layer.get("global_scale")
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode, "dtype": mx.float32}
    if global_scale is not None and global_scale.ndim:  # one for each expert
        experts = zip(layer["weight"], scales, global_scale, strict=True)
        return mx.stack([mx.dequantize(w, s, global_scale=g, **how) for w, s, g in experts])
    return mx.dequantize(layer["weight"], scales, biases, global_scale=global_scale, **how)


def _is_quantized(module: Any) -> bool:
    return hasattr(module, "bits") and "scales" in module


def _leaves(model: Any) -> list[Any]:
    from mlx.nn import Module
    from mlx.utils import tree_flatten

    found = {id(module): module for _, module in tree_flatten(model.leaf_modules(), is_leaf=Module.is_module)}
    return list(found.values())
