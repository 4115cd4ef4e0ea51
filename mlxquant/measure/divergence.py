"""From the scores of positions to a student's figures and their standard errors.

Positions of one window share their text, so a window counts as one observation, not as P: errors are of means over
windows (as for samples drawn in clusters: Cochran, Sampling Techniques, chapter 9), with the correction C / (C - 1) for
C windows. llama-perplexity takes positions as independent; where a window has one position the two agree.

Every window scores the same number of positions, so that a mean over positions is a mean of windows' means. What is a
function of a mean gets its error from the function's slope there (the delta method), quantiles theirs from the share
of positions below them (Woodruff 1952, Confidence intervals for medians and other position measures). Against a
bootstrap over windows that is as near to the true spread, takes a twentieth of the time and draws no random numbers.

scores_WP: POSITION of score.py, W windows of P scored positions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlxquant.measure.report import Divergence, Estimate

Array = np.ndarray[Any, Any]

_BEST = 5  # of which shared5 counts


def summarize(scores_WP: Array) -> Divergence:
    """A student's figures. Errors are None where there is one window, and where the figure is not finite: a student
    that excludes what the teacher does not has a mean divergence of inf.

    Raises ValueError when there is no position.
    """
    _check(scores_WP)
    kl, nll_p, nll_q = scores_WP["kl"], scores_WP["nll_p"], scores_WP["nll_q"]
    delta_p = np.exp(-nll_q) - np.exp(-nll_p)
    with np.errstate(invalid="ignore", over="ignore"):
        median, p90, p99, p999 = _quantiles(kl, (0.5, 0.9, 0.99, 0.999))
        return Divergence(
            kl=_mean(kl),
            kl_median=median,
            kl_p90=p90,
            kl_p99=p99,
            kl_p999=p999,
            kl_max=float(kl.max()),
            ppl_teacher=_exp(_mean(nll_p)),
            ppl_student=_exp(_mean(nll_q)),
            ppl_ratio=_exp(_mean(nll_q - nll_p)),
            delta_p=_mean(delta_p),
            delta_p_rms=_root(_mean(delta_p**2)),
            top1=_mean(scores_WP["best_p"] == scores_WP["best_q"]),
            top5=_mean(scores_WP["shared5"] / _BEST),
            windows=kl.shape[0],
            positions=kl.size,
        )


def difference(a_WP: Array, b_WP: Array) -> Estimate:
    """Mean KL of student a less that of student b, both scored on the same windows against one teacher.

    Paired by position: what makes a text hard is hard for both and cancels, so the error is smaller than those of the
    two means suggest.

    Raises ValueError when the two have not the same windows and positions, or none.
    """
    _check(a_WP)
    if a_WP.shape != b_WP.shape:
        raise ValueError(f"scores of {a_WP.shape} and {b_WP.shape} windows and positions: expected the same")
    with np.errstate(invalid="ignore"):
        return _mean(a_WP["kl"] - b_WP["kl"])


def worst(scores_WP: Array, count: int) -> list[tuple[int, int]]:
    """Window and position, both from 0 as they stand in `scores_WP`, of the `count` greatest kl, greatest first; of
    equal ones the earlier first.
    """
    order = np.argsort(-scores_WP["kl"], axis=None, kind="stable")[:count]
    return [divmod(int(at), scores_WP.shape[1]) for at in order]


def _check(scores_WP: Array) -> None:
    if scores_WP.ndim != 2 or not scores_WP.size:
        raise ValueError(f"scores of shape {scores_WP.shape}: expected windows and positions, one of each at least")


def _mean(x_WP: Array) -> Estimate:
    mean_W = x_WP.mean(axis=1)
    return _estimate(float(mean_W.mean()), _error(mean_W))


def _error(mean_W: Array) -> float | None:
    """Standard error of the mean of windows' means; None of one window."""
    return float(mean_W.std(ddof=1)) / math.sqrt(mean_W.size) if mean_W.size > 1 else None


def _estimate(value: float, error: float | None) -> Estimate:
    return Estimate(value, error if error is not None and math.isfinite(error) else None)


def _exp(log: Estimate) -> Estimate:
    value = float(np.exp(log.value))
    return _estimate(value, None if log.error is None else value * log.error)


def _root(square: Estimate) -> Estimate:
    """As llama-perplexity's RMS of delta p. At 0 the root has no slope, but every square is 0, too."""
    value = math.sqrt(square.value)
    return _estimate(value, None if square.error is None else square.error / (2 * value) if value else 0.0)


def _quantiles(x_WP: Array, fractions: tuple[float, ...]) -> list[Estimate]:
    """Half the distance between the quantiles that lie the error of the share of positions up to here off."""
    ordered = np.sort(x_WP, axis=None)
    estimates = []
    for fraction in fractions:
        value = _quantile(ordered, fraction)
        error = _error((x_WP <= value).mean(axis=1))
        if error is not None:
            error = (_quantile(ordered, fraction + error) - _quantile(ordered, fraction - error)) / 2
        estimates.append(_estimate(value, error))
    return estimates


def _quantile(ordered: Array, fraction: float) -> float:
    """Linear between neighbours, as numpy's and llama-perplexity's `percentile`; numpy's is NaN beside infinity."""
    at = min(max(fraction, 0.0), 1.0) * (ordered.size - 1)
    low = int(at)
    below, above = float(ordered[low]), float(ordered[min(low + 1, ordered.size - 1)])
    return below if at == low or below == above else below + (at - low) * (above - below)
