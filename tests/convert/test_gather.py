"""Chunks cover a target once, and no range of rows makes a source read more than it must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from mlxquant.convert.gather import chunks, mxfp4_rows, refuse_shifted_norms, rows, wide_rows
from mlxquant.errors import SourceError
from mlxquant.families.layout import Piece, Target
from mlxquant.tensors import TensorSpec

EXPERTS, WIDTH, COLUMNS = 3, 6, 8


class Counting:
    """Arrays as a source that notes how many rows each reading took."""

    path, config = Path("arrays"), {}

    def __init__(self, dtype: str = "F32", **tensors: np.ndarray) -> None:
        self.tensors, self.dtype, self.taken = tensors, dtype, 0
        self.specs = {name: TensorSpec(name, value.shape, dtype) for name, value in tensors.items()}

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        value = self.tensors[name]
        assert 0 <= start <= stop <= self.specs[name].rows
        self.taken = max(self.taken, stop - start)
        return value.reshape(-1, value.shape[-1])[start:stop]


def stack() -> tuple[Counting, Target, np.ndarray]:
    """Every second column of a transposed stack, as gpt-oss keeps gate and up."""
    fused = np.arange(EXPERTS * WIDTH * COLUMNS, dtype=np.float32).reshape(EXPERTS, WIDTH, COLUMNS)
    half = COLUMNS // 2
    pieces = tuple(Piece("fused", e * COLUMNS + 1, half, 2) for e in range(EXPERTS))
    target = Target("up", (EXPERTS, half, WIDTH), "F32", pieces, "transposed")
    return Counting(fused=fused), target, fused.swapaxes(1, 2)[:, 1::2].reshape(-1, WIDTH)


@pytest.mark.parametrize(("start", "stop"), [(0, 12), (0, 4), (3, 5), (1, 2), (7, 12), (11, 12)])
def test_any_rows_of_a_transposed_stack_read_one_matrix_at_a_time(start: int, stop: int) -> None:
    source, target, expected = stack()
    assert np.array_equal(wide_rows(source, target, start, stop), expected[start:stop])
    assert source.taken == WIDTH


@pytest.mark.parametrize("chunk_bytes", [1, 100, 10**9])
def test_chunks_cover_every_row_once(chunk_bytes: int) -> None:
    _, target, _ = stack()
    assert list(chunks(target, chunk_bytes)) == [(0, 4), (4, 8), (8, 12)]  # a matrix each
    plain = Target("w", (5, 7, 4), "BF16", (Piece("w", 0, 35),))
    covered = [row for start, stop in chunks(plain, chunk_bytes) for row in range(start, stop)]
    assert covered == list(range(35))


@pytest.mark.parametrize("change", ["pairs", "halves"])
def test_rotary_rows_are_read_within_their_heads(change: Any) -> None:
    heads, head_dim = 4, 8
    w = np.arange(heads * head_dim * 2, dtype=np.float32).reshape(-1, 2)
    split = (heads, 2, head_dim // 2, 2) if change == "pairs" else (heads, head_dim // 2, 2, 2)
    expected = w.reshape(split).swapaxes(1, 2).reshape(w.shape)
    source, target = Counting(q=w), Target("q", w.shape, "F32", (Piece("q", 0, len(w)),), change, heads=heads)
    for start in range(len(w)):
        for stop in range(start + 1, len(w) + 1):
            source.taken = 0
            assert np.array_equal(rows(source, target, start, stop), expected[start:stop])
            assert source.taken < stop - start + 2 * head_dim
    vector = Target("b", (len(w),), "F32", (Piece("b", 0, 1),), change, heads=heads)
    assert np.array_equal(rows(Counting(b=w[:, 0]), vector, 0, 1)[0], expected[:, 0])


def test_norms_are_shifted_in_float32_and_rounded_for_mlx_alone() -> None:
    w = np.array([0.001, -0.3, 1.5], ml_dtypes.bfloat16)
    source = Counting("BF16", w=w.view(np.uint16))
    target = Target("w", (3,), "BF16", (Piece("w", 0, 1),), "add_one")
    exact = w.astype(np.float32) + np.float32(1)
    assert np.array_equal(wide_rows(source, target, 0, 1)[0], exact)
    rounded = exact.astype(ml_dtypes.bfloat16)
    assert np.array_equal(rows(source, target, 0, 1)[0], rounded.view(np.uint16))
    assert not np.array_equal(rounded.astype(np.float32), exact)


def test_mxfp4_codes_keep_their_numbers() -> None:
    """Hugging Face's pairs of neighbours become ggml's pairs 16 apart: gguf decodes what transformers would."""
    rng = np.random.default_rng(0)
    out, groups = 6, 2
    codes = rng.integers(0, 256, (1, out, groups, 16), np.uint8)
    scales = rng.integers(120, 130, (1, out, groups), np.uint8)
    source = Counting("U8", w_blocks=codes, w_scales=scales)
    # transformers, FP4_VALUES
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    nibbles = np.stack((codes & 15, codes >> 4), -1).reshape(out, groups, 32)
    expected = (values[nibbles] * np.exp2(scales[0].astype(np.float32) - 127)[..., None]).reshape(out, -1)
    for part in (0, 1):
        pieces = (Piece("w_blocks", part, 3, 2), Piece("w_scales", part, 3, 2))
        target = Target("w", (1, 3, 64), "F32", pieces, "mxfp4")
        for start, stop in ((0, 3), (1, 3), (2, 3)):
            assert np.array_equal(wide_rows(source, target, start, stop), expected[part::2][start:stop])
            blocks = mxfp4_rows(source, target, start, stop)
            floats = gguf.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
            assert np.array_equal(floats, expected[part::2][start:stop])


@pytest.mark.parametrize(
    ("stored", "change", "reason"),
    [
        (0.0, "add_one", None),
        (1.0, "none", None),
        (1.0, "add_one", "has been applied already"),  # a checkpoint that somebody shifted
        (2.0, "none", "has been applied already"),  # an MLX folder shifted twice
        (0.0, "none", "is missing"),  # an MLX folder never shifted
    ],
)
def test_norms_shifted_twice_or_never_are_refused(stored: float, change: Any, reason: str | None) -> None:
    norms = {f"{name}_norm.weight": np.full(8, stored, np.float32) for name in ("attn", "post_attention", "output")}
    norms |= {"attn_q_norm.weight": np.full(8, 9.0, np.float32), "ssm_norm.weight": np.full(8, 7.0, np.float32)}
    source = Counting(**norms)
    targets = [Target(name, (8,), "F32", (Piece(name, 0, 1),), change) for name in norms]
    refuse_shifted_norms(source, targets)  # no family that is known to lie around 0
    source.config = {"model_type": "qwen3_next"}
    if reason is None:
        refuse_shifted_norms(source, targets)
    else:
        with pytest.raises(SourceError, match=rf"attn_norm\.weight and 3 other norms: .* 1 \+ w shift {reason}"):
            refuse_shifted_norms(source, targets)
