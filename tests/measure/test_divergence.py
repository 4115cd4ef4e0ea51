"""Figures and their errors: by hand, against the spread of many texts, against llama.cpp's formulas."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from mlxquant.measure.divergence import difference, summarize, worst
from mlxquant.measure.report import Divergence, Estimate
from mlxquant.measure.score import POSITION

INF = math.inf
ESTIMATES = [field.name for field in dataclasses.fields(Divergence) if field.type == "Estimate"]


def scores(kl_WP, **fields):
    kl_WP = np.asarray(kl_WP, float)
    out = np.zeros(kl_WP.shape, POSITION)
    out["kl"] = kl_WP
    for name, values in fields.items():
        out[name] = values
    return out


def text(rng, windows, positions, effect=0.6):
    """A student's scores on one text, whose windows are hard or easy as a whole."""
    hard = rng.standard_normal((windows, 1)) * effect
    noise = rng.standard_normal((6, windows, positions))
    nll_p = np.exp(hard + 0.5 * noise[0])
    return scores(
        np.exp(hard - 2 + noise[1]),
        nll_p=nll_p,
        nll_q=nll_p + 0.1 * hard + 0.2 * noise[2],
        best_q=hard + noise[3] > 1.5,
        shared5=np.clip(np.rint(4 - hard + noise[4]), 0, 5),
    )


# By hand


def test_two_windows_of_two_positions():
    """Errors of a mean of two windows: half the distance between their means."""
    found = summarize(
        scores(
            [[0.0, 1.0], [2.0, 5.0]],
            nll_p=np.log([[2, 2], [4, 4]]),
            nll_q=np.log([[4, 4], [4, 4]]),
            best_p=[[7, 7], [7, 7]],
            best_q=[[7, 8], [7, 7]],
            shared5=[[5, 4], [3, 2]],
        )
    )
    near = lambda value, error: Estimate(pytest.approx(value, rel=1e-14), pytest.approx(error, rel=1e-14))  # noqa: E731
    ln2 = math.log(2)
    assert found.kl == near(2.0, 1.5)
    assert found.ppl_teacher == near(math.sqrt(8), math.sqrt(8) * ln2 / 2)
    assert found.ppl_student == near(4, 0)
    assert found.ppl_ratio == near(math.sqrt(2), math.sqrt(2) * ln2 / 2)
    assert found.delta_p == near(-1 / 8, 1 / 8)
    assert found.delta_p_rms == near(math.sqrt(1 / 32), (1 / 32) / (2 * math.sqrt(1 / 32)))
    assert found.top1 == near(0.75, 0.25)
    assert found.top5 == near(0.7, 0.2)
    assert (found.kl_median.value, found.kl_max) == (1.5, 5.0)
    assert (found.windows, found.positions) == (2, 4)


def test_a_quantile_is_off_by_what_the_share_below_it_is():
    """Below the median are all of the first window, none of the second: the share is off by 1/2, so the median may be
    anything: half the way from least to greatest. With the same numbers dealt evenly it is off by nothing.
    """
    assert summarize(scores([[0, 1, 2, 3], [4, 5, 6, 7]])).kl_median == Estimate(3.5, 3.5)
    assert summarize(scores([[0, 2, 4, 6], [1, 3, 5, 7]])).kl_median == Estimate(3.5, 0.0)


def test_a_quantile_that_many_positions_share():
    """Up to 0 are all of the first window and 1 of 4 of the second: 5/8, off by 3/8, and the median may be from the
    quantile of 1/8, 0, to that of 7/8, 2.125.
    """
    assert summarize(scores([[0, 0, 0, 0], [0, 1, 2, 3]])).kl_median == Estimate(0.0, 2.125 / 2)


def test_quantiles_are_numpys():
    rng = np.random.default_rng(0)
    kl = np.exp(rng.standard_normal((7, 31)))
    found = summarize(scores(kl))
    for name, fraction in {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}.items():
        assert getattr(found, f"kl_{name}").value == pytest.approx(np.quantile(kl, fraction), rel=1e-14)
    assert found.kl_max == kl.max()


def test_one_window_has_no_errors():
    found = summarize(text(np.random.default_rng(1), 1, 9))
    assert [getattr(found, name).error for name in ESTIMATES] == [None] * len(ESTIMATES)
    one = scores([[1.0]])
    assert summarize(one).kl_p999 == difference(one, scores([[0.0]])) == Estimate(1.0, None)


def test_the_teacher_itself():
    """No divergence, and no doubt about it."""
    found = summarize(scores(np.zeros((5, 4)), nll_p=2.0, nll_q=2.0, shared5=5))
    for name in ("kl", "kl_median", "kl_p90", "kl_p99", "kl_p999", "delta_p", "delta_p_rms"):
        assert getattr(found, name) == Estimate(0.0, 0.0)
    for name in ("ppl_ratio", "top1", "top5"):
        assert getattr(found, name) == Estimate(1.0, 0.0)
    assert found.kl_max == 0.0


@pytest.mark.filterwarnings("error")
def test_infinity_is_passed_on_and_has_no_error():
    found = summarize(scores([[0.1, 0.2, 0.3], [0.4, INF, 0.3]], nll_p=1.0, nll_q=[[1, 1, 1], [1, INF, 1]]))
    assert found.kl == found.ppl_student == found.ppl_ratio == Estimate(INF, None)
    assert found.kl_max == found.kl_p999.value == INF
    assert found.kl_median.value == pytest.approx(0.3)
    assert found.delta_p.value == pytest.approx(-math.exp(-1) / 6)
    assert found.ppl_teacher == Estimate(math.e, 0.0)
    assert summarize(scores([[0.0, 800.0]], nll_q=800.0)).ppl_student.value == INF


@pytest.mark.filterwarnings("error")
def test_quantiles_beside_infinity():
    found = summarize(scores([[0.0, 1.0, 2.0, INF, INF]]))
    assert found.kl_median == Estimate(2.0, None)
    assert found.kl_p90 == Estimate(INF, None)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4,)])
def test_no_positions(shape):
    with pytest.raises(ValueError, match="windows and positions"):
        summarize(scores(np.zeros(shape)))
    with pytest.raises(ValueError, match="windows and positions"):
        difference(scores(np.zeros(shape)), scores(np.zeros(shape)))


# Against the spread of many texts


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(2)
    return [text(rng, 60, 100) for _ in range(600)]


@pytest.fixture(scope="module")
def summaries(texts):
    return [summarize(one) for one in texts]


@pytest.mark.parametrize("name", ESTIMATES)
def test_errors_are_the_spread_of_many_texts(summaries, name):
    """Of 600 texts the spread is known to 3 %, more roughly where few positions of a text make the figure."""
    found = [getattr(one, name) for one in summaries]
    spread = np.std([estimate.value for estimate in found], ddof=1)
    assert np.mean([estimate.error for estimate in found]) == pytest.approx(spread, rel=0.12)


def test_independent_positions_would_promise_too_much(texts, summaries):
    """So that the test above does not pass for want of an effect of windows."""
    spread = np.std([one.kl.value for one in summaries], ddof=1)
    told = np.mean([one["kl"].std(ddof=1) / math.sqrt(one.size) for one in texts])
    assert told < spread / 2


def test_differences_are_the_spread_of_many_texts():
    rng = np.random.default_rng(3)
    found, apart = [], []
    for _ in range(400):
        a = text(rng, 40, 25)
        b = scores(a["kl"] * np.exp(-0.1 + 0.1 * rng.standard_normal(a.shape)))
        found.append(difference(a, b))
        apart.append(math.hypot(summarize(a).kl.error, summarize(b).kl.error))
    spread = np.std([estimate.value for estimate in found], ddof=1)
    assert math.sqrt(np.mean([estimate.error**2 for estimate in found])) == pytest.approx(spread, rel=0.12)
    assert spread < min(apart) / 3


def test_a_difference_is_the_difference():
    rng = np.random.default_rng(4)
    a, b = text(rng, 5, 6), text(rng, 5, 6)
    assert difference(a, b).value == pytest.approx(summarize(a).kl.value - summarize(b).kl.value, rel=1e-12)
    assert difference(a, a) == Estimate(0.0, 0.0)
    assert (difference(a, b).value, difference(a, b).error) == (-difference(b, a).value, difference(b, a).error)
    with pytest.raises(ValueError, match=r"\(5, 6\) and \(4, 6\)"):
        difference(a, b[:4])


# Against llama.cpp, which takes positions as independent: tools/perplexity/perplexity.cpp, kl_divergence


def llama_mean(values):
    """mean_and_uncertainty"""
    mean = values.sum() / values.size
    return mean, math.sqrt(((values**2).sum() / values.size - mean**2) / (values.size - 1))


def test_windows_of_one_position_have_llama_cpps_errors():
    one = text(np.random.default_rng(5), 300, 1)
    found = summarize(one)
    delta_p = np.exp(-one["nll_q"]) - np.exp(-one["nll_p"])
    agrees = lambda estimate, expected: (estimate.value, estimate.error) == pytest.approx(expected, rel=1e-9)  # noqa: E731
    assert agrees(found.kl, llama_mean(one["kl"]))
    assert agrees(found.delta_p, llama_mean(delta_p))
    for field, name in (("nll_p", "teacher"), ("nll_q", "student")):
        mean, error = llama_mean(one[field])
        assert agrees(getattr(found, f"ppl_{name}"), (math.exp(mean), math.exp(mean) * error))
    square, error = llama_mean(delta_p**2)
    assert agrees(found.delta_p_rms, (math.sqrt(square), 0.5 / math.sqrt(square) * error))
    same = (one["best_p"] == one["best_q"]).mean()
    assert agrees(found.top1, (same, math.sqrt(same * (1 - same) / (one.size - 1))))
    # The ratio's error with the covariance of the two, as theirs
    p, q = one["nll_p"], one["nll_q"]
    covariance = ((p * q).mean() - p.mean() * q.mean()) / (one.size - 1)
    variance = llama_mean(p)[1] ** 2 + llama_mean(q)[1] ** 2 - 2 * covariance
    ratio = math.exp(q.mean() - p.mean())
    assert agrees(found.ppl_ratio, (ratio, ratio * math.sqrt(variance)))


# The worst


def test_worst_first_and_the_earlier_of_equals():
    some = scores([[1.0, 3.0, 0.0], [3.0, INF, 2.0]])
    assert worst(some, 4) == [(1, 1), (0, 1), (1, 0), (1, 2)]
    assert worst(some, 0) == []
    assert worst(some, 99) == [*worst(some, 5), (0, 2)]
    many = scores(np.random.default_rng(6).integers(0, 4, (30, 100)))
    threes = [(int(window), int(position)) for window, position in np.argwhere(many["kl"] == 3)]
    assert worst(many, len(threes)) == threes
