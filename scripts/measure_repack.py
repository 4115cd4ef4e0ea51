"""What repacking costs: for each ggml type, its own NMSE on Gaussian weights and what its MLX form adds to it.

    python scripts/measure_repack.py          prints the table that stands in mlxquant/codecs/repacked.py

Needs libgguf (the `dev` extra), whose encoder makes the blocks.
"""

from __future__ import annotations

import libgguf
import numpy as np

from mlxquant.codecs.encode import decode
from mlxquant.codecs.ggml import decode_rows
from mlxquant.codecs.repack import repack
from mlxquant.codecs.repacked import REPACKED

WIDTH = 2048


def measure(type_name: str, rows: int = 512) -> tuple[float, float]:
    """(own NMSE, extra NMSE) of one type."""
    w_OI = (np.random.default_rng(0).standard_normal((rows, WIDTH)) * 0.02).astype(np.float32)
    importance = np.ones(WIDTH, np.float32) if type_name.startswith("IQ") else None
    raw = libgguf.quantize_rows(w_OI, libgguf.GGMLQuantizationType[type_name], imatrix=importance)
    blocks = decode_rows(raw, type_name, WIDTH)
    repacked = decode(repack(raw, type_name, WIDTH), "F16", REPACKED[type_name].codec)
    return nmse(w_OI, blocks), nmse(blocks, repacked)


def nmse(reference: np.ndarray, other: np.ndarray) -> float:
    squared = np.square(reference - other, dtype=np.float64).sum()
    return float(squared / np.square(reference, dtype=np.float64).sum())


if __name__ == "__main__":
    for name, repacked in REPACKED.items():
        own, extra = measure(name)
        print(f"{name:8} {repacked.codec.label:6} own {own:.1e}  extra {extra:.1e}  share {extra / own:.4f}")
