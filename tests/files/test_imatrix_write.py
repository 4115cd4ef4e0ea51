"""What we write is what llama-imatrix writes, to the byte, and reads back as what it was."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from mlxquant.errors import TargetError
from mlxquant.files.imatrix import Sums, imatrix_bytes, read_imatrix, write_imatrix

FIXTURE = Path(__file__).parent.parent / "fixtures" / "imatrix" / "moe.gguf"


def sums_in(path: Path) -> dict[str, Sums]:
    """By a foreign reader, names in an order that is not the file's."""
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    names = sorted({name.rpartition(".")[0] for name in tensors}, reverse=True)
    return {
        name: Sums(
            np.atleast_2d(tensors[f"{name}.in_sum2"]).astype(np.float64),
            tensors[f"{name}.counts"].reshape(-1).astype(np.int64),
        )
        for name in names
    }


def test_the_bytes_are_llama_imatrixs() -> None:
    found = imatrix_bytes(sums_in(FIXTURE), ["text.txt"], 3, 64)
    assert found == FIXTURE.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sums = {
        "blk.0.ffn_up.weight": Sums(rng.random((1, 40)) * 1e6, np.array([1024])),
        "blk.0.ffn_up_exps.weight": Sums(rng.random((3, 16)), np.array([7, 0, 2**23 + 1])),
        "blk.10.attn_q.weight": Sums(np.zeros((1, 8)), np.array([5])),
    }
    write_imatrix(tmp_path / "i.gguf", sums, ["a text", "another"], 2, 512)
    found = read_imatrix(tmp_path / "i.gguf")
    assert (found.datasets, found.chunks) == (("a text", "another"), 2)
    assert found.entries.keys() == sums.keys()
    for name, entry in found.entries.items():
        counts = sums[name].counts.astype(np.float32)[:, None]
        expected = sums[name].in_sum2.astype(np.float32) / np.maximum(counts, np.float32(1))
        np.testing.assert_array_equal(entry, np.where(counts > 0, expected, np.float32(1)), name)


def test_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be written"):
        write_imatrix(tmp_path / "none" / "i.gguf", sums_in(FIXTURE), ["t"], 3, 64)
    assert list(tmp_path.iterdir()) == []
