"""Refitting: never a larger error, and nothing that one more step could gain."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from mlxquant.calibrate.gptq import gptq, output_error, prepare
from mlxquant.calibrate.refit import codes, quadratic, refit
from mlxquant.codecs.encode import decode, encode
from mlxquant.codecs.floats import widen
from mlxquant.codecs.search import search
from mlxquant.codecs.spec import AFFINE_BITS, affine
from tests.calibrate.hessians import hessian, row_errors, weights


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize(("group", "dtype"), [(32, "BF16"), (64, "F16"), (128, "F32")])
def test_no_row_gets_worse_and_the_whole_gets_better(bits: int, group: int, dtype: str) -> None:
    w, h, codec = weights(24, 256), hessian(256), affine(bits, group)
    starts = (
        encode(w, "F32", dtype, codec),
        search(w, "F32", dtype, codec, np.diagonal(h).copy()),
        gptq(w, prepare(h), dtype, codec, rounds=0).parts,
    )
    for parts in starts:
        before = row_errors(w, decode(parts, dtype, codec), h)
        chosen = refit(w, parts, h, dtype, codec, rounds=2)
        after = row_errors(w, chosen.values_OI, h)
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < before.sum()
        np.testing.assert_allclose(chosen.error, output_error(w, chosen.values_OI, h))
        np.testing.assert_array_equal(chosen.values_OI, decode(chosen.parts, dtype, codec))


def test_more_rounds_no_larger_error_and_none_nothing() -> None:
    w, h, codec = weights(40, 256), hessian(256), affine(2, 32)
    parts = encode(w, "F32", "BF16", codec)
    errors = [refit(w, parts, h, "BF16", codec, rounds=rounds).error for rounds in (0, 1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    for was, now in zip(parts, refit(w, parts, h, "BF16", codec, rounds=0).parts, strict=True):
        np.testing.assert_array_equal(was, now)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_and_biases_alone_leave_codes_and_no_larger_error(bits: int) -> None:
    w, h, codec = weights(40, 256), hessian(256), affine(bits, 64)
    parts = search(w, "F32", "BF16", codec, np.diagonal(h).copy())
    before, chosen = row_errors(w, decode(parts, "BF16", codec), h), refit(w, parts, h, "BF16", codec, recode=False)
    after = row_errors(w, chosen.values_OI, h)
    np.testing.assert_array_equal(chosen.parts[0], parts[0])
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.99 * before.sum()


def test_in_the_end_no_code_and_no_scale_could_gain() -> None:
    """Codes: every one, to every other value. Scales and biases: the joint least-squares fit of each row."""
    w, h, codec = weights(6, 96), hessian(96), affine(3, 32)
    chosen = refit(w, encode(w, "F32", "F32", codec), h, "F32", codec, rounds=200)
    q = codes(chosen.parts, codec).astype(np.float64)
    scale, bias = (np.repeat(part, 32, axis=1).astype(np.float64) for part in chosen.parts[1:])
    wide = h.astype(np.float64)
    for row, error in enumerate(row_errors(w, chosen.values_OI, h)):
        e = w[row] - (scale[row] * q[row] + bias[row])
        pull = wide @ e
        by = scale[row][:, None] * (np.arange(8) - q[row][:, None])
        assert (2 * by * pull[:, None] - by**2 * np.diag(wide)[:, None]).max() < 1e-4 * error
        columns = np.zeros((96, 6))
        for g in range(3):
            part = slice(32 * g, 32 * g + 32)
            columns[part, 2 * g], columns[part, 2 * g + 1] = q[row, part], 1
        gain = columns.T @ pull
        assert gain @ np.linalg.solve(columns.T @ wide @ columns, gain) < 0.01 * error


def test_codes_are_the_best_there_are() -> None:
    """Five columns that are ever active, 2 bits: against all 1024 codes for the scale and bias that a row ends with."""
    codec, best = affine(2, 32), 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        live = np.sort(rng.choice(32, 5, replace=False))
        x = rng.normal(size=(50, 5)) @ (np.eye(5) + 0.5 * rng.normal(size=(5, 5)))
        h = np.zeros((32, 32), np.float32)
        h[np.ix_(live, live)] = x.T @ x / 50
        w = rng.normal(size=(1, 32)).astype(np.float32)
        found = refit(w, encode(w, "F32", "F32", codec), h, "F32", codec, rounds=10)
        scale, bias = found.parts[1][0, 0], found.parts[2][0, 0]
        every = np.array(list(product(range(4), repeat=5))) * scale + bias
        errors = row_errors(np.broadcast_to(w[0, live], every.shape), every, h[np.ix_(live, live)])
        error = row_errors(w, found.values_OI, h)[0]
        assert error >= errors.min() * (1 - 1e-4)
        best += error <= errors.min() * (1 + 1e-4)
    assert best >= 18, best


def test_a_group_whose_codes_are_all_the_same_or_that_is_never_active() -> None:
    w, h, codec = weights(5, 128), hessian(128), affine(4, 64)
    w[:, :64] = 0.25
    h[64:] = h[:, 64:] = 0
    parts = encode(w, "F32", "BF16", codec)
    chosen = refit(w, parts, h, "BF16", codec)
    assert np.isfinite(chosen.values_OI).all()
    assert chosen.error <= output_error(w, decode(parts, "BF16", codec), h)
    np.testing.assert_array_equal(chosen.parts[0][:, 8:], parts[0][:, 8:])


def test_a_row_alone_is_the_row_among_others() -> None:
    w, h, codec = weights(270, 128), hessian(128), affine(3, 64)
    parts = encode(w, "F32", "BF16", codec)
    whole = refit(w, parts, h, "BF16", codec).parts
    for row in (0, 255, 269):
        one = slice(row, row + 1)
        alone = refit(w[one], tuple(part[one] for part in parts), h, "BF16", codec).parts
        for a, b in zip(alone, whole, strict=True):
            np.testing.assert_array_equal(a, b[one])


def test_quadratic_reads_half_of_the_hessian() -> None:
    w, h = weights(7, 700), hessian(700)
    np.testing.assert_allclose(quadratic(np.ascontiguousarray(w.T), h), row_errors(w, np.zeros_like(w), h), rtol=1e-4)


def test_codes_are_read_back() -> None:
    w, codec = weights(3, 64), affine(5, 32)
    parts = encode(w, "F32", "F32", codec)
    scale, bias = (np.repeat(widen(part, "F32"), 32, axis=1) for part in parts[1:])
    np.testing.assert_array_equal(codes(parts, codec) * scale + bias, decode(parts, "F32", codec))
