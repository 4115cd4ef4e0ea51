"""Scores of single positions: closed forms, sums in longdouble, and what must be exact."""

from __future__ import annotations

import decimal
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxquant.codecs import blocks
from mlxquant.measure import score as module
from mlxquant.measure.score import POSITION, exp, score

INF, NAN = math.inf, math.nan
D = decimal.Decimal


def one(p, q, following=0):
    """The score of a single position."""
    return score(np.array([p], np.float32), np.array([q], np.float32), np.array([following]))[0]


def logits(rng, shape, scale=4.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def slow(p_PV, q_PV, next_P):
    """The same in longdouble, by the definitions; five best by a stable sort."""
    log_p, log_q = slow_log(p_PV), slow_log(q_PV)
    out = np.empty(len(p_PV), POSITION)
    for i, token in enumerate(next_P):
        mass = np.exp(log_p[i])
        out["kl"][i] = sum(m * (a - b) for m, a, b in zip(mass, log_p[i], log_q[i], strict=True) if m > 0)
        out["nll_p"][i], out["nll_q"][i] = -log_p[i, token], -log_q[i, token]
        five_p, five_q = (np.argsort(-row[i], kind="stable")[:5] for row in (p_PV, q_PV))
        out["best_p"][i], out["best_q"][i] = five_p[0], five_q[0]
        out["shared5"][i] = len(set(five_p) & set(five_q))
    return out


def slow_log(x_PV):
    x = x_PV.astype(np.longdouble)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def agree(got, expected, tolerance):
    for field in ("kl", "nll_p", "nll_q"):
        np.testing.assert_allclose(got[field], expected[field], rtol=tolerance, atol=tolerance)
    for field in ("best_p", "best_q", "shared5"):
        np.testing.assert_array_equal(got[field], expected[field])


# By hand


def test_two_tokens():
    """p = (1/2, 1/2), q = (1/4, 3/4), where 3 is what the logit stands for that float32 has next to ln 3."""
    ln3 = np.float32(math.log(3))
    three = math.exp(ln3)
    got = one([7, 7], [0, ln3], 1)
    assert got["kl"] == pytest.approx(math.log((1 + three) / 2) - math.log(three) / 2, abs=1e-15)
    assert got["nll_p"] == pytest.approx(math.log(2), abs=1e-15)
    assert got["nll_q"] == pytest.approx(math.log1p(1 / three), abs=1e-15)
    assert (got["best_p"], got["best_q"], got["shared5"]) == (0, 1, 2)


def test_three_tokens():
    """q is uniform, so that KL = ln 3 - H(p)."""
    p = np.exp([0.0, 1.0, -2.0]) / np.exp([0.0, 1.0, -2.0]).sum()
    got = one([0, 1, -2], [5, 5, 5], 2)
    assert got["kl"] == pytest.approx(math.log(3) + (p * np.log(p)).sum(), abs=1e-15)
    assert got["nll_p"] == pytest.approx(-math.log(p[2]), abs=1e-15)
    assert got["nll_q"] == pytest.approx(math.log(3), abs=1e-15)
    assert (got["best_p"], got["best_q"]) == (1, 0)


def test_one_token():
    assert one([-3], [11]).item() == (0.0, 0.0, 0.0, 0, 0, 1)


def test_a_probability_of_nothing():
    """What the teacher excludes costs the student's mass there: KL((1, 0) || (1/2, 1/2)) = ln 2."""
    got = one([3, -INF], [0, 0], 1)
    assert got["kl"] == pytest.approx(math.log(2), abs=1e-15)
    assert got["nll_p"] == INF
    assert one([0, 0], [3, -INF])["kl"] == INF
    assert one([0, -INF, 0], [0, -INF, 0])["kl"] == 0


def test_far_below_the_best_counts_as_nothing():
    assert one([0, -709], [0, -INF])["kl"] == 0
    assert one([0, -707], [0, -INF])["kl"] == INF
    got = one([0, -3e38], [0, -2e38], 1)
    assert got["kl"] == 0
    assert got["nll_p"] == float(np.float32(3e38))


@pytest.mark.parametrize("bad", [NAN, INF, -NAN])
@pytest.mark.parametrize("at", [0, 3, 299])
def test_what_is_no_number_gives_nan(bad, at):
    rng = np.random.default_rng(at)
    good, spoilt = logits(rng, (3, 300)), logits(rng, (3, 300))
    spoilt[1, at] = bad
    assert math.copysign(1, spoilt[1, at]) == math.copysign(1, bad)
    for p, q in ((good, spoilt), (spoilt, good), (spoilt, spoilt)):
        np.testing.assert_array_equal(np.isnan(score(p, q, np.zeros(3, int))["kl"]), [False, True, False])


def test_nothing_but_minus_infinity_gives_nan():
    assert np.isnan(one([-INF, -INF], [0, 1])["kl"])
    assert np.isnan(one([0, 1], [-INF, -INF])["kl"])


# Against the definitions


@pytest.mark.parametrize("vocabulary", [2, 4, 5, 6, 255, 256, 257, 3000])
def test_like_the_definitions(vocabulary):
    rng = np.random.default_rng(vocabulary)
    p = logits(rng, (9, vocabulary))
    q = p + logits(rng, p.shape, 0.5)
    following = rng.integers(0, vocabulary, 9)
    agree(score(p, q, following), slow(p, q, following), 1e-14)


# Logits from denormals to what float32 has, many of them equal or excluded.
ODD = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -INF, -1e9, 3e38, -3e38, 1e-45]),
    st.floats(-60, 60, width=32),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_like_the_definitions_whatever_the_logits(data):
    positions, vocabulary = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    rows = st.lists(ODD, min_size=vocabulary, max_size=vocabulary).filter(lambda row: max(row) > -INF)
    p, q = (np.array(data.draw(st.lists(rows, min_size=positions, max_size=positions)), np.float32) for _ in "pq")
    following = np.array(data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=positions, max_size=positions)))
    expected = slow(p, q, following)
    # exp(-708) is where ours stops; longdouble goes on to exp(-11000).
    beyond = ((p - p.max(-1, keepdims=True).astype(float) < -708) & (q == -INF)).any(-1)
    got = score(p, q, following)
    agree(got[~beyond], expected[~beyond], 1e-13)
    assert (score(p, p, following)["kl"] == 0).all()
    assert (got["kl"] >= 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 700), st.integers(-(2**12), 2**12), st.integers(0, 2**32))
def test_an_offset_changes_nothing(positions, vocabulary, offset, seed):
    """Logits in steps of 1/256, which float32 adds the offset to without rounding."""
    rng = np.random.default_rng(seed)
    p, q = (rng.integers(-4096, 4096, (2, positions, vocabulary)) / 256).astype(np.float32)
    following = rng.integers(0, vocabulary, positions)
    agree(score(p + np.float32(offset), q, following), score(p, q, following), 1e-12)
    agree(score(p, q - np.float32(offset), following), score(p, q, following), 1e-12)


def test_a_small_divergence_is_not_lost():
    """KL of a change d in one logit of probability m is m (1 - m) d**2 / 2: 2**-33 here, with no floor below it."""
    p = np.zeros((1, 2), np.float32)
    q = np.array([[2.0**-15, 0]], np.float32)
    got = score(p, q, np.zeros(1, int))["kl"][0]
    assert got == pytest.approx(2.0**-33, rel=1e-5)


# Exactness


def test_equal_rows_diverge_by_exactly_nothing():
    p = logits(np.random.default_rng(0), (40, 5000))
    p[3] *= 1e30
    got = score(p, p.copy(), np.arange(40))
    assert (got["kl"] == 0).all()
    np.testing.assert_array_equal(got["nll_p"], got["nll_q"])
    np.testing.assert_array_equal(got["best_p"], got["best_q"])
    assert (got["shared5"] == 5).all()


def test_rounding_makes_no_divergence_negative():
    """One logit differs in its last place: KL is mostly far below the rounding of float64."""
    p = logits(np.random.default_rng(6), (200, 2000))
    q = p.copy()
    q[:, 7] = np.nextafter(p[:, 7], np.float32(99))
    got = score(p, q, np.zeros(200, int))["kl"]
    assert 0 <= got.min() <= got.max() < 1e-12


def test_the_lowest_of_equal_tokens_is_the_better():
    """Also where one block of lanes ends and the next begins."""
    row = np.full(2000, 1.0, np.float32)
    row[[255, 256, 767, 1999]] = 9
    assert one(row, row)["best_p"] == 255
    # p's five best: 255 256 767 1999 0; q's: 1999 255 256 767 1
    other = row.copy()
    other[1999], other[0] = 10, 0
    got = one(row, other)
    assert (got["best_q"], got["shared5"]) == (1999, 4)


def test_zeros_of_both_signs_are_equal():
    assert one([-0.0, 0.0], [0.0, -0.0])["best_p"] == 0


@pytest.mark.parametrize("kind", ["rising", "falling", "negative", "few values", "mostly excluded"])
def test_five_best(kind):
    """Rows on which blocks are hard to pass over, and rows of ties."""
    rng = np.random.default_rng(1)
    p, q = np.sort(logits(rng, (2, 6, 1500)), -1)
    if kind == "falling":
        p, q = p[:, ::-1], q[:, ::-1]
    elif kind == "negative":
        p, q = -np.exp(logits(rng, (2, 6, 1500)))
    elif kind == "few values":
        p, q = rng.integers(0, 3, (2, 6, 1500)).astype(np.float32)
    elif kind == "mostly excluded":
        p, q = np.where(rng.random((2, 6, 1500)) < 0.001, p, -np.float32(INF))
        p[:, 900] = q[:, 700] = 0
    got, expected = score(p, q, np.full(6, 900)), slow(p, q, np.full(6, 900))
    for field in ("best_p", "best_q", "shared5"):
        np.testing.assert_array_equal(got[field], expected[field])


def test_the_same_bits_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK", 1)
    rng = np.random.default_rng(2)
    p, q = logits(rng, (2, 61, 1003))
    dealt = {}
    for threads in (1, 2, 3):
        monkeypatch.setattr(blocks, "cores", lambda threads=threads: threads)
        dealt[threads] = score(p, q, np.arange(61)).tobytes()
    assert dealt[1] == dealt[2] == dealt[3]
    alone = [score(p[i : i + 1], q[i : i + 1], np.array([i]))[0].tobytes() for i in range(61)]
    assert b"".join(alone) == dealt[1]


def test_any_layout_of_memory():
    rng = np.random.default_rng(3)
    wide = logits(rng, (8, 2, 300))
    p, q = wide[:, 0], wide[::-1, 1]
    q.flags.writeable = False
    plain = score(p.copy(), q.copy(), np.arange(8))
    assert score(p, q, np.arange(8, dtype=np.int32)).tobytes() == plain.tobytes()
    assert score(np.asfortranarray(p), q, np.arange(8, dtype=np.uint16)).tobytes() == plain.tobytes()


@pytest.mark.parametrize("vocabulary", [0, 7])
def test_no_positions(vocabulary):
    none = np.empty((0, vocabulary), np.float32)
    assert score(none, none, np.empty(0, int)).shape == (0,)


@pytest.mark.parametrize(
    ("p", "q", "following", "said"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3), np.float32), [0, 0], "float64"),
        (np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32), [0, 0], r"\(2, 4\)"),
        (np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), [0], r"\(1,\)"),
        (np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), [0, 3], "3: expected 0..2"),
        (np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), [-1, 2], "-1..2: expected 0..2"),
    ],
)
def test_arrays_that_do_not_fit(p, q, following, said):
    with pytest.raises(ValueError, match=said):
        score(p, q, np.array(following))


# exp


def test_exp_is_within_its_bound():
    rng = np.random.default_rng(4)
    some = [0.0, -708.0, -math.log(2) / 2, -math.log(2), -1e-300, -5e-324, *-rng.random(2000) * 708, *-rng.random(2000)]
    with decimal.localcontext(prec=40):
        worst = max(abs(D(exp(x)) / D(x).exp() - 1) for x in map(float, some))
    assert worst < D("2e-16")
    assert exp(0.0) == 1.0


def test_exp_of_what_is_far_off():
    assert exp(math.nextafter(-708.0, -INF)) == 0.0
    assert exp(-INF) == 0.0
    assert math.isnan(exp(NAN))


def test_the_polynomial_is_the_one_described():
    """Newton's interpolation of (e**r - 1 - r) / r**2 at the Chebyshev nodes of |r| <= ln(2) / 2."""
    with decimal.localcontext(prec=60):
        half, pi, count = D(2).ln() / 2, D("3.14159265358979323846264338327950288419716939937510582097494"), 10
        nodes = [half * cosine(pi * (2 * i + 1) / (2 * count)) for i in range(count)]
        table = [(r.exp() - 1 - r) / r**2 for r in nodes]
        for j in range(1, count):
            for i in range(count - 1, j - 1, -1):
                table[i] = (table[i] - table[i - 1]) / (nodes[i] - nodes[i - j])
        powers = [D(0)] * count
        for node, value in zip(reversed(nodes), reversed(table), strict=True):
            powers = [low - node * at for low, at in zip([D(0), *powers], powers, strict=False)]
            powers[0] += value
    assert [getattr(module, f"_C{i}") for i in range(count)] == [float(c) for c in powers]


def cosine(x):
    total = term = D(1)
    for n in range(2, 100, 2):
        term *= -x * x / (n * (n - 1))
        total += term
    return total
