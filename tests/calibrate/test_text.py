"""Samples: where they are cut, that a seed makes them again, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxquant.calibrate.text import calibration, hold_out, made
from mlxquant.errors import UsageError
from mlxquant.measure.windows import begins_with, encode
from mlxquant.run.text import Text
from tests.families.vocab_cases import BOS, CASES
from tests.measure.test_windows import text_of


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return text_of(tmp_path_factory.mktemp("plain"), CASES["qwen2"])


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return text_of(tmp_path_factory.mktemp("bos"), CASES["llama3"])


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    """A text in which every place is told from any other."""
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"{i} " for i in range(3000)))
    return str(path)


def places(whole: list[int], tokens_BL: Any) -> list[int]:
    """Where each sample's tokens, but the first, stand in the text."""
    found = []
    for row in tokens_BL.tolist():
        at = [i for i in range(len(whole)) if whole[i + 1 : i + len(row)] == row[1:]]
        assert len(at) == 1
        found.append(at[0])
    return found


@pytest.mark.parametrize("bos", [False, True])
def test_samples_stand_in_the_text_in_order_and_apart(bos: bool, plain: Text, with_bos: Text, numbers: str) -> None:
    text, length = with_bos if bos else plain, 64
    whole = begins_with(text) + encode(text, Path(numbers).read_text())
    found = calibration(numbers, text, 12, length, seed=3)
    assert found.tokens_BL.shape == (12, length)
    assert found.tokens_BL.dtype == np.int32
    at = places(whole, found.tokens_BL)
    assert all(b - a >= length for a, b in itertools.pairwise(at))
    assert at[0] + at[-1] > length, "from everywhere, not from the beginning"
    if bos:
        assert found.tokens_BL[:, 0].tolist() == [BOS] * 12
    else:
        assert found.tokens_BL[:, 0].tolist() == [whole[i] for i in at]


def test_the_same_seed_makes_the_same_samples(plain: Text, numbers: str) -> None:
    one, same, other = (calibration(numbers, plain, 4, 32, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.tokens_BL, same.tokens_BL)
    assert one.sha256 == same.sha256 != other.sha256
    assert one.sha256 == hashlib.sha256(one.tokens_BL.astype("<i4").tobytes()).hexdigest()
    assert one.label == "numbers.txt: 4 samples of 32 tokens, seed 0"


def test_a_text_that_just_suffices_is_used_whole(plain: Text, tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_text("".join("qzjx"[i % 3] for i in range(64)))
    found = calibration(str(path), plain, 4, 16, seed=5)
    assert found.tokens_BL.ravel().tolist() == encode(plain, path.read_text())
    with pytest.raises(UsageError, match=r"letters.txt: 64 tokens, and 5 samples of 16 take 80") as caught:
        calibration(str(path), plain, 5, 16, seed=5)
    assert "--samples 4 or fewer" in str(caught.value.hint)
    with pytest.raises(UsageError, match="64 tokens, and 1 samples of 65"):
        calibration(str(path), plain, 1, 65, seed=5)


def test_every_way_of_laying_samples_is_as_likely(plain: Text, tmp_path: Path) -> None:
    """5 places for two samples in a text longer by four: 15 ways."""
    path = tmp_path / "letters.txt"
    path.write_text("".join("qzjx"[i % 3] for i in range(20)))
    ways = {calibration(str(path), plain, 2, 8, seed).tokens_BL.tobytes() for seed in range(200)}
    assert len(ways) <= 15
    begin = encode(plain, path.read_text())[:8]
    first = [calibration(str(path), plain, 2, 8, seed).tokens_BL[0].tolist() == begin for seed in range(200)]
    assert 0.2 < np.mean(first) < 0.75  # 5 of 15 begin at 0, and others that look alike


def test_self_is_what_generate_gives(plain: Text) -> None:
    asked: list[tuple[int, int, int]] = []

    def generate(samples: int, length: int, seed: int) -> Any:
        asked.append((samples, length, seed))
        return np.arange(samples * length).reshape(samples, length)

    found = calibration("self", plain, 3, 9, 7, generate)
    assert asked == [(3, 9, 7)]
    np.testing.assert_array_equal(found.tokens_BL, np.arange(27).reshape(3, 9))
    assert "own text" in found.label
    with pytest.raises(UsageError, match="no model to sample from"):
        calibration("self", plain, 3, 9, 7)


@pytest.mark.parametrize(("samples", "length", "option"), [(0, 64, "--samples 0"), (1, 7, "--sequence-length 7")])
def test_nothing_to_see(plain: Text, samples: int, length: int, option: str) -> None:
    with pytest.raises(UsageError, match=option):
        calibration("builtin", plain, samples, length, 0)


@pytest.mark.parametrize(("count", "share", "held"), [(16, 0.25, 4), (2, 0.01, 1), (3, 0.99, 2), (128, 1 / 8, 16)])
def test_held_out_samples_are_none_of_the_others(count: int, share: float, held: int) -> None:
    samples = made(np.arange(count * 8).reshape(count, 8), "a text")
    kept, out = hold_out(samples, share)
    assert len(out.tokens_BL) == held
    rows = [set(map(tuple, part.tokens_BL.tolist())) for part in (kept, out)]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(map(tuple, samples.tokens_BL.tolist()))
    gaps = np.diff(np.concatenate([[0], out.tokens_BL[:, 0] // 8, [count - 1]]))
    assert gaps.max() <= count / held + 1, "from everywhere"
    assert "held out" in out.label
    assert kept.sha256 != out.sha256


@pytest.mark.parametrize(("count", "share"), [(1, 0.5), (4, 0.0), (4, 1.0)])
def test_nothing_to_hold_out(count: int, share: float) -> None:
    with pytest.raises(UsageError, match="cannot be split"):
        hold_out(made(np.zeros((count, 8)), "a text"), share)
