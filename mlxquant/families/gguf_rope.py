"""Rope scaling: from GGUF keys, and from the tensor of factors that llama.cpp stores for Llama 3.1 and
later."""

from __future__ import annotations

import itertools
import math
from typing import Any

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf_metadata import Metadata

_FOLDER_HINT = "give the model's Hugging Face folder instead"
_YARN_KEYS = {
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_attn_factor": "attention_factor",
    "yarn_ext_factor": "extrapolation_factor",
}
# The factors depend on original context / low and original context / high alone; published models have these.
_ORIGINAL_TOKENS = (8192, 4096, 2048, 16384, 32768, 65536, 131072)
_LOW_HIGH = ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0))


def rope_scaling(
    meta: Metadata, arch: str, config: dict[str, Any], factors: list[float] | None
) -> dict[str, Any] | None:
    """The `rope_scaling` entry of config.json, or None. `factors` are the values of rope_freqs.weight.

    Raises UnsupportedError for a kind of scaling, or for factors, that no known parameters give.
    """
    kind = meta.text(f"{arch}.rope.scaling.type", "linear")  # llama.cpp's default; without a factor it does nothing
    factor = meta.number(f"{arch}.rope.scaling.factor", meta.number(f"{arch}.rope.scale_linear", 1.0)) or 1.0
    if factors is not None and any(f != 1.0 for f in factors):
        if factor != 1.0:
            raise UnsupportedError(
                "GGUF: rope_freqs.weight and a rope scaling factor at once are not supported",
                hint=_FOLDER_HINT,
            )
        return llama3_scaling(factors, config["rope_theta"], config["head_dim"])
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(meta, arch, factor)
    raise UnsupportedError(
        f"GGUF key {arch}.rope.scaling.type: {kind!r:.60} is not supported (linear and yarn are)",
        hint=_FOLDER_HINT,
    )


def _yarn(meta: Metadata, arch: str, factor: float) -> dict[str, Any]:
    original = meta.integer(f"{arch}.rope.scaling.original_context_length", least=1)
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    for key, name in _YARN_KEYS.items():
        if (full := f"{arch}.rope.scaling.{key}") in meta:
            scaling[name] = meta.number(full)
    return scaling


def llama3_scaling(factors: list[float], theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters behind rope_freqs.weight: those of a published model that give the very same factors.

    Raises SourceError for a wrong number of factors, UnsupportedError where no known parameters fit.
    """
    if len(factors) != head_dim // 2:
        raise SourceError(f"GGUF tensor rope_freqs.weight: {len(factors)} values, expected {head_dim // 2}")
    factor = max(factors)
    for original, (low, high) in itertools.product(_ORIGINAL_TOKENS, _LOW_HIGH):
        expected = llama3_factors(theta, head_dim, factor, low, high, original)
        if all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(factors, expected, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise UnsupportedError(
        f"GGUF tensor rope_freqs.weight: no known Llama 3 rope scaling gives its values (largest {factor:g})",
        hint=_FOLDER_HINT,
    )


def llama3_factors(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> list[float]:
    """By what each of the head_dim / 2 wavelengths is stretched (Llama 3.1's apply_scaling): 1 for short
    ones, `factor` for long ones, and in between a blend of the two frequencies."""
    stretched = []
    for i in range(0, head_dim, 2):
        turns = original / (2 * math.pi * theta ** (i / head_dim))  # of this frequency in the original context
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        stretched.append(1 / ((1 - blend) / factor + blend))
    return stretched
