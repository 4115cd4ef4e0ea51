"""What a GGUF file's keys say of how it was made: who wrote it, as which file type, from what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlxquant.plan.gguf_types import FILE_TYPES

# general.file_type of what llama.cpp writes and we do not (llama.h, enum llama_ftype).
_OTHERS = {
    19: "IQ2_XXS", 20: "IQ2_XS", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 31: "IQ1_M", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip
_NAMES = {number: name for name, (number, _) in FILE_TYPES.items()} | _OTHERS


def provenance(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What is known of file_type, made_by, made_from, imatrix, licence: those of our own files, and of llama.cpp's."""
    text = {key: value for key, value in metadata.items() if isinstance(value, str)}
    number = metadata.get("general.file_type")
    version, repository = text.get("mlxquant.version"), text.get("general.source.huggingface.repository")
    found = {
        "file_type": _NAMES.get(number, str(number)) if isinstance(number, int) else None,
        "made_by": f"mlxquant {version}" if version else text.get("general.quantized_by"),
        "made_from": _source(text["mlxquant.source"]) if "mlxquant.source" in text else repository,
        "imatrix": ", ".join(text[k] for k in ("quantize.imatrix.file", "quantize.imatrix.dataset") if k in text),
        "licence": text.get("general.license"),
    }
    return {key: value for key, value in found.items() if value}


def _source(written: str) -> str | None:
    """'org/name at 0123abc', or the file or folder's name."""
    try:
        origin = json.loads(written)
        name, revision = origin["name"], origin.get("revision")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return f"{name} at {revision}" if revision else str(name)
