"""Figures as they are written: digits by the error, nothing that looks like 0 and is not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxquant.measure.columns import caveats, columns, estimate, fixed, floor, protocol, rounded, significant
from mlxquant.measure.report import Estimate, Student
from mlxquant.units import visible
from tests.measure import reports


@pytest.mark.parametrize(
    ("value", "error", "expected", "short"),
    [
        (12.3456, 0.4231, "12.35 ± 0.42", "12.3"),
        (0.61234, 0.0996, "0.61 ± 0.10", "0.6"),  # the error's first digit is the one it is rounded to
        (0.00010012, 0.00001234, "0.000100 ± 0.000012", "0.00010"),
        (10012.3, 312.0, "10,010 ± 310", "10,000"),
        (0.3, 1.2, "0.3 ± 1.2", "0"),
        (-0.01, 0.3, "-0.01 ± 0.30", "0.0"),
        (100.0, 0.0, "100", "100"),
        (0.0, 0.0, "0", "0"),
        (12.3456, None, "12.3", "12.3"),
        (math.inf, math.nan, "inf", "inf"),
        (3e9, 1e8, "3e+09 ± 1e+08", "3e+09"),
        (1e-9, 1e-10, "<0.000001", "<0.000001"),
    ],
)
def test_two_digits_of_the_error_decide(value: float, error: float | None, expected: str, short: str):
    assert estimate(Estimate(value, error)) == expected
    assert rounded(Estimate(value, error)) == short


@given(st.floats(1e-6, 1e6), st.floats(1e-5, 1e6))
def test_what_is_written_is_within_a_twentieth_of_the_error(value: float, error: float):
    shown, _, shown_error = estimate(Estimate(value, error)).replace(",", "").partition(" ± ")
    assert abs(float(shown.lstrip("<")) - value) <= 0.0501 * error + 1e-6
    assert abs(float(shown_error) - error) <= 0.0501 * error


@given(st.floats(0, 1e6))
def test_only_zero_is_written_as_zero(value: float):
    assert (significant(value) == "0") == (value == 0)
    assert (float(fixed(value, 3).replace(",", "").lstrip("<")) == 0) == (value == 0)


def test_scales_reach_value_and_error():
    assert estimate(Estimate(0.0523, 0.0011), 1000) == "52.3 ± 1.1"


def test_speed_has_columns_only_where_it_was_measured():
    plain, timed = ([c.head for c in columns(r)] for r in (reports.report(), reports.timed()))
    assert timed == [*plain, "prefill", "decode", "peak"]


def test_the_protocol_says_what_was_read():
    assert protocol(reports.report()) == (
        "64 of 561 windows of 512 tokens, the second half of each scored (16,320 positions), each begins with BOS "
        "(token 1); computed on cpu (AMD EPYC), activations in float32"
    )
    other = reports.report(setting=reports.setting(windows=561, stride=256, bos=None))
    assert protocol(other).startswith("561 windows of 512 tokens, one every 256, ")
    assert "no BOS" in protocol(other)


def test_the_floor_is_said_where_there_is_one():
    assert floor(reports.report(setting=reports.setting(floor=2e-6))).startswith("Differences below 0.00200 mnat")
    assert floor(reports.report(setting=reports.setting(floor=1e-13))).startswith("Differences below 0.000001 mnat")
    assert floor(reports.report(setting=reports.setting(floor=0.0))) == ""


def of(*behind: Estimate | None, floor: float = 1e-9) -> list[str]:
    students = tuple(reports.student(f"s{i}", "x", 4.0, 0.1 + i, 0.01, behind=found) for i, found in enumerate(behind))
    return caveats(reports.report(students, setting=reports.setting(floor=floor)))


def test_neighbours_within_two_errors_are_named_together():
    near, far = Estimate(0.0199, 0.01), Estimate(0.0201, 0.01)
    (line,) = of(None, near, far, near, near)
    assert line.endswith("apart): s0, s1; s2, s3, s4.")
    assert of(None, far, far) == []
    assert of(None, Estimate(1e-4, 1e-5), floor=1e-3)[0].endswith(": s0, s1.")


def test_without_an_error_nothing_is_said_of_a_difference():
    assert of(None, Estimate(0.1, None), None) == []


def test_what_was_left_out_is_said():
    whole, part = reports.student("a", "x", 4.0, 0.1, 0.01), reports.student("b", "x", 3.0, 0.2, 0.01)
    part = type(part)(part.model, reports.divergence(0.2, None, windows=1))
    lines = caveats(reports.report((whole, part), interrupted=True))
    assert lines[0] == "Stopped early: b was scored on 1 of 64 windows."
    assert "one window" in lines[1]
    assert caveats(reports.report((whole,), interrupted=True)) == ["Stopped early: not every student was scored."]


@pytest.mark.parametrize(("windows", "words"), [(1, "no standard errors"), (2, "are rough"), (9, "are rough")])
def test_errors_from_few_windows_are_said_to_be_rough(windows: int, words: str):
    def lines(count: int, kl: float) -> list[str]:
        model = reports.student("a", "x", 4.0, 0.1, 0.01).model
        found = (Student(model, reports.divergence(kl, None, windows=count)),)
        return caveats(reports.report(found, setting=reports.setting(windows=count)))

    (line,) = lines(windows, 0.2)
    assert words in line
    assert lines(10, 0.2) == lines(64, float("inf")) == []


def test_nothing_invisible_is_left():
    assert visible("a\x1b[31m\n\u202e\udc80é½ 漢") == "a\\x1b[31m\\n\\u202e\\udc80é½ 漢"
