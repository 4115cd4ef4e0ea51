"""What a model on this disk is, from its headers: plan/describe.py's answer for a path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxquant.plan.describe import Description, describe, describe_gguf

if TYPE_CHECKING:
    from mlxquant.files.gguf_file import GGUFTensor

# Metadata, tensors, and the rope factors, which are a tensor but belong to the config.
GGUFHeader = tuple[dict[str, Any], "dict[str, GGUFTensor]", list[float] | None]


def describe_path(path: Path) -> Description:
    """A Hugging Face or MLX folder, or a .gguf file. Raises SourceError."""
    if path.is_file():
        return describe_gguf(*gguf_header(path))
    from mlxquant.files.hf_folder import HFFolder

    folder = HFFolder(path)
    return describe(folder.config, folder.specs)


def gguf_header(path: Path) -> GGUFHeader:
    """What `describe_gguf` takes. Raises SourceError."""
    from mlxquant.families.gguf import ROPE_FREQS
    from mlxquant.files.gguf_file import GGUFFile

    file = GGUFFile(path)
    factors = file.tensors.get(ROPE_FREQS)
    if factors is None or factors.type_name != "F32":
        return file.metadata, file.tensors, None
    return file.metadata, file.tensors, file.read_rows(ROPE_FREQS, 0, 1).view("<f4")[0].tolist()


def front_bytes(header: GGUFHeader) -> int:
    """Bytes of the file that `gguf_header` looks at: up to the first tensor, or the end of the factors."""
    from mlxquant.families.gguf import ROPE_FREQS

    _, tensors, factors = header
    if factors is not None:
        return tensors[ROPE_FREQS].offset + tensors[ROPE_FREQS].nbytes
    return min((t.offset for t in tensors.values()), default=0)
