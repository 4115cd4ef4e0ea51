"""How far decode(encode(w)) may be from w: the promise of each format, from the weights alone.

Not from what was stored: a damaged scale would then widen its own bound.
"""

from __future__ import annotations

import numpy as np

from mlxquant.codecs.floats import Array, fold
from mlxquant.codecs.reference import affine_scale_bias, mx_scale
from mlxquant.codecs.spec import Codec

# dtype -> (bits of mantissa, least normal exponent)
_PRECISION = {"BF16": (7, -126), "F16": (10, -14), "F32": (23, -126)}


def error_bound(w_OI: Array, dtype_code: str, codec: Codec) -> Array:
    """The greatest |w - decode(encode(w))| of each group: float64 (O, I / group_size); for keep zeros (O, 1).

    `w_OI` is float32, finite, already rounded to `dtype_code`, as encode does first.

    affine   max(step / 2, range - n * step) + n * (half a unit of the scale in the dtype) + float32 rounding.
             Half a step where codes reach. Where n steps are shorter than the range, what is left of it at
             the far end (as much as a whole step, see affine.py). The rounding of the scale comes in up to n
             times, that of the bias not at all: it is itself one of the weights, or zero.
    mx       scale * half the widest gap between codes that the group reaches, or what lies beyond the
             last code, plus the rounding of w / scale to the dtype. A group of scale 0 promises its peak.
    """
    if not codec.quantized:
        return np.zeros((len(w_OI), 1))
    groups = w_OI.reshape(len(w_OI), -1, codec.group_size)
    peak = fold(np.maximum, np.abs(groups)).astype(np.float64)
    if codec.mode == "affine":
        return _affine(groups, peak, dtype_code, 2**codec.bits - 1)
    return _mx(groups, peak, dtype_code, codec)


def _affine(groups: Array, peak: Array, dtype_code: str, n: int) -> Array:
    step = np.abs(affine_scale_bias(groups, n.bit_length())[0]).astype(np.float64)
    spread = fold(np.maximum, groups).astype(np.float64) - fold(np.minimum, groups)
    # A handful of float32 operations on numbers of at most peak or n steps, each good to 2**-24.
    rounding = (peak + n * step) * 2.0**-22
    far = spread - n * step
    return np.asarray(np.maximum(step / 2, far) + n * _half_unit(step, dtype_code) + rounding)


def _mx(groups: Array, peak: Array, dtype_code: str, codec: Codec) -> Array:
    scale = mx_scale(groups, dtype_code, codec.mode)[1].astype(np.float64)
    zero = scale == 0
    x = peak / np.where(zero, 1, scale)
    if codec.bits == 8:
        last = 448.0
        unit = np.maximum(np.exp2(np.floor(np.log2(np.maximum(x, 2.0**-6))) - 3), 2.0**-9)
        half_gap = np.minimum(unit, 32) / 2
    else:
        last = 6.0
        half_gap = np.select([x <= 2, x <= 4], [0.25, 0.5], 1.0)
    # Beyond 2**24 MLX's search for the nearest nvfp4 code finds any of them, zero too.
    lost = np.where((x > 2.0**24) & (codec.mode == "nvfp4"), x, x - last)
    inside = np.maximum(half_gap, lost) + _half_unit(x, dtype_code)
    return np.asarray(np.where(zero, peak, inside * scale * (1 + 2.0**-22)))


def _half_unit(size: Array, dtype_code: str) -> Array:
    """Half the last place of numbers of this size in a dtype: how far rounding to it can go."""
    mantissa, least = _PRECISION[dtype_code]
    _, exponent = np.frexp(size)
    return np.asarray(np.ldexp(0.5, np.maximum(exponent - 1, least) - mantissa))
