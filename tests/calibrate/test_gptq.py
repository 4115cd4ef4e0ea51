"""GPTQ against its own paper's loop in float64, and against what it must be better than."""

from __future__ import annotations

import numpy as np
import pytest

from mlxquant.calibrate import gptq as module
from mlxquant.calibrate.gptq import NotPositive, corrected, gptq, output_error, prepare
from mlxquant.calibrate.refit import codes
from mlxquant.codecs.encode import NonFiniteError, decode, encode
from mlxquant.codecs.floats import widen
from mlxquant.codecs.search import search, search_values
from mlxquant.codecs.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, affine
from tests.calibrate.hessians import hessian, inputs, row_errors, weights


def reference(
    w: np.ndarray, h: np.ndarray, order: np.ndarray, scale: np.ndarray, bias: np.ndarray, group: int, top: int
) -> np.ndarray:
    """Algorithm 1 of arXiv:2210.17323, column by column: scales are given, the inverse is an inverse."""
    w, h, out = w.astype(np.float64)[:, order], h.astype(np.float64), np.empty(w.shape, np.uint8)
    h = h[np.ix_(order, order)] + 0.01 * np.diag(h).mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    for j, column in enumerate(order):
        s, b = scale[:, column // group], bias[:, column // group]
        code = np.clip(np.rint((w[:, j] - b) / s), 0, top)
        error = (w[:, j] - (s * code + b)) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        out[:, column] = code
    return out


@pytest.mark.parametrize("order", ["natural", "columns", "groups"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 64), (3, 128), (8, 32)])
def test_codes_are_those_of_the_paper(bits: int, group: int, order: str) -> None:
    w, h, codec = weights(12, 256), hessian(256), affine(bits, group)
    prepared = prepare(h, act_order=order != "natural", group_size=group if order == "groups" else None)
    parts = gptq(w, prepared, "BF16", codec, rounds=0).parts
    scale, bias = (widen(part, "BF16") for part in parts[1:])
    expected = reference(w, h, prepared.order_I, scale, bias, group, 2**bits - 1)
    np.testing.assert_array_equal(codes(parts, codec), expected)


def test_orders() -> None:
    h = hessian(256)
    diagonal = np.diag(h)
    assert (prepare(h, act_order=False).order_I == np.arange(256)).all()
    assert (np.diff(diagonal[prepare(h).order_I]) <= 0).all()
    whole = prepare(h, group_size=64)
    groups = whole.order_I.reshape(4, 64)
    assert whole.keeps_whole(64)
    assert not prepare(h).keeps_whole(64)
    assert not whole.keeps_whole(32)
    assert (np.diff(diagonal[groups], axis=1) <= 0).all()
    assert (np.diff(diagonal[groups].mean(axis=1)) <= 0).all()
    assert not prepare(h, group_size=128).keeps_whole(128)


def test_cost_is_what_an_error_costs_when_later_columns_make_it_good() -> None:
    h = hessian(64)
    prepared = prepare(h)
    damped = h.astype(np.float64) + 0.01 * np.diag(h).mean() * np.eye(64)
    for place in (0, 20, 63):
        later = prepared.order_I[place:]
        left = np.linalg.inv(damped[np.ix_(later, later)])[0, 0]
        np.testing.assert_allclose(prepared.cost_I[later[0]], 1 / left, rtol=1e-5)


def test_scales_wait_for_what_earlier_groups_left_or_are_all_searched_before() -> None:
    w, h, codec = weights(30, 256), hessian(256), affine(3, 64)
    mixed, whole = prepare(h), prepare(h, group_size=64)
    at_once = search_values(w, "BF16", codec, mixed.cost_I)
    np.testing.assert_array_equal(widen(gptq(w, mixed, "BF16", codec, rounds=0).parts[1], "BF16"), at_once[1])
    found = widen(gptq(w, whole, "BF16", codec, rounds=0).parts[1], "BF16")
    first = whole.order_I[:64]
    alone = search_values(np.ascontiguousarray(w[:, first]), "BF16", codec, whole.cost_I[first])[1]
    np.testing.assert_array_equal(found[:, first[0] // 64], alone[:, 0])
    wanted = search_values(w, "BF16", codec, whole.cost_I)[1]
    later = [g for g in range(4) if g != first[0] // 64]
    assert (found != wanted)[:, later].mean() > 0.8


@pytest.mark.parametrize("group", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_less_error_than_search_than_rounding(bits: int, group: int) -> None:
    w, h, codec = weights(32, 256), hessian(256), affine(bits, group)
    prepared = prepare(h, group_size=group)
    chosen = [gptq(w, prepared, "BF16", codec, rounds=rounds) for rounds in (2, 1, 0)]
    by_search = decode(search(w, "F32", "BF16", codec, np.diagonal(h).copy()), "BF16", codec)
    by_rounding = decode(encode(w, "F32", "BF16", codec), "BF16", codec)
    errors = [piece.error for piece in chosen] + [output_error(w, v, h) for v in (by_search, by_rounding)]
    assert errors == sorted(errors), errors
    assert len(set(errors)) == 5
    for piece in chosen:
        np.testing.assert_array_equal(piece.values_OI, decode(piece.parts, "BF16", codec))
        exact = row_errors(w, piece.values_OI, h).sum() / row_errors(w, np.zeros_like(w), h).sum()
        np.testing.assert_allclose(piece.error, exact, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_dtypes(dtype: str) -> None:
    w, h, codec = weights(20, 128), hessian(128), affine(4, 32)
    chosen = gptq(w, prepare(h), dtype, codec)
    assert chosen.error < 0.3 * output_error(w, decode(encode(w, "F32", dtype, codec), dtype, codec), h)
    np.testing.assert_array_equal(chosen.values_OI, decode(chosen.parts, dtype, codec))


@pytest.mark.parametrize("group_size", [None, 64])
def test_any_split_into_rows_gives_the_same_bytes_and_so_does_a_second_time(group_size: int | None) -> None:
    w, codec = weights(300, 320), affine(4, 64)
    prepared = prepare(hessian(320), group_size=group_size)
    whole = gptq(w, prepared, "BF16", codec).parts
    for cuts in ([], [1], [100, 101, 263]):
        pieces = [gptq(rows, prepared, "BF16", codec).parts for rows in np.split(w, cuts)]
        for part, of_pieces in zip(whole, zip(*pieces, strict=True), strict=True):
            np.testing.assert_array_equal(part, np.concatenate(of_pieces))


def test_columns_that_were_never_active_are_rounded_to_nearest() -> None:
    w, codec = weights(16, 128), affine(4, 64)
    h = hessian(128)
    dead = [3, 64, 127]
    h[dead] = h[:, dead] = 0
    chosen = gptq(w, prepare(h), "BF16", codec)
    scale = np.repeat(widen(chosen.parts[1], "BF16"), 64, axis=1)
    bias = np.repeat(widen(chosen.parts[2], "BF16"), 64, axis=1)
    nearest = np.clip(np.rint((w - bias) / scale), 0, 15)
    assert np.isfinite(chosen.values_OI).all()
    assert np.abs(codes(chosen.parts, codec)[:, dead] - nearest[:, dead]).max() <= 1
    alone = gptq(w, prepare(h), "BF16", codec, rounds=0)
    scale, bias = (np.repeat(widen(part, "BF16"), 64, axis=1) for part in alone.parts[1:])
    nearest = np.clip(np.rint((w - bias) / scale), 0, 15)
    np.testing.assert_array_equal(codes(alone.parts, codec)[:, dead], nearest[:, dead])


@pytest.mark.parametrize("bad", [np.zeros((64, 64)), -np.eye(64), np.full((64, 64), np.nan)])
def test_what_is_not_positive(bad: np.ndarray) -> None:
    with pytest.raises(NotPositive, match="Hessian"):
        prepare(bad.astype(np.float32))


def test_a_hessian_that_damping_mends_and_one_that_it_does_not() -> None:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0]
    sizes = np.linspace(1, 3, 64)
    for least, damping in ((-0.01, 0.01), (-0.1, 0.1), (-1.0, 1.0)):
        sizes[0] = least
        prepared = prepare(((basis * sizes) @ basis.T).astype(np.float32))
        assert prepared.damping == pytest.approx(damping)
        chosen = gptq(weights(4, 64), prepared, "BF16", affine(4, 64), rounds=0)
        assert (f"{damping:g} of its mean diagonal" in chosen.note) == (damping > 0.05)
    sizes[0] = -3
    with pytest.raises(NotPositive, match="not positive definite"):
        prepare(((basis * sizes) @ basis.T).astype(np.float32))


@pytest.mark.parametrize("double", [4096, 0])
def test_factor_in_blocks_is_lapacks(double: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A width that is not a whole number of blocks, in float64 and in float32."""
    monkeypatch.setattr(module, "_DOUBLE_WIDTH", double)
    h = hessian(600)
    prepared = prepare(h)
    order = prepared.order_I
    damped = h[np.ix_(order, order)].astype(np.float64) + 0.01 * np.diag(h).mean() * np.eye(600)
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    tolerance = 1e-6 if double else 1e-3
    np.testing.assert_allclose(prepared.cost_I[order], np.diag(upper) ** 2, rtol=tolerance)
    expected = np.triu(upper / np.diag(upper), 1)
    np.testing.assert_allclose(np.triu(prepared.follow_II, 1), expected, atol=tolerance * np.abs(expected).max())


def test_corrected_weights_say_of_other_inputs_what_was_said() -> None:
    x = inputs(64, seed=3)
    y = x + 0.1 * inputs(64, seed=4)
    w = weights(10, 64)
    seen, cross = y.T @ y / len(y), x.T @ y / len(y)
    best = np.linalg.lstsq(y, x @ w.T, rcond=None)[0].T
    target = corrected(w, seen, cross, damping=0.0)
    assert target.dtype == np.float32
    np.testing.assert_allclose(target, best, atol=1e-5)
    np.testing.assert_allclose(corrected(w, seen, cross, strength=0.25, damping=0.0), w + 0.25 * (best - w), atol=1e-5)
    np.testing.assert_array_equal(corrected(w, seen, cross, strength=0.0), w)
    singular = np.zeros((64, 64), np.float32)
    with pytest.raises(NotPositive, match="mean diagonal"):
        corrected(w, singular, cross.astype(np.float32))


def test_a_target_is_quantized_instead() -> None:
    x = inputs(128, seed=3)
    y = x + 0.3 * inputs(128, seed=4)
    w, codec = weights(32, 128), affine(6, 64)
    seen, cross = ((a.T @ y / len(y)).astype(np.float32) for a in (y, x))
    prepared = prepare(seen)
    target = corrected(w, seen, cross)
    values = {name: gptq(w, prepared, "BF16", codec, target_OI=t).values_OI for name, t in (("w", None), ("t", target))}
    missed = {name: np.square(x @ w.T - y @ v.T).sum() for name, v in values.items()}
    assert missed["t"] < 0.9 * missed["w"]
    np.testing.assert_array_equal(values["t"], gptq(target, prepared, "BF16", codec).values_OI)


def test_a_weight_that_is_no_number_is_named_by_its_row() -> None:
    w = weights(300, 64)
    w[270, 5] = np.nan
    for act_order in (True, False):
        with pytest.raises(NonFiniteError) as caught:
            gptq(w, prepare(hessian(64), act_order=act_order), "BF16", affine(4, 64))
        assert caught.value.row == 270
