"""Rope scaling: the tensors of factors that llama.cpp stores for Llama 3.1 and for Phi-3, made from config.json, and
the `rope_scaling` of config.json made from them and from GGUF keys."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlxquant.errors import SourceError, UnsupportedError
from mlxquant.families.gguf_hparams import Hparams, read_hparams, real
from mlxquant.families.gguf_metadata import Metadata
from mlxquant.families.gguf_table import ROPE_TENSORS, module_of_config

Array = np.ndarray[Any, Any]

ROPE_FREQS, _LONG, _SHORT = ROPE_TENSORS
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
# The families whose class of llama.cpp's converter makes rope_freqs.weight: LlamaModel and what is derived from it.
# Granite's would too, but its architecture has no place for the tensor.
_LLAMA3_FAMILIES = ("llama", "mistral", "mixtral", "smollm3", "granite")


def rope_tensors(config: Mapping[str, Any]) -> dict[str, Array]:
    """The rope factors that a GGUF file of this model has as tensors: GGUF name -> float32 (pairs,).

    rope_freqs.weight where rope scaling is llama3's (conversion/llama.py, generate_extra_tensors), rope_factors_* where
    it is Phi-3's long rope (conversion/phi.py); most models have none. The script's bits. Raises SourceError for
    settings that are missing or no numbers, UnsupportedError where llama.cpp has no place for them."""
    hparams = read_hparams(config, module_of_config(config))
    kind = hparams.rope["rope_type"].lower()
    if hparams.model_type in _LLAMA3_FAMILIES and kind == "llama3":
        if hparams.model_type == "granite":
            raise UnsupportedError("config.json: llama.cpp has no rope scaling 'llama3' in its architecture granite")
        return {ROPE_FREQS: _stored_llama3_factors(hparams)}
    if hparams.model_type == "phi3" and hparams.rope.get("long_factor"):
        pairs = _phi3_pairs(hparams)
        names = (_LONG, "long_factor"), (_SHORT, "short_factor")
        return {tensor: _factor_list(hparams, name, pairs) for tensor, name in names}
    return {}


def _phi3_pairs(hparams: Hparams) -> int:
    part = real("partial_rotary_factor", hparams.rope.get("partial_rotary_factor", 1.0))
    return int(part * hparams.integer("hidden_size", 1)) // hparams.integer("num_attention_heads", 1) // 2


def _factor_list(hparams: Hparams, name: str, pairs: int) -> Array:
    values = hparams.rope.get(name)
    if not isinstance(values, list) or len(values) != pairs:
        found = f"{len(values)} entries" if isinstance(values, list) else f"{values!r:.60}"
        raise SourceError(f"config.json: {name} of rope_scaling: {found}, expected {pairs} numbers")
    return np.array([real(name, value) for value in values], np.float32)


def _stored_llama3_factors(hparams: Hparams) -> Array:
    """`llama3_factors` in the float32 steps of the script's torch tensors: each division by a tensor is there a
    reciprocal and a product. The powers are rounded once, as torch's are without vector units; its vectorized ones are
    off by a last bit here and there. With the published thetas (10000 to 5 million) no factor shows it, with others
    one in a hundred does."""
    f32 = np.float32
    names = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    theta, factor, low, high, original = (real(name, hparams.rope.get(name)) for name in names)
    if not (theta > 0 and factor > 0 and 0 < low < high and original > 0):
        raise SourceError(f"config.json: rope_scaling: {dict(hparams.rope)!r:.120} is no llama3 scaling")
    exponents = np.arange(0, hparams.head_dim, 2, dtype=f32) / f32(hparams.head_dim)
    frequencies = 1 / (theta ** exponents.astype(np.float64)).astype(f32)
    wavelengths = (1 / frequencies) * f32(2 * math.pi)
    blend = ((1 / wavelengths) * f32(original) - f32(low)) / f32(high - low)
    between = 1 / ((1 - blend) / f32(factor) + blend)
    # The script compares float32 tensors with its bounds as float32.
    made = np.where(wavelengths > f32(original / low), f32(factor), between)
    return np.where(wavelengths < f32(original / high), f32(1), made).astype(f32)


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
    if not factor > 0:
        raise SourceError(f"GGUF tensor rope_freqs.weight: the largest value is {factor:g}, expected more than 0")
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


def long_rope(
    meta: Metadata,
    shapes: Mapping[str, tuple[int, ...]],
    factors: tuple[Sequence[float], Sequence[float]] | None,
    pairs: int,
    scale: float,
    original: int,
) -> dict[str, Any] | None:
    """The `rope_scaling` of a Phi-3 with long context, or None. `factors`: the values of both tensors, long and short.

    Raises SourceError where one is missing or too short, UnsupportedError for what stock mlx-lm would run otherwise:
    it computes the attention factor itself."""
    if _LONG not in shapes and _SHORT not in shapes:
        if meta.number("phi3.rope.scaling.factor", 1.0) not in (0.0, 1.0):
            raise UnsupportedError("GGUF: rope scaling by a factor in a phi3 model is not supported", hint=_FOLDER_HINT)
        return None
    if factors is None:
        raise SourceError(f"GGUF tensor {_LONG if _LONG in shapes else _SHORT} is in the file, but not its values")
    for name, values in zip((_LONG, _SHORT), factors, strict=True):
        if len(values) != pairs:
            raise SourceError(f"GGUF tensor {name}: {len(values)} values, expected {pairs}")
    expected = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    found = meta.number("phi3.rope.scaling.attn_factor", 1.0)
    if not math.isclose(found, expected, rel_tol=1e-6):
        raise UnsupportedError(
            f"GGUF key phi3.rope.scaling.attn_factor: found {found:g}, supported is only {expected:g}, which "
            "follows from the context lengths",
            hint=_FOLDER_HINT,
        )
    long, short = ([float(np.format_float_positional(np.float32(f))) for f in values] for values in factors)
    return {"type": "longrope", "rope_type": "longrope", "long_factor": long, "short_factor": short}
