"""Every type we write against ggml's reference encoder (libgguf), byte for byte, and against kept hashes of its bytes.

The hashes are for machines without libgguf (Apple silicon, Python 3.14). Made with

    python -m tests.codecs.test_ggml_encode
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxquant.codecs import blocks
from mlxquant.codecs.floats import NonFiniteError, narrow, widen
from mlxquant.codecs.ggml import ENCODED, block, decode_rows, encode_rows, row_without_scale
from mlxquant.errors import UnsupportedError
from mlxquant.files.gguf_file import GGUFFile
from tests.codecs.ggml_rows import (
    BLOCKS,
    ROWS,
    WEIGHTED,
    all_rows,
    exact_importance,
    exact_rows,
    ggml_encode,
    importances,
    kinds_of_rows,
)

HASHES = Path(__file__).parent.parent / "fixtures" / "ggml_encode.json"


def widths(type_name: str) -> tuple[int, ...]:
    return (32, 96, 544) if block(type_name)[0] == 32 else (256, 512, 768)


def assert_same(ours: np.ndarray, theirs: np.ndarray, kinds: list[str]) -> None:
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape
    wrong = np.flatnonzero((ours != theirs).any(1))
    assert wrong.size == 0, {kinds[row // ROWS] for row in wrong}


def test_every_type_is_tested() -> None:
    assert set(ENCODED) == {*BLOCKS, "F32", "F16", "BF16"}


@pytest.mark.parametrize("type_name", BLOCKS)
def test_same_bytes_as_ggml(type_name: str) -> None:
    for width in widths(type_name):
        rows, kinds = all_rows(width), list(kinds_of_rows(width))
        assert_same(encode_rows(rows, "F32", type_name), ggml_encode(rows, type_name), kinds)


@pytest.mark.parametrize("type_name", BLOCKS)
def test_same_bytes_as_ggml_with_importance(type_name: str) -> None:
    for width in widths(type_name):
        rows, kinds = all_rows(width, seed=1), list(kinds_of_rows(width))
        plain = encode_rows(rows, "F32", type_name)
        for name, importance in importances(width).items():
            ours = encode_rows(rows, "F32", type_name, importance)
            assert_same(ours, ggml_encode(rows, type_name, importance), [f"{kind}, {name}" for kind in kinds])
        assert (type_name in WEIGHTED) == (ours != plain).any()


@pytest.mark.parametrize("type_name", BLOCKS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    blocks_wide=st.integers(1, 9),
    rows=st.integers(1, 40),
    exponent=st.integers(-140, 120),
    tails=st.sampled_from([1.0, 3.0, 100.0]),
    weighted=st.booleans(),
)
def test_random_rows(
    type_name: str, seed: int, blocks_wide: int, rows: int, exponent: int, tails: float, weighted: bool
) -> None:
    rng = np.random.default_rng(seed)
    width = blocks_wide * block(type_name)[0]
    values = np.ldexp(rng.standard_t(tails, (rows, width)), exponent)
    values = np.clip(values * rng.choice([0, 1, 1, 1], (rows, width)), -3e38, 3e38).astype(np.float32)
    importance = rng.exponential(size=width).astype(np.float32) if weighted else None
    assert (
        encode_rows(values, "F32", type_name, importance).tobytes()
        == ggml_encode(values, type_name, importance).tobytes()
    )


def usual_rows() -> np.ndarray:
    """Numbers that every type and every source dtype can hold."""
    kinds = kinds_of_rows(512)
    names = ("gauss", "heavy tails", "positive", "ternary", "zero", "larger denormal")
    return np.concatenate([kinds[name] for name in names])


@pytest.mark.parametrize("type_name", ENCODED)
@pytest.mark.parametrize("code", ["BF16", "F16", "F64"])
def test_any_source_is_its_float32(code: str, type_name: str) -> None:
    raw = narrow(usual_rows(), code)
    expected = encode_rows(widen(raw, code), "F32", type_name)
    np.testing.assert_array_equal(encode_rows(raw, code, type_name), expected)


def test_floats_round_to_nearest_even() -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([usual_rows(), rng.integers(0, 0x47000000, (20, 512), dtype=np.uint32).view(np.float32)])
    for name, dtype in (("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
        assert encode_rows(rows, "F32", name).tobytes() == rows.astype(dtype).tobytes()
        assert encode_rows(rows, "F32", name).tobytes() == ggml_encode(rows, name).tobytes()


@pytest.mark.parametrize("type_name", ENCODED)
def test_same_bytes_on_any_number_of_threads(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", 1)
    rng = np.random.default_rng(0)
    rows = (rng.standard_t(3, (330, 768)) * 0.02).astype(np.float32)  # four tiles, the last one not full
    importance = importances(768)["usual"]
    results = set()
    for threads in (1, 2, 3):
        monkeypatch.setattr(blocks, "cores", lambda threads=threads: threads)
        results.add(encode_rows(rows, "F32", type_name, importance).tobytes())
    results.add(b"".join(encode_rows(part, "F32", type_name, importance).tobytes() for part in np.split(rows, 10)))
    assert len(results) == 1


@pytest.mark.parametrize("type_name", ENCODED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_row(type_name: str, bad: float) -> None:
    rows = np.zeros((900, 512), np.float32)
    rows[[700, 898], 17] = bad
    for code in ("F32", "BF16", "F64"):
        with pytest.raises(NonFiniteError, match="row 700: NaN") as caught:
            encode_rows(narrow(rows, code), code, type_name)
        assert caught.value.row == 700


def test_what_would_become_infinite_is_refused() -> None:
    rows = np.zeros((3, 32), np.float32)
    rows[1, 3] = np.nextafter(np.float32(65520), np.float32(0))
    assert encode_rows(rows, "F32", "F16").view(np.float16)[1, 3] == 65504
    rows[1, 3] = -65520
    with pytest.raises(NonFiniteError, match=r"row 1: .*too large for F16"):
        encode_rows(rows, "F32", "F16")
    rows[1, 3] = 3.3962e38
    with pytest.raises(NonFiniteError, match=r"row 1: .*too large for BF16"):
        encode_rows(rows, "F32", "BF16")
    with pytest.raises(NonFiniteError, match="row 2: "):
        encode_rows(np.array([[0.0], [1e38], [1e39]]), "F64", "F32")


# (a, b): a is what a weight can be off by, in parts of the block's largest magnitude: half a step of the codes, a whole
# one where the far end is clipped (Q4_0, Q5_0, Q3_K, Q6_K), and the steps of the scales where these are packed. b is
# the mean square error of Gaussian rows in parts of their mean square.
HALF = 2**-10  # float16 scales
ERRORS = {
    **{"Q4_0": (1 / 8, 0.0075), "Q5_0": (1 / 16, 0.0019), "Q8_0": (1 / 254, 3e-5)},
    **{"Q4_1": (1 / 15, 0.0062), "Q5_1": (1 / 31, 0.0015)},
    **{"Q2_K": (1 / 3 + 1 / 15, 0.09), "Q4_K": (1 / 15 + 2 / 63, 0.0052), "Q5_K": (1 / 31 + 2 / 63, 0.0014)},
    **{"Q3_K": (1 / 4, 0.024), "Q6_K": (1 / 32, 0.00032), "IQ4_NL": (12 / 113, 0.006), "IQ4_XS": (13 / 113, 0.006)},
    **{"TQ1_0": (1 / 2, 0.66), "TQ2_0": (1 / 2, 0.66)},
    **{"F32": (0, 0), "F16": (0, 5e-8), "BF16": (1 / 256, 3e-6)},
}


@pytest.mark.parametrize("type_name", ENCODED)
def test_what_is_decoded_is_near(type_name: str) -> None:
    kinds, (worst, mean) = kinds_of_rows(1024), ERRORS[type_name]
    for kind in ("gauss", "heavy tails", "peaked", "positive", "sorted", "constant", "two numbers", "on a grid"):
        rows = kinds[kind]
        back = decode_rows(encode_rows(rows, "F32", type_name), type_name, 1024)
        in_blocks = (4, -1, max(32, block(type_name)[0]))
        largest, error = (np.abs(part).reshape(in_blocks).max(-1) for part in (rows, back - rows))
        assert (error <= (worst + HALF) * largest).all(), kind
    gauss = np.random.default_rng(3).normal(size=(64, 1024)).astype(np.float32)
    back = decode_rows(encode_rows(gauss, "F32", type_name), type_name, 1024)
    assert np.square(back - gauss).mean() <= mean * np.square(gauss).mean()


def test_ternary_weights_come_back_as_they_were() -> None:
    rows = (np.random.default_rng(0).integers(-1, 2, (20, 512)) * 0.75).astype(np.float32)
    for type_name in ("TQ1_0", "TQ2_0"):
        np.testing.assert_array_equal(decode_rows(encode_rows(rows, "F32", type_name), type_name, 512), rows)


def test_arguments_no_plan_contains() -> None:
    rows = np.zeros((2, 64), np.float32)
    with pytest.raises(UnsupportedError, match=r"IQ2_XS cannot be written: known are F32, .*TQ2_0"):
        encode_rows(rows, "F32", "IQ2_XS")
    with pytest.raises(ValueError, match="Q4_K takes rows of whole blocks of 256"):
        encode_rows(rows, "F32", "Q4_K")
    with pytest.raises(ValueError, match="F16 rows come as"):
        encode_rows(rows, "F16", "Q4_0")
    for bad in (np.zeros(32, np.float32), np.zeros(64), np.full(64, -1, np.float32), np.full(64, np.nan, np.float32)):
        with pytest.raises(ValueError, match="importance"):
            encode_rows(rows, "F32", "Q4_0", bad)
    assert encode_rows(rows[:0], "F32", "Q4_0").shape == (0, 36)


def hashes() -> dict[str, dict[str, str]]:
    """Of ggml's bytes, with and without importance."""
    rows, importance = exact_rows(512), exact_importance(512)
    answers = {name: (ggml_encode(rows, name), ggml_encode(rows, name, importance)) for name in BLOCKS}
    return {name: {"plain": digest(a), "weighted": digest(b)} for name, (a, b) in answers.items()}


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


@pytest.mark.parametrize("type_name", BLOCKS)
def test_kept_hashes(type_name: str) -> None:
    rows, importance = exact_rows(512), exact_importance(512)
    kept = json.loads(HASHES.read_text())["sha256"][type_name]
    assert digest(encode_rows(rows, "F32", type_name)) == kept["plain"]
    assert digest(encode_rows(rows, "F32", type_name, importance)) == kept["weighted"]


@pytest.mark.parametrize("type_name", BLOCKS)
def test_rows_of_a_real_model(type_name: str) -> None:
    """Runs where MLXQUANT_MODELS names a folder with smol.gguf (the demo's model) in it."""
    path = Path(os.environ.get("MLXQUANT_MODELS", "")) / "smol.gguf"
    if not os.environ.get("MLXQUANT_MODELS") or not path.is_file():
        pytest.skip("MLXQUANT_MODELS names no folder with this file")
    file = GGUFFile(path)
    compared = 0
    for name, tensor in file.tensors.items():
        width = tensor.shape[-1]
        if len(tensor.shape) == 2 and width % block(type_name)[0] == 0 and name.startswith(("blk.1.", "token_embd")):
            rows = decode_rows(file.read_rows(name, 0, 64), tensor.type_name, width)
            assert encode_rows(rows, "F32", type_name).tobytes() == ggml_encode(rows, type_name).tobytes(), name
            compared += 1
    assert compared


if __name__ == "__main__":
    command = "python -m tests.codecs.test_ggml_encode"
    HASHES.write_text(json.dumps({"command": command, "source": "libgguf", "sha256": hashes()}, indent=1) + "\n")


@pytest.mark.parametrize("type_name", [name for name in ENCODED if name not in ("F32", "F16", "BF16")])
def test_a_scale_that_overflows_is_found(type_name: str) -> None:
    """llama-quantize refuses the row; its bytes are ggml's all the same."""
    w_OI = np.full((5, 256), 0.5, np.float32)
    assert row_without_scale(encode_rows(w_OI, "F32", type_name), type_name) == -1
    w_OI[3, 64:128] = np.linspace(3e9, 1e10, 64)  # at 1e30 some give finite garbage, as in ggml
    assert row_without_scale(encode_rows(w_OI, "F32", type_name), type_name) == 3


@pytest.mark.parametrize("type_name", ENCODED)
def test_rows_that_are_read_in_place_stay_as_they_are(type_name: str) -> None:
    """Writable float32 rows are not copied before the kernels read them; read-only ones are, to the same blocks."""
    w_OI = np.random.default_rng(4).standard_normal((40, 512)).astype(np.float32)
    importance_I = np.random.default_rng(5).random(512, np.float32)
    given, copied = w_OI.copy(), w_OI.copy()
    copied.flags.writeable = False
    blocks_ = [encode_rows(rows, "F32", type_name, importance_I).tobytes() for rows in (given, copied)]
    assert blocks_[0] == blocks_[1]
    assert given.tobytes() == w_OI.tobytes()
