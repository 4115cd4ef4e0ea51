"""The Hugging Face checkpoint that a config.json stands for: every tensor's name, shape and dtype, without a download.

The tables of mlx_modules.py say what each tensor of the MLX model is made of. layout() reads them towards the model;
here they are read the other way, so that no name is written twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxquant.families.mlx_config import text_config
from mlxquant.families.mlx_layout import all_flags, expected, published
from mlxquant.families.mlx_modules import dimensions, made_of
from mlxquant.families.shape import ModelShape
from mlxquant.tensors import FLOAT_CODES, TensorSpec

_MXFP4_GROUP = 32


def checkpoint(config: Mapping[str, Any], dtype: str | None = None) -> dict[str, TensorSpec]:
    """{name: spec} of all that the text model is made of, in its order, as make_plan and plan_checkpoint take it.

    `dtype`: a dtype code for all tensors; None: config.json's, else BF16. What a conversion leaves out (vision towers,
    multi-token prediction, tied heads stored twice) is not listed. A checkpoint published in FP8 is listed as the
    floats that it stands for; gpt-oss's experts as MXFP4 where config.json says so, else as floats in MLX's layout.

    Raises SourceError (a key is missing or wrong) and UnsupportedError (an unknown family).
    """
    shape, code = ModelShape.from_config(config), dtype or _stated_dtype(config)
    numbers = dimensions(shape)
    specs: dict[str, TensorSpec] = {}
    for row, _, source in expected(shape, _flags(config, shape), numbers):
        names, size = made_of(row, source, numbers)
        for name in (published(shape.module, name) for name in names):
            specs[name] = TensorSpec(name, size, code)
    return _with_mxfp4(specs) if shape.module == "gpt_oss" and _is_mxfp4(config) else specs


def _flags(config: Mapping[str, Any], shape: ModelShape) -> set[str]:
    stated = text_config(config).get("tie_word_embeddings")
    return all_flags(config, shape, head_present=not shape.tied and stated is not True)


def _stated_dtype(config: Mapping[str, Any]) -> str:
    """transformers before 5 writes `torch_dtype`, since 5 `dtype`."""
    found = text_config(config)
    names = (found.get(key) for key in ("torch_dtype", "dtype"))
    return next((FLOAT_CODES[name] for name in names if isinstance(name, str) and name in FLOAT_CODES), "BF16")


def _is_mxfp4(config: Mapping[str, Any]) -> bool:
    scheme = config.get("quantization_config")
    return isinstance(scheme, Mapping) and scheme.get("quant_method") == "mxfp4"


def _with_mxfp4(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """gpt-oss as OpenAI published it: gate and up in one, codes and scales of 32 weights: see fused_experts.py."""
    made: dict[str, TensorSpec] = {}
    for spec in specs.values():
        at, _, part = spec.name.partition(".mlp.experts.")
        for one in _published(at + ".mlp.experts.", part, spec) if part else (spec,):
            made[one.name] = one
    return made


def _published(at: str, part: str, spec: TensorSpec) -> tuple[TensorSpec, ...]:
    """`part`: gate_proj.weight, ... up_proj adds nothing: it lies in gate_up_proj."""
    which, _, kind = part.partition("_proj.")
    if which == "up":
        return ()
    name, (experts, rows, *width) = at + {"gate": "gate_up_proj"}.get(which, f"{which}_proj"), spec.shape
    rows *= 2 if which == "gate" else 1
    if kind == "bias":
        return (TensorSpec(f"{name}_bias", (experts, rows), spec.dtype),)
    groups = width[0] // _MXFP4_GROUP
    return (
        TensorSpec(f"{name}_blocks", (experts, rows, groups, _MXFP4_GROUP // 2), "U8"),
        TensorSpec(f"{name}_scales", (experts, rows, groups), "U8"),
    )
