from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import UsageError
from mlxquant.run.sampling import Sampling, penalize, restrict, suggested

P = [0.4, 0.05, 0.3, 0.1, 0.15]


def kept(**options) -> list[int]:
    """Tokens of the distribution P that a restriction leaves."""
    left = np.array(restrict(mx.log(mx.array([P])), **options))[0]
    return [int(i) for i in np.flatnonzero(np.isfinite(left))]


def test_restrictions_by_hand():
    assert kept() == [0, 1, 2, 3, 4]
    # Sorted: 0.4, 0.3, 0.15, 0.1, 0.05. The token that crosses the line stays.
    assert kept(top_p=0.3) == [0]
    assert kept(top_p=0.69) == [0, 2]
    assert kept(top_p=0.71) == [0, 2, 4]
    assert kept(top_p=0.999) == [0, 1, 2, 3, 4]
    assert kept(top_p=1.0) == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 2]
    assert kept(top_k=5) == kept(top_k=50) == [0, 1, 2, 3, 4]
    assert kept(min_p=0.3) == [0, 2, 4]
    assert kept(min_p=1.0) == [0]
    assert kept(top_p=0.71, top_k=1) == [0]


def test_restrictions_against_mlx_lm():
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    rng = np.random.default_rng(0)
    logits = mx.array(rng.normal(size=(1, 300)).astype(np.float32) * 3)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for p in (0.05, 0.5, 0.9, 0.99):
        assert mx.array_equal(restrict(logprobs, top_p=p), apply_top_p(logprobs, p))
        assert mx.array_equal(restrict(logprobs, min_p=p), apply_min_p(logprobs, p))
    for k in (1, 7, 299):
        assert mx.array_equal(restrict(logprobs, top_k=k), apply_top_k(logprobs, k))


def test_penalty_by_hand_and_against_mlx_lm():
    from mlx_lm.sample_utils import make_repetition_penalty

    logits = mx.array([[2.0, -2.0, 1.0, 0.0]])
    found = penalize(logits, mx.array([0, 1, 1, 3]), 2.0)
    assert found.tolist() == [[1.0, -4.0, 1.0, 0.0]]
    theirs = make_repetition_penalty(2.0, 20)(mx.array([0, 1, 1, 3]), mx.array(logits))
    assert mx.array_equal(found, theirs)
    assert logits.tolist() == [[2.0, -2.0, 1.0, 0.0]], "the model's logits are not changed in place"


def test_penalty_follows_the_tokens_that_were_chosen():
    sampler = Sampling(repetition_penalty=4.0, repetition_context=2).sampler([])
    logits = mx.array([[3.0, 2.0, 1.0, 0.5]])
    # Two tokens are remembered: 0, 1, then 2 (3/4 < 1 and 2/4 < 1), then 0 again, forgotten by then.
    assert [sampler(logits)[0].item() for _ in range(4)] == [0, 1, 2, 0]


def test_prompt_counts_as_recent():
    sampler = Sampling(repetition_penalty=4.0, repetition_context=2).sampler([9, 9, 0])
    assert sampler(mx.array([[3.0, 2.0] + [0.0] * 8]))[0].item() == 1


def test_frequencies_are_the_distribution():
    settings = Sampling(temperature=0.5, top_k=3, seed=7)
    sampler = settings.sampler()
    logits = mx.log(mx.array([P]))
    draws = np.array([sampler(logits)[0].item() for _ in range(3000)])
    found = np.bincount(draws, minlength=5) / len(draws)
    wanted = np.array([0.4, 0, 0.3, 0, 0.15]) ** 2  # temperature 0.5 squares
    wanted /= wanted.sum()
    assert found[1] == found[3] == 0
    # Four standard deviations of a share among 3000.
    assert np.all(np.abs(found - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 3000) + 1e-9)


def test_logprob_is_at_temperature_one():
    token, logprob = Sampling(temperature=0.1, seed=1).sampler()(mx.log(mx.array([P])))
    assert logprob.item() == pytest.approx(math.log(P[token.item()]), abs=1e-6)


def test_same_seed_same_tokens_other_seed_other_tokens():
    def draw(seed):
        sampler = Sampling(temperature=1.0, seed=seed).sampler()
        return [sampler(mx.zeros((1, 1000)))[0].item() for _ in range(8)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_seed_does_not_depend_on_global_state():
    def draw():
        sampler = Sampling(temperature=1.0, seed=3).sampler()
        return [sampler(mx.zeros((1, 1000)))[0].item() for _ in range(4)]

    mx.random.seed(1)
    first = draw()
    mx.random.seed(2)
    assert draw() == first


def test_top_p_keeps_at_least_one_token_in_low_precision():
    logprobs = mx.array([[-8.0, -9.0, -9.0]]).astype(mx.bfloat16)
    assert np.isfinite(np.array(restrict(logprobs, top_p=0.0001).astype(mx.float32))).sum() == 1


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 1.1}, {"top_k": -1},
     {"min_p": 2}, {"repetition_penalty": 0}, {"repetition_context": -1}, {"seed": -1}],
)  # fmt: skip
def test_numbers_that_mean_nothing(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "top_p": 0.9}, {}),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"do_sample": True, "top_k": 64}, {"temperature": 1.0, "top_k": 64}),
        ({"temperature": 0.6, "top_p": 0.95, "min_p": None}, {"temperature": 0.6, "top_p": 0.95}),
        ({"temperature": "hot"}, {}),
        ({"temperature": -1}, {}),
        ({"temperature": math.nan}, {}),
        ({"temperature": 1, "top_k": math.inf}, {}),
    ],
)
def test_suggested_sampling(config, wanted):
    assert suggested(config) == wanted
    Sampling(**suggested(config))
