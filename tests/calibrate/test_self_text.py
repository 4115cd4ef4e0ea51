"""Text of the model's own: drawn from its probabilities, the same whatever fits beside one another."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.calibrate.self_text import Draw, Stopped, generator, starts
from mlxquant.calibrate.text import calibration
from mlxquant.errors import SourceError
from mlxquant.measure.runner import Silent
from mlxquant.run.cache import plan_cache
from mlxquant.run.device import prepare
from mlxquant.run.model import load_model
from mlxquant.run.text import Text
from tests.families.vocab_cases import BOS, CASES
from tests.measure.test_windows import text_of


def fixed(logits_V: list[float], seen: list[tuple[int, ...]]):
    """A model that always says the same."""

    def model(tokens, cache):
        seen.append(tuple(tokens.shape))
        return mx.broadcast_to(mx.array(logits_V), (*tokens.shape, len(logits_V)))

    return model


def test_tokens_are_as_likely_as_the_model_says() -> None:
    p = np.array([0.5, 0.0, 0.3, 0.15, 0.05])
    seen: list[tuple[int, ...]] = []
    with np.errstate(divide="ignore"):
        draw = Draw(fixed(np.log(p).tolist(), seen), list, np.array([4]), ())
    tokens = draw(100, 201, 0, 64, Silent())
    assert (tokens[:, 0] == 4).all()
    found = np.bincount(tokens[:, 1:].ravel(), minlength=5) / 20_000
    np.testing.assert_allclose(found, p, atol=0.015)
    assert found[1] == 0
    assert set(seen) == {(64, 1), (36, 1)}
    assert len(np.unique(tokens, axis=0)) == 100, "no sample twice"


def test_behind_an_end_of_text_another_begins() -> None:
    draw = Draw(fixed([0.0, 9.0, 0.0, 0.0], []), list, np.array([2, 3]), (1,))
    tokens = draw(4, 50, 0, 4, Silent())
    ends = tokens[:, :-1] == 1
    assert ends.sum() > 50
    assert set(tokens[:, 1:][ends].tolist()) == {2, 3}


def test_what_fits_beside_one_another_changes_nothing(trained_dense: Path) -> None:
    loaded, text = load_model(trained_dense), Text.load(trained_dense)
    draw = Draw(loaded.model, plan_cache(loaded.model).make, starts(text), text.eos_ids)
    together, apart = draw(5, 40, 3, 5, Silent()), draw(5, 40, 3, 2, Silent())
    np.testing.assert_array_equal(together, apart)
    assert (draw(5, 40, 4, 5, Silent()) != together).any()


def test_it_is_likelier_than_random_tokens(trained_dense: Path) -> None:
    text = Text.load(trained_dense)
    own = calibration("self", text, 6, 64, 0, generator(trained_dense, prepare("cpu"), text))
    assert own.tokens_BL.shape == (6, 64)
    same = calibration("self", text, 6, 64, 0, generator(trained_dense, prepare("cpu"), text))
    assert own.sha256 == same.sha256
    model = load_model(trained_dense).model

    def loss(tokens: np.ndarray) -> float:
        ids = mx.array(tokens)
        logits = model(ids[:, :-1])
        chosen = mx.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        return float((mx.logsumexp(logits, axis=-1) - chosen).mean().item())

    assert loss(own.tokens_BL) < loss(np.random.default_rng(0).integers(3, 512, (6, 64))) - 1


def test_beginnings(tmp_path: Path, trained_dense: Path) -> None:
    assert starts(text_of(tmp_path / "bos", CASES["llama3"])).tolist() == [BOS]
    ordinary = starts(Text.load(trained_dense))
    assert ordinary.tolist() == list(range(3, 512))  # tests/tiny.py has three control tokens


def test_logits_that_are_no_numbers() -> None:
    draw = Draw(fixed([0.0, float("nan")], []), list, np.array([0]), ())
    with pytest.raises(SourceError, match="logits are NaN"):
        draw(2, 8, 0, 2, Silent())


def test_it_can_be_stopped() -> None:
    class Pressed(Silent):
        def stopped(self) -> bool:
            return True

    with pytest.raises(Stopped):
        Draw(fixed([0.0, 0.0], []), list, np.array([0]), ())(2, 8, 0, 2, Pressed())
